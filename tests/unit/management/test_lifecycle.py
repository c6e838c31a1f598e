"""What consumers and the operator do with VCMs: removal, force, migration, a second VCM, a second terminal, failures."""

import asyncio
import time
from pathlib import Path

import pytest

from cipherfleet.contract.errors import LimitReached, MachineUnknown, NoCapacity, StateConflict, UkeyAbsent
from cipherfleet.contract.lifecycle import DELETION, Actor, Process
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import (
    DeletePermit,
    FlowFailed,
    IdentityWanted,
    LoginPermit,
    MigrateRequest,
    ServiceOn,
    VcmCreateRequest,
    VcmDetail,
)
from cipherfleet.contract.statements import Purpose
from cipherfleet.contract.vcc import VccLimits
from tests.unit.management.world import ACME, BOLT, SETTINGS, World, until, world_in


async def create(world: World, machine: str | None = None) -> VcmDetail:
    request = VcmCreateRequest(ACME, machine)  # type: ignore[arg-type]
    return await world.operator.call("POST", "/v1/vcms", request, reply=VcmDetail)


async def delete(world: World, vcm: str, *, force: bool = False) -> VcmDetail:
    return await world.operator.call("DELETE", f"/v1/vcms/{vcm}?force={int(force)}", reply=VcmDetail)


def deletion(detail: VcmDetail) -> list[tuple[int, str]]:
    return [(e.step, e.actor) for e in detail.trace if e.process is Process.DELETE]


def actors(stand_in: Actor) -> list[tuple[int, str]]:
    return [(s.number, stand_in if s.actor is Actor.TERMINAL else s.actor) for s in DELETION]


# -- removal -------------------------------------------------------------------------------------------------------------


async def test_removal_deletes_every_vcm_at_once(world: World) -> None:
    terminal, first = await world.serving()
    second = (await create(world)).vcm.id
    await terminal.pull()
    await world.clean()
    for vcm in (first, second):
        assert deletion(await world.detail(vcm)) == actors(Actor.AUTHENTICATION)
    assert await world.service() == "off"


@pytest.mark.parametrize("frame", [IdentityWanted, LoginPermit])
async def test_removal_ends_a_creation_that_waits_for_the_terminal(world: World, frame: type[IdentityWanted]) -> None:
    terminal = world.terminal()
    terminal.mute.add(frame)
    await terminal.plug_in()
    await terminal.wait_for(frame)
    await terminal.pull()
    await world.clean()
    assert (await world.only_vcm()).trace[-1].error == "ukey-absent"  # a step's end would say timed-out


@pytest.mark.parametrize("route", ["verify", "authorise", "build"])
async def test_removal_ends_a_creation_that_waits_for_a_peer(world: World, route: str) -> None:
    peers = list(world.machines) if route == "build" else [world.kmc]
    for peer in peers:
        peer.before[route] = peer.hang
    terminal = world.terminal()
    await terminal.plug_in()
    waiting = [asyncio.ensure_future(peer.hanging.wait()) for peer in peers]
    _, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for other in others:
        other.cancel()
    await terminal.pull()
    await world.clean()
    assert (await world.only_vcm()).trace[-1].error == "ukey-absent"


async def test_back_again_the_service_is_on_again(world: World) -> None:
    terminal, first = await world.serving()
    await terminal.pull()
    again, second = await world.serving()
    assert second != first
    assert await world.service() == "on"
    await again.pull()
    await world.clean()


async def test_a_terminal_lost_without_a_word_has_the_lease_to_come_back(tmp_path: Path) -> None:
    async with world_in(tmp_path / "m") as world:
        terminal, vcm = await world.serving()
        await terminal.end()
        fresh, same = await world.serving()
        assert same == vcm
        await fresh.end()
        began = time.monotonic()
        await world.clean()
        assert time.monotonic() - began >= SETTINGS.lease_s * 0.9
        assert deletion(await world.detail(vcm)) == actors(Actor.AUTHENTICATION)


