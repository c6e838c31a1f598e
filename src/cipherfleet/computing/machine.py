"""The cloud cipher machine: a host with a crypto card that runs VCMs, by order of the management platform."""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import protect
from cipherfleet.channel.server import Call, Server
from cipherfleet.computing.launcher import Launcher
from cipherfleet.computing.listening import parse_address
from cipherfleet.computing.machine_card import CardKeeper
from cipherfleet.computing.machine_vcms import Vcms
from cipherfleet.contract.errors import CardUnavailable, DiskFull, KmcUnavailable, StateNotWritable
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import MachineId, VcmId
from cipherfleet.contract.machine_api import BuildOrder, MachineReport, VcmReport
from cipherfleet.contract.messages import Done
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcc import VccLimits

log = logging.getLogger(__name__)


class MachineConfig(msgspec.Struct, frozen=True):
    """``address``: host:port. ``credentials`` trust the root. ``launcher``: a kind; empty: as the settings say."""

    id: MachineId
    state: str
    address: str
    credentials: Credentials
    kmc_url: str
    run_folder: str
    isolation: str
    settings: Settings = Settings()
    launcher: str = ""


class MachineReady(msgspec.Struct, frozen=True):
    url: str


class Machine:
    """The routes of ``contract.machine_api``."""

    def __init__(self, configuration: MachineConfig, url: str, vcms: Vcms, cards: CardKeeper) -> None:
        self._configuration, self._url, self._vcms, self._cards = configuration, url, vcms, cards

    def mount(self, server: Server) -> None:
        server.route("GET", "/v1/status", {Role.MANAGEMENT}, self._status)
        server.route("PUT", "/v1/vcms/{vcm}", {Role.MANAGEMENT}, self._build)
        server.route("PUT", "/v1/vcms/{vcm}/limits", {Role.MANAGEMENT}, self._limit)
        server.route("DELETE", "/v1/vcms/{vcm}", {Role.MANAGEMENT}, self._delete)

    async def _status(self, call: Call) -> MachineReport:
        card = await self._cards.status()
        return MachineReport(
            id=self._configuration.id,
            url=self._url,
            state="up",
            pid=os.getpid(),
            capacity=self._configuration.settings.vcms_per_machine,
            card=card.report if card is not None else None,
            vcms=self._vcms.reports(card),
            seen_at=time.time(),
        )

    async def _build(self, call: Call) -> VcmReport:
        return await self._vcms.build(call.path("vcm", VcmId), await call.body(BuildOrder))

    async def _limit(self, call: Call) -> Done:
        card, _ = self._cards.card
        await card.limit(call.path("vcm", VcmId), await call.body(VccLimits))
        return Done()

    async def _delete(self, call: Call) -> Done:
        await self._vcms.delete(call.path("vcm", VcmId))
        return Done()


async def main(configuration: MachineConfig, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    """A machine's life. Raises ``PortTaken``, ``StateNotWritable`` or ``DiskFull``."""
    protect()
    state = _make_folders(Path(configuration.state))
    launcher = Launcher(configuration.launcher) if configuration.launcher else await Launcher.find(configuration.settings.launcher)
    kmc_url = urlsplit(configuration.kmc_url)
    kmc_address = parse_address(kmc_url.netloc)
    name = Identity(Role.KMC, "kmc").dns_name
    async with Caller(configuration.kmc_url, name, configuration.credentials, KmcUnavailable) as kmc, AsyncExitStack() as held:
        held.push_async_callback(launcher.close)
        root, settings = configuration.credentials.trust, configuration.settings
        vcms = Vcms(state / "vcm", Path(configuration.run_folder), kmc, kmc_address, root, launcher, settings)
        vcms.sweep()

        async def card_lost() -> None:
            await vcms.fail_all(CardUnavailable(f"the crypto card of {configuration.id} failed"))

        run_folder = configuration.run_folder
        cards = vcms.cards = CardKeeper(configuration.id, kmc, settings, logs=state / "logs", run_folder=run_folder, on_lost=card_lost)
        server = Server(configuration.credentials)
        url = f"https://{configuration.address}"
        Machine(configuration, url, vcms, cards).mount(server)
        await server.start(parse_address(configuration.address))
        keeping = asyncio.create_task(cards.run())
        stopping = asyncio.create_task(stop.wait())
        try:
            ready(MachineReady(url))
            await asyncio.wait((keeping, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await server.stop()
            await vcms.close()
            keeping.cancel()
            await asyncio.gather(keeping, stopping, return_exceptions=True)
        if not stop.is_set():
            keeping.result()


def _make_folders(state: Path) -> Path:
    """Raises ``StateNotWritable`` or ``DiskFull``."""
    try:
        for folder in (state, state / "vcm", state / "logs"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(state, os.W_OK):
            raise StateNotWritable(f"{state} is not writable")
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise DiskFull(f"no space left for {state}") from exc
        raise StateNotWritable(f"cannot write {state}: {exc.strerror}") from exc
    return state
