"""The queue of tasks that every place of a measurement works off, and what a slice of it came to.

Tasks arrive as a Poisson process, and at most ``depth`` are in flight; who comes while so many are waits outside. With a mean
between arrivals far below what a task takes, the queue is never empty: the load is closed at ``depth``, which shows the throughput
of the saturated place. With a mean far above it, nearly every task is alone, which shows what one task takes.
"""

import random
import time
from array import array

import msgspec

DEPTH = 16
SATURATED_S = 1e-6
QUANTILES = 400
"""How many latencies of a slice are told, evenly spaced over all of them in their order."""


class Slice(msgspec.Struct, frozen=True):
    """What to do for how long; ``begins`` and ``ends`` are by ``CLOCK_MONOTONIC``, which all processes of a host share."""

    operation: str  # null | aes-256-gcm | aes-256-cbc | sha-256
    size: int
    begins: float
    ends: float
    mean_s: float = SATURATED_S
    depth: int = DEPTH
    direct: bool = False  # as a library call, where there is a choice


class Counted(msgspec.Struct, frozen=True):
    """What ended between ``begins`` and ``ends``: how many tasks, and quantiles of what they took, seconds in order."""

    operations: int
    latencies: list[float]


class Tally:
    """The clock of a slice: when tasks arrive, and which of them count."""

    def __init__(self, wanted: Slice) -> None:
        self._begins, self._ends, self._rate = wanted.begins, wanted.ends, 1 / wanted.mean_s
        self._due = time.monotonic()
        self._taken = array("d")

    def arrival(self) -> float | None:
        """When the next task arrives; None when that is after the slice's end."""
        self._due += random.expovariate(self._rate)
        return self._due if self._due < self._ends and time.monotonic() < self._ends else None

    def done(self, since: float) -> float:
        """A task that was begun at ``since`` has ended; when."""
        now = time.monotonic()
        if self._begins <= now < self._ends:
            self._taken.append(now - since)
        return now

    def counted(self) -> Counted:
        return Counted(len(self._taken), quantiles(self._taken, QUANTILES))


def quantiles(values: "array[float] | list[float]", most: int) -> list[float]:
    """All values in order, or ``most`` of them, evenly spaced."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return ordered
    return [ordered[(2 * index + 1) * len(ordered) // (2 * most)] for index in range(most)]
