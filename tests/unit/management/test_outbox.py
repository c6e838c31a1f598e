"""What was decided reaches the KMC's log once and in its order, whoever ends or is away meanwhile."""

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cipherfleet.contract.errors import FileProblem, NotPermitted, OutOfOrder
from cipherfleet.contract.ids import ConsumerId, new_vcm_id
from cipherfleet.contract.management_api import MigrateRequest, VcmDetail
from cipherfleet.contract.vcc import VccLimits
from cipherfleet.management import outbox
from cipherfleet.management.outbox import Decision
from cipherfleet.management.recovery import void_past
from cipherfleet.management.schema import FILE, MIGRATIONS
from cipherfleet.management.store import Store
from cipherfleet.state.database import Database
from tests.unit.management.world import ACME, World, until

NAME_OF = {"domain-allotted": "domain", "machine-registered": "machine"}


def told(world: World, consumer: str = ACME) -> list[tuple[str, str]]:
    """Event and whose will, of a consumer, without what the setting up made."""
    return [(e.event, e.by) for e in world.kmc.log if e.consumer == consumer and e.event not in NAME_OF]


async def until_told(world: World, *events: tuple[str, str]) -> None:
    async def all_there() -> bool:
        return told(world) == list(events)

    await until(all_there, lambda: f"told: {told(world)}")
    numbers = [e.number for e in world.kmc.log]
    assert numbers == list(range(1, len(numbers) + 1))


async def until_delivered(world: World) -> None:
    async def empty() -> bool:
        return waiting(world.state) == 0

    await until(empty)


def waiting(state: Path) -> int:
    connection = sqlite3.connect(f"file:{state / FILE}?mode=ro", uri=True)
    try:
        return int(connection.execute("SELECT count(*) FROM outbox").fetchone()[0])
    finally:
        connection.close()


async def test_a_life_is_told(world: World) -> None:
    _, vcm = await world.serving()
    await world.operator.call("PUT", f"/v1/vcms/{vcm}/limits", VccLimits(keys=3), reply=VcmDetail)
    new = await world.operator.call("POST", f"/v1/vcms/{vcm}/migrate", MigrateRequest(), reply=VcmDetail)
    await world.operator.call("DELETE", f"/v1/vcms/{new.vcm.id}?force=1", reply=VcmDetail)
    await until_told(
        world,
        ("vcm-ordered", "consumer"),
        ("vcm-limits-set", "operator"),
        ("vcm-migration-ordered", "operator"),
        ("vcm-deletion-ordered", "consumer"),
        ("vcm-deleted", "management"),
        ("vcm-deletion-ordered", "operator"),
        ("vcm-deleted", "management"),
    )
    by_event = {e.event: e.subject for e in world.kmc.log}
    assert by_event["vcm-limits-set"].startswith(f"{vcm}: ")
    assert "keys 3" in by_event["vcm-limits-set"]
    assert by_event["vcm-migration-ordered"] == f"{new.vcm.id} in the place of {vcm}"
    assert by_event["vcm-deletion-ordered"] == f"{new.vcm.id}: operator"
    assert [e.event for e in world.kmc.log if not e.consumer] == ["machine-registered"] * len(world.machines)
    await until_delivered(world)


async def test_a_creation_that_fails_and_a_deletion_that_is_refused_are_told(world: World) -> None:
    async def refuse() -> None:
        raise NotPermitted("the fake refuses")

    for machine in world.machines:
        machine.before["build"] = refuse
    await world.terminal().plug_in()

    async def failed() -> bool:
        return ("vcm-deleted", "management") in told(world)

    await until(failed)
    assert told(world)[:3] == [("vcm-ordered", "consumer"), ("vcm-failed", "management"), ("vcm-deleted", "management")]
    assert next(e.outcome for e in world.kmc.log if e.event == "vcm-failed") == NotPermitted.code
    for machine in world.machines:
        machine.well()
    terminal, vcm = await world.serving()
    world.kmc.before["verify"] = refuse
    with pytest.raises(NotPermitted):
        await world.operator.call("DELETE", f"/v1/vcms/{vcm}", reply=VcmDetail)
    await terminal.end()

    async def refused() -> bool:
        return any((e.event, e.subject, e.outcome) == ("vcm-deletion-refused", vcm, NotPermitted.code) for e in world.kmc.log)

    await until(refused)


