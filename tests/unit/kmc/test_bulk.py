"""Long reads take turns: one of each consumer, two of all, and a queue that ends."""

import asyncio

import pytest

from cipherfleet.contract.errors import LimitReached
from cipherfleet.kmc.bulk import AT_ONCE, MOST_WAITING, BulkReads
from cipherfleet.state.database import THREADS


async def test_one_of_each_and_two_of_all() -> None:
    bulk, done = BulkReads(), list[str]()
    running = most = 0

    async def read(whose: str) -> None:
        nonlocal running, most
        async with bulk.turn(whose, "vcm"):
            running += 1
            most = max(most, running)
            for _ in range(3):
                await asyncio.sleep(0)
            running -= 1
            done.append(whose)

    await asyncio.gather(*(read(name) for name in ("a", "a", "a", "b", "b", "c", "d")))
    assert most == AT_ONCE < THREADS
    assert len(done) == 7
    assert not bulk._turns


async def test_who_waits_for_too_many_is_refused_and_others_are_not() -> None:
    bulk, end = BulkReads(), asyncio.Event()

    async def read(whose: str) -> None:
        async with bulk.turn(whose, "vcm"):
            await end.wait()

    waiting = [asyncio.create_task(read("a")) for _ in range(1 + MOST_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(LimitReached):
        await read("a")
    other = asyncio.create_task(read("b"))
    end.set()
    await asyncio.gather(*waiting, other)
    await read("a")


async def test_who_gives_up_leaves_no_gap() -> None:
    bulk = BulkReads()

    async def read() -> None:
        async with bulk.turn("a", "vcm"):
            pass

    async with bulk.turn("a", "vcm"):
        waiting = asyncio.create_task(read())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
    await read()
    assert not bulk._turns


async def test_many_vcms_of_one_consumer_wait_for_each_other() -> None:
    bulk, done = BulkReads(), list[int]()

    async def read(number: int) -> None:
        async with bulk.turn("a", f"vcm-{number}"):
            await asyncio.sleep(0)
            done.append(number)

    await asyncio.gather(*(read(number) for number in range(20)))
    assert done == list(range(20))
