"""The key escrow: what is committed, what is refused, and that what it shows can be checked without trusting it."""

import asyncio
import os
import secrets
import sqlite3
from dataclasses import dataclass
from functools import partial

import msgspec
import pytest
from msgspec import structs

from cipherfleet.channel import codec, signing
from cipherfleet.channel.codec import MAX_BODY_BYTES
from cipherfleet.contract.errors import (
    CipherfleetError,
    EscrowRolledBack,
    EscrowRowForeign,
    EscrowRowTampered,
    ForeignConsumer,
    KeyUnknown,
    LimitReached,
    Malformed,
    ServiceOff,
    StateConflict,
    TooLarge,
)
from cipherfleet.contract.escrow import (
    APPLICATION,
    EscrowRow,
    KeyAttributes,
    KeyState,
    LogEntry,
    RowName,
    RowWrite,
    Seen,
    StatementEntry,
    row_digest,
)
from cipherfleet.contract.ids import ApplicationName, ConsumerId, MachineId, new_key_id
from cipherfleet.contract.kmc_api import (
    MAX_ROW_NAMES,
    MAX_STATEMENT_NAMES,
    CardReady,
    CmkReleased,
    DownloadSignal,
    EscrowReceipt,
    EscrowWrite,
    LogPage,
    RowsReply,
    RowsRequest,
    StatementsReply,
    StatementsRequest,
)
from cipherfleet.contract.statements import CheckpointStatement, DestructionStatement, Signed
from cipherfleet.kmc import escrow, statements, store
from cipherfleet.kmc.pace import Pace
from tests.escrow import check_whole
from tests.unit.kmc.world import SEALED, TestConsumer, TestVcm, World, key_row, start_vcm


@pytest.fixture
async def alice(world: World) -> TestConsumer:
    return await world.enrol()


@pytest.fixture
async def vcm(world: World, alice: TestConsumer) -> TestVcm:
    return await start_vcm(world, alice, await alice.plug_in())


@dataclass(frozen=True)
class View:
    """All of a consumer's escrow, collected page by page."""

    rows: tuple[EscrowRow, ...]
    statements: tuple[StatementEntry, ...]
    log: tuple[LogEntry, ...]
    checkpoint: Signed


async def view_of(vcm: TestVcm) -> View:
    log: list[LogEntry] = []
    while True:
        page = await vcm.caller.call("GET", f"/v1/escrow?after={len(log)}", reply=LogPage)
        log += page.log
        if page.checkpoint is not None:
            break
        if not page.log:
            raise EscrowRolledBack("the log ends without a checkpoint")
    rows: list[EscrowRow] = []
    while True:
        after = f"?after={rows[-1].key}/{rows[-1].version}" if rows else ""
        found = await vcm.caller.call("GET", f"/v1/escrow/rows{after}", reply=RowsReply)
        rows += found.rows
        if found.end:
            break
    names = {entry.subject.removeprefix(APPLICATION).rpartition("@")[0] for entry in log if entry.subject.startswith(APPLICATION)}
    asked = StatementsRequest(tuple(ApplicationName(name) for name in sorted(names)))
    kept = await vcm.caller.call("POST", "/v1/escrow/statements", asked, reply=StatementsReply)
    return View(tuple(rows), kept.statements, tuple(log), page.checkpoint)


def checked(view: View, consumer: TestConsumer, seen: Seen | None = None) -> Seen:
    """As a VCM does it."""
    statement = signing.verify(view.checkpoint, CheckpointStatement, [consumer.reply.kmc_signing_key])
    point = Seen(statement.epoch, statement.sequence, statement.head)
    check_whole(consumer.name, view.log, view.rows, view.statements, point, seen)
    return point