async def test_the_removal_of_one_consumer_leaves_the_other(world: World) -> None:
    mine, _ = await world.serving(ACME)
    _, theirs = await world.serving(BOLT)
    await mine.pull()

    async def off() -> bool:
        return await world.service(ACME) == "off"

    await until(off)
    assert await world.service(BOLT) == "on"
    assert (await world.detail(theirs)).vcm.state is VcmState.SERVING


# -- deletion ------------------------------------------------------------------------------------------------------------


async def test_a_deletion_needs_the_ukey_unless_forced(world: World) -> None:
    terminal, vcm = await world.serving()
    await terminal.end()
    with pytest.raises(UkeyAbsent):
        await delete(world, vcm)
    assert (await world.detail(vcm)).vcm.state is VcmState.SERVING
    detail = await delete(world, vcm, force=True)
    assert detail.vcm.state is VcmState.DELETED
    assert deletion(detail) == actors(Actor.OPERATOR)
    await world.clean()


async def test_a_forced_deletion_tells_the_terminal_and_leaves_a_line(world: World, caplog: pytest.LogCaptureFixture) -> None:
    terminal, vcm = await world.serving()
    await delete(world, vcm, force=True)
    assert (await terminal.wait_for(DeletePermit)).vcm == vcm
    assert [r.message for r in caplog.records if r.message.startswith("audit:")] == [
        f"audit: the operator forces the deletion of {vcm} of {ACME}"
    ]
    assert not [f for f in terminal.heard if isinstance(f, IdentityWanted) and f.purpose is Purpose.DELETE_VCM]


async def test_deleting_what_is_gone_succeeds(world: World) -> None:
    _, vcm = await world.serving()
    first = await delete(world, vcm)
    for force in (False, True):
        assert await delete(world, vcm, force=force) == first


async def test_after_the_last_deletion_service_stays_off_until_it_is_asked_for(world: World) -> None:
    terminal, vcm = await world.serving()
    await delete(world, vcm)
    polls = world.machines[0].calls["status"]

    async def turned() -> bool:
        return world.machines[0].calls["status"] >= polls + 4

    await until(turned)
    assert (await world.vcms()).vcms == ()
    created = await create(world)
    assert created.vcm.state is VcmState.SERVING
    assert await world.service() == "on"
    assert (await terminal.service(2)).vcm == created.vcm.id


async def test_a_deletion_of_one_of_two_leaves_service_on(world: World) -> None:
    _, first = await world.serving()
    second = (await create(world)).vcm.id
    await delete(world, first)
    assert await world.service() == "on"
    world.host(second).set_state(second, VcmState.FAILED)

    async def rebuilt() -> bool:
        return [v.id for v in (await world.vcms()).vcms if v.state is VcmState.SERVING and v.id != second] != []

    await until(rebuilt)  # service is still wanted


async def test_a_silent_terminal_does_not_hold_a_deletion_up(world: World) -> None:
    terminal, vcm = await world.serving()
    terminal.mute.add(DeletePermit)
    detail = await delete(world, vcm)
    assert detail.vcm.state is VcmState.DELETED
    assert deletion(detail)[-1] == (8, Actor.AUTHENTICATION)


async def test_a_forced_deletion_ends_the_creation_of_that_vcm(world: World) -> None:
    terminal = world.terminal()
    terminal.mute.add(LoginPermit)
    await terminal.plug_in()
    vcm = (await terminal.wait_for(LoginPermit)).vcm
    detail = await delete(world, vcm, force=True)
    assert detail.vcm.state is VcmState.DELETED
    assert detail.trace[-1].error == "state-conflict"


# -- creation by the operator --------------------------------------------------------------------------------------------


async def test_creation_without_a_terminal_is_refused(world: World) -> None:
    with pytest.raises(UkeyAbsent) as caught:
        await create(world)
    assert "terminal --ukey" in caught.value.hint
    await world.clean()
    assert [(e.step, e.error) for e in (await world.only_vcm()).trace] == [(1, "ukey-absent")]
    assert (await world.only_vcm()).vcm.machine is None


