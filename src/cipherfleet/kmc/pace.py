"""How often a consumer may do what costs the others something: a token bucket each (monotonic clock)."""

import math
import time
from collections.abc import Callable

from cipherfleet.contract.errors import LimitReached
from cipherfleet.contract.ids import ConsumerId


class Pace:
    """``burst`` times at once, ``per_second`` in the long run. Full buckets are forgotten, so it stays small."""

    def __init__(
        self, per_second: float, burst: int, what: str = "changes its keys", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second, self._burst, self._what, self._clock = per_second, burst, what, clock
        self._left: dict[ConsumerId, tuple[float, float]] = {}

    def take(self, consumer: ConsumerId, changes: int) -> None:
        """All of ``changes``, or none of them. Raises ``LimitReached``."""
        now = self._clock()
        left = self._filled(consumer, now)
        if changes > left:
            wait_s = math.ceil((changes - left) / self._per_second)
            raise LimitReached(
                f"{consumer} {self._what} more often than {self._per_second:g} times per second", f"slow down: try again in {wait_s} s"
            )
        self._left = {name: kept for name, kept in self._left.items() if self._filled(name, now) < self._burst}
        if changes:
            self._left[consumer] = (left - changes, now)

    def _filled(self, consumer: ConsumerId, now: float) -> float:
        left, at = self._left.get(consumer, (self._burst, now))
        return min(self._burst, left + (now - at) * self._per_second)
