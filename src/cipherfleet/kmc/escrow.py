"""The key escrow: wrapped rows and statements, the log over them, and the HSM's word on where the log stands.

A write is acknowledged after it is on disk. Nothing in here can be opened without a CMK, and no CMK is here.
"""

from collections.abc import Sequence
from functools import partial

import msgspec
from sqlalchemy import Connection, insert, update

from cipherfleet.channel import codec, signing
from cipherfleet.contract.audit_events import DATA_EVENT, PLATFORM_EVENTS
from cipherfleet.contract.errors import ForeignConsumer, KeyUnknown, LimitReached, Malformed, StateConflict, TooLarge
from cipherfleet.contract.escrow import (
    KeyAttributes,
    KeyState,
    LogEntry,
    RowName,
    Seen,
    decode_attributes,
    extend,
    is_alias,
    is_destroyed,
    row_digest,
    was_destroyed,
)
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.kmc_api import (
    MAX_ROW_NAMES,
    MAX_STATEMENT_NAMES,
    EscrowReceipt,
    EscrowWrite,
    KeySearch,
    KeysFound,
    LogPage,
    RowsReply,
    StatementsReply,
)
from cipherfleet.contract.statements import CheckpointStatement, Destroyed, DestructionStatement, Signed
from cipherfleet.kmc import audit, key_index, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow_reads import read_log, read_log_of, read_rows, read_rows_after, read_statements
from cipherfleet.kmc.escrow_writes import store_rows
from cipherfleet.kmc.pace import Pace
from cipherfleet.kmc.schema import consumers, log

LOG_PAGE = 5_000
"""Entries in one answer: some 500 KiB."""
ROWS_PAGE = 512
"""Rows in one answer: at most 11 MiB, as each has two parts of ``MAX_ROW_PART_BYTES`` (base64 included)."""
MAX_WRITES = 2000
"""Rows of a batch of a thousand keys."""
MAX_ROW_PART_BYTES = 8 * 1024
MAX_WRITE_BYTES = codec.MAX_BODY_BYTES
STATEMENT_ENTRIES = 1024
"""The last entries of a log are kept for statements: whoever fills it with rows cannot hinder a signing out."""
CHANGES_PER_SECOND, CHANGES_BURST = 50, 2000
"""Changes of a consumer's existing rows; new ones are bounded by the settings."""
MAX_VERSION = 2**31 - 1


