"""The audit log in the KMC's database: per consumer a chain of entries (``contract.audit``), and the checkpoints that seal it.

Entries are written in the transaction of what they tell, so neither is there without the other, whenever power is lost.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Select, and_, func, insert, or_, select, update

from cipherfleet.channel import codec
from cipherfleet.contract.audit import (
    MAX_PAGE,
    MAX_TEXT,
    PLATFORM,
    AuditEntry,
    AuditHead,
    AuditHeads,
    AuditLog,
    AuditQuery,
    Sealing,
    digest_of,
    genesis,
)
from cipherfleet.contract.statements import Signed
from cipherfleet.kmc.schema import audit, audit_checkpoints, audit_heads


class Line(NamedTuple):
    """What is to be written."""

    at: float
    actor: str
    event: str
    subject: str
    outcome: str = "ok"
    times: int = 1


def append(
    connection: Connection, consumer: str, *, at: float, actor: str, event: str, subject: str, outcome: str = "ok", count: int = 1
) -> None:
    """One entry more, in the caller's transaction."""
    append_all(connection, consumer, [Line(at, actor, event, subject, outcome, count)])


def append_all(connection: Connection, consumer: str, lines: Iterable[Line]) -> None:
    """Entries in this order, in the caller's transaction."""
    head = connection.execute(select(audit_heads.c.sequence, audit_heads.c.digest).where(audit_heads.c.consumer == consumer)).first()
    sequence, digest = (head.sequence, head.digest) if head is not None else (0, genesis(consumer))
    rows = []
    for line in lines:
        sequence += 1
        actor, event, subject, outcome = (text[:MAX_TEXT] for text in (line.actor, line.event, line.subject, line.outcome))
        entry = AuditEntry(sequence, line.at, consumer, actor, event, subject, outcome, "", line.times)
        digest = digest_of(digest, entry)
        rows.append({**msgspec.structs.asdict(entry), "digest": digest})
    if not rows:
        return
    connection.execute(insert(audit), rows)
    if head is None:
        connection.execute(insert(audit_heads).values(consumer=consumer, sequence=sequence, digest=digest))
    else:
        connection.execute(update(audit_heads).where(audit_heads.c.consumer == consumer).values(sequence=sequence, digest=digest))


# -- reading -----------------------------------------------------------------------------------------------------------


def read(connection: Connection, query: AuditQuery) -> tuple[AuditEntry, ...]:
    """The entries that are asked for, of a log by number, of all (``consumer`` empty) by consumer and number."""
    chosen = _chosen(query)
    if query.newest:
        order = (audit.c.sequence.desc(),) if query.consumer else (audit.c.at.desc(), audit.c.sequence.desc())
        found = connection.execute(chosen.order_by(*order).limit(query.limit)).all()
        return tuple(sorted((_entry(row) for row in found), key=lambda entry: (entry.consumer, entry.sequence)))
    found = connection.execute(chosen.order_by(audit.c.consumer, audit.c.sequence).limit(query.limit)).all()
    return tuple(_entry(row) for row in found)


def read_page(connection: Connection, query: AuditQuery, signing_key: bytes, sealing: Sealing) -> AuditLog:
    """As ``contract.audit.AuditLog`` says, all as of one moment."""
    entries = read(connection, query)
    if query.filtered or not query.consumer:
        return AuditLog(entries)
    consumer = named(query)
    end = head(connection, consumer)
    more = bool(entries) and entries[-1].sequence < end.sequence
    last = entries[-1].sequence if more else None
    return AuditLog(entries, _checkpoints(connection, consumer, query.after, last), end, signing_key, sealing)


def head(connection: Connection, consumer: str) -> AuditHead:
    found = connection.execute(select(audit_heads).where(audit_heads.c.consumer == consumer)).first()
    return AuditHead(consumer, 0, genesis(consumer)) if found is None else AuditHead(**found._mapping)


def read_heads(connection: Connection) -> AuditHeads:
    return AuditHeads(tuple(AuditHead(**row._mapping) for row in connection.execute(select(audit_heads).order_by(audit_heads.c.consumer))))


def named(query: AuditQuery) -> str:
    """The consumer as the database names it: the operator's own log is the empty one's."""
    return "" if query.consumer == PLATFORM else query.consumer


def _chosen(query: AuditQuery) -> Select[tuple[object, ...]]:
    wanted: list[ColumnElement[bool]] = []
    if query.consumer:
        wanted.append(audit.c.consumer == named(query))
    if query.after:
        wanted.append(audit.c.sequence > query.after)
    if query.since:
        wanted.append(audit.c.at >= query.since)
    if query.event:
        wanted.append(audit.c.event == query.event)
    if query.key:  # a key by itself, or a version of it: KEY/VERSION, and "0" follows "/"
        under = and_(audit.c.subject > f"{query.key}/", audit.c.subject < f"{query.key}0")
        wanted.append(or_(audit.c.subject == query.key, under))
    return select(audit).where(*wanted)


def _entry(row: Sequence[object]) -> AuditEntry:
    """Whatever somebody put into a column that is not of its kind, the check of the chain finds."""
    return AuditEntry(**row._mapping)  # type: ignore[attr-defined]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def add_checkpoint(connection: Connection, consumer: str, sequence: int, signed: Signed) -> None:
    connection.execute(insert(audit_checkpoints).values(consumer=consumer, sequence=sequence, statement=codec.encode(signed)))


def newest_checkpoints(connection: Connection) -> dict[str, Signed]:
    """Of each log. Raises ``Malformed`` for one that cannot be read."""
    newest = select(audit_checkpoints.c.consumer, func.max(audit_checkpoints.c.sequence).label("sequence")).group_by(
        audit_checkpoints.c.consumer
    )
    last = newest.subquery()
    query = select(audit_checkpoints).join(
        last, (audit_checkpoints.c.consumer == last.c.consumer) & (audit_checkpoints.c.sequence == last.c.sequence)
    )
    return {row.consumer: codec.decode(row.statement, Signed) for row in connection.execute(query)}


def _checkpoints(connection: Connection, consumer: str, after: int, last: int | None) -> tuple[Signed, ...]:
    """Those from entry ``after`` on to ``last``, or all later ones: at most as many as entries, and a few that were left behind."""
    query = select(audit_checkpoints.c.statement).where(audit_checkpoints.c.consumer == consumer, audit_checkpoints.c.sequence > after)
    if last is not None:
        query = query.where(audit_checkpoints.c.sequence <= last)
    found = connection.scalars(query.order_by(audit_checkpoints.c.sequence).limit(MAX_PAGE))
    return tuple(codec.decode(statement, Signed) for statement in found)
