"""What the management platform decided, in the audit logs: its own word, of its own kinds, each once and in its order.

The KMC sees to who says it, how much and what kind; whether it is true, only the management platform knows.
"""

from datetime import UTC, datetime
from itertools import groupby

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.contract.audit import MAX_LATE_S, MAX_TEXT, ManagementEvent, ManagementEvents
from cipherfleet.contract.audit_events import MANAGEMENT_EVENTS
from cipherfleet.contract.errors import Malformed, OutOfOrder
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.pace import Pace
from cipherfleet.kmc.schema import management_outbox

EVENTS_PER_SECOND, EVENTS_BURST = 100, 4096
"""Events that the management platform may write in the long run, and at once."""


class EventDesk:
    def __init__(self, center: Center) -> None:
        self._center = center
        self._pace = Pace(EVENTS_PER_SECOND, EVENTS_BURST, "writes audit entries")

    async def report(self, batch: ManagementEvents, *, actor: str) -> None:
        """Those that are new are committed together, each in its consumer's log; what comes twice counts once.

        Raises ``Malformed`` for an event that is not management's, ``OutOfOrder`` for a gap or what lies behind, ``LimitReached``.
        """
        unknown = {event.event for event in batch.events} - set(MANAGEMENT_EVENTS)
        if unknown:
            raise Malformed(f"{min(unknown)} is no event of the management platform")
        first, last = batch.events[0].number, batch.events[-1].number
        if [event.number for event in batch.events] != list(range(first, last + 1)):
            raise OutOfOrder("events of the management platform come in their order, without a gap")
        self._pace.take(ConsumerId("management"), len(batch.events))
        now = self._center.wall_clock()

        def commit(connection: Connection) -> None:
            row = connection.execute(select(management_outbox)).first()
            known = row.number if row is not None and row.outbox == batch.outbox else None
            if known is not None and not first <= known + 1 <= last + 1:
                raise OutOfOrder(f"event {known + 1} of the management platform comes next, not {first} to {last}")
            if known is None:
                subject = f"{batch.outbox} at event {first}"
                audit.append(connection, "", at=now, actor=actor, event="management-events-began", subject=subject)
            values = {"id": 1, "outbox": batch.outbox, "number": last}
            connection.execute(upsert(management_outbox).values(values).on_conflict_do_update(index_elements=["id"], set_=values))
            new = [event for event in batch.events if known is None or event.number > known]
            for consumer, events in groupby(new, key=lambda event: event.consumer):
                has_log = consumer and store.find_consumer(connection, ConsumerId(consumer)) is not None
                lines = [_line(event, actor, now, named=not has_log) for event in events]
                audit.append_all(connection, consumer if has_log else "", lines)

        await self._center.database.write(commit)


def _line(event: ManagementEvent, actor: str, now: float, *, named: bool) -> audit.Line:
    """``named``: the entry stands in the operator's log, and says whose it is about. What comes late gets the KMC's time, and says so."""
    subject = f"{event.consumer}: {event.subject}" if named and event.consumer else event.subject
    in_time = now - MAX_LATE_S <= event.at <= now
    if not in_time:
        said = datetime.fromtimestamp(min(event.at, 2**36), UTC).isoformat(timespec="seconds")
        note = f" (decided at {said})"
        subject = subject[: MAX_TEXT - len(note)] + note
    return audit.Line(event.at if in_time else now, f"{actor} for {event.by}", event.event, subject, event.outcome)
