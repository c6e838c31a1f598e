"""One consumer, two Ukeys: what one permits, the other permits, whatever was restarted in between."""

from pathlib import Path

import pytest

from cipherfleet import SyncClient
from tests.functional.test_ukeys import code, make_spare, stop_agent
from tests.support import PIN, Consumer, TestCloud, command, eventually, refusal


@pytest.fixture
def pins(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "pin", tmp_path / "new-pin"
    first.write_text(PIN + "\n")
    second.write_text("8642-spare\n")
    return first, second


def shown(consumer: Consumer, pin: Path) -> tuple[str, int, str]:
    document = command("policy", "show", "--ukey", consumer.ukey, "--pin-file", pin, "--json").document
    return document["name"], document["number"], document["signed_by"]


def test_a_policy_reaches_the_other_ukey(own_cloud: TestCloud, pins: tuple[Path, Path], tmp_path: Path) -> None:
    consumer = own_cloud.enrol("acme")
    spare, serial = make_spare(consumer, pins, tmp_path / "spare")  # number 1
    assert shown(spare, pins[1]) == ("international", 0, "")
    consumer.plug_in()
    with SyncClient(consumer.sign_in()) as client:  # number 2
        first = command("policy", "set", "fips", "--ukey", consumer.ukey, "--pin-file", pins[0], "--json").document
        assert (first["name"], first["number"]) == ("fips", 3)
        eventually(lambda: client.policy()[0] == "fips", what="fips is in force")
        stop_agent(own_cloud, consumer)
        eventually(lambda: consumer.service == "off", what="service off")
        own_cloud.kill("kmc")
        refused = command("policy", "set", "gm", "--ukey", consumer.ukey, "--pin-file", pins[0], "--json")
        assert (refused.status, refused.document["error"]["code"]) == (1, "kmc-unavailable")
        assert "in force with this Ukey" in refused.document["error"]["hint"]
        assert shown(consumer, pins[0]) == ("gm", 4, first["signed_by"])
        own_cloud.up()

        spare.plug_in()
        eventually(lambda: not refusal(lambda: client.random(1)), within=40, what="the spare's service")
        assert client.policy()[0] == "fips"  # what the KMC took; not what it never saw
        assert refusal(lambda: client.create_key("SM4-GCM")) == "policy-refused"
        assert shown(spare, pins[1]) == ("fips", 3, first["signed_by"])

        again = command("policy", "set", "gm", "--ukey", consumer.ukey, "--pin-file", pins[0], "--json").document
        assert again["number"] == 5
        eventually(lambda: client.policy()[0] == "gm", what="the spare's terminal learned of it while it serves")
        assert shown(spare, pins[1]) == ("gm", 5, first["signed_by"])
        own_cloud.kill("kmc")
        own_cloud.up()

        assert command("policy", "set", "international", "--ukey", spare.ukey, "--pin-file", pins[1], "--json").document["number"] == 6
        stop_agent(own_cloud, spare)
        eventually(lambda: consumer.service == "off", what="service off")
        consumer.plug_in()
        eventually(lambda: not refusal(lambda: client.random(1)), within=40, what="the first one's service")
        assert client.policy()[0] == "international"
        assert shown(consumer, pins[0]) == ("international", 6, serial)

    revoked = command("ukey", "revoke", serial, "--ukey", consumer.ukey, "--pin-file", pins[0], "--json")
    assert revoked.status == 0, revoked.stderr
    assert code("policy", "set", "gm", "--ukey", spare.ukey, "--pin-file", pins[1])
    assert shown(consumer, pins[0]) == ("international", 6, serial)  # what it said while it counted stays
    events = [e["event"] for e in command("audit", "show", "--consumer", "acme", "--state", own_cloud.cloud.state, "--json").document]
    assert events.count("policy-set") == 3
