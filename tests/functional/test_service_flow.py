"""The whole story on a real cloud: plug in, make keys, use them, delete the VCM."""

import base64
import hashlib
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cipherfleet import SyncClient
from cipherfleet.contract.ciphertext import sealed_length
from cipherfleet.contract.lifecycle import CREATION, DELETION
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import CHUNK_BYTES
from tests.support import Consumer, TestCloud, command, eventually, profile_file, refusal


def test_from_plugging_in_to_a_decrypted_file(shared_cloud: TestCloud, consumer: Consumer, tmp_path: Path) -> None:
    info = consumer.plug_in()
    assert consumer.service == "on"
    detail = shared_cloud.vcm(info["vcm"])
    assert detail.vcm.state == "serving"
    plain = tmp_path / "plain"
    plain.write_bytes(hashlib.shake_256(b"real file").digest(3_000_001))
    profile = profile_file(consumer.sign_in(), tmp_path)
    key = command("key", "create", "AES-256-GCM", "--profile", profile, "--json").document
    assert command("encrypt", "--key", key["id"], "--in", plain, "--out", tmp_path / "c", "--profile", profile).status == 0
    assert (tmp_path / "c").stat().st_size == sealed_length(3_000_001)
    assert command("decrypt", "--in", tmp_path / "c", "--out", tmp_path / "p", "--profile", profile).status == 0
    assert (tmp_path / "p").read_bytes() == plain.read_bytes()


def test_creation_has_nine_steps_and_deletion_eight(shared_cloud: TestCloud, consumer: Consumer) -> None:
    vcm = consumer.plug_in()["vcm"]
    shown = command("vcm", "show", vcm, "--trace", "--state", shared_cloud.cloud.state, "--json").document
    assert [(t["process"], t["step"], t["actor"]) for t in shown["trace"]] == [("create", s.number, s.actor) for s in CREATION]
    deleted = command("vcm", "delete", vcm, "--state", shared_cloud.cloud.state, "--json").document
    deletion = [t for t in deleted["trace"] if t["process"] == "delete"]
    assert [(t["step"], t["actor"]) for t in deletion] == [(s.number, s.actor) for s in DELETION]
    times = [t["at"] for t in deleted["trace"]]
    assert times == sorted(times)
    assert all(t["ms"] >= 0 and not t["error"] for t in deleted["trace"])
    assert consumer.vcms() == []
    eventually(lambda: consumer.service == "off", what="service off")
    again = command("vcm", "delete", vcm, "--state", shared_cloud.cloud.state, "--json")
    assert (again.status, again.document["state"]) == (0, "deleted")


def test_a_second_vcm_serves_the_same_keys(shared_cloud: TestCloud, consumer: Consumer) -> None:
    consumer.plug_in()
    with consumer.client() as client:
        key = client.create_key("AES-256-GCM")
        ciphertext = client.encrypt(key.id, b"before")
        state = shared_cloud.cloud.state
        made = command("vcm", "create", "--consumer", consumer.name, "--state", state, "--json").document
        assert len(consumer.vcms()) == 2
        first = next(v for v in consumer.vcms() if v.id != made["id"])
        assert command("vcm", "delete", first.id, "--state", state, "--json").status == 0
        assert client.decrypt(ciphertext) == b"before"


def test_migration_moves_the_service_to_another_machine(shared_cloud: TestCloud, consumer: Consumer) -> None:
    vcm = consumer.plug_in()["vcm"]
    before = shared_cloud.vcm(vcm).vcm
    with consumer.client() as client:
        key = client.create_key("SM4-GCM")
        ciphertext = client.encrypt(key.id, b"moving")
        target = next(m for m in ("m1", "m2") if m != before.machine)
        moved = command("vcm", "migrate", vcm, "--to", target, "--state", shared_cloud.cloud.state, "--json").document
        assert moved["machine"] == target
        assert [v.id for v in consumer.vcms()] == [moved["id"]]
        assert client.decrypt(ciphertext) == b"moving"


