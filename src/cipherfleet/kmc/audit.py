"""The audit log: per consumer a chain of lines, each digest over the one before and the line itself.

A line that was changed, removed or reordered breaks the chain; lines cut off at the end show against the kept heads.
"""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec
from sqlalchemy import Connection, insert, select, update

from cipherfleet.contract.errors import AuditBroken
from cipherfleet.contract.kmc_api import AuditEntry
from cipherfleet.kmc.schema import audit, audit_heads

MAX_TEXT = 200
MAX_LINES = 40_000
"""How many lines one answer holds (the newest), so that it stays below the channel's limit of 16 MiB."""


def genesis(consumer: str) -> str:
    """What the first line of a consumer chains to."""
    return hashlib.sha256(f"cipherfleet audit v1 {consumer}".encode()).hexdigest()


def digest_of(previous: str, entry: AuditEntry) -> str:
    """SHA-256 (hex) over the previous digest and every field of the line but its own digest."""
    content = (entry.sequence, entry.at, entry.consumer, entry.actor, entry.event, entry.subject, entry.outcome)
    return hashlib.sha256(bytes.fromhex(previous) + msgspec.json.encode(content)).hexdigest()


def verify_audit(entries: Iterable[AuditEntry], heads: Mapping[str, tuple[int, str]] | None = None) -> None:
    """That the lines of each consumer are its whole log, in order. Raises ``AuditBroken``.

    ``heads``: consumer -> (sequence, digest) of the last line there must be, for those that are checked to the end.
    """
    last: dict[str, tuple[int, str]] = {}
    for entry in entries:
        sequence, digest = last.get(entry.consumer, (0, genesis(entry.consumer)))
        who = entry.consumer or "the platform"
        if entry.sequence != sequence + 1:
            raise AuditBroken(f"the audit log of {who} lacks line {sequence + 1}")
        if entry.digest != digest_of(digest, entry):
            raise AuditBroken(f"line {entry.sequence} of the audit log of {who} was changed")
        last[entry.consumer] = (entry.sequence, entry.digest)
    for consumer, head in (heads or {}).items():
        if last.get(consumer, (0, genesis(consumer))) != head:
            raise AuditBroken(f"the audit log of {consumer or 'the platform'} does not reach its line {head[0]}")


def append(connection: Connection, consumer: str, *, at: float, actor: str, event: str, subject: str, outcome: str = "ok") -> None:
    """One line more, in the caller's transaction: what is not committed is not in the log, and the other way round."""
    head = connection.execute(select(audit_heads.c.sequence, audit_heads.c.digest).where(audit_heads.c.consumer == consumer)).first()
    sequence, previous = (head.sequence, head.digest) if head is not None else (0, genesis(consumer))
    entry = AuditEntry(sequence + 1, at, consumer, actor[:MAX_TEXT], event[:MAX_TEXT], subject[:MAX_TEXT], outcome[:MAX_TEXT], "")
    digest = digest_of(previous, entry)
    connection.execute(insert(audit).values({**msgspec.structs.asdict(entry), "digest": digest}))
    if head is None:
        connection.execute(insert(audit_heads).values(consumer=consumer, sequence=entry.sequence, digest=digest))
    else:
        connection.execute(update(audit_heads).where(audit_heads.c.consumer == consumer).values(sequence=entry.sequence, digest=digest))


def read(connection: Connection, consumer: str | None, *, limit: int = MAX_LINES) -> tuple[AuditEntry, ...]:
    """The newest ``limit`` lines of a consumer (``None``: everybody's), by consumer and sequence."""
    query = select(audit).order_by(audit.c.at.desc(), audit.c.sequence.desc()).limit(limit)
    if consumer is not None:
        query = query.where(audit.c.consumer == consumer)
    entries = [AuditEntry(**row._mapping) for row in connection.execute(query)]
    return tuple(sorted(entries, key=lambda entry: (entry.consumer, entry.sequence)))


def verify(connection: Connection, consumer: str | None) -> None:
    """``verify_audit`` over all that is stored. Raises ``AuditBroken``."""
    query, heads = select(audit).order_by(audit.c.consumer, audit.c.sequence), select(audit_heads)
    if consumer is not None:
        query, heads = query.where(audit.c.consumer == consumer), heads.where(audit_heads.c.consumer == consumer)
    ends = {row.consumer: (row.sequence, row.digest) for row in connection.execute(heads)}
    verify_audit((AuditEntry(**row._mapping) for row in connection.execute(query)), ends)
