"""Rows into the escrow's tables, all of a write or none. Functions of an open transaction."""

from collections import defaultdict
from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, update
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.contract.errors import LimitReached, StateConflict
from cipherfleet.contract.escrow import EscrowRow, RowName, RowWrite, row_digest
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.settings import Settings
from cipherfleet.kmc import store
from cipherfleet.kmc.escrow_reads import read_rows
from cipherfleet.kmc.schema import consumers, rows


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
        current[name] = write.row
    _count(connection, consumer, counts, limits)
    put = upsert(rows)
    changed = {name: put.excluded[name] for name in ("attributes", "wrapped")}
    values = [msgspec.structs.asdict(current[name]) for name in dict.fromkeys(names)]
    connection.execute(put.on_conflict_do_update(index_elements=["consumer", "key", "version"], set_=changed), values)


def _count(connection: Connection, consumer: ConsumerId, more: dict[str, int], limits: Settings) -> None:
    found = store.get_consumer(connection, consumer)
    keys, row_count, row_bytes = found.keys + more["keys"], found.row_count + more["row_count"], found.row_bytes + more["row_bytes"]
    if more["keys"] and keys > limits.keys_per_consumer:
        raise LimitReached(f"a consumer has at most {limits.keys_per_consumer} keys")
    if more["row_count"] and row_count > limits.versions_per_consumer:
        raise LimitReached(f"a consumer's keys have at most {limits.versions_per_consumer} versions, attributes included")
    if more["row_bytes"] > 0 and row_bytes > limits.escrow_mib_per_consumer * 1024 * 1024:
        raise LimitReached(f"a consumer's wrapped keys have at most {limits.escrow_mib_per_consumer} MiB")
    values = {"keys": keys, "row_count": row_count, "row_bytes": row_bytes}
    connection.execute(update(consumers).where(consumers.c.name == consumer).values(values))


def _size(row: EscrowRow) -> int:
    return len(row.attributes) + len(row.wrapped)