def test_limits_are_set_while_a_vcm_serves_and_move_with_it(shared_cloud: TestCloud, consumer: Consumer) -> None:
    vcm, state = consumer.plug_in()["vcm"], shared_cloud.cloud.state
    assert command("vcm", "limits", vcm, "--state", state, "--json").document["operations_s"] == 0
    told = command("vcm", "limits", vcm, "--operations", "20", "--weight", "2", "--keys", "1", "--state", state, "--json").document
    assert told == {"operations_s": 20.0, "bytes_s": 0.0, "depth": 256, "keys": 1, "weight": 2.0}
    with consumer.client() as client:
        key = client.create_key("AES-256-GCM")
        second = client.create_key("AES-256-GCM")  # the one that was idle makes room
        for one in (key, second, key):
            assert client.decrypt(client.encrypt(one.id, b"by turns")) == b"by turns"
        began = time.monotonic()
        for _ in range(12):
            client.encrypt(key.id, b"slowly")
        assert time.monotonic() - began > (12 - 3) / 20
    target = next(m for m in ("m1", "m2") if m != shared_cloud.vcm(vcm).vcm.machine)
    moved = command("vcm", "migrate", vcm, "--to", target, "--state", state, "--json").document["id"]
    assert command("vcm", "limits", moved, "--bytes", "1e9", "--state", state, "--json").document == {**told, "bytes_s": 1e9}
    shown = command("vcm", "show", moved, "--state", state, "--json").document
    assert sum(shown["statistics"]["service_us"]) > 0
    assert "in service" in command("vcm", "show", moved, "--state", state).stdout
    assert command("vcm", "limits", vcm, "--weight", "2", "--state", state, "--json").document["error"]["code"] == "state-conflict"
    assert command("vcm", "limits", moved, "--depth", "0", "--state", state).status == 2


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 1_000_000])
@pytest.mark.parametrize("algorithm", ["AES-256-GCM", "SM4-GCM"])
def test_every_size_comes_back(plugged: Consumer, algorithm: str, size: int) -> None:
    data = hashlib.shake_256(str(size).encode()).digest(size)
    with plugged.client() as client:
        key = client.create_key(algorithm)
        ciphertext = client.encrypt(key.id, data, context=b"order 66")
        assert len(ciphertext) == sealed_length(size)
        assert client.decrypt(ciphertext, context=b"order 66") == data
        assert refusal(lambda: client.decrypt(ciphertext, context=b"order 67")) == "ciphertext-invalid"


