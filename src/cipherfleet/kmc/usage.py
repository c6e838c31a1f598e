"""What a consumer's applications do with data: VCMs report it, the audit log keeps it, and each key knows when it was used last.

"Last used" is a hint: VCM and KMC say so, and nobody signs it.
"""

from collections.abc import Iterable
from functools import partial

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.contract.audit import MAX_LATE_S, DataUse, KeyUsage, UsageReport
from cipherfleet.contract.identities import Identity
from cipherfleet.contract.ids import ConsumerId, KeyId
from cipherfleet.kmc import audit
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.pace import Pace
from cipherfleet.kmc.schema import key_usage, usage_reports

LINES_PER_SECOND, LINES_BURST = 500, 20_000
"""Entries that a consumer's VCMs may write in the long run, and at once."""


class Usage:
    def __init__(self, center: Center) -> None:
        self._center = center
        self._pace = Pace(LINES_PER_SECOND, LINES_BURST, "writes audit entries")

    async def report(self, report: UsageReport, vcm: Identity) -> None:
        """Entries and last uses are committed together; a report that comes twice counts once. Raises ``LimitReached``."""
        self._pace.take(vcm.consumer, len(report.recorded))
        now, consumer = self._center.wall_clock(), vcm.consumer
        lines = [
            audit.Line(
                use.at if now - MAX_LATE_S <= use.at <= now else now,
                f"application/{use.application} via {vcm.id}",
                f"data-{use.operation}",
                f"{use.key}/{use.version}" if use.key else "",
                use.outcome,
                use.count,
            )
            for use in report.recorded
        ]

        def commit(connection: Connection) -> None:
            known = connection.execute(select(usage_reports.c.number).where(usage_reports.c.vcm == vcm.id)).scalar_one_or_none()
            if known is not None and known >= report.number:
                return
            values = {"vcm": vcm.id, "number": report.number}
            connection.execute(upsert(usage_reports).values(values).on_conflict_do_update(index_elements=["vcm"], set_=values))
            audit.append_all(connection, consumer, lines)
            _count(connection, consumer, (*report.recorded, *report.counted), now)

        await self._center.database.write(commit)

    async def of(self, consumer: ConsumerId, key: KeyId) -> KeyUsage:
        found = await self._center.database.read(partial(_find, consumer=consumer, key=key))
        return found or KeyUsage(0, None)


def _count(connection: Connection, consumer: ConsumerId, uses: Iterable[DataUse], now: float) -> None:
    totals: dict[str, tuple[int, float]] = {}
    for use in uses:
        if use.key and use.outcome == "ok":
            count, last = totals.get(use.key, (0, 0.0))
            totals[use.key] = (count + use.count, max(last, min(use.at, now)))
    if not totals:
        return
    put = upsert(key_usage)
    more = {
        "uses": key_usage.c.uses + put.excluded.uses,
        "last_used_at": func.max(key_usage.c.last_used_at, put.excluded.last_used_at),
    }
    values = [{"consumer": consumer, "key": key, "uses": count, "last_used_at": last} for key, (count, last) in totals.items()]
    connection.execute(put.on_conflict_do_update(index_elements=["consumer", "key"], set_=more), values)


def _find(connection: Connection, consumer: ConsumerId, key: KeyId) -> KeyUsage | None:
    query = select(key_usage.c.uses, key_usage.c.last_used_at).where(key_usage.c.consumer == consumer, key_usage.c.key == key)
    row = connection.execute(query).first()
    return None if row is None else KeyUsage(row.uses, row.last_used_at)
