"""The network manager: a security domain per consumer, a port in it per VCM (creation and deletion step 5)."""

from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.management_api import DomainInfo
from cipherfleet.management.drivers.network import NetworkDriver
from cipherfleet.management.inventory import FIRST_SLOT, LAST_SLOT, DomainRecord, VcmRecord
from cipherfleet.management.store import Store

SERVICE_PORT = 8443


class NetworkManager:
    """``network`` is the cloud's number R, ``isolation`` process or domain: both say how addresses look."""

    def __init__(self, store: Store, driver: NetworkDriver, *, isolation: str, network: int) -> None:
        self._store, self._driver = store, driver
        self.isolation = isolation
        self._prefix = f"127.{network}" if isolation == "process" else f"10.{network}"

    def address(self, domain: DomainRecord, slot: int) -> str:
        """``host:port`` of a slot."""
        return f"{self._prefix}.{domain.index + 1}.{slot}:{SERVICE_PORT}"

    def endpoint(self, domain: DomainRecord, slot: int | None) -> str:
        """The slot's URL; empty while there is none."""
        return "" if slot is None else f"https://{self.address(domain, slot)}"

    def information(self, domain: DomainRecord, serving: set[int]) -> DomainInfo:
        """The domain as its consumer may know it; ``serving``: slots whose VCM serves."""
        slots = sorted(range(FIRST_SLOT, LAST_SLOT + 1), key=lambda slot: (slot not in serving, slot))
        endpoints = tuple(self.endpoint(domain, slot) for slot in slots)
        return DomainInfo(domain.consumer, f"{self._prefix}.{domain.index + 1}.0/24", endpoints)

    def applications(self, domain: DomainRecord) -> str:
        """The network namespace of the domain's applications ("" = the host's)."""
        return self._driver.applications(domain.index)

    async def create(self, domain: DomainRecord, slot: int) -> str:
        """Creation step 5, ``secure_region_info``: the network namespace of the VCM's port ("" = the host's)."""
        return await self._driver.create_port(domain.index, slot)

    async def delete(self, vcm: VcmRecord) -> None:
        """Deletion step 5: the port is cut off; the network goes with the last one. Idempotent."""
        if vcm.slot is None:
            return
        ports = (await self._store.ports()).get(vcm.consumer, {})
        if ports.get(vcm.slot) != vcm.id:
            return  # released before: the slot may be another VCM's by now
        index = await self._index(vcm.consumer)
        await self._driver.delete_port(index, vcm.slot)
        if set(ports) == {vcm.slot}:
            await self._driver.delete_domain(index)

    async def sweep(self) -> int:
        """Delete the networks that no VCM of the inventory has; how many parts there were."""
        ports = await self._store.ports()
        return await self._driver.sweep({await self._index(consumer): set(slots) for consumer, slots in ports.items()})

    async def _index(self, consumer: ConsumerId) -> int:
        return (await self._store.domain(consumer)).index
