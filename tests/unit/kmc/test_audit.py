"""The audit log at the KMC: seals, pages, and every way to tamper with the database, found at the API by whoever asks."""

import asyncio
import sqlite3
import time

import msgspec
import pytest

from cipherfleet.channel import signing
from cipherfleet.channel.audit_check import AuditCheck, AuditVerdict, read_audit_checkpoint
from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.client import Caller
from cipherfleet.contract.audit import (
    MAX_TEXT,
    AuditEntry,
    AuditHeads,
    AuditLog,
    AuditPoint,
    AuditQuery,
    KeyUsage,
    UsageReport,
    digest_of,
    genesis,
)
from cipherfleet.contract.audit import DataUse as Use
from cipherfleet.contract.audit_seals import GRACE_S
from cipherfleet.contract.errors import (
    AuditBroken,
    AuditUnsealed,
    CertificateRevoked,
    HsmUnavailable,
    KmcUnavailable,
    Malformed,
    NotPermitted,
)
from cipherfleet.contract.kmc_api import LastUses, LeaseGranted, LeaseRequested, LeaseWanted, Revoked, UkeyRemoved
from cipherfleet.contract.statements import AuditCheckpointStatement
from cipherfleet.kmc import refusals
from tests.unit.kmc.world import World, start_vcm

KEY = "0123456789abcdef" * 2


async def ask(caller: Caller, query: AuditQuery) -> AuditLog:
    return await caller.call("GET", query.path, reply=AuditLog)


async def verify(caller: Caller, consumer: str, key: bytes, seen: AuditPoint | None = None, *, limit: int = 3) -> AuditVerdict:
    """As the command does it, in small pages."""
    check = AuditCheck(consumer, key, seen=seen)
    query: AuditQuery | None = AuditQuery()
    while query is not None:
        query = check.page(await ask(caller, msgspec.structs.replace(query, consumer=consumer, limit=limit)))
    return check.end()


async def seal(world: World) -> None:
    await world.kmc.sealer.seal(lambda unsealed, waited: True)


async def fill(world: World, count: int = 8) -> AuditPoint:
    """Entries for alice, the first five under a seal and the rest under another; the point that a Ukey would have seen."""
    for number in range(count):
        await world.center.audit("alice", "actor", "event", str(number))
        if number == 4:
            await seal(world)
    await seal(world)
    newest = world.kmc.sealer.newest("alice")
    assert newest is not None
    statement = read_audit_checkpoint(newest[1], "alice", world.center.signer.public_key)
    return AuditPoint(statement.sequence, statement.digest)


def edit(world: World, *statements: str) -> None:
    with sqlite3.connect(world.folder / "kmc.sqlite") as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def rechain(world: World, change: str, *, keep: int = 0) -> None:
    """The rogue database owner's best: change, chain everything anew, and set the head to it."""
    edit(world, change)
    with sqlite3.connect(world.folder / "kmc.sqlite") as connection:
        connection.row_factory = sqlite3.Row
        digest, sequence = genesis("alice"), 0
        found = connection.execute("SELECT * FROM audit WHERE consumer = 'alice' ORDER BY sequence").fetchall()
        connection.execute("DELETE FROM audit WHERE consumer = 'alice'")
        for row in found:
            sequence += 1
            values = {**dict(row), "sequence": sequence, "digest": ""}
            digest = digest_of(digest, msgspec.convert(values, AuditEntry))
            names = ", ".join(values)
            values["digest"] = digest
            marks = ", ".join("?" * len(values))
            connection.execute(f"INSERT INTO audit ({names}) VALUES ({marks})", [*values.values()])  # noqa: S608
        connection.execute("UPDATE audit_heads SET sequence = ?, digest = ? WHERE consumer = 'alice'", (sequence, digest))
    connection.close()


TAMPERED = {
    "removed": ("DELETE FROM audit WHERE consumer = 'alice' AND sequence = 3", 3),
    "changed": ("UPDATE audit SET outcome = 'refused' WHERE consumer = 'alice' AND sequence = 4", 4),
    "reordered": (
        "UPDATE audit SET sequence = CASE sequence WHEN 2 THEN -1 ELSE sequence END WHERE consumer = 'alice';"
        "UPDATE audit SET sequence = 2 WHERE consumer = 'alice' AND sequence = 3;"
        "UPDATE audit SET sequence = 3 WHERE consumer = 'alice' AND sequence = -1",
        2,
    ),
    "inserted": (
        "UPDATE audit SET sequence = -sequence - 1 WHERE consumer = 'alice' AND sequence > 5;"
        "UPDATE audit SET sequence = -sequence WHERE consumer = 'alice' AND sequence < 0;"
        "INSERT INTO audit SELECT consumer, 6, at, actor, event, 'forged', outcome, digest, count FROM audit"
        " WHERE consumer = 'alice' AND sequence = 5",
        6,
    ),
    "truncated": ("DELETE FROM audit WHERE consumer = 'alice' AND sequence > 6", 7),
}


