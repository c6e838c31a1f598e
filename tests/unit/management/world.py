"""A whole platform for tests: the management process of the product between fake peers, restartable on its own state."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import ManagementUnavailable
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import MachineRegistration, PlatformStatus, VcmDetail, VcmList
from cipherfleet.contract.settings import Settings
from cipherfleet.management.process import ManagementConfig, Ready, main
from cipherfleet.management.store import Store
from tests.pki import Authority
from tests.unit.management.fakes import FakeKmc, FakeMachine, FakeTerminal, new_ukey

T = TypeVar("T")

SETTINGS = Settings(heartbeat_s=0.1, lease_s=0.5, monitor_s=0.05, step_s=10.0)
QUICK = Settings(heartbeat_s=0.1, lease_s=0.5, monitor_s=0.05, step_s=1.0)

ROOT = Authority("root")
PLATFORM = ROOT.subordinate("platform")
ACME, BOLT = ConsumerId("acme"), ConsumerId("bolt")
DOMAINS = {name: ROOT.subordinate(name) for name in (ACME, BOLT)}
UKEYS = {name: new_ukey() for name in (ACME, BOLT)}
MANAGEMENT = PLATFORM.credentials(Identity(Role.MANAGEMENT, "management"))
OPERATOR = PLATFORM.credentials(Identity(Role.OPERATOR, "operator"))
TERMINALS = {name: DOMAINS[name].credentials(Identity(Role.TERMINAL, "ukey-00000001", name)) for name in DOMAINS}


class World:
    def __init__(
        self, state: Path, settings: Settings = SETTINGS, machines: int = 2, isolation: str = "process", network: int = 99
    ) -> None:
        self.state, self.settings, self.isolation, self.network = state, settings, isolation, network
        self.kmc = FakeKmc(PLATFORM)
        self.kmc.ukeys = {name: ukey.public_key for name, ukey in UKEYS.items()}
        self.machines = [FakeMachine(MachineId(f"m{n}"), PLATFORM) for n in range(1, machines + 1)]
        self.url = ""
        self.operator: Caller = self._caller(OPERATOR)
        self.terminals: list[FakeTerminal] = []
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def _caller(self, credentials: Any) -> Caller:
        return Caller(self.url, Identity(Role.MANAGEMENT, "management").dns_name, credentials, ManagementUnavailable)

    async def start(self) -> None:
        await asyncio.gather(self.kmc.start(), *(m.start() for m in self.machines))
        await self.start_management()
        for machine in self.machines:
            await self.operator.call("PUT", f"/v1/machines/{machine.id}", MachineRegistration(machine.url))
        for name in DOMAINS:
            await self.operator.call("PUT", f"/v1/consumers/{name}")

    async def start_management(self) -> None:
        ready: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        config = ManagementConfig(str(self.state), "127.0.0.1:0", MANAGEMENT, self.kmc.url, self.isolation, self.network, self.settings)
        self._task = asyncio.create_task(main(config, ready.set_result, self._stop))
        either: set[asyncio.Future[Any]] = {self._task, ready}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()
        answer = ready.result()
        assert isinstance(answer, Ready)
        self.url = answer.url
        await self.operator.close()
        self.operator = self._caller(OPERATOR)

    async def kill_management(self) -> None:
        """It ends wherever it is; nothing is undone or told to anybody."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def stop_management(self) -> None:
        assert self._task is not None
        self._stop.set()
        await self._task
        self._task = None

    async def close(self) -> None:
        for terminal in self.terminals:
            await terminal.end()
        await self.operator.close()
        await self.kill_management()
        await asyncio.gather(self.kmc.stop(), *(m.stop() for m in self.machines))

    # -- who plays along -----------------------------------------------------------------------------------------------

    def terminal(self, consumer: ConsumerId = ACME) -> FakeTerminal:
        terminal = FakeTerminal(consumer, UKEYS[consumer], self._caller(TERMINALS[consumer]), self.bring_up)
        self.terminals.append(terminal)
        return terminal

    async def serving(self, consumer: ConsumerId = ACME) -> tuple[FakeTerminal, VcmId]:
        """A terminal, plugged in, and the VCM that serves it."""
        terminal = self.terminal(consumer)
        await terminal.plug_in()
        return terminal, (await terminal.service()).vcm

    def bring_up(self, vcm: VcmId) -> None:
        """What card, KMC and VCM do among themselves between steps 6 and 9."""
        for machine in self.machines:
            if vcm in machine.vcms and vcm in self.kmc.vcms:
                machine.set_state(vcm, VcmState.SERVING)
                self.kmc.serving.add(vcm)

    def host(self, vcm: VcmId) -> FakeMachine:
        return next(m for m in self.machines if vcm in m.vcms)

    # -- what the operator sees ----------------------------------------------------------------------------------------

    async def status(self) -> PlatformStatus:
        return await self.operator.call("GET", "/v1/status", reply=PlatformStatus)

    async def service(self, consumer: ConsumerId = ACME) -> str:
        return next(c.service for c in (await self.status()).consumers if c.name == consumer)

    async def vcms(self, *, everything: bool = False) -> VcmList:
        return await self.operator.call("GET", f"/v1/vcms?all={int(everything)}", reply=VcmList)

    async def detail(self, vcm: VcmId) -> VcmDetail:
        return await self.operator.call("GET", f"/v1/vcms/{vcm}", reply=VcmDetail)

    async def only_vcm(self) -> VcmDetail:
        """The one VCM there is or was."""
        (entry,) = (await self.vcms(everything=True)).vcms
        return await self.detail(entry.id)

    # -- what must not be left -----------------------------------------------------------------------------------------

    def left(self) -> dict[str, object]:
        """What the peers still hold."""
        held: dict[str, object] = {"tokens": self.kmc.tokens, "authorised": self.kmc.vcms, "serving": self.kmc.serving}
        held |= {f"instances of {m.id}": m.vcms for m in self.machines}
        return {name: thing for name, thing in held.items() if thing}

    async def tables(self) -> dict[str, int]:
        """Rows of tokens and ports, and VCMs that are more than history, straight from the database."""
        store = await asyncio.to_thread(Store.open, self.state)
        try:
            alive = await store.vcms()
            ports = await store.ports()
            count = await store.count_tokens()
        finally:
            await store.close()
        return {"tokens": count, "ports": sum(map(len, ports.values())), "vcms": len(alive)}

    async def clean(self, timeout: float = 20.0) -> None:
        """Wait until nothing half-made is left anywhere, or fail and say what is."""
        nothing = {"tokens": 0, "ports": 0, "vcms": 0}
        await until(lambda: self._is_clean(nothing), lambda: f"left: {self.left()}", timeout)
        assert await self.tables() == nothing

    async def _is_clean(self, nothing: dict[str, int]) -> bool:
        return not self.left() and await self.tables() == nothing


async def until(true: Callable[[], Awaitable[bool]], what: Callable[[], str] = lambda: "", timeout: float = 20.0) -> None:
    """Wait for a fact that another process (here: the platform's ring) brings about."""
    end = time.monotonic() + timeout
    while not await true():
        if time.monotonic() > end:
            raise AssertionError(f"it did not happen within {timeout} s; {what()}")
        await asyncio.sleep(0.01)


@asynccontextmanager
async def world_in(state: Path, settings: Settings = SETTINGS, **options: Any) -> AsyncIterator[World]:
    world = World(state, settings, **options)
    try:
        await world.start()
        yield world
    finally:
        await world.close()
