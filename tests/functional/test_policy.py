"""A consumer restricts itself while it is in service: by its Ukey, at every card, within a heartbeat."""

from pathlib import Path

from cipherfleet import SyncClient
from cipherfleet.contract.settings import Settings
from tests.support import Consumer, command, eventually, profile_file, refusal


def in_force(client: SyncClient, name: str) -> None:
    eventually(lambda: client.policy()[0] == name, within=3 * Settings().heartbeat_s, what=f"policy {name}")


def test_a_policy_is_set_while_a_vcm_serves(consumer: Consumer, tmp_path: Path) -> None:
    profile, pin = profile_file(consumer.sign_in(), tmp_path), tmp_path / "pin"
    pin.write_text(f"{consumer.pin}\n")
    consumer.plug_in()
    ukey = ("--ukey", consumer.ukey, "--pin-file", pin, "--json")
    assert command("policy", "show", *ukey).document["name"] == "international"
    with SyncClient(profile) as client:
        aes = client.create_key("AES-256-GCM")
        ciphertext = client.encrypt(aes.id, b"from before")
        assert command("policy", "set", "gm", *ukey).document["base"] == "gm"
        in_force(client, "gm")
        assert refusal(lambda: client.create_key("AES-256-GCM")) == "policy-refused"
        assert refusal(lambda: client.encrypt(aes.id, b"x")) == "policy-refused"
        assert refusal(lambda: client.digest("SHA-256", b"x")) == "policy-refused"
        assert client.decrypt(ciphertext) == b"from before"
        sm4 = client.create_key("SM4-GCM")
        assert client.decrypt(client.encrypt(sm4.id, b"x")) == b"x"
        shown = command("key", "show", aes.id, "--profile", profile, "--json").document
        assert shown["policy"].startswith("gm: refused by rule profile")
        listed = {a["name"]: a for a in command("algorithms", "--profile", profile, "--json").document}
        assert (listed["SM2"]["allowed"], listed["AES-256-GCM"]["rule"]) == (True, "profile")
        consumer.pull()
        eventually(lambda: consumer.service == "off", what="service off")
        consumer.put_back()
        eventually(lambda: consumer.service == "on", within=30, what="service on")
        in_force(client, "gm")  # it is on the Ukey, not in the VCM
        own = tmp_path / "own.toml"
        own.write_text('name = "own"\nbase = "fips"\ndeny = ["SHA-224"]\n')
        assert command("policy", "set", own, *ukey).document["name"] == "own"
        in_force(client, "own")
        assert refusal(lambda: client.digest("SHA-224", b"x")) == "policy-refused"
        assert len(client.digest("SHA-256", b"x")) == 32


def test_what_is_no_policy(plugged: Consumer, tmp_path: Path) -> None:
    pin, bad = tmp_path / "pin", tmp_path / "bad.toml"
    pin.write_text(f"{plugged.pin}\n")
    bad.write_text('name = "x"\nallow = ["ROT-*"]\n')
    for what, code in ((bad, "malformed"), ("nist", "malformed"), (tmp_path, "file-problem")):
        refused = command("policy", "set", what, "--ukey", plugged.ukey, "--pin-file", pin, "--json")
        assert (refused.status, refused.document["error"]["code"]) == (1, code)
    checked = {a["name"]: a for a in command("policy", "check", "fips", "--json").document}
    assert (checked["AES-256-GCM"]["allowed"], checked["SM4-GCM"]["rule"]) == (True, "profile")
    pin.write_text("wrong-pin\n")
    refused = command("policy", "set", "gm", "--ukey", plugged.ukey, "--pin-file", pin, "--json")
    assert (refused.status, refused.document["error"]["code"]) == (1, "pin-wrong")