@pytest.mark.parametrize("way", TAMPERED)
async def test_tampering_with_the_database_is_found_at_the_api(world: World, way: str) -> None:
    alice = await world.enrol()
    await world.enrol("bob")
    vcm = await start_vcm(world, alice, await alice.plug_in())
    seen = await fill(world)
    key = alice.reply.kmc_signing_key
    askers = [await world.operator(), vcm.caller, alice.terminal()]
    for caller in askers:
        verdict = await verify(caller, "alice", key, seen)
        assert verdict.sealed == verdict.verified == verdict.ukey == seen.sequence
    statements, first = TAMPERED[way]
    edit(world, *statements.split(";"))
    for caller in askers:
        with pytest.raises(AuditBroken, match=rf"entry {first}\b"):
            await verify(caller, "alice", key)
    await verify(askers[0], "bob", key)  # another log is another matter


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("UPDATE audit SET outcome = 'refused' WHERE consumer = 'alice' AND sequence = 3", "sealed"),
        ("DELETE FROM audit WHERE consumer = 'alice' AND sequence = 3", "sealed"),
        ("DELETE FROM audit WHERE consumer = 'alice' AND sequence > 6", "lacks entry 7"),
    ],
)
async def test_a_log_that_was_chained_anew_contradicts_its_seals(world: World, change: str, first: str) -> None:
    alice = await world.enrol()
    seen = await fill(world)
    rechain(world, change)
    operator = await world.operator()
    with pytest.raises(AuditBroken, match=first):
        await verify(operator, "alice", alice.reply.kmc_signing_key)
    edit(world, "DELETE FROM audit_checkpoints WHERE consumer = 'alice'")
    verdict = await verify(operator, "alice", alice.reply.kmc_signing_key)
    assert verdict.sealed == 0  # which is all that shows without the Ukey, until a seal is due
    world.clock.ahead = world.settings.audit_seal_s + GRACE_S + 1
    with pytest.raises(AuditUnsealed):
        await verify(operator, "alice", alice.reply.kmc_signing_key)
    with pytest.raises(AuditBroken):
        await verify(operator, "alice", alice.reply.kmc_signing_key, seen)


async def sealed_entries(world: World) -> list[int]:
    with sqlite3.connect(world.folder / "kmc.sqlite") as connection:
        found = connection.execute("SELECT sequence FROM audit_checkpoints WHERE consumer = 'alice' ORDER BY sequence").fetchall()
    connection.close()
    return [row[0] for row in found]


@pytest.mark.parametrize("which", ["all", "newest", "middle", "first"])
async def test_deleted_seals_show_without_a_ukey(world: World, which: str) -> None:
    alice = await world.enrol()
    for number in range(9):
        await world.center.audit("alice", "actor", "event", str(number))
        if number % 3 == 2:
            await seal(world)
    seals, operator, key = await sealed_entries(world), await world.operator(), alice.reply.kmc_signing_key
    assert len(seals) >= 3
    world.clock.ahead = 10 * world.settings.audit_seal_s
    good = await verify(operator, "alice", key)
    assert (good.sealed, good.late) == (good.verified, 0)
    gone = {"all": seals, "newest": seals[-1:], "middle": seals[1:-1], "first": seals[:1]}[which]
    edit(world, f"DELETE FROM audit_checkpoints WHERE consumer = 'alice' AND sequence IN ({', '.join(map(str, gone))})")  # noqa: S608
    sentence = {
        "all": f"entries 1 to {seals[-1]} of the audit log of alice are under no seal",
        "newest": f"entries {seals[-2] + 1} to {seals[-1]} of the audit log of alice are under no seal",
        "middle": f"lacks its seal on entry {seals[-2]}",
        "first": f"lacks its seal on entry {seals[0]}",
    }[which]
    for limit in (2, 2000):
        with pytest.raises(AuditUnsealed, match=sentence):
            await verify(operator, "alice", key, limit=limit)