class Escrow:
    """Rows and log of all consumers."""

    def __init__(self, center: Center) -> None:
        self._center = center
        self._checkpoints: dict[ConsumerId, tuple[Seen, Signed]] = {}
        self._sequences: dict[ConsumerId, int] = {}
        self._pace = Pace(CHANGES_PER_SECOND, CHANGES_BURST)

    async def log_page(self, consumer: ConsumerId, after: int) -> LogPage:
        """Flow step g: what came after that entry, as of one moment; at the end of the log the checkpoint. Raises ``HsmUnavailable``."""

        def read(connection: Connection) -> tuple[store.Consumer, tuple[LogEntry, ...]]:
            return store.get_consumer(connection, consumer), read_log(connection, consumer, after, limit=LOG_PAGE)

        found, entries = await self._center.database.read(read)
        at_end = after + len(entries) >= found.sequence
        return LogPage(entries, await self.checkpoint(consumer, point_of(found)) if at_end else None)

    async def rows(self, consumer: ConsumerId, names: Sequence[RowName]) -> RowsReply:
        """Those of the named rows that are there. Raises ``Malformed``."""
        if len(names) > MAX_ROW_NAMES:
            raise Malformed(f"at most {MAX_ROW_NAMES} rows are asked for at once")
        return RowsReply(await self._center.database.read(partial(read_rows, consumer=consumer, names=names)))

    async def rows_page(self, consumer: ConsumerId, after: RowName | None) -> RowsReply:
        """The rows after that one, by key and version."""
        found = await self._center.database.read(partial(read_rows_after, consumer=consumer, after=after, limit=ROWS_PAGE))
        return RowsReply(found, end=len(found) < ROWS_PAGE)

    async def search(self, consumer: ConsumerId, wanted: KeySearch) -> KeysFound:
        """Keys by label, state, algorithm and terms."""
        return await self._center.database.read(partial(key_index.search, consumer=consumer, wanted=wanted))

    async def statements(self, consumer: ConsumerId, names: Sequence[ApplicationName]) -> StatementsReply:
        """Those of these applications that there are. Raises ``Malformed`` or ``EscrowRowTampered``."""
        if len(names) > MAX_STATEMENT_NAMES:
            raise Malformed(f"at most {MAX_STATEMENT_NAMES} statements are asked for at once")
        return StatementsReply(await self._center.database.read(partial(read_statements, consumer=consumer, names=names)))

    async def write(self, consumer: ConsumerId, request: EscrowWrite, *, via: str) -> EscrowReceipt:
        """All rows, their log entries and an audit entry for each key, or nothing.

        Raises ``Malformed``, ``TooLarge``, ``ForeignConsumer``, ``LimitReached`` or ``StateConflict``.
        """
        check_write(consumer, request)
        self._pace.take(consumer, sum(bool(write.previous) for write in request.writes))
        at = self._center.wall_clock()
        rows = [write.row for write in request.writes]
        keys = list(dict.fromkeys(row.key for row in rows))

        def commit(connection: Connection) -> EscrowReceipt:
            store_rows(connection, consumer, request.writes, self._center.settings)
            changes = [(row.subject, row_digest(row)) for row in rows]
            entries = append_log(connection, consumer, changes, self._center.settings.changes_per_consumer - STATEMENT_ENTRIES)
            key_index.note(connection, consumer, rows, entries)
            actor = f"{request.actor[:120]} via {via}" if request.actor else via
            event = request.event or "escrow-written"
            audit.append_all(connection, consumer, [audit.Line(at, actor, event, key) for key in keys])
            return EscrowReceipt(entries)

        receipt = await self._center.database.write(commit, lambda receipt: self.note(consumer, receipt.log))
        if any(row.version == 0 and was_destroyed(row, 1) for row in rows):
            await self._center.database.forget_deleted()
        return receipt

    async def receipt(self, consumer: ConsumerId, key: KeyId) -> Signed:
        """That material of a key was destroyed, signed by the HSM. Raises ``KeyUnknown``, or ``StateConflict`` when none was."""

        def read(connection: Connection) -> DestructionStatement:
            entries = read_log_of(connection, consumer, key)
            (row,) = read_rows(connection, consumer, [RowName(key, 0)]) or (None,)
            attributes = decode_attributes(row) if row is not None and not is_alias(row) else None
            if not isinstance(attributes, KeyAttributes):
                raise KeyUnknown(f"there is no key {key}")
            versions = {entry: int(entry.subject.rpartition("/")[2]) for entry in entries}
            gone = [entry for entry, version in versions.items() if version > 0 and is_destroyed(attributes, version)]
            left = {row.version for row in read_rows(connection, consumer, [RowName(key, versions[entry]) for entry in gone])}
            material = tuple(Destroyed(versions[entry], entry.digest) for entry in gone if versions[entry] not in left)
            if not material:
                raise StateConflict(f"nothing of key {key} was destroyed")
            made = max(entry.sequence for entry, version in versions.items() if version == 0)
            at = attributes.delete_at if attributes.state is KeyState.DELETED else 0.0
            return DestructionStatement(consumer, key, store.get_consumer(connection, consumer).epoch, made, at, material)

        return await signing.sign(await self._center.database.read(read), self._center.signer)

    async def since(self, consumer: ConsumerId, sequence: int) -> tuple[Seen, Signed, tuple[LogEntry, ...]]:
        """Where the log stands, the HSM's word on it, and the entries after ``sequence``."""

        def read(connection: Connection) -> tuple[store.Consumer, tuple[LogEntry, ...]]:
            return store.get_consumer(connection, consumer), read_log(connection, consumer, sequence)

        found, entries = await self._center.database.read(read)
        point = point_of(found)
        return point, await self.checkpoint(consumer, point), entries

    async def sequence(self, consumer: ConsumerId) -> int:
        """How many changes there were; known without the database, as each heartbeat asks."""
        if consumer not in self._sequences:
            found = await self._center.database.read(partial(store.get_consumer, name=consumer))
            self._sequences[consumer] = max(found.sequence, self._sequences.get(consumer, 0))
        return self._sequences[consumer]

    def note(self, consumer: ConsumerId, entries: tuple[LogEntry, ...]) -> None:
        """These entries were committed."""
        self._sequences[consumer] = max(entry.sequence for entry in entries)

    async def checkpoint(self, consumer: ConsumerId, point: Seen) -> Signed:
        """Signed by the HSM, once per point."""
        kept = self._checkpoints.get(consumer)
        if kept is not None and kept[0] == point:
            return kept[1]
        statement = CheckpointStatement(consumer, point.epoch, point.sequence, point.head)
        signed = await signing.sign(statement, self._center.signer)
        self._checkpoints[consumer] = (point, signed)
        return signed