async def test_rows_and_statements_in_one_view(world: World, alice: TestConsumer, vcm: TestVcm) -> None:
    key = new_key_id()
    attributes, material = key_row("alice", key, 0), key_row("alice", key, 1)
    receipt = await vcm.write(RowWrite(attributes), RowWrite(material))
    assert [(e.sequence, e.subject, e.digest) for e in receipt.log] == [
        (1, f"key/{key}/0", row_digest(attributes)),
        (2, f"key/{key}/1", row_digest(material)),
    ]
    await alice.application()
    view = await view_of(vcm)
    assert view.rows == (attributes, material)
    asked = RowsRequest((RowName(key, 1), RowName(new_key_id(), 0)))
    assert (await vcm.caller.call("POST", "/v1/escrow/rows", asked, reply=RowsReply)).rows == (material,)
    assert [kept.name for kept in view.statements] == ["shop"]
    point = checked(view, alice)
    assert point.sequence == 3
    changed = key_row("alice", key, 0, mark=b"x", replaces=attributes)
    await vcm.write(RowWrite(changed, row_digest(attributes)))
    newer = await view_of(vcm)
    assert newer.rows == (changed, material)
    assert checked(newer, alice, point).sequence == 4
    assert (await vcm.write(RowWrite(key_row("alice")))).log[0].sequence == 5
    lines = await vcm.caller.call("GET", "/v1/audit", reply=dict)
    line = lines["entries"][-1]
    assert (line["actor"], line["event"], line["consumer"]) == (f"application/shop via {vcm.id}", "key-created", "alice")


async def test_who_comes_second_reads_again(vcm: TestVcm) -> None:
    row = key_row("alice", version=0)
    await vcm.write(RowWrite(row))
    newer = structs.replace(row, wrapped=b"n" * 60)
    for previous in (b"", bytes(32)):
        with pytest.raises(StateConflict):
            await vcm.write(RowWrite(newer, previous))
    with pytest.raises(StateConflict):
        await vcm.write(RowWrite(key_row("alice", version=0), bytes(32)))
    await vcm.write(RowWrite(newer, row_digest(row)))
    with pytest.raises(StateConflict):
        await vcm.write(RowWrite(newer, row_digest(row)))


async def test_material_is_written_once(alice: TestConsumer, vcm: TestVcm) -> None:
    """Whoever replaced it would destroy what was encrypted under it."""
    material = key_row("alice")
    await vcm.write(RowWrite(material))
    with pytest.raises(StateConflict):
        await vcm.write(RowWrite(key_row("alice", material.key, mark=b"!"), row_digest(material)))
    view = await view_of(vcm)
    assert view.rows == (material,)
    assert checked(view, alice).sequence == 1


def whole_row(of: EscrowRow, state: KeyState, revision: int, previous: bytes = b"", oldest_version: int = 1) -> EscrowRow:
    attributes = KeyAttributes("AES-256-GCM", state, 2, revision, 0.0, previous=previous, oldest_version=oldest_version)
    return EscrowRow(of.consumer, of.key, 0, codec.encode(attributes), bytes(28))


async def test_destroyed_material_is_erased_and_stays_so(world: World, alice: TestConsumer, vcm: TestVcm) -> None:
    """The log keeps its digests; the database, and what the database leaves on the disk, has none of it."""
    material = [structs.replace(key_row(alice.name), wrapped=secrets.token_bytes(60))]
    material.append(structs.replace(material[0], version=2, wrapped=secrets.token_bytes(60)))
    first = whole_row(material[0], KeyState.ENABLED, 1)
    await vcm.write(*(RowWrite(row) for row in (first, *material)))
    trimmed = whole_row(first, KeyState.ENABLED, 2, row_digest(first), 2)
    await vcm.write(RowWrite(trimmed, row_digest(first)))
    assert [row.version for row in (await view_of(vcm)).rows if row.key == first.key] == [0, 2]
    gone = whole_row(first, KeyState.DELETED, 3, row_digest(trimmed), 2)
    await vcm.write(RowWrite(gone, row_digest(trimmed)))
    assert [row.version for row in (await view_of(vcm)).rows if row.key == first.key] == [0]
    for row in material:
        with pytest.raises(StateConflict):
            await vcm.write(RowWrite(row))
    found = await world.center.database.read(partial(store.get_consumer, name=alice.name))
    assert (found.row_count, found.row_bytes) == (1, len(gone.attributes) + len(gone.wrapped))
    await receipts(world, vcm, gone, material)
    files = list(world.folder.glob("kmc.sqlite*"))
    assert files
    assert not [file.name for file in files for row in material if row.wrapped in file.read_bytes()]