async def test_a_seal_that_was_deleted_and_made_anew_is_told_as_late(world: World) -> None:
    alice = await world.enrol()
    await fill(world)
    edit(world, "DELETE FROM audit_checkpoints WHERE consumer = 'alice'")
    await world.restart()
    operator = await world.operator()
    world.clock.ahead = 10 * world.settings.audit_seal_s
    await seal(world)
    verdict = await verify(operator, "alice", alice.reply.kmc_signing_key)
    assert verdict.late == verdict.sealed == verdict.verified


async def test_while_the_hsm_is_away_a_log_is_unsealed_and_sealed_at_once_when_it_is_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = await world.enrol()
    await seal(world)

    async def away(message: bytes) -> bytes:
        raise HsmUnavailable("no answer")

    operator, key = await world.operator(), alice.reply.kmc_signing_key
    with monkeypatch.context() as patch:
        patch.setattr(world.center.signer, "sign", away)
        await world.center.audit("alice", "actor", "event", "x")
        assert (await verify(operator, "alice", key)).sealed > 0
        world.clock.ahead = world.settings.audit_seal_s + GRACE_S + 1
        with pytest.raises(AuditUnsealed):
            await verify(operator, "alice", key)
    rule = world.settings
    await world.kmc.sealer.seal(lambda unsealed, waited: waited >= rule.audit_seal_s)  # by the times in the log: it waits for no clock
    verdict = await verify(operator, "alice", key)
    assert (verdict.sealed, verdict.late) == (verdict.verified, 1)


async def test_too_many_without_a_seal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = await world.enrol()
    await seal(world)
    edit(world, "DELETE FROM audit_checkpoints WHERE consumer = 'alice'")
    monkeypatch.setattr(world.center, "settings", msgspec.structs.replace(world.settings, audit_seal_entries=2, audit_seal_s=86400.0))
    world.clock.ahead = GRACE_S + 5
    with pytest.raises(AuditUnsealed):
        await verify(await world.operator(), "alice", alice.reply.kmc_signing_key)


async def test_a_log_that_names_no_rule_is_refused(world: World) -> None:
    alice = await world.enrol()
    page = await ask(await world.operator(), AuditQuery("alice"))
    check = AuditCheck("alice", alice.reply.kmc_signing_key)
    check.page(msgspec.structs.replace(page, sealing=None, checkpoints=()))
    with pytest.raises(AuditUnsealed, match="by which rule"):
        check.end()


async def test_what_was_chained_anew_gets_no_seal(world: World) -> None:
    alice = await world.enrol()
    await fill(world)
    rechain(world, "UPDATE audit SET outcome = 'refused' WHERE consumer = 'alice' AND sequence = 9")
    before = world.kmc.sealer.newest("alice")
    await world.center.audit("alice", "actor", "event", "more")
    await seal(world)
    assert world.kmc.sealer.newest("alice") == before
    with pytest.raises(AuditBroken):
        await verify(await world.operator(), "alice", alice.reply.kmc_signing_key)
    await world.restart()
    assert world.kmc.sealer.newest("alice") is None  # nor is it trusted after a restart


async def test_seals_come_by_number_and_by_time_and_when_the_kmc_ends(world: World) -> None:
    await world.enrol()
    settings = world.settings
    for _ in range(settings.audit_seal_entries):
        await world.center.audit("alice", "actor", "event", "x")
    await world.kmc.sealer.seal(lambda unsealed, waited: unsealed >= settings.audit_seal_entries)
    first = world.kmc.sealer.newest("alice")
    assert first is not None
    assert world.kmc.sealer.newest("") is None
    await world.center.audit("alice", "actor", "event", "y")
    await world.restart()
    second, platform = world.kmc.sealer.newest("alice"), world.kmc.sealer.newest("")
    assert second is not None
    assert second[0] == first[0] + 1
    assert platform is not None


async def test_a_forged_or_foreign_seal_shows(world: World) -> None:
    alice, bob = await world.enrol(), await world.enrol("bob")
    await fill(world)
    operator, key = await world.operator(), alice.reply.kmc_signing_key
    page = await ask(operator, AuditQuery("alice"))
    statement = AuditCheckpointStatement("alice", 1, page.entries[-1].sequence, page.entries[-1].digest, 0.0, 0)
    forged = await signing.sign(statement, signing.LocalSigner(new_key()))
    theirs = await ask(operator, AuditQuery("bob"))
    assert bob.reply.kmc_signing_key == key
    for wrong in (forged, theirs.checkpoints[0], page.checkpoints[0].__class__("cipherfleet/lease/v1", b"{}")):
        with pytest.raises(AuditBroken):
            AuditCheck("alice", key).page(msgspec.structs.replace(page, checkpoints=(wrong,)))
    with pytest.raises(AuditBroken):
        AuditCheck("alice", key).page(theirs)