def point_of(consumer: store.Consumer) -> Seen:
    return Seen(consumer.epoch, consumer.sequence, consumer.head)


def check_write(consumer: ConsumerId, request: EscrowWrite) -> None:
    """The bounds of a write, and that it is the caller's own.

    Raises ``Malformed``, ``TooLarge``, ``ForeignConsumer`` or ``StateConflict``.
    """
    if not 1 <= len(request.writes) <= MAX_WRITES:
        raise Malformed(f"a write has 1 to {MAX_WRITES} rows, not {len(request.writes)}")
    if len(request.event) > 64 or not request.event.isprintable() or not request.actor.isprintable():
        raise Malformed("event and actor are short printable texts")
    if request.event in PLATFORM_EVENTS or request.event.startswith(DATA_EVENT):
        raise Malformed(f"a VCM does not say {request.event}")
    for write in request.writes:
        row = write.row
        if row.consumer != consumer:
            raise ForeignConsumer(f"row {row.subject} belongs to another consumer")
        if not 0 <= row.version <= MAX_VERSION:
            raise Malformed(f"row {row.subject} has no possible version")
        if len(row.attributes) > MAX_ROW_PART_BYTES or len(row.wrapped) > MAX_ROW_PART_BYTES:
            raise TooLarge(f"attributes and wrapped key of a row have at most {MAX_ROW_PART_BYTES} bytes each")
        if len(row.wrapped) < 12 + 16:
            raise Malformed(f"row {row.subject} is not wrapped")
        if write.previous and len(write.previous) != 32:
            raise Malformed(f"row {row.subject} names no previous digest")
        if row.version != 0 and write.previous:
            # What was encrypted under the material would be lost, and no VCM would take the consumer's escrow any more.
            raise StateConflict(f"row {row.subject} is key material, which is written once")
        decode_attributes(row)


def append_log(connection: Connection, consumer: ConsumerId, changes: Sequence[tuple[str, bytes]], most: int) -> tuple[LogEntry, ...]:
    """New entries, and the new head of the consumer's log, which has at most ``most``. Raises ``LimitReached``."""
    found = store.get_consumer(connection, consumer)
    sequence, head, entries = found.sequence, found.head, []
    if sequence + len(changes) > most:
        raise LimitReached(f"the escrow of {consumer} has seen {sequence} changes, no more fit")
    for subject, digest in changes:
        sequence += 1
        entry = LogEntry(sequence, subject, digest)
        head = extend(head, entry)
        entries.append(entry)
    connection.execute(insert(log), [{"consumer": consumer, **msgspec.structs.asdict(entry)} for entry in entries])
    connection.execute(update(consumers).where(consumers.c.name == consumer).values(sequence=sequence, head=head))
    return tuple(entries)
