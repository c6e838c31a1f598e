"""The scheduler's pure functions, by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipherfleet.contract.errors import MachineUnknown, NoCapacity
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.management.inventory import Cause
from cipherfleet.management.scheduler import (
    Build,
    ConsumerView,
    Delete,
    MachineView,
    Sight,
    Snapshot,
    VcmView,
    Withdraw,
    decide,
    plan,
)

machine_ids = st.integers(1, 30).map(lambda n: MachineId(f"m{n}"))
machines = st.builds(MachineView, id=machine_ids, up=st.booleans(), capacity=st.integers(0, 5), load=st.integers(0, 6), card=st.booleans())
snapshots = st.lists(machines, max_size=8, unique_by=lambda m: m.id).map(lambda found: Snapshot(tuple(found)))


def fits(machine: MachineView) -> bool:
    return machine.up and machine.card and machine.load < machine.capacity


@given(snapshots)
def test_the_least_loaded_machine_that_fits_is_taken(snapshot: Snapshot) -> None:
    fitting = [m for m in snapshot.machines if fits(m)]
    if not fitting:
        with pytest.raises(NoCapacity):
            plan(snapshot)
        return
    chosen = next(m for m in snapshot.machines if m.id == plan(snapshot).machine)
    assert fits(chosen)
    assert chosen.load == min(m.load for m in fitting)
    assert int(chosen.id[1:]) == min(int(m.id[1:]) for m in fitting if m.load == chosen.load)


@given(snapshots, st.randoms())
def test_the_order_of_the_machines_plays_no_part(snapshot: Snapshot, random: st.DataObject) -> None:
    shuffled = list(snapshot.machines)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    results = []
    for candidate in (snapshot, Snapshot(tuple(shuffled))):
        try:
            results.append(plan(candidate).machine)
        except NoCapacity:
            results.append(MachineId("none"))
    assert results[0] == results[1]


@given(snapshots, machine_ids)
def test_a_wish_is_a_command(snapshot: Snapshot, wished: MachineId) -> None:
    machine = next((m for m in snapshot.machines if m.id == wished), None)
    if machine is None:
        with pytest.raises(MachineUnknown):
            plan(snapshot, wished)
    elif not fits(machine):
        with pytest.raises(NoCapacity, match=wished):
            plan(snapshot, wished)
    else:
        assert plan(snapshot, wished).machine == wished


@given(snapshots, machine_ids)
def test_what_is_to_be_avoided_is_taken_last(snapshot: Snapshot, avoided: MachineId) -> None:
    fitting = {m.id for m in snapshot.machines if fits(m)}
    if fitting:
        assert (plan(snapshot, avoid=avoided).machine == avoided) == (fitting == {avoided})


def test_what_is_missing_is_said() -> None:
    with pytest.raises(NoCapacity, match="no cipher machine is registered"):
        plan(Snapshot(()))
    m = MachineView
    views = (
        m(MachineId("m1"), False, 4, 0),
        m(MachineId("m2"), True, 4, 4),
        m(MachineId("m3"), True, 4, 0, card=False),
    )
    with pytest.raises(NoCapacity) as caught:
        plan(Snapshot(views))
    assert "down: m1" in caught.value.message
    assert "full: m2 (4 of 4 VCMs)" in caught.value.message
    assert "without a crypto card: m3" in caught.value.message
    assert "--machines" in caught.value.hint


# -- the ring's decisions --------------------------------------------------------------------------------------------------

LEASE_S = 6.0
vcms = st.builds(
    VcmView,
    id=st.integers(0, 15).map(lambda n: VcmId(f"vcm-{n:012x}")),
    state=st.sampled_from([s for s in VcmState if s is not VcmState.DELETED]),
    sight=st.sampled_from(Sight),
    cause=st.none() | st.sampled_from(Cause),
)
consumers = st.builds(
    ConsumerView,
    consumer=st.sampled_from(["a", "b", "c", "d"]).map(ConsumerId),
    wanted=st.booleans(),
    absent_s=st.none() | st.floats(0, 20),
    busy=st.booleans(),
    resting=st.booleans(),
    vcms=st.lists(vcms, max_size=4, unique_by=lambda v: v.id).map(tuple),
)
views = st.lists(consumers, max_size=4, unique_by=lambda c: c.consumer).map(tuple)


@given(views)
def test_decisions_are_those_of_the_rules(all_views: tuple[ConsumerView, ...]) -> None:
    decisions = decide(all_views, LEASE_S)
    for view in all_views:
        mine = [d for d in decisions if d.consumer == view.consumer]
        if view.busy:
            assert mine == []
            continue
        lost = view.absent_s is not None and view.absent_s >= LEASE_S
        deleted = {d.vcm: d.cause for d in mine if isinstance(d, Delete)}
        assert (Withdraw(view.consumer) in mine) == (lost and view.wanted)
        for vcm in view.vcms:
            well = vcm.state is VcmState.SERVING and vcm.sight is not Sight.FAILED
            stays = well and view.wanted and not lost
            assert (vcm.id not in deleted) == stays
            if vcm.state is VcmState.DELETING and vcm.cause is not None:
                assert deleted[vcm.id] is vcm.cause  # what was begun for a reason goes on for it
        nothing_left = len(deleted) == len(view.vcms)
        build = view.wanted and view.absent_s is None and nothing_left and not view.resting
        assert (Build(view.consumer) in mine) == build
    assert len(decisions) == len(set(decisions))


@given(views)
def test_without_a_terminal_nothing_is_built(all_views: tuple[ConsumerView, ...]) -> None:
    away = tuple(ConsumerView(v.consumer, v.wanted, 0.0, v.busy, v.resting, v.vcms) for v in all_views)
    assert not [d for d in decide(away, LEASE_S) if isinstance(d, Build)]
