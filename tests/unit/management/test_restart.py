"""The management platform ends in the middle of every step; a new process on the same state leaves nothing half-made."""

import asyncio
import contextlib
from typing import Any

import pytest

from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.ids import VcmId
from cipherfleet.contract.lifecycle import CREATION, Process, TraceEntry
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import LoggedIn, LoginFailed, LoginPermit, ServiceOn, TerminalToManagement, VcmDetail
from cipherfleet.management.store import Store
from tests.unit.management.fakes import FakeTerminal
from tests.unit.management.world import ACME, World, until


class Stop:
    """Stops the platform where the trace of a step is written: ``before`` or ``after`` it is on the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, process: Process, step: int, when: str) -> None:
        self.reached = asyncio.Event()
        self._patch = monkeypatch
        real = Store.add_trace
        reached = self.reached

        async def stop(store: Store, vcm: VcmId, entry: TraceEntry) -> None:
            here = (entry.process, entry.step) == (process, step)
            if here and when == "before":
                reached.set()
                await asyncio.Event().wait()
            await real(store, vcm, entry)
            if here:
                reached.set()
                await asyncio.Event().wait()

        monkeypatch.setattr(Store, "add_trace", stop)

    async def kill(self, world: World) -> None:
        async with asyncio.timeout(20):
            await self.reached.wait()
        await world.kill_management()
        self._patch.undo()


async def oldest(world: World) -> VcmDetail:
    return await world.detail((await world.vcms(everything=True)).vcms[0].id)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(1, 10))
async def test_a_creation_is_undone(world: World, monkeypatch: pytest.MonkeyPatch, step: int, when: str) -> None:
    stop = Stop(monkeypatch, Process.CREATE, step, when)
    terminal = world.terminal()
    await terminal.plug_in()
    await stop.kill(world)
    await terminal.end()
    await world.start_management()
    await world.clean()
    detail = await oldest(world)
    assert detail.vcm.state is VcmState.DELETED
    done = step - 1 if when == "before" else step
    steps = [(e.step, e.error) for e in detail.trace if e.process is Process.CREATE]
    interrupted = [(done + 1, "management-unavailable")] if done < len(CREATION) else []
    assert steps == [(n, "") for n in range(1, done + 1)] + interrupted


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_creation_is_undone_whose_peer_was_at_work(world: World, step: int, when: str) -> None:
    who, route = {2: ("kmc", "verify"), 4: ("kmc", "authorise"), 6: ("machine", "build")}[step]
    peers: list[Any] = [world.kmc] if who == "kmc" else list(world.machines)
    for peer in peers:
        getattr(peer, when)[route] = peer.hang
    terminal = world.terminal()
    await terminal.plug_in()
    waiting = [asyncio.ensure_future(p.hanging.wait()) for p in peers]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    await world.kill_management()
    for task in waiting:
        task.cancel()
    await terminal.end()
    for peer in peers:
        peer.well()
    await world.start_management()
    await world.clean()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(1, 9))
async def test_a_deletion_is_ended(world: World, monkeypatch: pytest.MonkeyPatch, step: int, when: str, forced: bool) -> None:
    terminal, vcm = await world.serving()
    stop = Stop(monkeypatch, Process.DELETE, step, when)
    asking = asyncio.create_task(world.operator.call("DELETE", f"/v1/vcms/{vcm}?force={int(forced)}", reply=VcmDetail))
    await stop.kill(world)
    with contextlib.suppress(CipherfleetError):
        await asking
    await terminal.end()
    await world.start_management()
    await world.clean()
    detail = await world.detail(vcm)
    steps = [(e.step, e.error) for e in detail.trace if e.process is Process.DELETE]
    assert steps == [(n, "") for n in range(1, 9)]


async def reconnect(world: World, terminal: FakeTerminal) -> FakeTerminal:
    await terminal.end()
    fresh = world.terminal()
    await fresh.plug_in()
    return fresh


async def test_a_vcm_that_still_serves_is_taken_over(world: World) -> None:
    terminal, vcm = await world.serving()
    await world.kill_management()
    await world.start_management()
    fresh = await reconnect(world, terminal)
    answer = await fresh.service()
    assert answer.vcm == vcm
    assert answer.endpoint == (await world.detail(vcm)).vcm.endpoint
    assert [e.step for e in answer.trace] == list(range(1, 10))
    permit = await fresh.wait_for(LoginPermit)
    assert (permit.vcm, permit.mark) == (vcm, b"")
    assert len((await world.vcms(everything=True)).vcms) == 1


@pytest.mark.parametrize("why", ["failed", "forgotten", "revoked", "silent", "login"])
async def test_a_vcm_that_does_not_serve_is_replaced(quick: World, why: str) -> None:
    terminal, vcm = await quick.serving()
    await quick.kill_management()
    machine = quick.host(vcm)
    if why == "failed":
        machine.set_state(vcm, VcmState.FAILED)
    elif why == "forgotten":
        del machine.vcms[vcm]
    elif why == "revoked":
        quick.kmc.serving.clear()
    elif why == "silent":
        await machine.stop()
    await terminal.end()
    await quick.start_management()
    fresh = quick.terminal()
    if why == "login":

        async def answer_login(frame: LoginPermit) -> TerminalToManagement:
            if frame.vcm == vcm:
                return LoginFailed(vcm, "card-unconfirmed", "another card answered")
            quick.bring_up(frame.vcm)
            return LoggedIn(frame.vcm)

        fresh.answers[LoginPermit] = answer_login
    await fresh.plug_in()
    answer = await fresh.service()
    assert answer.vcm != vcm
    if why == "silent":
        await machine.start()

    async def gone() -> bool:
        return (await quick.detail(vcm)).vcm.state is VcmState.DELETED

    await until(gone)
    assert await quick.service(ACME) == "on"


async def test_without_its_terminal_the_service_ends_after_the_lease(world: World) -> None:
    terminal, vcm = await world.serving()
    await world.kill_management()
    await terminal.end()
    await world.start_management()
    assert (await world.detail(vcm)).vcm.state is VcmState.SERVING
    await world.clean()
    assert await world.service() == "off"


async def test_a_vcm_whose_machine_forgot_it_is_cleaned_up(world: World) -> None:
    terminal, vcm = await world.serving()
    machine = world.host(vcm)
    await world.kill_management()
    del machine.vcms[vcm]
    await terminal.end()
    await world.start_management()
    await world.clean()


async def test_an_orderly_end_changes_nothing(world: World) -> None:
    terminal, vcm = await world.serving()
    await world.stop_management()
    assert vcm in world.host(vcm).vcms
    await world.start_management()
    assert (await world.detail(vcm)).vcm.id == vcm
    fresh = await reconnect(world, terminal)
    assert (await fresh.wait_for(ServiceOn)).vcm == vcm


async def test_a_kmc_that_is_away_at_the_start_is_waited_for(quick: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop(monkeypatch, Process.CREATE, 6, "after")
    terminal = quick.terminal()
    await terminal.plug_in()
    await stop.kill(quick)
    await terminal.end()
    await quick.kmc.stop()
    await quick.start_management()

    async def instance_gone() -> bool:
        return not any(m.vcms for m in quick.machines)

    await until(instance_gone)
    assert (await oldest(quick)).vcm.state in (VcmState.DELETING, VcmState.FAILED)
    await quick.kmc.start()
    await quick.clean()