async def receipts(world: World, vcm: TestVcm, gone: EscrowRow, material: list[EscrowRow]) -> None:
    """The HSM signs what was destroyed, and nothing that was not."""
    told = await vcm.caller.call("GET", f"/v1/escrow/receipts/{gone.key}", reply=Signed)
    statement = signing.verify(told, DestructionStatement, (world.center.signer.public_key,))
    assert (statement.consumer, statement.key) == ("alice", gone.key)
    assert [(one.version, one.digest) for one in statement.material] == [(row.version, row_digest(row)) for row in material]
    alive = key_row("alice")
    await vcm.write(RowWrite(whole_row(alive, KeyState.ENABLED, 1)), RowWrite(alive))
    with pytest.raises(StateConflict):
        await vcm.caller.call("GET", f"/v1/escrow/receipts/{alive.key}", reply=Signed)
    with pytest.raises(KeyUnknown):
        await vcm.caller.call("GET", f"/v1/escrow/receipts/{new_key_id()}", reply=Signed)


async def test_the_largest_write_comes_through(vcm: TestVcm) -> None:
    largest = structs.replace(key_row("alice"), wrapped=bytes(escrow.MAX_ROW_PART_BYTES))
    label = " " * (escrow.MAX_ROW_PART_BYTES - len(largest.attributes))
    largest = structs.replace(largest, attributes=largest.attributes + label.encode())
    fits = escrow.MAX_WRITE_BYTES * 3 // 4 // (2 * escrow.MAX_ROW_PART_BYTES + 300)
    writes = [RowWrite(structs.replace(largest, key=new_key_id())) for _ in range(fits)]
    assert len((await vcm.write(*writes)).log) == fits
    with pytest.raises(TooLarge):
        await vcm.write(*(RowWrite(structs.replace(largest, key=new_key_id())) for _ in range(fits + 64)))


