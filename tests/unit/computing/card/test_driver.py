"""The VCM's end of the rings without a card: places in the region, counters that wrap, rings that are full."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipherfleet.computing import vcc_memory
from cipherfleet.computing.vcc_device import Device
from cipherfleet.computing.vcc_driver import Driver, Extents
from cipherfleet.computing.vcc_memory import Memory
from cipherfleet.contract.errors import CardUnavailable, Malformed, TooLarge
from cipherfleet.contract.vcc import MAX_SUBMIT_BYTES, REGION_BYTES, RING_ENTRIES, Counter, Operation, Status


@pytest.fixture
def memory() -> Iterator[Memory]:
    descriptor = vcc_memory.create()
    made = Memory(descriptor)
    os.close(descriptor)
    yield made
    made.close()


@given(st.lists(st.integers(1, 400), max_size=60), st.randoms(use_true_random=False))
def test_extents_never_overlap_and_all_come_back(sizes: list[int], chance: object) -> None:
    import random

    assert isinstance(chance, random.Random)
    extents, taken = Extents(4096), dict[int, int]()
    for size in sizes:
        at = extents.take(size)
        if at is not None:
            assert all(at + size <= other or other + length <= at for other, length in taken.items())
            assert 0 <= at <= 4096 - size
            taken[at] = size
        if taken and chance.random() < 0.4:
            gone = chance.choice(sorted(taken))
            extents.give_back(gone, taken.pop(gone))
    for at, size in taken.items():
        extents.give_back(at, size)
    assert extents.take(4096) == 0


def test_requests_and_answers_pass_in_order_while_the_counters_wrap(memory: Memory) -> None:
    driver, device = Driver(memory), Device(memory)
    near = 2**32 - 3
    driver._submitted = driver._seen = device._taken = device._completed = near
    for counter in (Counter.SUBMITTED, Counter.COMPLETED, Counter.SEEN):
        memory.publish(counter, near)
    for number in range(10):
        assert driver.push(Operation.RUN, number, number * 7, b"p%d" % number, b"d" * number)
        request = device.take()
        assert request is not None
        assert (device.parameters(request), bytes(device.data(request)), request.handle) == (b"p%d" % number, b"d" * number, number * 7)
        device.complete(request, number + 1, b"params", b"data%d" % number)
        assert [tuple(a) for a in driver.pull()] == [(number, Status.DONE, number + 1, b"params", b"data%d" % number)]
    assert device.take() is None
    assert driver.pull() == []


def test_a_full_ring_takes_no_more_until_answers_were_pulled(memory: Memory) -> None:
    driver, device = Driver(memory), Device(memory)
    for number in range(RING_ENTRIES):
        assert driver.push(Operation.NULL, number, 0, b"", b"")
    assert not driver.push(Operation.NULL, 999, 0, b"", b"")
    assert len(driver) == RING_ENTRIES
    while (request := device.take()) is not None:
        device.complete(request, 0, b"", b"")
    assert len(driver.pull()) == RING_ENTRIES
    assert driver.push(Operation.NULL, 999, 0, b"", b"")


def test_a_full_region_takes_no_more(memory: Memory) -> None:
    driver = Driver(memory)
    assert driver.push(Operation.RUN, 1, 0, b"", bytes(MAX_SUBMIT_BYTES))
    assert not driver.push(Operation.RUN, 2, 0, b"", bytes(MAX_SUBMIT_BYTES))
    assert driver.push(Operation.RUN, 3, 0, b"", bytes(1024))


def test_a_data_key_is_gone_from_the_region_when_it_was_taken(memory: Memory) -> None:
    driver, device = Driver(memory), Device(memory)
    driver.push(Operation.DATA_KEY, 1, 0, b"", b"")
    request = device.take()
    assert request is not None
    device.complete(request, 0, b"", b"the plaintext of a data key")
    (answer,) = driver.pull()
    assert answer.data == b"the plaintext of a data key"
    assert b"plaintext" not in bytes(memory.region[: 64 * 1024])


def test_an_answer_longer_than_its_room_is_an_error(memory: Memory) -> None:
    driver, device = Driver(memory), Device(memory)
    driver.push(Operation.NULL, 1, 0, b"", b"")
    request = device.take()
    assert request is not None
    device.complete(request, 0, b"", bytes(64 * 1024))
    (answer,) = driver.pull()
    assert answer.status == Status.FAILED
    assert TooLarge.code.encode() in answer.parameters


def test_counters_out_of_bounds(memory: Memory) -> None:
    memory.publish(Counter.COMPLETED, RING_ENTRIES + 1)
    with pytest.raises(CardUnavailable):
        Driver(memory).pull()
    memory.publish(Counter.SUBMITTED, RING_ENTRIES + 1)
    with pytest.raises(Malformed):
        Device(memory).take()


def test_memory_of_another_size_is_none() -> None:
    descriptor = os.memfd_create("small")
    os.ftruncate(descriptor, REGION_BYTES)
    with pytest.raises(CardUnavailable):
        Memory(descriptor)
    os.close(descriptor)
