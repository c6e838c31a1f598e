"""What the platform shows: inventory and monitor, put together."""

from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.machine_api import VcmReport, VcmState
from cipherfleet.contract.management_api import ConsumerStatus, DomainInfo, PlatformStatus, VcmDetail, VcmEntry, VcmList
from cipherfleet.contract.vcc import VccStatistics
from cipherfleet.management.inventory import DomainRecord, VcmRecord
from cipherfleet.management.modules import Modules
from cipherfleet.management.ring import Ring


class Overview:
    def __init__(self, modules: Modules, ring: Ring) -> None:
        self._modules, self._ring = modules, ring

    async def status(self) -> PlatformStatus:
        modules = self._modules
        domains = await modules.store.domains()
        entries = (await self.vcms(deleted=False)).vcms
        serving = {entry.consumer for entry in entries if entry.state is VcmState.SERVING}
        consumers = tuple(ConsumerStatus(d.consumer, "on" if d.consumer in serving else "off", self._lease(d, serving)) for d in domains)
        return PlatformStatus(consumers, modules.monitor.machines, entries)

    def _lease(self, domain: DomainRecord, serving: set[ConsumerId]) -> float:
        """Seconds the service would go on if the terminal said nothing more."""
        if domain.consumer not in serving:
            return 0.0
        return max(0.0, self._modules.settings.lease_s - (self._ring.absent_s(domain.consumer) or 0.0))

    async def vcms(self, *, deleted: bool) -> VcmList:
        domains = {d.consumer: d for d in await self._modules.store.domains()}
        records = await self._modules.store.vcms(deleted=deleted)
        return VcmList(tuple(self._entry(r, domains.get(r.consumer), self._modules.monitor.vcm(r.id)) for r in records))

    async def vcm(self, vcm: VcmId) -> VcmDetail:
        """Raises ``VcmUnknown``."""
        modules = self._modules
        record = await modules.store.vcm(vcm)
        domains = {d.consumer: d for d in await modules.store.domains()}
        if record.state is VcmState.SERVING and modules.monitor.vcm(vcm) is None and record.machine is not None:
            await modules.monitor.look(record.machine)  # it serves since the last look
        report = modules.monitor.vcm(vcm)
        isolation = (report.isolation if report is not None else None) or record.isolation
        entry, trace = self._entry(record, domains.get(record.consumer), report), await modules.store.trace(vcm)
        return VcmDetail(entry, isolation, trace, record.limits, VccStatistics() if report is None else report.statistics)

    async def domain(self, consumer: ConsumerId) -> DomainInfo:
        """Raises ``ConsumerUnknown``."""
        domain = await self._modules.store.domain(consumer)
        records = await self._modules.store.vcms(consumer=consumer)
        serving = {r.slot for r in records if r.state is VcmState.SERVING and r.slot is not None}
        return self._modules.network.information(domain, serving)

    def _entry(self, record: VcmRecord, domain: DomainRecord | None, report: VcmReport | None) -> VcmEntry:
        state = record.state
        if not record.alive:
            report = None
        if report is not None and state is VcmState.SERVING:
            state = report.state  # its machine knows better how it fares
        return VcmEntry(
            id=record.id,
            consumer=record.consumer,
            machine=record.machine,
            state=state,
            pid=0 if report is None else report.pid,
            isolation=self._modules.network.isolation,
            endpoint="" if domain is None else self._modules.network.endpoint(domain, record.slot),
            created_at=record.created_at,
            operations=0 if report is None else report.operations,
            bytes=0 if report is None else report.bytes,
        )
