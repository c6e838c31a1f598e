"""What applications do with data, counted for the audit log and for each key's "last used".

``counted``: one entry for all operations that were alike, every ``audit_flush_s``. A VCM that ends tells the rest with its last words, over
the channel that it has; one that is killed, or has no channel, loses that much. ``sampled``: an
entry for one operation in so many, the others only count for "last used". ``full``: an entry for each, committed before the
operation is done, so without the KMC there is none.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable

from cipherfleet.computing.vcm_escrow import Kmc
from cipherfleet.contract.audit import DataUse, UsageReport
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.messages import Done
from cipherfleet.contract.settings import Settings

log = logging.getLogger(__name__)

MAX_KINDS = 4096
"""Different uses that are kept apart until they are told; what is more goes without its key."""
MAX_USES = 512
"""Uses of one kind in a report, so that it fits a call and a frame."""
ASKED = "asked"
"""The outcome of an entry that was written before its operation."""

Kind = tuple[str, str, int, str, str]  # application, key, version, operation, outcome


class DataAudit:
    def __init__(self, kmc: Kmc, settings: Settings, wall_clock: Callable[[], float] = time.time) -> None:
        self._kmc, self._settings, self._wall_clock = kmc, settings, wall_clock
        self._recorded: dict[Kind, tuple[int, float]] = {}
        self._counted: dict[Kind, tuple[int, float]] = {}
        self._number = 0
        self._reports: deque[UsageReport] = deque()  # made, and not known to be with the KMC: told again with their numbers
        self._telling = asyncio.Lock()

    def note(self, application: str, operation: str, key: str, version: int, outcome: str) -> None:
        """An operation has ended. Costs next to nothing; the KMC learns of it later."""
        counts = self._recorded if self._has_entry(outcome) else self._counted
        kind = (application, key, version, operation, outcome)
        if kind not in counts and len(counts) >= MAX_KINDS - 64:
            kind = (application, "", 0, operation, outcome)
        counts[kind] = counts.get(kind, (0, 0.0))[0] + 1, self._wall_clock()

    def _has_entry(self, outcome: str) -> bool:
        match self._settings.audit_data:
            case "counted":
                return True
            case "sampled":
                return random.random() < self._settings.audit_sample_rate  # noqa: S311 - which ones are looked at is no secret
            case "full":
                return outcome != "ok"  # those have theirs already

    async def ask(self, application: str, *uses: tuple[str, str, int]) -> None:
        """These (operation, key, version) are about to begin: in ``full`` mode there is an entry for each when this returns.

        Raises what the KMC answers.
        """
        if self._settings.audit_data == "full" and uses:
            now = self._wall_clock()
            asked = tuple(DataUse(application, key, version, operation, ASKED, 1, now) for operation, key, version in uses)
            async with self._telling:
                await self._settle()  # numbers go up
                self._number += 1
                await self._tell(UsageReport(self._number, asked))

    async def run(self) -> None:
        """Tell the KMC now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(self._settings.audit_flush_s)
            try:
                await self.flush()
            except CipherfleetError as exc:
                log.info("operations on data are told later: %s", exc.code)

    async def flush(self) -> None:
        """Tell the KMC what was noted. Raises what it answers; nothing is lost then."""
        async with self._telling:
            await self._settle()
            self._make()
            await self._settle()

    def last_words(self) -> tuple[UsageReport, ...]:
        """What the KMC may not know yet, also of a report that is on its way: there it counts once."""
        self._make()
        return tuple(self._reports)

    async def _settle(self) -> None:
        while self._reports:
            report = self._reports[0]
            await self._tell(report)
            self._reports.popleft()

    def _make(self) -> None:
        """Reports of all that was noted."""
        recorded, self._recorded = _uses(self._recorded), {}
        counted, self._counted = _uses(self._counted), {}
        while recorded or counted:
            self._number += 1
            self._reports.append(UsageReport(self._number, recorded[:MAX_USES], counted[:MAX_USES]))
            recorded, counted = recorded[MAX_USES:], counted[MAX_USES:]

    async def _tell(self, report: UsageReport) -> None:
        await self._kmc.call("POST", "/v1/usage", report, reply=Done)


def _uses(counts: dict[Kind, tuple[int, float]]) -> tuple[DataUse, ...]:
    return tuple(
        DataUse(application, key, version, operation, outcome, count, at)
        for (application, key, version, operation, outcome), (count, at) in counts.items()
    )
