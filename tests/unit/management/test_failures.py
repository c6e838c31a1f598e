"""Every step of a creation and of a deletion fails in every way: nothing half-made stays, and the trace says which step it was."""

from collections.abc import Callable
from typing import Any

import pytest

from cipherfleet.contract.errors import DiskFull, IsolationUnavailable, NotPermitted, ServiceUnavailable
from cipherfleet.contract.lifecycle import CREATION, Process
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import (
    FlowFailed,
    IdentityWanted,
    LoggedIn,
    LoginFailed,
    LoginPermit,
    TerminalToManagement,
    VcmDetail,
)
from cipherfleet.management.drivers.local_process import LocalProcessNetwork
from cipherfleet.management.store import Store
from tests.unit.management.fakes import FakeTerminal, Fault, error
from tests.unit.management.world import World, until

PEER_STEPS = {1: ("kmc", "challenge"), 2: ("kmc", "verify"), 4: ("kmc", "authorise"), 6: ("machine", "build"), 9: ("kmc", "state")}


def break_peer(world: World, step: int, fault: Callable[[Any], Fault], *, when: str) -> None:
    who, route = PEER_STEPS[step]
    for peer in [world.kmc] if who == "kmc" else world.machines:
        getattr(peer, when)[route] = fault(peer)


async def mend(world: World) -> None:
    for peer in (world.kmc, *world.machines):
        peer.well()
        if not peer.alive:
            await peer.start()


async def failed_creation(world: World) -> tuple[FakeTerminal, FlowFailed]:
    terminal = world.terminal()
    await terminal.plug_in()
    return terminal, await terminal.wait_for(FlowFailed)


async def check_history(world: World, step: int, codes: set[str]) -> None:
    """The oldest creation is history: its steps in order, the last one with the error."""
    first = (await world.vcms(everything=True)).vcms[0]
    trace = [e for e in (await world.detail(first.id)).trace if e.process is Process.CREATE]
    assert [(e.step, e.actor) for e in trace] == [(s.number, s.actor) for s in CREATION[:step]]
    assert [e.error for e in trace[:-1]] == [""] * (step - 1)
    assert trace[-1].error in codes
    assert first.pid == 0


async def check_over(world: World, terminal: FakeTerminal, step: int, codes: set[str]) -> None:
    """The fault is over; the Ukey goes; nothing is left."""
    await terminal.pull()
    await mend(world)
    await world.clean()
    await check_history(world, step, codes)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", PEER_STEPS)
async def test_a_peer_that_refuses(world: World, step: int, when: str) -> None:
    break_peer(world, step, lambda peer: error, when=when)
    terminal, failed = await failed_creation(world)
    assert failed.code == "not-permitted"
    await check_over(world, terminal, step, {"not-permitted"})


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", PEER_STEPS)
async def test_a_peer_that_hangs(quick: World, step: int, when: str) -> None:
    break_peer(quick, step, lambda peer: peer.hang, when=when)
    terminal, failed = await failed_creation(quick)
    assert failed.code == "timed-out"
    await check_over(quick, terminal, step, {"timed-out"})


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", PEER_STEPS)
async def test_a_peer_that_is_killed(quick: World, step: int, when: str) -> None:
    break_peer(quick, step, lambda peer: peer.die, when=when)
    terminal, failed = await failed_creation(quick)
    codes = {"kmc-unavailable", "machine-unavailable", "timed-out"}
    assert failed.code in codes
    await check_over(quick, terminal, step, codes)


@pytest.mark.parametrize(("step", "frame"), [(1, IdentityWanted), (8, LoginPermit)])
async def test_a_terminal_that_is_silent(quick: World, step: int, frame: type[Any]) -> None:
    terminal = quick.terminal()
    terminal.mute.add(frame)
    await terminal.plug_in()
    assert (await terminal.wait_for(FlowFailed)).code == "timed-out"
    await check_over(quick, terminal, step, {"timed-out"})


@pytest.mark.parametrize(("step", "frame"), [(1, IdentityWanted), (8, LoginPermit)])
async def test_a_terminal_that_is_killed(world: World, step: int, frame: type[Any]) -> None:
    terminal = world.terminal()
    terminal.mute.add(frame)
    await terminal.plug_in()
    await terminal.wait_for(frame)
    await terminal.end()
    await world.clean()
    await check_history(world, step, {"ukey-absent"})


async def test_a_terminal_that_cannot_log_in(world: World) -> None:
    terminal = world.terminal()

    async def fail(frame: LoginPermit) -> TerminalToManagement:
        return LoginFailed(frame.vcm, "card-unconfirmed", "x" * 1000)

    terminal.answers[LoginPermit] = fail
    await terminal.plug_in()
    failed = await terminal.wait_for(FlowFailed)
    assert failed.code == "card-unconfirmed"
    assert len(failed.message) < 300
    await check_over(world, terminal, 8, {"card-unconfirmed"})


