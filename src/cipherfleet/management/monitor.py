"""The monitor: what every machine last said of itself, its card and its VCMs (flow step h)."""

import asyncio
import time

import msgspec

from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.ids import MachineId, VcmId
from cipherfleet.contract.machine_api import MachineReport, VcmReport, VcmState
from cipherfleet.contract.settings import Settings
from cipherfleet.management.inventory import MachineRecord, VcmRecord
from cipherfleet.management.machines import Machines
from cipherfleet.management.scheduler import Sight

SILENT_POLLS = 3


class Monitor:
    """Polls all machines at once; a machine silent for more than three polls is down."""

    def __init__(self, machines: Machines, settings: Settings) -> None:
        self._machines = machines
        self._timeout = max(1.0, settings.monitor_s)
        self._known: list[MachineRecord] = []
        self._reports: dict[MachineId, MachineReport] = {}
        self._silent: dict[MachineId, int] = {}

    async def poll(self) -> None:
        """Ask every machine once, at the same time."""
        self._known = await self._machines.known()
        await asyncio.gather(*(self._look(record) for record in self._known))

    async def look(self, machine: MachineId) -> MachineReport | None:
        """Ask one machine now; none when it does not answer."""
        self._known = await self._machines.known()
        for record in self._known:
            if record.id == machine and await self._look(record):
                return self._reports[machine]
        return None

    async def _look(self, record: MachineRecord) -> bool:
        asked = time.time()
        try:
            caller = await self._machines.caller_of(record)
            report = await caller.call("GET", "/v1/status", reply=MachineReport, timeout=self._timeout)
        except CipherfleetError:
            report = None
        if report is None or report.id != record.id:
            self._silent[record.id] = self._silent.get(record.id, 0) + 1
            return False
        self._silent[record.id] = 0
        self._reports[record.id] = msgspec.structs.replace(report, url=record.url, seen_at=asked)
        return True

    @property
    def machines(self) -> tuple[MachineReport, ...]:
        """Every registered machine as last seen."""
        return tuple(self._view(record) for record in self._known)

    def _view(self, record: MachineRecord) -> MachineReport:
        report = self._reports.get(record.id)
        if report is None:
            return MachineReport(record.id, record.url, "down", 0, 0, None, ())
        if self._down(record.id):
            return MachineReport(record.id, record.url, "down", 0, report.capacity, None, (), report.seen_at)
        return report

    def _down(self, machine: MachineId) -> bool:
        return self._silent.get(machine, 0) > SILENT_POLLS

    def vcm(self, vcm: VcmId) -> VcmReport | None:
        """What its machine last said of a VCM."""
        for machine in self.machines:
            for report in machine.vcms:
                if report.id == vcm:
                    return report
        return None

    def sight(self, record: VcmRecord) -> Sight:
        """How a VCM that should serve fares; ``UNKNOWN`` as long as no report is newer than its last change."""
        if record.machine is None:
            return Sight.UNKNOWN
        if self._down(record.machine):
            return Sight.FAILED
        report = self._reports.get(record.machine)
        if report is None or report.seen_at <= record.changed_at:
            return Sight.UNKNOWN
        found = next((v for v in report.vcms if v.id == record.id), None)
        if found is None or found.state in (VcmState.FAILED, VcmState.DELETED, VcmState.DELETING):
            return Sight.FAILED
        return Sight.WELL
