"""The key escrow: wrapped rows and statements, the log over them, and the HSM's word on where the log stands.

A write is acknowledged after it is on disk. Nothing in here can be opened without a CMK, and no CMK is here.
"""

from collections.abc import Sequence
from functools import partial

import msgspec
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.channel import signing
from cipherfleet.contract.errors import ForeignConsumer, LimitReached, Malformed, StateConflict, TooLarge
from cipherfleet.contract.escrow import EscrowRow, LogEntry, RowName, RowWrite, Seen, decode_attributes, extend, row_digest
from cipherfleet.contract.ids import ApplicationName, ConsumerId
from cipherfleet.contract.kmc_api import (
    MAX_ROW_NAMES,
    MAX_STATEMENT_NAMES,
    EscrowReceipt,
    EscrowWrite,
    LogPage,
    RowsReply,
    StatementsReply,
)
from cipherfleet.contract.statements import CheckpointStatement, Signed
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow_reads import read_log, read_rows, read_rows_after, read_statements
from cipherfleet.kmc.pace import Pace
from cipherfleet.kmc.schema import consumers, log, rows

LOG_PAGE = 5_000
"""Entries in one answer: some 500 KiB."""
ROWS_PAGE = 512
"""Rows in one answer: at most 11 MiB, as each has two parts of ``MAX_ROW_PART_BYTES`` (base64 included)."""
MAX_WRITES = 64
MAX_ROW_PART_BYTES = 8 * 1024
MAX_WRITE_BYTES = 2 * 1024 * 1024
MAX_KEYS = 4096
MAX_ROWS = 16_384
MAX_ROW_BYTES = 4 * 1024 * 1024
MAX_LOG = 65_536
STATEMENT_ENTRIES = 1024
"""The last entries of a log are kept for statements: whoever fills it with rows cannot hinder a signing out."""
CHANGES_PER_SECOND, CHANGES_BURST = 50, 2000
"""Changes of a consumer's existing rows; new ones are bounded by ``MAX_ROWS``."""
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

    async def statements(self, consumer: ConsumerId, names: Sequence[ApplicationName]) -> StatementsReply:
        """Those of these applications that there are. Raises ``Malformed`` or ``EscrowRowTampered``."""
        if len(names) > MAX_STATEMENT_NAMES:
            raise Malformed(f"at most {MAX_STATEMENT_NAMES} statements are asked for at once")
        return StatementsReply(await self._center.database.read(partial(read_statements, consumer=consumer, names=names)))

    async def write(self, consumer: ConsumerId, request: EscrowWrite, *, via: str) -> EscrowReceipt:
        """All rows, their log entries and the audit line, or nothing.

        Raises ``Malformed``, ``TooLarge``, ``ForeignConsumer``, ``LimitReached`` or ``StateConflict``.
        """
        check_write(consumer, request)
        self._pace.take(consumer, sum(bool(write.previous) for write in request.writes))
        at = self._center.wall_clock()
        subject = ", ".join(dict.fromkeys(write.row.key for write in request.writes))

        def commit(connection: Connection) -> EscrowReceipt:
            changes = [(_store_row(connection, write), row_digest(write.row)) for write in request.writes]
            entries = append_log(connection, consumer, changes, kept_free=STATEMENT_ENTRIES)
            actor = f"{request.actor[:120]} via {via}" if request.actor else via
            audit.append(connection, consumer, at=at, actor=actor, event=request.event or "escrow-written", subject=subject)
            return EscrowReceipt(entries)

        return await self._center.database.write(commit, lambda receipt: self.note(consumer, receipt.log))

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


def append_log(
    connection: Connection, consumer: ConsumerId, changes: list[tuple[str, bytes]], *, kept_free: int = 0
) -> tuple[LogEntry, ...]:
    """New entries, and the new head of the consumer's log. Raises ``LimitReached``."""
    found = store.get_consumer(connection, consumer)
    sequence, head, entries = found.sequence, found.head, []
    if sequence + len(changes) > MAX_LOG - kept_free:
        raise LimitReached(f"the escrow of {consumer} has seen {sequence} changes, no more fit")
    for subject, digest in changes:
        sequence += 1
        entry = LogEntry(sequence, subject, digest)
        head = extend(head, entry)
        entries.append(entry)
    connection.execute(insert(log), [{"consumer": consumer, **msgspec.structs.asdict(entry)} for entry in entries])
    connection.execute(update(consumers).where(consumers.c.name == consumer).values(sequence=sequence, head=head))
    return tuple(entries)


def _store_row(connection: Connection, write: RowWrite) -> str:
    """The row, if it replaces what the writer believes it does; its subject."""
    row = write.row
    here = (rows.c.consumer == row.consumer) & (rows.c.key == row.key) & (rows.c.version == row.version)
    current = connection.execute(select(rows).where(here)).first()
    before = b"" if current is None else row_digest(EscrowRow(**current._mapping))
    if before != write.previous:
        raise StateConflict(f"row {row.subject} was changed by somebody else", "read the escrow again and retry")
    if current is None:
        kept = select(func.count()).select_from(rows).where(rows.c.consumer == row.consumer)
        keys = kept.where(rows.c.version == 0)
        if row.version == 0 and connection.execute(keys).scalar_one() >= MAX_KEYS:
            raise LimitReached(f"a consumer has at most {MAX_KEYS} keys")
        if connection.execute(kept).scalar_one() >= MAX_ROWS:
            raise LimitReached(f"a consumer has at most {MAX_ROWS} versions of keys")
    grown = len(row.attributes) + len(row.wrapped) - (0 if current is None else len(current.attributes) + len(current.wrapped))
    total = store.get_consumer(connection, row.consumer).row_bytes + grown
    if total > MAX_ROW_BYTES:
        raise LimitReached(f"a consumer's wrapped keys have at most {MAX_ROW_BYTES} bytes")
    connection.execute(update(consumers).where(consumers.c.name == row.consumer).values(row_bytes=total))
    values = msgspec.structs.asdict(row)
    connection.execute(upsert(rows).values(values).on_conflict_do_update(index_elements=["consumer", "key", "version"], set_=values))
    return row.subject
