"""The paper's Figure 8: the throughput of VCMs' crypto cards by block size, beside the same work done on the host.

Every place has the same queue of tasks (see ``task_queue``). All places of one operation and block size are measured one right
after the other, in an order that rotates.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

from cipherfleet.app import output
from cipherfleet.app.bench import openssl
from cipherfleet.app.bench.card_rig import CardRig, Load, card_rig, measure
from cipherfleet.app.bench.report import Row
from cipherfleet.app.bench.samples import Sample, ratio, sample
from cipherfleet.app.bench.task_queue import DEPTH

OPERATIONS = ("null", "aes-256-gcm", "aes-256-cbc", "sha-256")
SIZES = (16, 64, 256, 1024, 4096, 16 * 1024, 64 * 1024, 256 * 1024, 1024 * 1024)
PLACES = ("vcm", "host", "engine", "direct", "openssl")
OPENSSL_RATIOS = (64 * 1024, 1024 * 1024)


class Plan(NamedTuple):
    """``openssl_sizes``: where openssl, which takes a second each time, takes part."""

    vcms: int
    rounds: int
    slice_s: float
    lead_s: float
    openssl_sizes: tuple[int, ...]


FULL = Plan(40, 7, 0.25, 0.06, SIZES)
QUICK = Plan(8, 2, 0.05, 0.02, OPENSSL_RATIOS)


class Measured(NamedTuple):
    samples: list[Sample]
    about: dict[str, object]


async def figure8(plan: Plan, *, quiet: bool) -> Measured:
    yardstick = await openssl.version()
    async with card_rig(plan.vcms, quiet=quiet) as rig:
        samples: list[Sample] = []
        points = [(operation, size) for operation in OPERATIONS for size in SIZES]
        with output.steps("measuring", plan.rounds * len(points), quiet=quiet) as step:
            for number in range(plan.rounds):
                for index, (operation, size) in enumerate(points):
                    step(f"round {number + 1}, {operation}, {size} bytes")
                    point = _Point(rig, plan, number, operation, size, speed=bool(yardstick) and size in plan.openssl_sizes)
                    samples += await point.measure(number + index)
    samples.sort(key=lambda s: (OPERATIONS.index(s.operation), s.size, PLACES.index(s.where), s.vcms))
    return Measured(samples, {"depth": DEPTH, "launcher": rig.launcher, "openssl": yardstick or "not installed, left out"})


class _Point:
    """One operation and block size in one round, at every place."""

    def __init__(self, rig: CardRig, plan: Plan, number: int, operation: str, size: int, *, speed: bool) -> None:
        self._plan, self._number, self._operation, self._size = plan, number, operation, size
        self._loads = {
            ("vcm", 1): [Load(rig.vcms[0], operation, size)],
            ("vcm", plan.vcms): [Load(vcm, operation, size) for vcm in rig.vcms],
            ("host", 1): [Load(rig.host, operation, size)],
            ("engine", 1): [Load(rig.engine, operation, size)],
            ("direct", 1): [Load(rig.engine, operation, size, direct=True)],
        }
        self._speed = speed and operation in openssl.NAMES

    async def measure(self, turn: int) -> list[Sample]:
        """``turn``: which place is first."""
        jobs: list[Callable[[], Awaitable[Sample | None]]] = [partial(self._place, *place) for place in self._loads]
        if self._speed:
            jobs.append(self._openssl)
        turn %= len(jobs)
        return [found for job in (*jobs[turn:], *jobs[:turn]) if (found := await job()) is not None]

    async def _place(self, where: str, vcms: int) -> Sample:
        counted = await measure(self._loads[where, vcms], self._plan.slice_s, self._plan.lead_s)
        return sample(self._number, self._operation, self._size, where, counted, self._plan.slice_s, vcms=vcms)

    async def _openssl(self) -> Sample | None:
        bytes_s = await openssl.speed(self._operation, self._size)
        if bytes_s is None:
            return None
        return Sample(self._number, self._operation, self._size, 1, "openssl", bytes_s / self._size)


def ratios(samples: list[Sample]) -> list[Row]:
    """VCMs, one and all, against every other place."""
    found: list[Row] = []
    for other in ("host", "openssl", "engine", "direct"):
        for operation, size, vcms in dict.fromkeys((s.operation, s.size, s.vcms) for s in samples if s.where == "vcm"):
            if other == "openssl" and size not in OPENSSL_RATIOS:
                continue
            here = [s for s in samples if (s.operation, s.size) == (operation, size)]
            over = [s for s in here if (s.where, s.vcms) == ("vcm", vcms)]
            found += ratio(f"vcm/{other}", over, [s for s in here if s.where == other])
    return found
