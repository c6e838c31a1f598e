"""What the ring does by itself, and what terminals may and may not do."""

import asyncio
import time
from pathlib import Path

import pytest

from cipherfleet.channel.signing import sign
from cipherfleet.contract.errors import ChallengeUnknown
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.lifecycle import DELETION, Actor, Process
from cipherfleet.contract.machine_api import VcmReport, VcmState
from cipherfleet.contract.management_api import (
    DeletePermit,
    FlowFailed,
    IdentityAnswered,
    IdentityWanted,
    Inserted,
    LoggedIn,
    LoginPermit,
    ServiceOn,
    VcmCreateRequest,
    VcmDetail,
)
from cipherfleet.contract.statements import IdentityRequest
from cipherfleet.management.inventory import VcmRecord
from cipherfleet.management.store import Store
from tests.unit.management.world import ACME, BOLT, QUICK, SETTINGS, UKEYS, World, until, world_in


async def create(world: World, machine: str | None = None) -> VcmDetail:
    request = VcmCreateRequest(ACME, machine)  # type: ignore[arg-type]
    return await world.operator.call("POST", "/v1/vcms", request, reply=VcmDetail)


def deletion(detail: VcmDetail) -> list[tuple[int, str]]:
    return [(e.step, e.actor) for e in detail.trace if e.process is Process.DELETE]


def actors(stand_in: Actor) -> list[tuple[int, str]]:
    return [(s.number, stand_in if s.actor is Actor.TERMINAL else s.actor) for s in DELETION]


# -- the ring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["failed", "forgotten"])
async def test_a_failed_vcm_is_replaced_while_the_ukey_is_in(world: World, loss: str) -> None:
    terminal, vcm = await world.serving()
    if loss == "failed":
        world.host(vcm).set_state(vcm, VcmState.FAILED, "killed")
    else:
        del world.host(vcm).vcms[vcm]
    new = (await terminal.service(2)).vcm
    assert new != vcm
    assert deletion(await world.detail(vcm)) == actors(Actor.SCHEDULER)
    assert not [f for f in terminal.heard if isinstance(f, DeletePermit)]  # service goes on


async def test_a_creation_that_ends_while_the_ring_reads_is_no_interrupted_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, _ = await world.serving()
    stale, finished = asyncio.Event(), asyncio.Event()
    real = Store.vcms

    async def slow(store: Store, *, consumer: ConsumerId | None = None) -> list[VcmRecord]:
        found = await real(store, consumer=consumer)
        if not finished.is_set() and any(v.state is VcmState.PREPARING for v in found) and consumer is None:
            stale.set()
            await finished.wait()
        return found

    terminal.mute.add(LoginPermit)
    creation = asyncio.create_task(create(world))
    permit = await terminal.wait_for(LoginPermit, 2)
    monkeypatch.setattr(Store, "vcms", slow)
    await asyncio.wait_for(stale.wait(), 5)
    world.bring_up(permit.vcm)
    assert terminal.frames is not None
    await terminal.frames.send(LoggedIn(permit.vcm))
    created = (await creation).vcm.id
    finished.set()
    for _ in range(5):
        polls = world.machines[0].calls["status"]
        await until(lambda polls=polls: _polled(world, polls))  # type: ignore[misc]
    detail = await world.detail(created)
    assert (detail.vcm.state, deletion(detail)) == (VcmState.SERVING, [])


async def _polled(world: World, since: int) -> bool:
    return world.machines[0].calls["status"] > since


async def test_a_creation_that_failed_is_tried_again_after_a_rest(quick: World) -> None:
    for machine in quick.machines:
        machine.card = False

    async def seen() -> bool:
        return all(m.card is None for m in (await quick.status()).machines)

    await until(seen)
    terminal = quick.terminal()
    await terminal.plug_in()
    failed = await terminal.wait_for(FlowFailed)
    assert failed.code == "no-capacity"
    for machine in quick.machines:
        machine.card = True
    assert isinstance(await terminal.wait_for(ServiceOn), ServiceOn)
    assert len((await quick.vcms(everything=True)).vcms) < 12  # it rested in between


