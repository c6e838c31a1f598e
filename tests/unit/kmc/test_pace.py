"""The token bucket: how much at once, how much in the long run, each consumer for itself."""

import pytest

from cipherfleet.contract.errors import LimitReached
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.kmc.pace import Pace

ALICE, BOB = ConsumerId("alice"), ConsumerId("bob")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_the_pace() -> None:
    clock = Clock()
    pace = Pace(50, 2000, clock=clock)
    pace.take(ALICE, 2000)
    with pytest.raises(LimitReached) as refused:
        pace.take(ALICE, 64)
    assert refused.value.hint == "slow down: try again in 2 s"
    pace.take(BOB, 64)
    clock.now = 2
    pace.take(ALICE, 64)
    with pytest.raises(LimitReached):
        pace.take(ALICE, 64)


def test_no_more_than_a_burst_is_saved_up() -> None:
    clock = Clock()
    pace = Pace(50, 100, clock=clock)
    pace.take(ALICE, 1)
    clock.now = 1000
    with pytest.raises(LimitReached):
        pace.take(ALICE, 101)
    pace.take(ALICE, 100)


def test_who_is_refused_pays_nothing() -> None:
    pace = Pace(1, 10, clock=Clock())
    with pytest.raises(LimitReached):
        pace.take(ALICE, 11)
    pace.take(ALICE, 10)


def test_full_buckets_are_forgotten() -> None:
    clock = Clock()
    pace = Pace(1, 10, clock=clock)
    pace.take(ALICE, 5)
    clock.now = 5
    pace.take(BOB, 1)
    assert set(pace._left) == {BOB}