async def test_everybody_reads_what_is_theirs(world: World) -> None:
    alice = await world.enrol()
    await world.enrol("bob")
    vcm = await start_vcm(world, alice, await alice.plug_in())
    operator = await world.operator()
    heads = await operator.call("GET", "/v1/audit/heads", reply=AuditHeads)
    assert {head.consumer for head in heads.heads} == {"", "alice", "bob"}
    assert {e.consumer for e in (await ask(operator, AuditQuery())).entries} == {"", "alice", "bob"}
    assert {e.consumer for e in (await ask(operator, AuditQuery("-"))).entries} == {""}
    assert (await ask(operator, AuditQuery("nobody"))).entries == ()
    for caller in (vcm.caller, alice.terminal()):
        for query in (AuditQuery(), AuditQuery("bob"), AuditQuery("-"), AuditQuery(newest=True)):
            assert {e.consumer for e in (await ask(caller, query)).entries} == {"alice"}
        with pytest.raises(NotPermitted):
            await caller.call("GET", "/v1/audit/heads", reply=AuditHeads)


@pytest.mark.parametrize(
    "query", ["consumer=../x", "after=-1", "after=x", "limit=0", "limit=2001", "since=x", f"key={'k' * 65}", "newest=x"]
)
async def test_questions_that_are_none(world: World, query: str) -> None:
    with pytest.raises(Malformed):
        await (await world.operator()).call("GET", f"/v1/audit?{query}", reply=AuditLog)


async def test_questions_by_number_time_event_and_key(world: World) -> None:
    operator, start = await world.operator(), time.time()
    for number in range(6):
        world.clock.ahead = number * 100
        await world.center.audit("alice", "actor", f"event-{number % 2}", f"{KEY}/{number}" if number < 3 else f"{KEY[::-1]}/{number}")

    async def numbers(**asked: object) -> list[int]:
        return [e.sequence for e in (await ask(operator, AuditQuery("alice", **asked))).entries]  # type: ignore[arg-type]

    assert await numbers() == [1, 2, 3, 4, 5, 6]
    assert await numbers(after=4) == [5, 6]
    assert await numbers(after=1, limit=2) == [2, 3]
    assert await numbers(newest=True, limit=2) == [5, 6]
    assert await numbers(event="event-1") == [2, 4, 6]
    assert await numbers(key=KEY) == [1, 2, 3]
    assert await numbers(key=KEY, newest=True, limit=1) == [3]
    assert await numbers(since=start + 350) == [5, 6]


async def test_a_flood_of_refusals_is_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "REFUSALS_PER_MINUTE", 3)
    for _ in range(10):
        await world.center.audit_refusal("alice", "mallory", "attempt", "x", "refused")
    await world.center.audit_refusal("alice", "bob", "attempt", "x", "refused")
    assert len(await world.audit_lines("alice")) == 4
    await world.center.write_suppressed()
    assert len(await world.audit_lines("alice")) == 4  # the minute is not over
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 61)
    await world.center.write_suppressed()
    last = (await ask(await world.operator(), AuditQuery("alice"))).entries[-1]
    assert (last.actor, last.event, last.outcome, last.count) == ("mallory", "attempt", "refused", 7)
    await world.center.audit_refusal("alice", "mallory", "attempt", "x", "refused")
    assert len(await world.audit_lines("alice")) == 6


async def test_long_texts_are_cut(world: World) -> None:
    await world.center.audit("alice", "a" * 1000, "e" * 1000, "s" * 1000, "o" * 1000)
    (line,) = (await ask(await world.operator(), AuditQuery("alice"))).entries
    assert {len(text) for text in (line.actor, line.event, line.subject, line.outcome)} == {MAX_TEXT}