async def test_a_thousand_keys_at_once(world: World, alice: TestConsumer, vcm: TestVcm) -> None:
    keys = [new_key_id() for _ in range(escrow.MAX_WRITES // 2)]
    rows = [key_row("alice", key, version) for key in keys for version in (1, 0)]
    receipt = await vcm.write(*(RowWrite(row) for row in rows))
    assert [entry.subject for entry in receipt.log] == [row.subject for row in rows]
    view = await view_of(vcm)
    assert (len(view.rows), checked(view, alice).sequence) == (2000, 2000)
    lines = await vcm.caller.call("GET", "/v1/audit", reply=dict)
    assert [line["subject"] for line in lines["entries"]][-1000:] == keys
    found = await world.database.read(lambda connection: store.get_consumer(connection, alice.name))
    assert (found.keys, found.row_count, found.row_bytes) == (1000, 2000, sum(len(r.attributes) + len(r.wrapped) for r in rows))


async def test_all_or_nothing(world: World, vcm: TestVcm) -> None:
    good = key_row("alice")
    with pytest.raises(StateConflict):
        await vcm.write(RowWrite(good), RowWrite(key_row("alice", version=0), bytes(32)))
    view = await view_of(vcm)
    assert (view.rows, view.log) == ((), ())
    assert ("key-created", "ok") not in await world.audit_lines("alice")


async def test_many_at_once(alice: TestConsumer, vcm: TestVcm) -> None:
    receipts = await asyncio.gather(*(vcm.write(RowWrite(key_row("alice"))) for _ in range(20)))
    assert sorted(r.log[0].sequence for r in receipts) == list(range(1, 21))
    assert checked(await view_of(vcm), alice).sequence == 20


async def test_wrong_writes(vcm: TestVcm) -> None:
    row = key_row("alice")
    wrong: list[tuple[object, type[CipherfleetError]]] = [
        (EscrowWrite(()), Malformed),
        (EscrowWrite((RowWrite(row),) * (escrow.MAX_WRITES + 1)), Malformed),
        (EscrowWrite((RowWrite(key_row("bob")),)), ForeignConsumer),
        (EscrowWrite((RowWrite(structs.replace(row, version=-1)),)), Malformed),
        (EscrowWrite((RowWrite(structs.replace(row, version=2**31)),)), Malformed),
        (EscrowWrite((RowWrite(structs.replace(row, attributes=b"{}")),)), Malformed),
        (EscrowWrite((RowWrite(structs.replace(row, attributes=bytes(8193))),)), TooLarge),
        (EscrowWrite((RowWrite(structs.replace(row, wrapped=bytes(8193))),)), TooLarge),
        (EscrowWrite((RowWrite(structs.replace(row, wrapped=b"short")),)), Malformed),
        (EscrowWrite((RowWrite(row, b"short"),)), Malformed),
        (EscrowWrite((RowWrite(row),), event="x" * 65), Malformed),
        (EscrowWrite((RowWrite(row),), actor="two\nlines"), Malformed),
        ({"writes": [{"row": {"consumer": "alice", "key": "../x", "version": 1, "attributes": "", "wrapped": ""}}]}, Malformed),
        ({"writes": "garbage"}, Malformed),
    ]
    for request, error in wrong:
        with pytest.raises(error):
            await vcm.caller.call("POST", "/v1/escrow", request, reply=EscrowReceipt)
    assert (await view_of(vcm)).log == ()


@pytest.mark.parametrize(
    ("limit", "most"),
    [("keys_per_consumer", 1), ("versions_per_consumer", 1), ("escrow_mib_per_consumer", 0), ("changes_per_consumer", 1025)],
)
async def test_limits(world: World, vcm: TestVcm, limit: str, most: int) -> None:
    row = key_row("alice", version=0)
    await vcm.write(RowWrite(row))
    world.center.settings = structs.replace(world.center.settings, **{limit: most})
    with pytest.raises(LimitReached):
        await vcm.write(RowWrite(key_row("alice", version=0)))
    if limit != "changes_per_consumer":  # what is there may still change
        await vcm.write(RowWrite(structs.replace(row, wrapped=b"n" * 60), row_digest(row)))


def named_row(replaces: EscrowRow | None = None, *, aliases: int = 0, tags: int = 0) -> EscrowRow:
    """The row of a key with so many names."""
    key = new_key_id() if replaces is None else replaces.key
    previous = b"" if replaces is None else row_digest(replaces)
    words = [str(number) for number in range(50)]
    made = KeyAttributes(
        "AES-256-GCM", KeyState.ENABLED, 1, 1, 0.0, previous=previous, aliases=tuple(words[:aliases]), tags=dict.fromkeys(words[:tags], "x")
    )
    return EscrowRow(ConsumerId("alice"), key, 0, msgspec.json.encode(made), os.urandom(60))


@pytest.mark.parametrize(("what", "other"), [("aliases", "tags"), ("tags", "aliases")])
async def test_aliases_and_tags_are_bounded_for_the_consumer(world: World, vcm: TestVcm, what: str, other: str) -> None:
    world.center.settings = structs.replace(world.center.settings, **{f"{what}_per_consumer": 5})

    def named(number: int, of: str = what, replaces: EscrowRow | None = None) -> EscrowRow:
        return named_row(replaces, aliases=number) if of == "aliases" else named_row(replaces, tags=number)

    first, second = named(3), named(2)
    await vcm.write(RowWrite(first), RowWrite(second))
    for rows in ([RowWrite(named(1))], [RowWrite(named(3, replaces=second), row_digest(second))]):
        with pytest.raises(LimitReached, match=f"at most 5 {what} in all"):
            await vcm.write(*rows)
    await vcm.write(RowWrite(named(50, other)))
    less, more = named(1, replaces=first), named(4, replaces=second)  # moved from one key to the other
    await vcm.write(RowWrite(less, row_digest(first)), RowWrite(more, row_digest(second)))
    await world.restart()
    world.center.settings = structs.replace(world.center.settings, **{f"{what}_per_consumer": 3})  # less than there is
    await vcm.write(RowWrite(named_row()), RowWrite(named(2, replaces=more), row_digest(more)))
    with pytest.raises(LimitReached):
        await vcm.write(RowWrite(named(1)))


async def test_rows_leave_room_for_statements(world: World, alice: TestConsumer, vcm: TestVcm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write keys cannot keep the consumer from signing an application out."""
    monkeypatch.setattr(escrow, "STATEMENT_ENTRIES", 2)
    world.center.settings = structs.replace(world.center.settings, changes_per_consumer=3)
    await vcm.write(RowWrite(key_row("alice")))
    with pytest.raises(LimitReached):
        await vcm.write(RowWrite(key_row("alice")))
    await alice.application()
    await alice.application(revoked=True)
    with pytest.raises(LimitReached):
        await alice.application()


async def test_changes_have_a_pace(world: World, vcm: TestVcm) -> None:
    row = key_row("alice", version=0)
    await vcm.write(RowWrite(row))
    world.kmc.escrow._pace = Pace(1 / 3600, 1)
    newer = structs.replace(row, wrapped=b"n" * 60)
    await vcm.write(RowWrite(newer, row_digest(row)))
    with pytest.raises(LimitReached) as refused:
        await vcm.write(RowWrite(row, row_digest(newer)))
    assert "slow down" in refused.value.hint
    await vcm.write(RowWrite(key_row("alice")))  # new rows are bounded otherwise


async def test_the_fullest_pages_fit_the_channel() -> None:
    """The bounds are such that a consumer that uses all of them can still be served."""
    base64 = 4 / 3
    row = 2 * escrow.MAX_ROW_PART_BYTES * base64 + 160
    assert max(escrow.ROWS_PAGE, MAX_ROW_NAMES) * row < MAX_BODY_BYTES
    assert escrow.LOG_PAGE * 116 < MAX_BODY_BYTES
    assert MAX_STATEMENT_NAMES * (statements.MAX_STATEMENT_BYTES * base64 + 420) < MAX_BODY_BYTES


async def test_pages(alice: TestConsumer, vcm: TestVcm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escrow, "LOG_PAGE", 3)
    monkeypatch.setattr(escrow, "ROWS_PAGE", 2)
    for _ in range(4):
        key = new_key_id()
        await vcm.write(RowWrite(key_row("alice", key, 1)), RowWrite(key_row("alice", key, 0)))
    first = await vcm.caller.call("GET", "/v1/escrow", reply=LogPage)
    assert ([entry.sequence for entry in first.log], first.checkpoint) == ([1, 2, 3], None)
    view = await view_of(vcm)
    assert (len(view.rows), checked(view, alice).sequence) == (8, 8)


@pytest.mark.parametrize("after", ["x", "-1", "1" * 11, "9" * 10])
async def test_a_page_after_nothing_possible(vcm: TestVcm, after: str) -> None:
    with pytest.raises(Malformed):
        await vcm.caller.call("GET", f"/v1/escrow?after={after}", reply=LogPage)


@pytest.mark.parametrize("after", ["x", "a" * 32, "a" * 32 + "/", "a" * 32 + "/-1", "A" * 32 + "/1", "a" * 32 + "/" + "1" * 11])
async def test_rows_after_nothing_possible(vcm: TestVcm, after: str) -> None:
    with pytest.raises(Malformed):
        await vcm.caller.call("GET", f"/v1/escrow/rows?after={after}", reply=RowsReply)


async def test_too_many_are_asked_for(vcm: TestVcm) -> None:
    with pytest.raises(Malformed):
        await vcm.caller.call("POST", "/v1/escrow/rows", RowsRequest((RowName(new_key_id(), 0),) * (MAX_ROW_NAMES + 1)), reply=RowsReply)
    with pytest.raises(Malformed):
        await vcm.caller.call("POST", "/v1/escrow/statements", StatementsRequest((ApplicationName("a"),) * 513), reply=StatementsReply)


async def test_only_a_vcm_with_its_cmk_gets_rows(world: World, alice: TestConsumer) -> None:
    terminal = await alice.plug_in()
    vcm = await start_vcm(world, alice)
    await vcm.channel.send(CardReady(vcm.card))
    await terminal.next(DownloadSignal)
    with pytest.raises(ServiceOff):
        await view_of(vcm)
    with pytest.raises(ServiceOff):
        await vcm.write(RowWrite(key_row("alice")))
    await terminal.send(CmkReleased(vcm.id, alice.reply.ciphertext_cmk, SEALED))
    async with asyncio.timeout(20):
        while not (await world.kmc.service.state(vcm.id)).released:
            await asyncio.sleep(0.01)
    await view_of(vcm)


async def test_two_consumers_see_nothing_of_each_other(world: World, alice: TestConsumer, vcm: TestVcm) -> None:
    bob = await world.enrol("bob")
    bobs = await start_vcm(world, bob, await bob.plug_in(), machine=MachineId("m2"))
    row = key_row("alice", version=0)
    await vcm.write(RowWrite(row))
    await alice.application()
    view = await view_of(bobs)
    assert (view.rows, view.statements, view.log) == ((), (), ())
    with pytest.raises(ForeignConsumer):
        await bobs.write(RowWrite(row))
    with pytest.raises(StateConflict):  # bob's row of the same name is not there to be replaced
        await bobs.write(RowWrite(structs.replace(row, consumer=ConsumerId("bob")), row_digest(row)))
    audit = await bobs.caller.call("GET", "/v1/audit?consumer=alice", reply=dict)
    assert {line["consumer"] for line in audit["entries"]} == {"bob"}


# -- whoever runs the database -----------------------------------------------------------------------------------------


async def tamper(world: World, *statements: str, values: tuple[object, ...] = ()) -> None:
    """As the operator could: the KMC stops, the database is edited, the KMC starts."""
    await world.stop()
    with sqlite3.connect(world.folder / "kmc.sqlite") as connection:
        for statement in statements:
            assert connection.execute(statement, values[: statement.count("?")]).rowcount > 0
            values = values[statement.count("?") :]
    connection.close()
    await world.start(int(world.url.rpartition(":")[2]))


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("UPDATE rows SET wrapped = x'00'", EscrowRowTampered),
        ("UPDATE rows SET attributes = '{}'", EscrowRowTampered),
        ("DELETE FROM rows", EscrowRolledBack),
        ("UPDATE rows SET key = 'ffffffffffffffffffffffffffffffff'", EscrowRowForeign),
        ("DELETE FROM log WHERE sequence = 2", EscrowRolledBack),
        ("UPDATE log SET digest = x'00' WHERE sequence = 1", EscrowRolledBack),
        ("DELETE FROM statements", EscrowRolledBack),
        ("UPDATE statements SET statement = '{}'", EscrowRowTampered),
    ],
)
async def test_a_tampered_database_shows(
    world: World, alice: TestConsumer, vcm: TestVcm, statement: str, error: type[CipherfleetError]
) -> None:
    await vcm.write(RowWrite(key_row("alice")))
    await alice.application()
    seen = checked(await view_of(vcm), alice)
    await tamper(world, statement)
    with pytest.raises(error):
        checked(await view_of(vcm), alice, seen)


async def test_a_rolled_back_database_shows(world: World, alice: TestConsumer, vcm: TestVcm) -> None:
    row = key_row("alice", version=0)
    await vcm.write(RowWrite(row))
    before = await view_of(vcm)
    await vcm.write(RowWrite(key_row("alice", row.key, 0, mark=b"n", replaces=row), row_digest(row)))
    seen = checked(await view_of(vcm), alice)
    old = checked(before, alice)
    undo = (
        "UPDATE rows SET attributes = ?, wrapped = ?",
        "DELETE FROM log WHERE sequence = 2",
        "UPDATE consumers SET sequence = 1, head = ?",
    )
    await tamper(world, *undo, values=(row.attributes, row.wrapped, old.head))
    view = await view_of(vcm)
    assert checked(view, alice) == old  # the HSM signs what it is told: consistent, but older than what was seen
    with pytest.raises(EscrowRolledBack):
        checked(view, alice, seen)


async def test_nothing_that_opens_a_key_is_in_the_database(world: World, alice: TestConsumer, vcm: TestVcm) -> None:
    await vcm.write(RowWrite(key_row("alice")))
    await world.stop()
    stored = b"".join(path.read_bytes() for path in sorted(world.folder.iterdir()))
    await world.start(int(world.url.rpartition(":")[2]))
    assert b"w" * 60 in stored  # the control: rows are there
    for secret in (alice.reply.ciphertext_cmk, SEALED, vcm.token.token):
        assert secret not in stored


def test_a_row_is_named_in_full() -> None:
    assert EscrowRow(ConsumerId("a"), new_key_id(), 3, b"", b"").subject.endswith("/3")
