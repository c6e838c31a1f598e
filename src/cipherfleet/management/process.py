"""The management platform as a process: it is put together here, started, and ended."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import protect
from cipherfleet.channel.server import Server
from cipherfleet.contract.errors import IsolationUnavailable, KmcUnavailable, Malformed
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.settings import Settings
from cipherfleet.management.authentication import Authentication
from cipherfleet.management.authority import Authority
from cipherfleet.management.delivery import Delivery
from cipherfleet.management.drivers.local_domain import LocalDomainNetwork
from cipherfleet.management.drivers.local_process import LocalProcessNetwork
from cipherfleet.management.drivers.network import NetworkDriver
from cipherfleet.management.image import ImageStore
from cipherfleet.management.lifecycle import Lifecycle
from cipherfleet.management.machines import Machines
from cipherfleet.management.modules import Modules
from cipherfleet.management.monitor import Monitor
from cipherfleet.management.network import NetworkManager
from cipherfleet.management.ring import Ring
from cipherfleet.management.server import Routes
from cipherfleet.management.store import Store


class ManagementConfig(msgspec.Struct, frozen=True):
    """``address``: host:port; ``isolation``: process or domain; ``network``: the cloud's number R, second octet of its addresses."""

    state: str
    address: str
    credentials: Credentials
    kmc_url: str
    isolation: str
    network: int
    settings: Settings = Settings()

    def __repr__(self) -> str:
        return f"ManagementConfig({self.address}, {self.isolation})"


class Ready(msgspec.Struct, frozen=True):
    url: str


def network_driver(isolation: str, network: int) -> NetworkDriver:
    """The driver of an isolation. Raises ``IsolationUnavailable``."""
    if isolation == "process":
        return LocalProcessNetwork()
    if isolation == "domain":
        driver = LocalDomainNetwork(network)
        driver.check()
        return driver
    raise IsolationUnavailable(f"there is no isolation {isolation!r}", "choose process or domain")


async def main(configuration: ManagementConfig, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    """Serve until ``stop``. Raises ``StateNewer``, ``StateNotWritable``, ``DiskFull``, ``PortTaken`` or ``IsolationUnavailable``."""
    protect()
    settings, credentials = configuration.settings, configuration.credentials
    host, _, port = configuration.address.rpartition(":")
    if not host or not port.isdecimal():
        raise Malformed(f"{configuration.address!r} is not host:port")
    driver = network_driver(configuration.isolation, configuration.network)
    store = await asyncio.to_thread(Store.open, Path(configuration.state))
    kmc_name = Identity(Role.KMC, "kmc").dns_name
    authority = Authority(Caller(configuration.kmc_url, kmc_name, credentials, KmcUnavailable, timeout=settings.step_s))
    machines = Machines(store, credentials)
    authentication = Authentication(authority, store)
    modules = Modules(
        store=store,
        authority=authority,
        authentication=authentication,
        monitor=Monitor(machines, settings),
        network=NetworkManager(store, driver, isolation=configuration.isolation, network=configuration.network),
        images=ImageStore(machines, settings.step_s),
        settings=settings,
    )
    lifecycle = Lifecycle(modules)
    ring = Ring(modules, lifecycle)
    delivery = Delivery(store, authority)
    server = Server(credentials)
    Routes(modules, machines, lifecycle, ring).mount(server)
    try:
        await ring.start()
        delivery.start()
        bound = await server.start((host, int(port)))
        ready(Ready(f"https://{bound[0]}:{bound[1]}"))
        await stop.wait()
    finally:
        await ring.stop()
        await lifecycle.close()
        await authentication.close()
        await delivery.stop()
        await server.stop()
        await authority.close()
        await machines.close()
        await store.close()