async def test_uses_are_written_and_remembered_once(world: World) -> None:
    alice = await world.enrol()
    vcm = await start_vcm(world, alice, await alice.plug_in())
    now = world.clock()
    report = UsageReport(
        1,
        (Use("shop", KEY, 2, "encrypt", "ok", 512, now), Use("shop", KEY, 2, "encrypt", "key-disabled", 3, now)),
        (Use("shop", KEY, 1, "decrypt", "ok", 8, now - 5),),
    )
    for _ in range(2):  # the second time it is a repetition
        await vcm.caller.call("POST", "/v1/usage", report)
    assert await vcm.caller.call("GET", f"/v1/usage/{KEY}", reply=KeyUsage) == KeyUsage(520, now)
    assert await vcm.caller.call("GET", f"/v1/usage/{KEY[::-1]}", reply=KeyUsage) == KeyUsage(0, None)
    entries = (await ask(alice.terminal(), AuditQuery(key=KEY))).entries
    assert [(e.event, e.subject, e.outcome, e.count) for e in entries] == [
        ("data-encrypt", f"{KEY}/2", "ok", 512),
        ("data-encrypt", f"{KEY}/2", "key-disabled", 3),
    ]
    assert {e.actor for e in entries} == {f"application/shop via {vcm.id}"}
    for wrong in (b'{"number":0,"recorded":[]}', b'{"number":2,"recorded":[{"application":"x"}]}'):
        with pytest.raises(Malformed):
            await vcm.caller.call("POST", "/v1/usage", msgspec.Raw(wrong))
    with pytest.raises(NotPermitted):
        await alice.terminal().call("POST", "/v1/usage", report)


@pytest.mark.parametrize("whole", [True, False], ids=["service", "one VCM"])
async def test_the_last_words_of_a_revoked_vcm_count_and_nothing_else_does(world: World, whole: bool) -> None:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    vcm = await start_vcm(world, alice, terminal)
    first = UsageReport(1, (Use("shop", KEY, 1, "encrypt", "ok", 2, world.clock()),))
    await vcm.caller.call("POST", "/v1/usage", first)
    management = await world.management()

    async def revoke() -> None:
        if whole:
            await terminal.send(UkeyRemoved())
        else:
            await management.call("DELETE", f"/v1/vcms/{vcm.id}")

    revoking = asyncio.create_task(revoke())
    await vcm.channel.next(Revoked)
    await vcm.channel.send(LeaseWanted(vcm.card, b"n" * 16))  # sent before it heard: nobody minds, and it buys nothing
    await vcm.channel.send(LastUses(first))  # may have been on its way
    await vcm.channel.send(LastUses(UsageReport(2, (Use("shop", KEY, 1, "encrypt", "ok", 5, world.clock()),))))
    with pytest.raises((CertificateRevoked, KmcUnavailable)):
        await vcm.caller.call("POST", "/v1/usage", UsageReport(3, first.recorded))
    assert await vcm.channel.closed() == []  # no lease
    await revoking
    entries = [e for e in (await ask(await world.operator(), AuditQuery("alice"))).entries if e.event == "data-encrypt"]
    assert [(e.count, e.actor) for e in entries] == [(2, f"application/shop via {vcm.id}"), (5, f"application/shop via {vcm.id}")]


async def test_a_revoked_vcm_that_stays_is_cut_off(world: World) -> None:
    alice = await world.enrol()
    vcm = await start_vcm(world, alice, await alice.plug_in())
    began = time.monotonic()
    await (await world.management()).call("DELETE", f"/v1/vcms/{vcm.id}")
    assert [type(frame) for frame in await vcm.channel.closed()] == [Revoked]
    assert time.monotonic() - began < 5
    with pytest.raises(OSError, match="closed"):
        await vcm.channel.send(LastUses(UsageReport(1, (Use("shop", KEY, 1, "encrypt", "ok", 5, world.clock()),))))


async def test_the_terminal_is_told_of_a_new_seal_once(world: World) -> None:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    vcm = await start_vcm(world, alice, terminal)
    await seal(world)

    async def told() -> AuditCheckpointStatement | None:
        nonce = time.monotonic_ns().to_bytes(16, "big")
        await vcm.channel.send(LeaseWanted(vcm.card, nonce))
        asked = await terminal.next(LeaseRequested)
        await terminal.send(await alice.lease(vcm, nonce))
        await vcm.channel.next(LeaseGranted)
        return None if asked.audit is None else read_audit_checkpoint(asked.audit, "alice", alice.reply.kmc_signing_key)

    first = await told()
    assert first is not None
    assert await told() is None
    await world.center.audit("alice", "actor", "event", "x")
    await seal(world)
    second = await told()
    assert second is not None
    assert second.sequence > first.sequence
