"""Keys by label, state, algorithm and terms. What is found is a hint: whoever asks checks each row, and that it fits.

Functions of an open transaction.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select, tuple_
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.contract.escrow import EscrowRow, KeyAttributes, LogEntry, decode_attributes
from cipherfleet.contract.ids import ConsumerId, KeyId
from cipherfleet.contract.key_life import terms_of
from cipherfleet.contract.kmc_api import KeySearch, KeysFound
from cipherfleet.kmc.schema import key_index, key_terms

_BEHIND_ALL = "\U0010ffff"


def note(connection: Connection, consumer: ConsumerId, rows: Sequence[EscrowRow], log: Sequence[LogEntry]) -> None:
    """These rows were written, with these entries of the log."""
    values, terms = [], []
    for row, entry in zip(rows, log, strict=True):
        if row.version != 0:
            continue
        attributes = decode_attributes(row)
        if not isinstance(attributes, KeyAttributes):
            continue  # an alias
        columns = {"algorithm": attributes.algorithm, "state": attributes.state.value, "label": attributes.label}
        values.append({"consumer": consumer, "key": row.key, "position": entry.sequence, **columns})
        terms += [{"consumer": consumer, "term": term, "key": row.key} for term in terms_of(attributes)]
    if not values:
        return
    put = upsert(key_index)
    changed = {name: put.excluded[name] for name in ("algorithm", "state", "label")}
    connection.execute(put.on_conflict_do_update(index_elements=["consumer", "key"], set_=changed), values)
    keys = [value["key"] for value in values]
    connection.execute(delete(key_terms).where(key_terms.c.consumer == consumer, key_terms.c.key.in_(keys)))
    if terms:
        connection.execute(insert(key_terms), terms)


def search(connection: Connection, consumer: ConsumerId, wanted: KeySearch) -> KeysFound:
    """In the order of creation; with a label, in the order of labels."""
    at = key_index.c
    query = select(at.key, at.label, at.position).where(at.consumer == consumer).limit(wanted.limit)
    order = (at.label, at.position) if wanted.label else (at.position,)
    if wanted.label:
        query = query.where(at.label >= wanted.label, at.label < wanted.label + _BEHIND_ALL)
    if wanted.state:
        query = query.where(at.state == wanted.state)
    if wanted.algorithm:
        query = query.where(at.algorithm == wanted.algorithm)
    for term in wanted.terms:
        of_term = select(key_terms.c.key).where(key_terms.c.consumer == consumer, key_terms.c.term == term)
        query = query.where(at.key.in_(of_term))
    if wanted.after is not None:
        label, position = wanted.after
        query = query.where(tuple_(*order) > tuple_(label, position)) if wanted.label else query.where(at.position > position)
    found = connection.execute(query.order_by(*order)).all()
    last = (found[-1].label, found[-1].position) if len(found) == wanted.limit else None
    return KeysFound(tuple(KeyId(row.key) for row in found), last)