OPENSSL = {
    "RSA-3072-PSS": ["dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"],
    "ECDSA-P-256": ["dgst", "-sha256"],
}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("algorithm", ["RSA-3072-PSS", "ECDSA-P-256", "Ed25519"])
def test_openssl_accepts_our_signatures(plugged: Consumer, tmp_path: Path, algorithm: str) -> None:
    profile = profile_file(plugged.sign_in(), tmp_path)
    message, signature, public = tmp_path / "message", tmp_path / "signature", tmp_path / "public.pem"
    message.write_bytes(b"the quick brown fox" * 1000)
    key = command("key", "create", "--algorithm", algorithm, "--profile", profile, "--json").document["id"]
    assert command("key", "show", key, "--public-key", public, "--profile", profile).status == 0
    assert command("sign", "--key", key, "--in", message, "--out", signature, "--profile", profile).status == 0
    if algorithm == "Ed25519":
        check = ["pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", message, "-sigfile", signature]
    else:
        check = [*OPENSSL[algorithm], "-verify", public, "-signature", signature, message]
    assert subprocess.run(["openssl", *map(str, check)], capture_output=True, check=False).returncode == 0
    verify = ("verify", "--key", key, "--in", message, "--signature", signature, "--profile", profile)
    assert command(*verify).status == 0
    message.write_bytes(b"another fox")
    refused = command(*verify, "--json")
    assert (refused.status, refused.document["error"]["code"]) == (1, "signature-invalid")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_key_made_by_openssl_is_imported(plugged: Consumer, tmp_path: Path) -> None:
    profile = profile_file(plugged.sign_in(), tmp_path)
    private, public, message = tmp_path / "private.pem", tmp_path / "public.pem", tmp_path / "message"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    message.write_bytes(b"signed with a key from outside")
    key = command("key", "import", "Ed25519", "--in", private, "--label", "mine", "--profile", profile, "--json").document
    assert key["imported"]
    assert command("sign", "--key", key["id"], "--in", message, "--out", tmp_path / "s", "--profile", profile).status == 0
    pkeyutl: list[str | Path] = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    check = [*pkeyutl, "-in", message, "-sigfile", tmp_path / "s"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    refused = command("key", "import", "ECDSA-P-256", "--in", private, "--profile", profile, "--json")
    assert (refused.status, refused.document["error"]["code"]) == (1, "key-material-invalid")
    large = command("key", "import", "AES-256-GCM", "--profile", profile, "--json", stdin=bytes(70_000))
    assert (large.status, large.document["error"]["code"]) == (1, "too-large")


def test_digests_macs_and_random(plugged: Consumer) -> None:
    data = b"abc" * 100_000
    with plugged.client() as client:
        for name in ("sha256", "sha384", "sha512"):
            assert client.digest(f"SHA-{name[3:]}", data) == hashlib.new(name, data).digest()
        key = client.create_key("HMAC-SHA-256")
        code = client.mac(key.id, data)
        client.verify_mac(key.id, data, code)
        assert refusal(lambda: client.verify_mac(key.id, data + b"x", code)) == "mac-invalid"
        assert client.random(32) != client.random(32)


def test_data_keys_and_reencryption(plugged: Consumer) -> None:
    with plugged.client() as client:
        old, new = client.create_key("AES-256-GCM"), client.create_key("SM4-GCM")
        made = client.generate_data_key(old.id, length=32)
        assert made.plaintext is not None
        assert client.decrypt(made.ciphertext) == made.plaintext
        wrapped_only = client.generate_data_key(old.id, length=32, plaintext=False)
        assert wrapped_only.plaintext is None
        moved = client.reencrypt(new.id, client.encrypt(old.id, b"x" * 200_000))
        assert client.decrypt(moved) == b"x" * 200_000


def test_rotation_keeps_old_ciphertexts_and_states_are_kept(plugged: Consumer) -> None:
    with plugged.client() as client:
        key = client.create_key("AES-256-GCM", label="ledger")
        first = client.encrypt(key.id, b"one")
        assert client.rotate_key(key.id).version == 2
        second = client.encrypt(key.id, b"two")
        assert (client.decrypt(first), client.decrypt(second)) == (b"one", b"two")
        client.disable_key(key.id)
        assert refusal(lambda: client.decrypt(first)) == "key-disabled"
        client.enable_key(key.id)
        assert client.decrypt(first) == b"one"
        client.delete_key(key.id)
        assert refusal(lambda: client.decrypt(first)) == "key-deleted"
        assert refusal(lambda: client.enable_key(key.id)) == "key-deleted"


def test_rights_are_enforced(plugged: Consumer) -> None:
    with plugged.client("all") as everything, SyncClient(plugged.sign_in("reader", (Right.DECRYPT, Right.SHOW))) as reader:
        key = everything.create_key("AES-256-GCM")
        ciphertext = everything.encrypt(key.id, b"for the reader")
        assert reader.decrypt(ciphertext) == b"for the reader"
        for refused in (
            lambda: reader.encrypt(key.id, b"x"),
            lambda: reader.create_key("AES-256-GCM"),
            lambda: reader.random(1),
            lambda: reader.disable_key(key.id),
        ):
            assert refusal(refused) == "not-permitted"


def test_a_revoked_application_is_refused_at_once(shared_cloud: TestCloud, plugged: Consumer) -> None:
    with plugged.client("doomed") as client:
        client.random(1)
        state = shared_cloud.cloud.state
        assert command("app", "revoke", "doomed", "--consumer", plugged.name, "--state", state).status == 0
        assert eventually(lambda: refusal(lambda: client.random(1)), within=1.0) in (
            "certificate-revoked",
            "application-revoked",
            "service-off",
        )
        listed = command("app", "list", "--state", state, "--json").document
        assert [a["state"] for a in listed if a["consumer"] == plugged.name and a["name"] == "doomed"] == ["revoked"]


def test_the_consumer_signs_an_application_out(plugged: Consumer, tmp_path: Path) -> None:
    pin = tmp_path / "pin"
    pin.write_text(plugged.pin)
    with plugged.client("leaving") as client:
        client.random(1)
        out = command("app", "revoke", "leaving", "--ukey", plugged.ukey, "--pin-file", pin, "--json")
        assert (out.status, out.document["state"]) == (0, "revoked")
        assert eventually(lambda: refusal(lambda: client.random(1)), within=1.0) in ("certificate-revoked", "application-revoked")
    with plugged.client("leaving") as again:
        again.random(1)


def test_the_isolation_in_force_is_told(shared_cloud: TestCloud, plugged: Consumer) -> None:
    isolation = shared_cloud.vcm(plugged.vcms()[0].id).isolation
    assert isolation is not None
    assert isolation.no_new_privileges
    assert isolation.seccomp
    if shutil.which("bwrap"):
        assert isolation.launcher == "bubblewrap"
        assert {"net", "pid", "mnt", "ipc", "user"} <= set(isolation.namespaces)
        assert isolation.read_only_root
        assert int(isolation.capabilities or "0", 16) == 0


def test_audit_lines_are_kept_and_verified(shared_cloud: TestCloud, plugged: Consumer) -> None:
    with plugged.client() as client:
        client.create_key("AES-256-GCM")
        mine = client.audit()
    assert mine
    assert {line.consumer for line in mine} == {plugged.name}
    assert command("audit", "verify", "--state", shared_cloud.cloud.state).status == 0
    shown = command("audit", "show", "--consumer", plugged.name, "--state", shared_cloud.cloud.state, "--json").document
    assert [line["digest"] for line in shown][: len(mine)] == [line.digest for line in mine]


def test_commands_work_through_pipes(plugged: Consumer, tmp_path: Path) -> None:
    profile = profile_file(plugged.sign_in(), tmp_path)
    key = command("key", "create", "--profile", profile, "--json").document["id"]
    sealed = command("encrypt", "--key", key, "--profile", profile, "--json", stdin=b"from a pipe").document["result"]
    opened = command("decrypt", "--profile", profile, stdin=base64.b64decode(sealed))
    assert opened.stdout == "from a pipe"