@pytest.mark.parametrize("loss", ["failed", "forgotten"])
@pytest.mark.parametrize("step", [8, 9])
async def test_a_vcm_that_dies_before_it_serves(world: World, step: int, loss: str) -> None:
    terminal = world.terminal()
    if step == 8:
        terminal.mute.add(LoginPermit)
    else:
        terminal.answers[LoginPermit] = _login_without_service
    await terminal.plug_in()
    permit = await terminal.wait_for(LoginPermit)
    machine = world.host(permit.vcm)
    if loss == "failed":
        machine.set_state(permit.vcm, VcmState.FAILED, "killed")
    else:
        del machine.vcms[permit.vcm]
    failed = await terminal.wait_for(FlowFailed)
    code = "service-off" if loss == "failed" else "machine-unavailable"
    assert failed.code == code
    await check_over(world, terminal, step, {code})


async def _login_without_service(frame: LoginPermit) -> TerminalToManagement:
    return LoggedIn(frame.vcm)


async def test_a_network_that_cannot_be_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: LocalProcessNetwork, index: int, slot: int) -> str:
        raise IsolationUnavailable("no network today")

    monkeypatch.setattr(LocalProcessNetwork, "create_port", refuse)
    terminal, failed = await failed_creation(world)
    assert failed.code == "isolation-unavailable"
    await check_over(world, terminal, 5, {"isolation-unavailable"})


async def test_a_defect_of_ours_is_undone_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: LocalProcessNetwork, index: int, slot: int) -> str:
        raise LookupError("secret text")

    monkeypatch.setattr(LocalProcessNetwork, "create_port", fail)
    terminal, failed = await failed_creation(world)
    assert failed.code == "internal"
    assert "secret" not in failed.message
    await check_over(world, terminal, 5, {"internal"})


@pytest.mark.parametrize("step", range(1, 10))
async def test_a_disk_that_is_full_at_any_step(world: World, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The step was done and cannot be recorded: it counts as failed, and is undone."""
    real = Store.add_trace

    async def full(self: Store, vcm: Any, entry: Any) -> None:
        if entry.process is Process.CREATE and entry.step == step:
            raise DiskFull("no space left")
        await real(self, vcm, entry)

    monkeypatch.setattr(Store, "add_trace", full)
    terminal, failed = await failed_creation(world)
    assert failed.code == "disk-full"
    monkeypatch.undo()
    await terminal.pull()
    await world.clean()


# -- deletion ------------------------------------------------------------------------------------------------------------

DELETE_PEERS: dict[tuple[str, str], str] = {
    ("kmc", "revoke_token"): "forced",
    ("kmc", "revoke_vcm"): "forced",
    ("machine", "delete"): "forced",
    ("kmc", "verify"): "signed",
}


def _killed(world: World, who: str) -> list[Any]:
    return [world.kmc] if who == "kmc" else list(world.machines)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fault", ["hang", "die"])
@pytest.mark.parametrize("place", DELETE_PEERS)
async def test_a_deletion_whose_peers_are_away_is_ended_when_they_are_back(
    quick: World, place: tuple[str, str], fault: str, when: str
) -> None:
    _, vcm = await quick.serving()
    who, route = place
    for peer in _killed(quick, who):
        getattr(peer, when)[route] = getattr(peer, fault)
    force = int(DELETE_PEERS[place] == "forced")
    with pytest.raises(ServiceUnavailable):
        await quick.operator.call("DELETE", f"/v1/vcms/{vcm}?force={force}", reply=VcmDetail)
    assert (await quick.detail(vcm)).vcm.state is VcmState.DELETING
    await mend(quick)
    await quick.clean()
    detail = await quick.detail(vcm)
    assert detail.vcm.state is VcmState.DELETED
    assert [e.step for e in detail.trace if e.process is Process.DELETE] == list(range(1, 9))
    assert not any(e.error for e in detail.trace)


async def test_a_refused_deletion_leaves_the_vcm_serving(world: World) -> None:
    _, vcm = await world.serving()
    world.kmc.before["verify"] = error
    with pytest.raises(NotPermitted, match="the fake refuses"):
        await world.operator.call("DELETE", f"/v1/vcms/{vcm}", reply=VcmDetail)
    world.kmc.well()
    assert (await world.detail(vcm)).vcm.state is VcmState.SERVING
    assert await world.service() == "on"


async def test_an_instance_is_stopped_at_removal_though_the_kmc_is_gone(world: World) -> None:
    terminal, vcm = await world.serving()
    machine = world.host(vcm)
    await world.kmc.stop()
    await terminal.pull()

    async def stopped() -> bool:
        return not machine.vcms

    await until(stopped, timeout=2.0)
    await world.kmc.start()
    await world.clean()


async def test_a_machine_that_never_answers_again_holds_its_port_and_nothing_else(quick: World) -> None:
    terminal, vcm = await quick.serving()
    host = quick.host(vcm)
    slot = (await quick.detail(vcm)).vcm.endpoint
    await host.stop()
    new = (await terminal.service(2)).vcm  # the ring builds a new one elsewhere
    detail = await quick.detail(new)
    assert detail.vcm.machine != host.id
    assert detail.vcm.endpoint != slot
    assert (await quick.detail(vcm)).vcm.state is VcmState.DELETING
    assert vcm not in quick.kmc.vcms
    await host.start()

    async def gone() -> bool:
        return (await quick.detail(vcm)).vcm.state is VcmState.DELETED

    await until(gone)
    assert vcm not in host.vcms
