"""What the platform decided, written down in the transaction of the decision, and waiting until the KMC has it in its audit log.

Functions of an open transaction. Numbers are given once and without a gap; the outbox has a name of its own, so that numbers
which a restore gives again are not taken for old ones.
"""

import secrets
import time
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, update

from cipherfleet.contract.audit import MAX_EVENTS, MAX_TEXT, Decider, ManagementEvent, ManagementEvents
from cipherfleet.management.schema import outbox, outbox_state

MAX_WAITING = 100_000
"""Events that wait for the KMC at most; what is more is counted, and the count is told."""


class Decision(NamedTuple):
    """For the audit log of ``consumer``, or the operator's own when it is empty."""

    event: str
    consumer: str
    by: Decider
    subject: str
    outcome: str = "ok"


def enqueue(connection: Connection, decision: Decision) -> None:
    """In the caller's transaction: the event is there if and only if what was decided is."""
    state = connection.execute(select(outbox_state)).first()
    if state is None:
        connection.execute(insert(outbox_state).values(id=1, outbox=_name(), newest=0, dropped=0))
        newest, dropped = 0, 0
    else:
        newest, dropped = state.newest, state.dropped
    oldest = connection.execute(select(func.min(outbox.c.number))).scalar_one()
    if oldest is not None and newest - oldest >= MAX_WAITING - 2:
        connection.execute(update(outbox_state).values(dropped=dropped + 1))
        return
    decisions = [decision] if not dropped else [Decision("events-dropped", "", "management", str(dropped)), decision]
    for event in decisions:
        newest += 1
        subject = "".join(c if c.isprintable() else "?" for c in event.subject[:MAX_TEXT])
        said = ManagementEvent(newest, time.time(), event.consumer, event.by, event.event, subject, event.outcome)
        connection.execute(insert(outbox).values(number=newest, event=msgspec.json.encode(said).decode()))
    connection.execute(update(outbox_state).values(newest=newest, dropped=0))


def waiting(connection: Connection) -> ManagementEvents | None:
    """The oldest that the KMC does not have yet, as far as is known; none when it has all."""
    rows = connection.execute(select(outbox.c.event).order_by(outbox.c.number).limit(MAX_EVENTS)).scalars().all()
    if not rows:
        return None
    name = connection.execute(select(outbox_state.c.outbox)).scalar_one()
    return ManagementEvents(name, tuple(msgspec.json.decode(row, type=ManagementEvent) for row in rows))


def delivered(connection: Connection, last: int) -> None:
    """The KMC has everything up to this number."""
    connection.execute(delete(outbox).where(outbox.c.number <= last))


def renew(connection: Connection) -> None:
    """The KMC knows another past of this outbox: from here on it is a new one. What waits is kept, and so may come twice."""
    connection.execute(update(outbox_state).values(outbox=_name()))


def _name() -> str:
    return secrets.token_hex(16)
