"""The image store: VCM instances are built and deleted on cipher machines by its orders."""

from cipherfleet.contract.errors import MachineUnknown
from cipherfleet.contract.ids import MachineId, VcmId
from cipherfleet.contract.machine_api import BuildOrder, VcmReport
from cipherfleet.contract.vcc import VccLimits
from cipherfleet.management.machines import Machines


class ImageStore:
    def __init__(self, machines: Machines, timeout: float) -> None:
        self._machines, self._timeout = machines, timeout

    async def build(self, machine: MachineId, vcm: VcmId, order: BuildOrder) -> VcmReport:
        """Creation step 6. Raises ``MachineUnavailable``, ``TimedOut`` or what the machine says."""
        caller = await self._machines.caller(machine)
        return await caller.call("PUT", f"/v1/vcms/{vcm}", order, reply=VcmReport, timeout=self._timeout)

    async def limit(self, machine: MachineId, vcm: VcmId, limits: VccLimits) -> None:
        """Hold a VCM's vCC to ``limits``. Raises ``MachineUnavailable``, ``TimedOut`` or ``VcmUnknown``."""
        caller = await self._machines.caller(machine)
        await caller.call("PUT", f"/v1/vcms/{vcm}/limits", limits, timeout=self._timeout)

    async def delete(self, machine: MachineId, vcm: VcmId) -> None:
        """Deletion step 6; what is gone is gone. Raises ``MachineUnavailable`` or ``TimedOut``."""
        try:
            caller = await self._machines.caller(machine)
        except MachineUnknown:
            return
        await caller.call("DELETE", f"/v1/vcms/{vcm}", timeout=self._timeout)
