"""Consumers, operator and accidents in any order: when it is over, what serves serves whole, and nothing half-made is left."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.lifecycle import CREATION, DELETION, Process
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import MigrateRequest, VcmCreateRequest, VcmDetail
from tests.unit.management.fakes import FakeTerminal
from tests.unit.management.world import ACME, BOLT, QUICK, World, until

consumers = st.sampled_from([ACME, BOLT])


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="cipherfleet-test-"))
        self.world: World | None = None
        self.plugged: dict[ConsumerId, FakeTerminal] = {}
        self.asked: list[asyncio.Task[None]] = []

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    @property
    def running(self) -> World:
        assert self.world is not None
        return self.world

    @initialize()
    def begin(self) -> None:
        async def work() -> None:
            self.world = World(self.folder / "state", QUICK)
            await self.world.start()

        self.do(work())

    @rule(consumer=consumers, wait=st.booleans())
    def plug_in(self, consumer: ConsumerId, wait: bool) -> None:
        async def work() -> None:
            terminal = self.plugged[consumer] = self.running.terminal(consumer)
            with suppress(CipherfleetError):
                await terminal.plug_in()
                if wait and self.running.kmc.alive:
                    await terminal.service()

        self.do(work())

    @rule(consumer=consumers, politely=st.booleans())
    def pull(self, consumer: ConsumerId, politely: bool) -> None:
        terminal = self.plugged.pop(consumer, None)
        if terminal is not None:
            self.do(terminal.pull() if politely else terminal.end())

    @rule(consumer=consumers, hurry=st.booleans())
    def create(self, consumer: ConsumerId, hurry: bool) -> None:
        """By the operator, who perhaps does not wait for the answer."""
        self.do(self.ask("POST", "/v1/vcms", VcmCreateRequest(consumer), hurry=hurry))

    @rule(force=st.booleans(), hurry=st.booleans(), which=st.integers(0, 3))
    def delete(self, force: bool, hurry: bool, which: int) -> None:
        self.do(self.on_a_vcm(which, lambda vcm: self.ask("DELETE", f"/v1/vcms/{vcm}?force={int(force)}", None, hurry=hurry)))

    @rule(hurry=st.booleans(), which=st.integers(0, 3))
    def migrate(self, hurry: bool, which: int) -> None:
        self.do(self.on_a_vcm(which, lambda vcm: self.ask("POST", f"/v1/vcms/{vcm}/migrate", MigrateRequest(), hurry=hurry)))

    @rule(which=st.integers(0, 3))
    def kill_vcm(self, which: int) -> None:
        found = [(m, vcm) for m in self.running.machines for vcm in m.vcms]
        if found:
            machine, vcm = found[which % len(found)]
            machine.set_state(vcm, VcmState.FAILED, "killed")

    @rule(which=st.integers(0, 1))
    def kill_machine(self, which: int) -> None:
        """Its VCMs die with it."""
        machine = self.running.machines[which]
        machine.vcms.clear()
        self.do(machine.stop())

    @rule()
    def kill_kmc(self) -> None:
        self.do(self.running.kmc.stop())

    @precondition(lambda self: self.world is not None and not all(p.alive for p in (self.world.kmc, *self.world.machines)))
    @rule()
    def bring_peers_back(self) -> None:
        self.do(self.mend())

    @rule()
    def restart_management(self) -> None:
        async def work() -> None:
            await self.running.kill_management()
            await self.running.start_management()
            for consumer, terminal in list(self.plugged.items()):  # terminals reconnect
                await terminal.end()
                self.plugged[consumer] = self.running.terminal(consumer)
                await self.plugged[consumer].plug_in()

        self.do(work())

    @rule(seconds=st.sampled_from([0.0, 0.02, 0.1, 0.6]))
    def time_passes(self, seconds: float) -> None:
        self.do(asyncio.sleep(seconds))

    # -- at the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if self.world is not None:
                self.do(self.check())
        finally:
            if self.world is not None:
                self.do(self.world.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    async def check(self) -> None:
        await self.mend()
        await asyncio.gather(*self.asked)
        for consumer in list(self.plugged):  # every Ukey that is in is plugged in anew, and has service
            await self.plugged[consumer].end()
            self.plugged[consumer] = self.running.terminal(consumer)
            await self.plugged[consumer].plug_in()
        await until(self.settled, lambda: f"{self.running.left()}", timeout=10.0)
        for terminal in self.plugged.values():
            await terminal.pull()
        await self.running.clean()
        for entry in (await self.running.vcms(everything=True)).vcms:
            check_trace(await self.running.detail(entry.id))

    async def settled(self) -> bool:
        """Whoever is plugged in has VCMs that all serve, here and at the peers; nobody else has any."""
        world = self.running
        alive = (await world.vcms()).vcms
        ids = {v.id for v in alive}
        peers = [v for m in world.machines for v in m.vcms]
        return (
            all(v.state is VcmState.SERVING for v in alive)
            and {v.consumer for v in alive} == set(self.plugged)
            and set(peers) == ids == set(world.kmc.vcms) == world.kmc.serving
            and len(world.kmc.tokens) == len(ids) == (await world.tables())["tokens"] == (await world.tables())["ports"]
        )

    # -- small things --------------------------------------------------------------------------------------------------

    async def mend(self) -> None:
        for peer in (self.running.kmc, *self.running.machines):
            if not peer.alive:
                await peer.start()

    async def ask(self, method: str, path: str, body: object, *, hurry: bool) -> None:
        async def call() -> None:
            with suppress(CipherfleetError):
                await self.running.operator.call(method, path, body, reply=VcmDetail)

        task = asyncio.create_task(call())
        self.asked.append(task)
        await asyncio.wait({task}, timeout=0.05 if hurry else None)

    async def on_a_vcm(self, which: int, work: Any) -> None:
        found = (await self.running.vcms()).vcms
        if found:
            await work(found[which % len(found)].id)


def check_trace(detail: VcmDetail) -> None:
    """The steps in order, without a gap; the deletion of what once served is whole."""
    created = [e for e in detail.trace if e.process is Process.CREATE]
    deleted = [e for e in detail.trace if e.process is Process.DELETE]
    assert [e.step for e in created] == list(range(1, len(created) + 1))
    assert not any(e.error for e in created[:-1])
    if deleted:
        assert len(created) == len(CREATION)
        assert [e.step for e in deleted] == list(range(1, len(DELETION) + 1))
        assert not any(e.error for e in deleted)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=12,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
