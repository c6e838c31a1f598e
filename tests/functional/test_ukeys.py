"""Several Ukeys of one consumer on a real cloud: a spare serves, a lost one is revoked."""

import asyncio
from pathlib import Path

import pytest

from cipherfleet import SyncClient
from cipherfleet.contract.escrow import Seen
from cipherfleet.terminal import epoch as epochs
from cipherfleet.terminal.epoch import Restored
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.support import PIN, Consumer, TestCloud, command, eventually, refusal

NEW_PIN = "8642-spare"


@pytest.fixture
def pins(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "pin", tmp_path / "new-pin"
    first.write_text(PIN + "\n")
    second.write_text(NEW_PIN + "\n")
    return first, second


def code(*arguments: object) -> str:
    result = command(*arguments, "--json")
    assert result.status == 1, result.stdout
    found: str = result.document["error"]["code"]
    return found


def make_spare(consumer: Consumer, pins: tuple[Path, Path], out: Path) -> tuple[Consumer, str]:
    made = command("ukey", "spare", "--ukey", consumer.ukey, "--pin-file", pins[0], "--out", out, "--new-pin-file", pins[1], "--json")
    assert made.status == 0, made.stderr
    return Consumer(consumer.cloud, consumer.name, out, NEW_PIN), made.document["ukey"]


def stop_agent(cloud: TestCloud, consumer: Consumer) -> None:
    for agent in cloud.processes("terminal"):
        if agent.consumer == consumer.name:
            cloud.end(agent)


def test_a_spare_serves_and_the_lost_one_is_revoked(own_cloud: TestCloud, pins: tuple[Path, Path], tmp_path: Path) -> None:
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    profile = consumer.sign_in("billing")
    with SyncClient(profile) as client:
        key = client.create_key("AES-256-GCM").id
        ciphertext = client.encrypt(key, b"attack at dawn")
    spare, serial = make_spare(consumer, pins, tmp_path / "spare")
    first = command("ukey", "list", "--ukey", spare.ukey, "--pin-file", pins[1], "--json").document
    lost = next(u["ukey"] for u in first if u["label"] == "first")
    assert {(u["ukey"], u["state"]) for u in first} == {(lost, "active"), (serial, "active")}

    consumer.sign_in("one")  # numbers are the consumer's: both Ukeys sign, in turn
    spare.sign_in("two")
    consumer.sign_in("three")
    spare.sign_in("four")

    stop_agent(own_cloud, consumer)
    spare.plug_in()
    with SyncClient(profile) as client:
        assert client.decrypt(ciphertext) == b"attack at dawn"

    revoked = command("ukey", "revoke", lost, "--ukey", spare.ukey, "--pin-file", pins[1], "--json")
    assert revoked.status == 0, revoked.stderr
    assert refusal(lambda: consumer.sign_in("five"))
    spare.sign_in("six")
    with SyncClient(profile) as client:  # signed in by the Ukey that is revoked now, before it was
        eventually(lambda: not refusal(lambda: client.decrypt(ciphertext)), within=40, what="the spare's service is back")
    stop_agent(own_cloud, consumer)
    assert refusal(lambda: consumer.plug_in(timeout=10))
    spare.plug_in()
    listed = command("ukey", "list", "--state", own_cloud.cloud.state, "--consumer", "acme", "--json").document
    assert {(u["ukey"], u["state"], u["revoked_by"]) for u in listed} == {(lost, "revoked", "consumer"), (serial, "active", "")}
    events = [e["event"] for e in command("audit", "show", "--consumer", "acme", "--state", own_cloud.cloud.state, "--json").document]
    assert "ukey-added" in events
    assert "ukey-revoked" in events
    again = ("ukey", "revoke", lost, "--ukey", spare.ukey, "--pin-file", pins[1])
    assert code(*again) == "state-conflict"
    assert code("ukey", "revoke", serial, "--consumer", "acme", "--state", own_cloud.cloud.state) == "state-conflict"  # the last one
    assert code("ukey", "revoke", serial, "--ukey", spare.ukey, "--pin-file", pins[1]) == "state-conflict"


def test_the_operator_revokes_one_of_two(shared_cloud: TestCloud, consumer: Consumer, pins: tuple[Path, Path], tmp_path: Path) -> None:
    consumer.plug_in()
    spare, _ = make_spare(consumer, pins, tmp_path / "spare")
    state = shared_cloud.cloud.state
    lost = next(
        u["ukey"]
        for u in command("ukey", "list", "--consumer", consumer.name, "--state", state, "--json").document
        if u["label"] == "first"
    )
    assert command("ukey", "revoke", lost, "--consumer", consumer.name, "--state", state).status == 0
    assert refusal(lambda: consumer.sign_in("x"))
    stop_agent(shared_cloud, consumer)
    spare.plug_in()
    with spare.client() as client:
        client.random(1)
    assert command("ukey", "revoke", lost, "--consumer", consumer.name, "--state", state).status == 0  # idempotent
    stop_agent(shared_cloud, consumer)


def test_what_is_refused(shared_cloud: TestCloud, consumer: Consumer, pins: tuple[Path, Path], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    made = ("ukey", "spare", "--ukey", consumer.ukey, "--pin-file", pins[0], "--new-pin-file", pins[1])
    assert code(*made, "--out", taken) == "exists"
    assert (
        code("ukey", "spare", "--ukey", consumer.ukey, "--pin-file", pins[1], "--new-pin-file", pins[1], "--out", tmp_path / "x")
        == "pin-wrong"
    )
    state = shared_cloud.cloud.state
    assert code("ukey", "revoke", "ukey-00000000", "--consumer", consumer.name, "--state", state) == "ukey-unknown"
    assert code("ukey", "revoke", "ukey-00000000", "--ukey", consumer.ukey, "--pin-file", pins[0]) == "ukey-unknown"
    assert code("ukey", "revoke", "something", "--consumer", consumer.name, "--state", state) == "malformed"
    assert code("ukey", "revoke", "ukey-00000000", "--state", state) == "malformed"
    assert not (tmp_path / "x").exists()


def test_custodians_bring_a_lost_ukey_back(own_cloud: TestCloud, pins: tuple[Path, Path], tmp_path: Path) -> None:
    """Two of three do, one does not; the lost Ukey is revoked in the same breath, and what was encrypted decrypts."""
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    profile = consumer.sign_in("billing")
    with SyncClient(profile) as client:
        ciphertext = client.encrypt(client.create_key("AES-256-GCM").id, b"attack at dawn")
    kit = tmp_path / "kit"
    asked = ("ukey", "split", "--ukey", consumer.ukey, "--pin-file", pins[0])
    assert code(*asked, "--shares", 3, "--threshold", 4, "--out", kit) == "malformed"
    made = command(*asked, "--shares", 3, "--threshold", 2, "--out", kit, "--json")
    assert made.status == 0, made.stderr
    files = made.document["files"]
    assert all(Path(file).stat().st_mode & 0o777 == 0o600 for file in files)
    assert made.document["header"]["consumer"] == "acme"

    consumer.pull()  # lost
    stop_agent(own_cloud, consumer)
    out = ("--out", tmp_path / "found", "--new-pin-file", pins[1])
    assert code("ukey", "recover", "--share", files[0], *out) == "shares-too-few"
    assert code("ukey", "recover", "--share", files[0], "--share", files[0], *out) == "share-repeated"
    assert not (tmp_path / "found").exists()
    found = command("ukey", "recover", "--share", files[2], "--share", files[0], *out, "--revoke-lost", "--json")
    assert found.status == 0, found.stderr
    assert found.document["revoked"] == made.document["header"]["made_by"]
    recovered = Consumer(own_cloud, "acme", tmp_path / "found", NEW_PIN)
    recovered.plug_in()
    with SyncClient(profile) as client:
        assert client.decrypt(ciphertext) == b"attack at dawn"
    consumer.put_back()
    stop_agent(own_cloud, consumer)
    assert refusal(lambda: consumer.sign_in("thief"))


def test_a_spare_joins_the_epoch_that_the_first_began(
    shared_cloud: TestCloud, consumer: Consumer, pins: tuple[Path, Path], tmp_path: Path
) -> None:
    """It signs nothing itself: it follows the other's statement, which the log names."""
    spare, _ = make_spare(consumer, pins, tmp_path / "spare")

    async def begin() -> Seen:
        with DirectoryUkey.open(consumer.ukey, PIN) as ukey:
            there = await ukey.memory.look()
            return await epochs.accept(ukey, Restored(there, there, 0, by_another=False, revoke_again=()))

    begun = asyncio.run(begin())
    assert refusal(lambda: spare.plug_in(timeout=10)) == "escrow-rolled-back"
    joined = command("consumer", "accept-restore", consumer.name, "--ukey", spare.ukey, "--pin-file", pins[1], "--json")
    assert joined.status == 0, joined.stderr
    assert joined.document["by_another"]
    assert (joined.document["now"]["epoch"], joined.document["now"]["sequence"]) == (begun.epoch, begun.sequence) == (2, begun.sequence)
    for one in (spare, consumer):
        one.plug_in()
        with one.client() as client:
            client.random(1)
        stop_agent(shared_cloud, consumer)