async def test_the_kmc_is_down_and_comes_back(world: World) -> None:
    _, vcm = await world.serving()
    await until_told(world, ("vcm-ordered", "consumer"))
    world.kmc.before["events"] = world.kmc.die
    await world.operator.call("PUT", f"/v1/vcms/{vcm}/limits", VccLimits(keys=3), reply=VcmDetail)

    async def dead() -> bool:
        return not world.kmc.alive

    await until(dead)
    await world.operator.call("PUT", f"/v1/vcms/{vcm}/limits", VccLimits(keys=4), reply=VcmDetail)
    assert waiting(world.state) >= 2
    world.kmc.well()
    await world.kmc.start()
    await until_told(world, ("vcm-ordered", "consumer"), ("vcm-limits-set", "operator"), ("vcm-limits-set", "operator"))
    subjects = [e.subject for e in world.kmc.log if e.event == "vcm-limits-set"]
    assert "keys 3" in subjects[0]
    assert "keys 4" in subjects[1]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_killed_between_decision_and_delivery(world: World, when: str) -> None:
    """``before`` the KMC has it, or ``after``, when only the mark is missing: the next life tells it, and it counts once."""
    _, vcm = await world.serving()
    await until_told(world, ("vcm-ordered", "consumer"))
    await until_delivered(world)
    getattr(world.kmc, when)["events"] = world.kmc.hang
    await world.operator.call("PUT", f"/v1/vcms/{vcm}/limits", VccLimits(keys=3), reply=VcmDetail)
    async with asyncio.timeout(5):
        await world.kmc.hanging.wait()
    assert len(told(world)) == (1 if when == "before" else 2)
    await world.kill_management()
    assert waiting(world.state) == 1
    world.kmc.well()
    already = len(world.kmc.batches)
    await world.start_management()
    await until_told(world, ("vcm-ordered", "consumer"), ("vcm-limits-set", "operator"))
    await until_delivered(world)
    assert len(world.kmc.batches) == already + 1  # told again, whether or not it was there
    assert world.kmc.batches[-1].outbox == world.kmc.batches[0].outbox


async def test_a_kmc_that_knows_another_past_gets_a_new_outbox(world: World) -> None:
    _, vcm = await world.serving()
    await until_told(world, ("vcm-ordered", "consumer"))
    await until_delivered(world)

    async def refuse() -> None:
        world.kmc.before.clear()
        raise OutOfOrder("event 1 comes next")

    world.kmc.before["events"] = refuse
    await world.operator.call("PUT", f"/v1/vcms/{vcm}/limits", VccLimits(keys=3), reply=VcmDetail)
    await until_told(world, ("vcm-ordered", "consumer"), ("vcm-limits-set", "operator"))
    assert len({b.outbox for b in world.kmc.batches}) == 2


# -- the outbox by itself ----------------------------------------------------------------------------------------------


def decide(number: int) -> Callable[..., None]:
    return lambda connection: outbox.enqueue(connection, Decision("vcm-ordered", "acme", "operator", str(number)))


async def test_numbers_are_never_given_twice(tmp_path: Path) -> None:
    database = Database.open(tmp_path, FILE, MIGRATIONS)
    try:
        for number in (1, 2):
            await database.write(decide(number))
            batch = await database.read(outbox.waiting)
            assert batch is not None
            assert [(e.number, e.subject) for e in batch.events] == [(number, str(number))]
            await database.write(partial(outbox.delivered, last=number))
            name = batch.outbox
        assert await database.read(outbox.waiting) is None
        await database.write(lambda connection: void_past(connection, at=0.0))
        await database.write(decide(3))
        renewed = await database.read(outbox.waiting)
        assert renewed is not None
        assert (renewed.outbox != name, renewed.events[0].number) == (True, 3)
    finally:
        await database.close()


async def test_a_decision_that_is_not_committed_is_not_told(tmp_path: Path) -> None:
    store = await asyncio.to_thread(Store.open, tmp_path)
    try:
        with pytest.raises(FileProblem):
            await store.add_vcm(new_vcm_id(), ConsumerId("nobody"), by="operator")
        assert await store.waiting_events() is None
        assert not store.decided.is_set()
    finally:
        await store.close()


async def test_the_backlog_is_bounded_and_what_was_dropped_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING", 5)
    database = Database.open(tmp_path, FILE, MIGRATIONS)
    try:
        for number in range(1, 9):
            await database.write(decide(number))
        batch = await database.read(outbox.waiting)
        assert batch is not None
        kept = len(batch.events)
        assert kept <= 5
        await database.write(lambda connection: outbox.delivered(connection, kept))
        await database.write(decide(9))
        batch = await database.read(outbox.waiting)
        assert batch is not None
        said = [(e.number, e.event, e.subject) for e in batch.events]
        assert said == [(kept + 1, "events-dropped", str(8 - kept)), (kept + 2, "vcm-ordered", "9")]
    finally:
        await database.close()


async def test_what_does_not_fit_an_event_is_cut(tmp_path: Path) -> None:
    database = Database.open(tmp_path, FILE, MIGRATIONS)
    try:
        await database.write(
            lambda connection: outbox.enqueue(connection, Decision("machine-registered", "", "operator", "m1\x1b\n" + "x" * 300))
        )
        batch = await database.read(outbox.waiting)  # decoded as strictly as at the KMC
        assert batch is not None
        assert batch.events[0].subject == "m1??" + "x" * 196
    finally:
        await database.close()
