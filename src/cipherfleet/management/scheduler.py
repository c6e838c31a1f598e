"""The VCM scheduler: pure functions from what is seen to what is to be done (flow steps c, d and i)."""

from enum import StrEnum

import msgspec

from cipherfleet.contract.errors import MachineUnknown, NoCapacity
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.management.inventory import Cause


class MachineView(msgspec.Struct, frozen=True):
    """One cipher machine. ``capacity`` and ``load`` in VCMs; ``card``: it has a crypto card that answers."""

    id: MachineId
    up: bool
    capacity: int
    load: int
    card: bool = True


class Snapshot(msgspec.Struct, frozen=True):
    machines: tuple[MachineView, ...]


class Plan(msgspec.Struct, frozen=True):
    machine: MachineId


def plan(snapshot: Snapshot, wished: MachineId | None = None, avoid: MachineId | None = None) -> Plan:
    """First placement: the least loaded machine that is up, has a card and a free place; ties by id.

    ``wished`` leaves no choice, ``avoid`` is taken only when nothing else fits. Raises ``MachineUnknown``, or ``NoCapacity``
    that says what is missing.
    """
    candidates = snapshot.machines
    if wished is not None:
        candidates = tuple(m for m in candidates if m.id == wished)
        if not candidates:
            raise MachineUnknown(f"there is no cipher machine {wished}", "see: cipherfleet status")
    fitting = [m for m in candidates if m.up and m.card and m.load < m.capacity]
    if not fitting:
        raise NoCapacity(_missing(candidates), "start more with: cipherfleet up --machines N")
    best = min(fitting, key=lambda m: (m.id == avoid, m.load, len(m.id), m.id))
    return Plan(best.id)


def _missing(machines: tuple[MachineView, ...]) -> str:
    if not machines:
        return "no cipher machine is registered"
    reasons = []
    if down := [m.id for m in machines if not m.up]:
        reasons.append(f"down: {', '.join(down)}")
    if bare := [m.id for m in machines if m.up and not m.card]:
        reasons.append(f"without a crypto card: {', '.join(bare)}")
    if full := [f"{m.id} ({m.load} of {m.capacity} VCMs)" for m in machines if m.up and m.card]:
        reasons.append(f"full: {', '.join(full)}")
    return f"no cipher machine can take a VCM; {'; '.join(reasons)}"


class Sight(StrEnum):
    """What the monitor saw of a VCM since it was last changed."""

    UNKNOWN = "unknown"  # nothing yet
    WELL = "well"
    FAILED = "failed"  # the machine says so, does not know it, or is down


class VcmView(msgspec.Struct, frozen=True):
    id: VcmId
    state: VcmState
    sight: Sight = Sight.UNKNOWN
    cause: Cause | None = None


class ConsumerView(msgspec.Struct, frozen=True):
    """One consumer. ``absent_s``: how long its terminal has been away, none while it is there; ``busy``: a run is under way;
    ``resting``: too soon after a failed creation for another."""

    consumer: ConsumerId
    wanted: bool
    absent_s: float | None
    busy: bool
    resting: bool
    vcms: tuple[VcmView, ...]


class Delete(msgspec.Struct, frozen=True):
    consumer: ConsumerId
    vcm: VcmId
    cause: Cause


class Build(msgspec.Struct, frozen=True):
    consumer: ConsumerId


class Withdraw(msgspec.Struct, frozen=True):
    """Service ends: the terminal stayed away longer than the lease."""

    consumer: ConsumerId


Decision = Delete | Build | Withdraw


def decide(consumers: tuple[ConsumerView, ...], lease_s: float) -> tuple[Decision, ...]:
    """The ring's decisions (flow step i), for consumers with no run under way."""
    decisions: list[Decision] = []
    for view in consumers:
        if view.busy:
            continue
        lost = view.absent_s is not None and view.absent_s >= lease_s
        if lost and view.wanted:
            decisions.append(Withdraw(view.consumer))
        in_service = view.wanted and not lost
        doomed = [Delete(view.consumer, vcm.id, cause) for vcm in view.vcms if (cause := _verdict(vcm, in_service)) is not None]
        decisions += doomed
        if in_service and view.absent_s is None and len(doomed) == len(view.vcms) and not view.resting:
            decisions.append(Build(view.consumer))
    return tuple(decisions)


def _verdict(vcm: VcmView, in_service: bool) -> Cause | None:
    """Why this VCM is to go, none if it stays."""
    if vcm.state is VcmState.DELETING:
        return vcm.cause or Cause.SCHEDULER
    if not in_service:
        return Cause.REMOVAL
    if vcm.state is not VcmState.SERVING or vcm.sight is Sight.FAILED:
        return Cause.SCHEDULER  # not busy, and yet not serving: a run was interrupted
    return None