async def test_vcms_spread_over_the_machines(world: World) -> None:
    await world.serving()
    await create(world)
    assert sorted(v.machine or "" for v in (await world.vcms()).vcms) == ["m1", "m2"]


async def test_a_wished_machine_is_taken_or_refused(world: World) -> None:
    _, vcm = await world.serving()
    machine = (await world.detail(vcm)).vcm.machine
    assert (await create(world, machine)).vcm.machine == machine
    with pytest.raises(MachineUnknown):
        await create(world, "m9")
    assert await world.service() == "on"


async def test_the_failure_of_a_second_vcm_leaves_the_first_and_its_terminal_alone(world: World) -> None:
    terminal, _ = await world.serving()
    for machine in world.machines:
        machine.capacity = 0

    async def seen() -> bool:
        return all(m.capacity == 0 for m in (await world.status()).machines)

    await until(seen)
    with pytest.raises(NoCapacity, match="full: m1"):
        await create(world)
    assert not [f for f in terminal.heard if isinstance(f, FlowFailed)]
    assert await world.service() == "on"


async def test_a_domain_holds_eight_vcms(world: World) -> None:
    await world.serving()
    for _ in range(7):
        await create(world)
    with pytest.raises(LimitReached):
        await create(world)
    endpoints = {v.endpoint for v in (await world.vcms()).vcms}
    assert endpoints == {f"https://127.99.2.{slot}:8443" for slot in range(10, 18)}


# -- migration -----------------------------------------------------------------------------------------------------------


async def test_migration_makes_before_it_breaks(world: World) -> None:
    terminal, old = await world.serving()
    source = (await world.detail(old)).vcm.machine
    moved = await world.operator.call("POST", f"/v1/vcms/{old}/migrate", MigrateRequest(), reply=VcmDetail)
    assert moved.vcm.id != old
    assert moved.vcm.machine != source
    assert [e.step for e in moved.trace] == list(range(1, 10))
    assert deletion(await world.detail(old)) == [(s.number, s.actor) for s in DELETION]
    kinds = [type(f) for f in terminal.heard if isinstance(f, ServiceOn | DeletePermit)]
    assert kinds == [ServiceOn, ServiceOn, DeletePermit]
    assert await world.service() == "on"


async def test_limits_outlive_the_vcm_they_were_set_for(world: World) -> None:
    terminal, old = await world.serving()
    second = (await create(world)).vcm.id
    hold = {vcm: VccLimits(weight=weight, keys=5) for vcm, weight in ((old, 2.0), (second, 3.0))}
    for vcm, limits in hold.items():
        shown = await world.operator.call("PUT", f"/v1/vcms/{vcm}/limits", limits, reply=VcmDetail)
        assert shown.limits == limits == world.host(vcm).limits[vcm]
    moved = await world.operator.call("POST", f"/v1/vcms/{old}/migrate", MigrateRequest(), reply=VcmDetail)
    assert moved.limits == hold[old] == world.host(moved.vcm.id).limits[moved.vcm.id]  # its own, not the ones set last
    with pytest.raises(StateConflict):
        await world.operator.call("PUT", f"/v1/vcms/{old}/limits", VccLimits())
    await terminal.pull()
    await world.clean()
    _, new = await world.serving()
    assert (await world.detail(new)).limits == hold[second] == world.host(new).limits[new]  # a pulled Ukey is no way around them


async def test_a_migration_that_fails_leaves_the_old_vcm(world: World) -> None:
    _, old = await world.serving()
    with pytest.raises(MachineUnknown):
        await world.operator.call("POST", f"/v1/vcms/{old}/migrate", MigrateRequest(machine="m9"), reply=VcmDetail)  # type: ignore[arg-type]
    assert (await world.detail(old)).vcm.state is VcmState.SERVING
    assert len((await world.vcms()).vcms) == 1


async def test_only_a_serving_vcm_migrates(world: World) -> None:
    _, vcm = await world.serving()
    await delete(world, vcm)
    with pytest.raises(StateConflict):
        await world.operator.call("POST", f"/v1/vcms/{vcm}/migrate", MigrateRequest(), reply=VcmDetail)
