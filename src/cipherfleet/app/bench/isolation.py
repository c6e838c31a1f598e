"""What a VCM that floods the card costs one that asks little of it, and how two that flood share the card.

The quiet VCM is also measured twice without the flood: how far these two are apart is what the host's own noise makes.
"""

from typing import NamedTuple

from cipherfleet.app import output
from cipherfleet.app.bench.card_rig import Load, card_rig, measure
from cipherfleet.app.bench.report import Row
from cipherfleet.app.bench.samples import Sample, ratio, sample

OPERATION = "aes-256-gcm"
FLOOD_BYTES, QUIET_BYTES = 1024 * 1024, 64
QUIET_MEAN_S = 0.01
LEAD_S = 0.1
ALONE, AGAIN, FLOODED, SHARED, WEIGHTED = "alone", "alone again", "beside a flood", "beside its equal", "beside weight 3"
WEIGHT = 3.0


class Plan(NamedTuple):
    rounds: int
    slice_s: float


FULL = Plan(15, 2.0)
QUICK = Plan(5, 0.5)


async def isolation(plan: Plan, *, quiet: bool) -> tuple[list[Sample], dict[str, object]]:
    async with card_rig(3, quiet=quiet, weights={2: WEIGHT}) as rig:
        small = Load(rig.vcms[0], OPERATION, QUIET_BYTES, QUIET_MEAN_S)
        first, second, heavy = (Load(vcm, OPERATION, FLOOD_BYTES) for vcm in rig.vcms)
        loads = {FLOODED: [small, second], ALONE: [small], AGAIN: [small], SHARED: [first, second], WEIGHTED: [first, heavy]}
        samples: list[Sample] = []
        with output.steps("measuring", plan.rounds * len(loads), quiet=quiet) as step:
            for number in range(plan.rounds):
                places = list(loads)
                for where in places[number % len(places) :] + places[: number % len(places)]:
                    step(f"round {number + 1}, {where}")
                    counted = await measure(loads[where], plan.slice_s, LEAD_S)
                    names = ("first", "second") if where in (SHARED, WEIGHTED) else ("quiet", "flood")
                    for name, load, one in zip(names, loads[where], counted, strict=False):
                        samples.append(sample(number, name, load.size, where, [one], plan.slice_s, vcms=len(counted)))
        return samples, {"launcher": rig.launcher}


def ratios(samples: list[Sample]) -> list[Row]:
    """Latencies of the quiet VCM, and the shares of two equal ones."""

    def at(operation: str, where: str) -> list[Sample]:
        return [s for s in samples if (s.operation, s.where) == (operation, where)]

    found: list[Row] = []
    for where in (FLOODED, AGAIN):
        over, under = at("quiet", where), at("quiet", ALONE)
        found += ratio(f"p50 {where}/{ALONE}", over, under, lambda s: s.p50_us)
        found += ratio(f"p99 {where}/{ALONE}", over, under, lambda s: s.p99_us)
    found += ratio("share of equals", at("first", SHARED), at("second", SHARED))
    return found + ratio("share of weight 3", at("second", WEIGHTED), at("first", WEIGHTED))
