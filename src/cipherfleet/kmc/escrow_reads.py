"""What the escrow's tables hold: functions of an open transaction. Whoever asks checks it, so nothing is checked here."""

from collections import defaultdict
from collections.abc import Iterable

from sqlalchemy import Connection, Select, select, tuple_

from cipherfleet.channel import codec
from cipherfleet.contract.errors import EscrowRowTampered, Malformed
from cipherfleet.contract.escrow import EscrowRow, LogEntry, RowName, StatementEntry
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.statements import ApplicationStatement, Signed
from cipherfleet.kmc.schema import log, rows, statements

_ROW = (rows.c.key, rows.c.version, rows.c.attributes, rows.c.wrapped)
_LOG = (log.c.sequence, log.c.subject, log.c.digest)


def read_log(connection: Connection, consumer: ConsumerId, after: int, *, limit: int | None = None) -> tuple[LogEntry, ...]:
    """The entries after one, in order."""
    query = select(*_LOG).where(log.c.consumer == consumer, log.c.sequence > after).order_by(log.c.sequence).limit(limit)
    return tuple(LogEntry(sequence, subject, digest) for sequence, subject, digest in connection.execute(query))


def read_log_of(connection: Connection, consumer: ConsumerId, key: KeyId) -> tuple[LogEntry, ...]:
    """The entries of one key's rows, in order."""
    query = select(*_LOG).where(log.c.consumer == consumer, log.c.subject.like(f"key/{key}/%")).order_by(log.c.sequence)
    return tuple(LogEntry(sequence, subject, digest) for sequence, subject, digest in connection.execute(query))


def read_rows(connection: Connection, consumer: ConsumerId, names: Iterable[RowName]) -> tuple[EscrowRow, ...]:
    """Those of the named rows that are there, in no order."""
    wanted: defaultdict[int, list[KeyId]] = defaultdict(list)
    for name in names:
        wanted[name.version].append(name.key)
    query = select(*_ROW).where(rows.c.consumer == consumer)
    return tuple(
        row
        for version, keys in wanted.items()
        for row in _rows(connection, consumer, query.where(rows.c.version == version, rows.c.key.in_(keys)))
    )


def read_rows_after(connection: Connection, consumer: ConsumerId, after: RowName | None, limit: int) -> tuple[EscrowRow, ...]:
    """The next rows by key and version."""
    query = select(*_ROW).where(rows.c.consumer == consumer).order_by(rows.c.key, rows.c.version).limit(limit)
    if after is not None:
        query = query.where(tuple_(rows.c.key, rows.c.version) > tuple_(after.key, after.version))
    return tuple(_rows(connection, consumer, query))


def read_statements(connection: Connection, consumer: ConsumerId, names: Iterable[ApplicationName]) -> tuple[StatementEntry, ...]:
    """The newest statement of each application that is there. Raises ``EscrowRowTampered``."""
    query = select(statements).where(statements.c.consumer == consumer, statements.c.name.in_(list(names)))
    try:
        return tuple(_statement_entry(row.name, codec.decode(as_bytes(row.statement), Signed)) for row in connection.execute(query))
    except Malformed as exc:
        raise EscrowRowTampered(f"a statement of {consumer} cannot be read") from exc


def as_bytes(kept: bytes | str) -> bytes:
    """SQLite lets whoever edits a database put a text where bytes belong: the reader's check shall find it, not ours."""
    return kept.encode() if isinstance(kept, str) else kept


def _rows(connection: Connection, consumer: ConsumerId, query: Select[str, int, bytes, bytes]) -> Iterable[EscrowRow]:
    for key, version, attributes, wrapped in connection.execute(query):
        yield EscrowRow(consumer, KeyId(key), version, as_bytes(attributes), as_bytes(wrapped))


def _statement_entry(name: str, signed: Signed) -> StatementEntry:
    return StatementEntry(ApplicationName(name), signed, codec.decode(signed.payload, ApplicationStatement).sequence)
