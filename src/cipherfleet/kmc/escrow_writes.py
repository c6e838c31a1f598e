"""Rows into the escrow's tables, all of a write or none. Functions of an open transaction."""

from collections import defaultdict
from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, delete, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.contract.errors import LimitReached, StateConflict
from cipherfleet.contract.escrow import EscrowRow, KeyAttributes, RowName, RowWrite, decode_attributes, row_digest, was_destroyed
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.settings import Settings
from cipherfleet.kmc import store
from cipherfleet.kmc.escrow_reads import read_rows
from cipherfleet.kmc.schema import consumers, rows

_ROW = (rows.c.consumer, rows.c.key, rows.c.version, rows.c.attributes, rows.c.wrapped)


def store_rows(connection: Connection, consumer: ConsumerId, writes: Sequence[RowWrite], limits: Settings) -> None:
    """The rows, each if it replaces what the writer believes it does. Raises ``StateConflict`` or ``LimitReached``."""
    names = [RowName(write.row.key, write.row.version) for write in writes]
    current = {RowName(row.key, row.version): row for row in read_rows(connection, consumer, names)}
    counts: defaultdict[str, int] = defaultdict(int)
    for name, write in zip(names, writes, strict=True):
        before = current.get(name)
        if (b"" if before is None else row_digest(before)) != write.previous:
            raise StateConflict(f"row {name.subject} was changed by somebody else", "read the escrow again and retry")
        counts["row_bytes"] += _size(write.row) - (0 if before is None else _size(before))
        counts["row_count"] += before is None
        counts["keys"] += before is None and name.version == 0
        for what, number in _named(write.row).items():
            counts[what] += number
        for what, number in ({} if before is None else _named(before)).items():
            counts[what] -= number
        current[name] = write.row
    _refuse_destroyed(connection, consumer, writes, current)
    for name in _destroyed(connection, consumer, writes):
        at = (rows.c.consumer == consumer) & (rows.c.key == name.key) & (rows.c.version == name.version)
        gone = EscrowRow(*connection.execute(delete(rows).where(at).returning(*_ROW)).one())
        counts["row_bytes"] -= _size(gone)
        counts["row_count"] -= 1
    _count(connection, consumer, counts, limits)
    put = upsert(rows)
    changed = {name: put.excluded[name] for name in ("attributes", "wrapped")}
    values = [msgspec.structs.asdict(current[name]) for name in dict.fromkeys(names)]
    connection.execute(put.on_conflict_do_update(index_elements=["consumer", "key", "version"], set_=changed), values)


def _destroyed(connection: Connection, consumer: ConsumerId, writes: Sequence[RowWrite]) -> list[RowName]:
    """What is there yet of material that these attributes say is destroyed: the log keeps its digests, and nothing keeps the rows."""
    found = []
    for row in (write.row for write in writes if write.row.version == 0):
        if was_destroyed(row, 1):
            versions = connection.execute(
                select(rows.c.version).where(rows.c.consumer == consumer, rows.c.key == row.key, rows.c.version > 0)
            )
            found += [RowName(row.key, version) for version in versions.scalars() if was_destroyed(row, version)]
    return found


def _refuse_destroyed(connection: Connection, consumer: ConsumerId, writes: Sequence[RowWrite], current: dict[RowName, EscrowRow]) -> None:
    """Material that was destroyed is not written again, even by a VCM that means to. Raises ``StateConflict``."""
    material = [RowName(write.row.key, write.row.version) for write in writes if write.row.version > 0]
    missing = list({RowName(name.key, 0) for name in material} - current.keys())
    whole = current | {RowName(row.key, 0): row for row in read_rows(connection, consumer, missing)}
    for name in material:
        row = whole.get(RowName(name.key, 0))
        if row is not None and was_destroyed(row, name.version):
            raise StateConflict(f"row {name.subject} is of material that is destroyed")


def _count(connection: Connection, consumer: ConsumerId, more: dict[str, int], limits: Settings) -> None:
    found = store.get_consumer(connection, consumer)
    keys, row_count, row_bytes = found.keys + more["keys"], found.row_count + more["row_count"], found.row_bytes + more["row_bytes"]
    if more["keys"] and keys > limits.keys_per_consumer:
        raise LimitReached(f"a consumer has at most {limits.keys_per_consumer} keys")
    if more["row_count"] and row_count > limits.versions_per_consumer:
        raise LimitReached(f"a consumer's keys have at most {limits.versions_per_consumer} versions, attributes included")
    for what, most in (("aliases", limits.aliases_per_consumer), ("tags", limits.tags_per_consumer)):
        if more[what] > 0 and getattr(found, what) + more[what] > most:
            raise LimitReached(f"a consumer's keys have at most {most} {what} in all")
    if more["row_bytes"] > 0 and row_bytes > limits.escrow_mib_per_consumer * 1024 * 1024:
        raise LimitReached(f"a consumer's wrapped keys have at most {limits.escrow_mib_per_consumer} MiB")
    values = {"keys": keys, "row_count": row_count, "row_bytes": row_bytes}
    values |= {"aliases": found.aliases + more["aliases"], "tags": found.tags + more["tags"]}
    connection.execute(update(consumers).where(consumers.c.name == consumer).values(values))


def _named(row: EscrowRow) -> dict[str, int]:
    """How many aliases and tags the row of a key has."""
    attributes = decode_attributes(row) if row.version == 0 else None
    return {"aliases": len(attributes.aliases), "tags": len(attributes.tags)} if isinstance(attributes, KeyAttributes) else {}


def _size(row: EscrowRow) -> int:
    return len(row.attributes) + len(row.wrapped)
