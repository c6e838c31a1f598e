"""The audit log: a chain that shows every change."""

import sqlite3
import time

import pytest
from msgspec import structs

from cipherfleet.contract.errors import AuditBroken, Malformed, NotPermitted
from cipherfleet.contract.kmc_api import AuditEntry, AuditLog
from cipherfleet.kmc import audit, center
from cipherfleet.kmc.audit import digest_of, genesis, verify_audit
from tests.unit.kmc.world import World, start_vcm


def chain(consumer: str, count: int) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for sequence in range(1, count + 1):
        entry = AuditEntry(sequence, 0.5, consumer, "actor", "event", "subject", "ok", "")
        previous = entries[-1].digest if entries else genesis(consumer)
        entries.append(structs.replace(entry, digest=digest_of(previous, entry)))
    return entries


def test_a_whole_chain_verifies() -> None:
    verify_audit([])
    verify_audit(chain("alice", 5))
    verify_audit(chain("", 3) + chain("alice", 5) + chain("bob", 2), {"bob": (2, chain("bob", 2)[-1].digest)})


@pytest.mark.parametrize("field", ["at", "actor", "event", "subject", "outcome", "digest"])
def test_a_changed_field_shows(field: str) -> None:
    entries = chain("alice", 3)
    value = 0.25 if field == "at" else "0" * 64
    entries[1] = structs.replace(entries[1], **{field: value})
    with pytest.raises(AuditBroken):
        verify_audit(entries)


def test_removed_reordered_repeated_foreign_and_cut_lines_show() -> None:
    good = chain("alice", 4)
    broken = [
        good[1:],
        good[:1] + good[2:],
        [good[1], good[0], *good[2:]],
        [good[0], *good],
        [structs.replace(e, consumer="bob") for e in good],
    ]
    for entries in broken:
        with pytest.raises(AuditBroken):
            verify_audit(entries)
    head = (good[-1].sequence, good[-1].digest)
    for cut in (good[:3], []):
        with pytest.raises(AuditBroken):
            verify_audit(cut, {"alice": head})


async def entries_of(world: World, query: str = "", path: str = "/v1/audit") -> tuple[AuditEntry, ...]:
    return (await (await world.operator()).call("GET", path + query, reply=AuditLog)).entries


async def test_the_operator_sees_and_verifies_all(world: World) -> None:
    alice = await world.enrol()
    await world.enrol("bob")
    vcm = await start_vcm(world, alice, await alice.plug_in())
    everything = await entries_of(world)
    assert {e.consumer for e in everything} == {"", "alice", "bob"}
    verify_audit(everything)
    assert {e.consumer for e in await entries_of(world, "?consumer=bob")} == {"bob"}
    assert await entries_of(world, "?consumer=nobody") == ()
    assert len(await entries_of(world, "", "/v1/audit/verify")) > len(everything)
    assert {e.consumer for e in await entries_of(world, "?consumer=alice", "/v1/audit/verify")} == {"alice"}
    theirs = await vcm.caller.call("GET", "/v1/audit?consumer=bob", reply=AuditLog)
    assert {e.consumer for e in theirs.entries} == {"alice"}
    verify_audit(theirs.entries)
    with pytest.raises(NotPermitted):
        await vcm.caller.call("GET", "/v1/audit/verify", reply=AuditLog)
    with pytest.raises(Malformed):
        await entries_of(world, "?consumer=../x")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET outcome = 'ok!' WHERE consumer = 'alice' AND sequence = 1",
        "DELETE FROM audit WHERE consumer = 'alice' AND sequence = 2",
        "DELETE FROM audit WHERE consumer = 'alice'",
        "UPDATE audit SET at = at + 1 WHERE consumer = 'alice'",
    ],
)
async def test_an_edited_log_shows(world: World, statement: str) -> None:
    await world.enrol()
    with sqlite3.connect(world.folder / "kmc.sqlite") as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(AuditBroken):
        await entries_of(world, "", "/v1/audit/verify")
    await entries_of(world, "?consumer=bob", "/v1/audit/verify")


async def test_a_flood_of_refusals_does_not_fill_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(center, "REFUSALS_PER_MINUTE", 3)
    for _ in range(10):
        await world.center.audit_refusal("alice", "mallory", "attempt", "x", "refused")
    await world.center.audit_refusal("alice", "bob", "attempt", "x", "refused")
    assert len(await world.audit_lines("alice")) == 4
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 61)
    await world.center.audit_refusal("alice", "mallory", "attempt", "x", "refused")
    assert len(await world.audit_lines("alice")) == 5


async def test_long_texts_are_cut(world: World) -> None:
    await world.center.audit("alice", "a" * 1000, "e" * 1000, "s" * 1000, "o" * 1000)
    (line,) = await entries_of(world, "?consumer=alice", "/v1/audit/verify")
    assert {len(text) for text in (line.actor, line.event, line.subject, line.outcome)} == {audit.MAX_TEXT}


async def test_the_newest_lines_are_shown(world: World) -> None:
    for number in range(5):
        await world.center.audit("alice", "actor", "event", str(number))
    newest = await world.database.read(lambda connection: audit.read(connection, "alice", limit=2))
    assert [entry.subject for entry in newest] == ["3", "4"]
