"""What single measurements come to: medians and quartiles over rounds, and ratios within rounds."""

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cipherfleet.app.bench.report import Row
from cipherfleet.app.bench.task_queue import Counted


class Sample(msgspec.Struct, frozen=True):
    """One measurement. Latencies are not known of every place, nor where nothing ended in time."""

    round: int
    operation: str
    size: int
    vcms: int
    where: str
    ops_s: float
    p50_us: float | None = None
    p99_us: float | None = None

    @property
    def place(self) -> tuple[str, int, int, str]:
        return self.operation, self.size, self.vcms, self.where


def sample(number: int, operation: str, size: int, where: str, counted: Sequence[Counted], seconds: float, *, vcms: int = 1) -> Sample:
    """Of all workers of one measurement."""
    latencies = sorted(value for one in counted for value in one.latencies)
    ops_s = sum(one.operations for one in counted) / seconds
    return Sample(number, operation, size, vcms, where, ops_s, percentile_us(latencies, 0.5), percentile_us(latencies, 0.99))


def percentile_us(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[int(len(ordered) * share)] * 1e6, 2) if ordered else None


def quartiles(values: list[float], digits: int) -> list[float]:
    """The first and the third: between them is the middle half."""
    if len(values) < 2:
        return [round(values[0], digits)] * 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [round(first, digits), round(third, digits)]


def rows(samples: Iterable[Sample]) -> list[Row]:
    """One row for each place, in the order of their first measurements."""
    places: dict[tuple[str, int, int, str], list[Sample]] = {}
    for one in samples:
        places.setdefault(one.place, []).append(one)
    return [_row(found) for found in places.values()]


def _row(found: list[Sample]) -> Row:
    speeds = [one.ops_s for one in found]
    first, typical = found[0], statistics.median(speeds)
    return {
        "operation": first.operation,
        "size": first.size,
        "vcms": first.vcms,
        "where": first.where,
        "rounds": len(found),
        "ops_s": round(typical, 1),
        "spread": quartiles(speeds, 1),
        "bytes_s": round(typical * first.size),
        "p50_us": _median([one.p50_us for one in found]),
        "p99_us": _median([one.p99_us for one in found]),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if known else None


def ratio(
    name: str, over: Iterable[Sample], under: Iterable[Sample], figure: Callable[[Sample], float | None] = lambda one: one.ops_s
) -> list[Row]:
    """The median of the rounds' own ratios of one place to another; nothing where no round has both."""
    below = {one.round: figure(one) for one in under}
    pairs = [(one, figure(one), below.get(one.round)) for one in over]
    found = [(one, above / value) for one, above, value in pairs if above and value]
    if not found:
        return []
    first, values = found[0][0], [value for _, value in found]
    return [
        {
            "ratio": name,
            "operation": first.operation,
            "size": first.size,
            "vcms": first.vcms,
            "value": round(statistics.median(values), 4),
            "spread": quartiles(values, 4),
        }
    ]
