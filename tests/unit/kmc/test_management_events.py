"""What the management platform says it decided: only that, only from it, each once and in its order."""

import time
from typing import Any

import msgspec
import pytest

from cipherfleet.contract.audit import MAX_EVENTS, AuditEntry, AuditLog, AuditQuery, ManagementEvent, ManagementEvents, verify_audit
from cipherfleet.contract.audit_events import KEY_EVENTS, PLATFORM_EVENTS
from cipherfleet.contract.errors import CipherfleetError, LimitReached, Malformed, NotPermitted, OutOfOrder
from cipherfleet.kmc import audit, management_events
from cipherfleet.kmc.recovery import void_past
from tests.unit.kmc.world import World, start_vcm

BOX, OTHER = "a" * 32, "b" * 32
VCM = "vcm-000000000000"


def event(number: int, **fields: Any) -> ManagementEvent:
    plain = ManagementEvent(number, time.time(), "alice", "operator", "vcm-ordered", f"{VCM} {number}")
    return msgspec.structs.replace(plain, **fields)


def batch(*numbers: int, box: str = BOX, **fields: Any) -> ManagementEvents:
    return ManagementEvents(box, tuple(event(number, **fields) for number in numbers))


async def tell(world: World, events: ManagementEvents) -> None:
    await (await world.management()).call("POST", "/v1/audit/events", events)


async def told(world: World, consumer: str = "alice", name: str = "vcm-ordered") -> list[AuditEntry]:
    log = await (await world.operator()).call("GET", AuditQuery(consumer).path, reply=AuditLog)
    verify_audit(log.entries)
    return [entry for entry in log.entries if entry.event == name]


async def test_decisions_are_in_the_consumers_log_and_the_rest_in_the_operators(world: World) -> None:
    await world.enrol()
    await tell(
        world,
        ManagementEvents(
            BOX,
            (
                event(1),
                event(2, event="vcm-failed", by="management", outcome="no-capacity"),
                event(3, consumer="", event="machine-registered", subject="m1 at https://a"),
                event(4, consumer="nobody"),
                event(5, event="vcm-limits-set", subject=f"{VCM}: keys 3"),
            ),
        ),
    )
    (ordered,), (failed,), (limited,) = [await told(world, name=name) for name in ("vcm-ordered", "vcm-failed", "vcm-limits-set")]
    assert (ordered.actor, ordered.subject, ordered.outcome) == ("cipherfleet:management/-/management for operator", f"{VCM} 1", "ok")
    assert (failed.actor, failed.outcome) == ("cipherfleet:management/-/management for management", "no-capacity")
    assert limited.subject == f"{VCM}: keys 3"
    assert [e.subject for e in await told(world, "-", "machine-registered")] == ["m1 at https://a"]
    assert [e.subject for e in await told(world, "-")] == [f"nobody: {VCM} 4"]
    (began,) = await told(world, "-", "management-events-began")
    assert began.subject == f"{BOX} at event 1"


async def test_what_comes_twice_counts_once_and_a_gap_or_the_past_is_refused(world: World) -> None:
    await world.enrol()
    for events in (batch(1, 2), batch(1, 2), batch(1, 2, 3), batch(3, 4)):
        await tell(world, events)
    assert [e.subject for e in await told(world)] == [f"{VCM} {n}" for n in (1, 2, 3, 4)]
    for events in (batch(6), batch(1, 2), batch(6, 5), batch(5, 5), batch(5, 7), batch(3, 4, 4, 5)):
        with pytest.raises(OutOfOrder):
            await tell(world, events)
    await world.restart()
    await tell(world, batch(3, 4, 5))
    assert [e.subject for e in await told(world)] == [f"{VCM} {n}" for n in range(1, 6)]


async def test_a_new_outbox_begins_where_it_says_and_that_is_told(world: World) -> None:
    await world.enrol()
    await tell(world, batch(1, 2))
    await tell(world, batch(2, 3, box=OTHER))  # management was restored: another event 2
    with pytest.raises(OutOfOrder):
        await tell(world, batch(7, box=OTHER))
    assert [e.subject for e in await told(world, "-", "management-events-began")] == [f"{BOX} at event 1", f"{OTHER} at event 2"]
    await world.center.database.write(lambda connection: void_past(connection, at=0.0, made_at=0.0))
    await tell(world, batch(9, box=OTHER))  # the KMC was restored


@pytest.mark.parametrize("name", ["made-up", *sorted(PLATFORM_EVENTS)[:3], *sorted(KEY_EVENTS)[:3], "data-encrypt"])
async def test_management_has_no_other_kinds_of_event(world: World, name: str) -> None:
    await world.enrol()
    with pytest.raises(Malformed, match="no event of the management platform"):
        await tell(world, ManagementEvents(BOX, (event(1), event(2, event=name))))
    assert await told(world) == []
    await tell(world, batch(1))  # none of it was taken


@pytest.mark.parametrize(
    "fields",
    [
        {"subject": "x" * 201},
        {"subject": "a\x1b[2J"},
        {"consumer": "UPPER"},
        {"consumer": "-"},
        {"by": "alice"},
        {"event": "x" * 65},
        {"outcome": "a b"},
        {"outcome": ""},
        {"at": -1.0},
    ],
)
async def test_malformed_events(world: World, fields: dict[str, Any]) -> None:
    await world.enrol()
    with pytest.raises(Malformed):
        await tell(world, batch(1, **fields))
    with pytest.raises(Malformed):
        await tell(world, batch(0))
    assert await told(world) == []


async def test_sizes_and_rates_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.enrol()
    for wrong in (batch(*range(1, MAX_EVENTS + 2)), ManagementEvents(BOX, ()), batch(1, box="short")):
        with pytest.raises(Malformed):
            await tell(world, wrong)
    widest = "é" * 200
    await tell(world, batch(*range(1, MAX_EVENTS + 1), subject=widest))
    assert {e.subject for e in await told(world)} == {widest}
    monkeypatch.setattr(world.kmc.events._pace, "_burst", MAX_EVENTS)
    with pytest.raises(LimitReached):
        for round_ in range(1, 3 + management_events.EVENTS_BURST // MAX_EVENTS):
            await tell(world, batch(*range(round_ * MAX_EVENTS + 1, (round_ + 1) * MAX_EVENTS + 1)))


async def test_nobody_else_speaks_for_management(world: World) -> None:
    alice = await world.enrol()
    vcm = await start_vcm(world, alice, await alice.plug_in())
    for caller in (await world.operator(), await world.machine(), vcm.caller, alice.terminal()):
        with pytest.raises(NotPermitted):
            await caller.call("POST", "/v1/audit/events", batch(1))
    assert await told(world) == []


@pytest.mark.parametrize("at", [0.0, 2.0**40, 1e300])
async def test_a_time_that_cannot_be_is_the_kmcs_own(world: World, at: float) -> None:
    await world.enrol()
    began = world.center.wall_clock()
    await tell(world, batch(1, at=at, subject="x" * 200))
    (entry,) = await told(world)
    assert began <= entry.at <= world.center.wall_clock()
    assert " (decided at " in entry.subject
    assert len(entry.subject) == 200


async def test_a_commit_that_fails_takes_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.enrol()

    def full(*args: object) -> None:
        raise CipherfleetError("no")

    with monkeypatch.context() as patch:
        patch.setattr(audit, "append_all", full)
        with pytest.raises(CipherfleetError):
            await tell(world, batch(1, 2))
    await tell(world, batch(1, 2))
    assert [e.subject for e in await told(world)] == [f"{VCM} 1", f"{VCM} 2"]