async def test_an_instance_that_nobody_ordered_is_deleted(world: World) -> None:
    stranger = VcmId("vcm-000000000000")
    world.machines[0].vcms[stranger] = VcmReport(stranger, ACME, VcmState.PREPARING, 1)

    async def gone() -> bool:
        return not world.machines[0].vcms

    await until(gone)


async def test_a_machine_silent_for_more_than_three_polls_is_down_and_up_again(quick: World) -> None:
    await quick.machines[1].stop()

    async def down() -> bool:
        return [m.state for m in (await quick.status()).machines] == ["up", "down"]

    await until(down)
    _, vcm = await quick.serving()
    assert (await quick.detail(vcm)).vcm.machine == "m1"
    await quick.machines[1].start()

    async def up() -> bool:
        return [m.state for m in (await quick.status()).machines] == ["up", "up"]

    await until(up)


async def test_a_poll_that_answers_for_another_machine_is_not_believed(quick: World) -> None:
    first, second = quick.machines
    first.id, second.id = second.id, first.id

    async def down() -> bool:
        return all(m.state == "down" for m in (await quick.status()).machines)

    await until(down)


# -- terminals -----------------------------------------------------------------------------------------------------------


async def test_a_second_terminal_replaces_the_first(world: World) -> None:
    first, vcm = await world.serving()
    second = world.terminal()
    await second.plug_in()
    assert (await second.service()).vcm == vcm
    assert (await first.wait_for(FlowFailed)).code == "already-running"
    async with asyncio.timeout(2):
        await first.ended.wait()
    await asyncio.sleep(SETTINGS.lease_s * 1.5)  # the first one's end is not the second one's
    assert await world.service() == "on"


async def test_a_terminal_that_asks_twice_has_one_vcm(world: World) -> None:
    terminal, vcm = await world.serving()
    assert terminal.frames is not None
    await terminal.frames.send(Inserted())
    assert (await terminal.service(2)).vcm == vcm
    assert len((await world.vcms(everything=True)).vcms) == 1


async def test_an_answer_to_an_old_challenge_is_refused(world: World) -> None:
    terminal = world.terminal()
    answers: list[IdentityAnswered] = []

    async def replay(frame: IdentityWanted) -> IdentityAnswered:
        answers.append(await terminal.prove(frame))
        return answers[0]

    terminal.answers[IdentityWanted] = replay
    await terminal.plug_in()
    await terminal.service()
    world.kmc.calls.clear()
    with pytest.raises(ChallengeUnknown):
        await create(world)
    assert world.kmc.calls["verify"] == 0


@pytest.mark.parametrize("consumer", [ACME, BOLT])
async def test_an_answer_with_another_ukey_is_refused(world: World, consumer: str) -> None:
    terminal = world.terminal(ACME)

    async def forge(frame: IdentityWanted) -> IdentityAnswered:
        return IdentityAnswered(await sign(IdentityRequest(ConsumerId(consumer), frame.nonce, frame.purpose, frame.vcm), UKEYS[BOLT]))

    terminal.answers[IdentityWanted] = forge
    await terminal.plug_in()
    failed = await terminal.wait_for(FlowFailed)
    assert failed.code == ("foreign-consumer" if consumer == BOLT else "statement-forged")
    await terminal.pull()
    await world.clean()


async def test_steps_have_a_limit(tmp_path: Path) -> None:
    async with world_in(tmp_path / "m", QUICK) as world:
        terminal = world.terminal()
        terminal.mute.add(IdentityWanted)
        began = time.monotonic()
        await terminal.plug_in()
        assert (await terminal.wait_for(FlowFailed)).code == "timed-out"
        assert time.monotonic() - began >= QUICK.step_s
