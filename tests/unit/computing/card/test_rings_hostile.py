"""The card's end of the rings against a VCM that writes what it likes: an error or the end of that one vCC, and nothing else."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable

import pytest

from cipherfleet.channel import codec
from cipherfleet.computing import vcc_memory
from cipherfleet.computing.card_server import CardServer
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.contract.errors import CardUnavailable
from cipherfleet.contract.vcc import (
    COMPLETION,
    MAX_PARAMETER_BYTES,
    MEMORY_BYTES,
    REGION_BYTES,
    RING_ENTRIES,
    Counter,
    Descriptor,
    Operation,
    RandomRequest,
    Status,
    Verb,
)
from tests.unit.computing.card.consumer import Consumer
from tests.unit.computing.card.hostile_vcm import HostileVcm, fill, strange
from tests.unit.computing.card.test_rings import alice, attach, card, generate, load, server, stream

__all__ = ["alice", "server"]

NULL = Descriptor(Operation.NULL, 1, 0, 0, 0, 0, 0, 0, 64)


@pytest.fixture
async def hostile(server: CardServer) -> AsyncIterator[HostileVcm]:
    sock, _ = await attach(server)
    made = HostileVcm(sock)
    yield made
    made.close()


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not check():
            await asyncio.sleep(0.001)


def vccs() -> int:
    return len(list(card().functions))


CLOSING: dict[str, Callable[[HostileVcm], None]] = {
    "noise": lambda v: v.write(b"\xff" * 64),
    "flags": lambda v: v.write(b"\0\0\1\0" + bytes(60)),
    "parameters out of the region": lambda v: v.write(NULL._replace(parameters_at=REGION_BYTES, parameter_bytes=1).encode()),
    "data out of the region": lambda v: v.write(NULL._replace(data_at=2**32 - 1, data_bytes=64).encode()),
    "room out of the region": lambda v: v.write(NULL._replace(room_at=1, room_bytes=REGION_BYTES).encode()),
    "too many parameters": lambda v: v.write(NULL._replace(parameter_bytes=MAX_PARAMETER_BYTES + 1).encode()),
    "more requests than the ring holds": lambda v: v.count(Counter.SUBMITTED, RING_ENTRIES + 1),
    "a counter that goes back": lambda v: v.count(Counter.SUBMITTED, 2**32 - 1),
    "completions seen that were none": lambda v: seen_too_much(v),
    "a good request, then noise": lambda v: good_then_noise(v),
}


def seen_too_much(vcm: HostileVcm) -> None:
    vcm.memory.publish(Counter.SEEN, 5)
    vcm.write(NULL.encode())


def good_then_noise(vcm: HostileVcm) -> None:
    vcm.write(NULL.encode())
    vcm.write(b"\xee" * 64)


@pytest.mark.parametrize("name", sorted(CLOSING))
async def test_what_is_no_request_ends_that_vcc_alone(alice: RingCard, hostile: HostileVcm, name: str) -> None:
    assert vccs() == 2
    CLOSING[name](hostile)
    await until(lambda: vccs() == 1)
    await alice.submit(Operation.NULL)


REFUSED: list[tuple[int, int, bytes, str]] = [
    (999, 0, b"", "unsupported"),
    (Operation.LOAD_CMK, 0, b"", "malformed"),
    (Operation.LOAD_CMK, 0, b"\xff\xfe", "malformed"),
    (Operation.LEASE, 0, b"[" * 10_000, "service-off"),
    (Operation.RUN, 2**64 - 1, b'{"verb":"encrypt"}', "service-off"),
]


async def test_refusals_keep_the_vcc_open(alice: RingCard, hostile: HostileVcm) -> None:
    for number, (operation, handle, parameters, code) in enumerate(REFUSED):
        hostile.memory.region[: len(parameters)] = parameters
        hostile.write(Descriptor(operation, number, handle, 0, len(parameters), 0, 0, 65536, 4096).encode())
        await until(lambda n=number: hostile.completed() == n + 1)  # type: ignore[misc]
        raw = hostile.memory.completions[vcc_memory.completion(number)]
        status, _, echoed, _, parameter_bytes, data_bytes = COMPLETION.unpack(raw)
        assert (status, echoed, data_bytes) == (Status.FAILED, number, 0)
        said = bytes(hostile.memory.region[65536 : 65536 + parameter_bytes])
        assert codec.decode(said, dict)["code"] == code
    assert vccs() == 2


async def test_an_answer_without_room_is_not_written(hostile: HostileVcm, alice: RingCard) -> None:
    hostile.memory.region[:4096] = b"\xaa" * 4096
    for number, room in enumerate((0, 40)):
        hostile.write(Descriptor(Operation.DESCRIBE, number, 0, 0, 0, 0, 0, 1024, room).encode())
        await until(lambda n=number: hostile.completed() == n + 1)  # type: ignore[misc]
        status, _, _, _, parameter_bytes, _ = COMPLETION.unpack(hostile.memory.completions[vcc_memory.completion(number)])
        assert (status, parameter_bytes) == (Status.FAILED, 0)
    assert bytes(hostile.memory.region[:4096]) == b"\xaa" * 4096


async def test_a_vcm_that_takes_no_answers_is_not_served_on(alice: RingCard, hostile: HostileVcm) -> None:
    for number in range(RING_ENTRIES + 5):
        hostile.write(NULL._replace(number=number).encode())
        if number % 50 == 0:
            await until(lambda n=number: hostile.completed() >= min(n, RING_ENTRIES))  # type: ignore[misc]
    await until(lambda: hostile.completed() == RING_ENTRIES)
    for _ in range(20):
        await alice.submit(Operation.NULL)
    assert hostile.completed() == RING_ENTRIES
    hostile.take_answers()
    os.eventfd_write(hostile.card_bell, 1)
    await until(lambda: hostile.completed() == RING_ENTRIES + 5)


def test_the_memory_cannot_be_taken_away() -> None:
    descriptor = vcc_memory.create()
    for size in (0, MEMORY_BYTES - 4096, MEMORY_BYTES + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


async def test_words_on_the_socket_end_the_vcc(alice: RingCard, hostile: HostileVcm) -> None:
    hostile.socket.send(b"hello")
    await until(lambda: vccs() == 1)
    await alice.submit(Operation.NULL)


FUZZED = int(os.environ.get("CIPHERFLEET_FUZZ", "20000"))
"""Descriptors that the card takes in the test below; a long run: CIPHERFLEET_FUZZ=1000000."""


async def test_strange_descriptors_disturb_nobody(server: CardServer, alice: RingCard) -> None:
    chance = random.Random(2026)  # noqa: S311 - the same run each time
    taken = lives = worked = 0
    while taken < FUZZED:
        consumer = Consumer()
        sock, function = await attach(server, consumer)
        client = RingCard(sock)
        await client.start()
        await load(client, consumer)
        handles = [await generate(client, name) for name in ("AES-256-GCM", "SM4-GCM", "HMAC-SHA-256", "Ed25519")]
        begun = await client.submit(Operation.BEGIN, parameters=stream(Verb.DIGEST, digest="SHA-256"))
        hostile = HostileVcm.take_over(client, [*handles, begun.value, 0])
        fill(hostile, chance)
        lives += 1
        try:
            while taken < FUZZED and function in list(card().functions):
                before = hostile.completed()
                for _ in range(chance.randrange(1, RING_ENTRIES)):
                    hostile.write(strange(chance, hostile.handles))
                    hostile.memory.region[chance.randrange(REGION_BYTES)] = chance.randrange(256)
                if chance.random() < 0.1:
                    assert len((await alice.submit(Operation.RANDOM, parameters=codec.encode(RandomRequest(9)))).data) == 9
                await until(lambda h=hostile, f=function: f not in list(card().functions) or h.completed() == h.submitted)  # type: ignore[misc]
                count = (hostile.completed() - before) & 0xFFFFFFFF
                taken += count
                worked += sum(
                    COMPLETION.unpack(hostile.memory.completions[vcc_memory.completion(before + n)])[0] == Status.DONE for n in range(count)
                )
                hostile.take_answers()
        finally:
            hostile.close()
        await until(lambda: vccs() == 1)
    assert lives > 1
    assert worked > taken // 20, "most of it is nonsense, but not all"
    await alice.submit(Operation.NULL)


# -- a card that writes nonsense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        COMPLETION.pack(Status.DONE, 0, 4711, 0, 0, 0),
        COMPLETION.pack(7, 0, 1, 0, 0, 0),
        COMPLETION.pack(Status.DONE, 1, 1, 0, 0, 0),
        COMPLETION.pack(Status.DONE, 0, 1, 0, 0, 2**32 - 1),
    ],
)
async def test_a_vcm_does_not_trust_what_answers(raw: bytes) -> None:
    import socket

    ours, theirs = socket.socketpair()
    descriptor, bells = vcc_memory.create(), [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    socket.send_fds(theirs, [b"v"], [descriptor, *bells])
    memory = vcc_memory.Memory(descriptor)
    client = RingCard(ours)
    await client.start()
    call = asyncio.create_task(client.submit(Operation.NULL))
    await until(lambda: memory.counters[Counter.SUBMITTED] == 1)
    memory.completions[vcc_memory.completion(0)] = raw
    memory.publish(Counter.COMPLETED, 1)
    os.eventfd_write(bells[1], 1)
    with pytest.raises(CardUnavailable):
        await call
    assert not client.connected
    await client.close()
    memory.close()
    for left in (descriptor, *bells):
        os.close(left)
    theirs.close()
