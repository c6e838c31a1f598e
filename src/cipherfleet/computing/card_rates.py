"""What a vCC is held to, and what it was seen to use: rates that only delay, histograms of microseconds."""

from cipherfleet.contract.vcc import VccStatistics

BURST_S = 0.05
"""How much of its rate a quiet vCC may use at once."""
BUCKETS = 26
"""Powers of two of microseconds: the last bucket begins at 16 s."""


class Rate:
    """So much per second: who took more than there was waits until that is paid."""

    def __init__(self, per_second: float, now: float) -> None:
        self._per_second = per_second
        self._stock = self._most = per_second * BURST_S
        self._at = now

    def wait_s(self, now: float) -> float:
        """How long until something may be taken; 0 when it may be now."""
        if not self._per_second:
            return 0.0
        self._stock = min(self._most, self._stock + (now - self._at) * self._per_second)
        self._at = now
        return 0.0 if self._stock >= 0 else -self._stock / self._per_second

    def take(self, amount: float) -> None:
        if self._per_second:
            self._stock -= amount


class Statistics:
    """Queue time (taken out of the ring -> begun) and service time (begun -> answered) of one vCC's requests."""

    def __init__(self) -> None:
        self._queue, self._service = [0] * BUCKETS, [0] * BUCKETS

    def queued(self, seconds: float) -> None:
        self._queue[bucket(seconds)] += 1

    def served(self, seconds: float) -> None:
        self._service[bucket(seconds)] += 1

    def report(self) -> VccStatistics:
        """Without the empty buckets at the end."""
        return VccStatistics(_used(self._queue), _used(self._service))


def bucket(seconds: float) -> int:
    return min(int(max(seconds, 0.0) * 1e6).bit_length(), BUCKETS - 1)


def _used(counts: list[int]) -> tuple[int, ...]:
    last = max((n for n, count in enumerate(counts) if count), default=-1)
    return tuple(counts[: last + 1])
