"""A card between its vCCs: turns by weight, limits set while it runs, engine threads, and what was counted."""

import asyncio
import hashlib
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from cipherfleet.computing import card_server
from cipherfleet.computing.card_engine import MAX_THREADS, helpers
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.card_rates import BUCKETS, Rate, Statistics, bucket
from cipherfleet.computing.card_request import Answer, Work
from cipherfleet.computing.card_server import CardServer, _Vcc
from cipherfleet.computing.engine_memory import no_pause
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import CardUnavailable, LimitReached, ServiceOff, VcmUnknown
from cipherfleet.contract.ids import VcmId
from cipherfleet.contract.vcc import Operation, VccLimits, Verb
from tests.unit.computing.card.consumer import Consumer
from tests.unit.computing.card.test_rings import SOCKETS, attach, card, generate, load, stream

LONG = 256 * 1024


@pytest.fixture
async def threaded() -> AsyncIterator[CardServer]:
    running = CardServer(card(), 2)
    yield running
    running.close()
    while SOCKETS:
        SOCKETS.pop().close()


async def serving(server: CardServer) -> tuple[RingCard, VirtualFunction]:
    consumer = Consumer()
    sock, function = await attach(server, consumer)
    client = RingCard(sock)
    await client.start()
    await load(client, consumer, 3_600_000)
    return client, function


class Gate:
    """Long work that lasts until a test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.running = self.most = 0
        self._lock = threading.Lock()
        real = VirtualFunction.execute

        def execute(function: VirtualFunction, *request: object) -> Answer | Work:
            answer = real(function, *request)  # type: ignore[arg-type]
            return answer._replace(run=lambda _: self._run(answer)) if isinstance(answer, Work) else answer

        monkeypatch.setattr(VirtualFunction, "execute", execute)

    def _run(self, work: Work) -> object:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.opened.wait(10)
        with self._lock:
            self.running -= 1
        return work.run(no_pause)

    async def until(self, running: int) -> None:
        async with asyncio.timeout(20):
            while self.running != running:
                await asyncio.sleep(0.001)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def runs_of(monkeypatch: pytest.MonkeyPatch) -> list[VcmId]:
    """Whose requests the card runs from now on, in their order."""
    served: list[VcmId] = []
    real = VirtualFunction.execute

    def execute(function: VirtualFunction, operation: int, *request: object) -> Answer | Work:
        if operation == Operation.RUN:
            served.append(function.vcm)
        return real(function, operation, *request)  # type: ignore[arg-type]

    monkeypatch.setattr(VirtualFunction, "execute", execute)
    return served


async def ended(server: CardServer, *clients: RingCard) -> None:
    for client in clients:
        await client.close()
    server.close()


# -- turns ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "threads"), [(1024, 0), (100 * 1024, 0), (LONG, 0), (100 * 1024, 1), (LONG, 1)])
@pytest.mark.parametrize("weight", [1, 3])
async def test_shares_are_as_the_weights(monkeypatch: pytest.MonkeyPatch, size: int, threads: int, weight: int) -> None:
    """Two vCCs that always have requests waiting, and which of them the card served."""
    server = CardServer(card(), threads)
    served = runs_of(monkeypatch)
    monkeypatch.setattr(card_server, "TURN_S", 1e-6)  # one round, then the clients, on the same loop, fill their rings again
    parts = [await serving(server) for _ in range(2)]
    server.limit(parts[1][1].vcm, VccLimits(weight=weight))
    digest, data = stream(Verb.DIGEST, digest="SHA-256"), os.urandom(size)
    enough = asyncio.Event()

    async def flood(client: RingCard) -> None:
        while not enough.is_set():
            await client.submit(Operation.RUN, parameters=digest, data=data)
            if len(served) > 1200:
                enough.set()

    depth = min(200, 14 * 1024 * 1024 // (2 * size + 4096))
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for client, _ in parts:
            for _ in range(depth):
                group.create_task(flood(client))
    counted = Counter(served[200:1200])
    share = counted[parts[1][1].vcm] / counted[parts[0][1].vcm]
    assert weight * 0.9 <= share <= weight * 1.1
    await ended(server, *(client for client, _ in parts))


async def test_who_asks_seldom_is_served_before_those_who_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most what is served already and one turn come before it, however many flood; with turns in order it would be all of theirs."""
    server = CardServer(card(), 0)
    served = runs_of(monkeypatch)
    monkeypatch.setattr(card_server, "TURN_S", 1e-6)
    floods, (quiet, function) = [await serving(server) for _ in range(8)], await serving(server)
    digest, data = stream(Verb.DIGEST, digest="SHA-256"), os.urandom(1024)
    turn = card_server.QUANTUM // (card_server.OPERATION_COST + len(data))
    await asyncio.sleep(0.05)
    for client, _ in floods:  # they fill their rings once
        for _ in range(200):
            assert client._push(Operation.RUN, 0, digest, data) is not None
    async with asyncio.timeout(10):
        while len(served) <= len(floods) * turn // 4:  # their small first turns are over
            await asyncio.sleep(0)
        began = len(served)
        await quiet.submit(Operation.RUN, parameters=digest, data=data)
    assert len(floods) * 200 - began > 5 * turn  # so much was still waiting
    assert served.index(function.vcm, began) - began <= 2 * turn  # the turn before its doorbell is heard, and the one then begun
    await ended(server, quiet, *(client for client, _ in floods))


async def test_sleeping_in_between_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first turn is a sixteenth of the others': with what is left of its ring a vCC stands in line behind those that waited."""
    server = CardServer(card(), 0)
    served = runs_of(monkeypatch)
    parts = [await serving(server) for _ in range(3)]
    digest, data = stream(Verb.DIGEST, digest="SHA-256"), os.urandom(1024)
    await asyncio.sleep(0.05)
    for client, _ in parts:  # all of them sleep, and all their requests are there before the card's next turn
        for _ in range(100):
            assert client._push(Operation.RUN, 0, digest, data) is not None
    futures = [pending.future for client, _ in parts for pending in client._pending.values()]
    await asyncio.gather(*futures)
    first = card_server.FIRST_QUANTUM // (card_server.OPERATION_COST + len(data)) + 1
    runs = [len(list(run)) for _, run in itertools.groupby(served)]
    assert sum(runs) == 300
    assert all(count <= first for count in runs[:3])
    assert max(runs[3:]) > first
    await ended(server, *(client for client, _ in parts))


@pytest.mark.parametrize("verb", [Verb.DIGEST, Verb.ENCRYPT])
async def test_long_work_lets_who_asks_seldom_in(monkeypatch: pytest.MonkeyPatch, verb: Verb) -> None:
    """Where no thread is free, between the parts of a block of 1 MiB; its own vCC's next request waits, and the result is right."""
    server = CardServer(card(), 0)
    (flood, _), (quiet, function) = [await serving(server) for _ in range(2)]
    handle, data = await generate(flood), os.urandom(1024 * 1024)
    request = {"parameters": stream(verb, digest="SHA-256" if verb is Verb.DIGEST else ""), "handle": handle, "data": data}
    digest, order = stream(Verb.DIGEST, digest="SHA-256"), []
    real, pauses = CardServer.let_others_in, itertools.count()
    await asyncio.sleep(0.05)

    def let_others_in(server: CardServer) -> None:
        if next(pauses) == 1:
            assert quiet._push(Operation.RUN, 0, digest, b"quiet") is not None
        before = function.operations
        real(server)
        if function.operations > before:
            order.append("quiet")

    monkeypatch.setattr(CardServer, "let_others_in", let_others_in)
    first, second = (asyncio.create_task(flood.submit(Operation.RUN, **request)) for _ in range(2))  # type: ignore[arg-type]
    first.add_done_callback(lambda _: order.append("first"))
    second.add_done_callback(lambda _: order.append("second"))
    made = (await first).data
    await second
    await asyncio.sleep(0)
    assert order == ["quiet", "first", "second"]
    if verb is Verb.DIGEST:
        assert made == hashlib.sha256(data).digest()
    else:
        opened = await flood.submit(
            Operation.RUN, handle=handle, parameters=stream(Verb.DECRYPT, header=made[:HEADER_BYTES]), data=made[HEADER_BYTES:]
        )
        assert opened.data == data
    await ended(server, flood, quiet)


async def test_weight_makes_no_first_turn_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is let into long work brings its weight, and still gets a small turn: a long one would pause, too, and so on."""
    server = CardServer(card(), 0)
    (flood, _), (quiet, function) = [await serving(server) for _ in range(2)]
    server.limit(function.vcm, VccLimits(weight=100))
    digest, data = stream(Verb.DIGEST, digest="SHA-256"), os.urandom(1024)
    real, let_in = CardServer.let_others_in, list[int]()
    await asyncio.sleep(0.05)

    def let_others_in(server: CardServer) -> None:
        if not let_in:
            assert all(quiet._push(Operation.RUN, 0, digest, data) for _ in range(100))
        before = function.operations
        real(server)
        let_in.append(function.operations - before)

    monkeypatch.setattr(CardServer, "let_others_in", let_others_in)
    await flood.submit(Operation.RUN, parameters=digest, data=bytes(1024 * 1024))
    assert 0 < let_in[0] <= card_server.FIRST_QUANTUM // (card_server.OPERATION_COST + len(data))
    assert not any(let_in[1:])
    await ended(server, flood, quiet)


# -- limits --------------------------------------------------------------------------------------------------------------


RATE = 5
"""Requests per second: fifty take nine seconds, whatever else the machine does."""


async def fifty(client: RingCard, data: bytes = b"", done: list[float] | None = None) -> None:
    """Fifty requests at once; ``done`` gets the time of each answer."""

    async def one() -> None:
        await client.submit(Operation.NULL, data=data)
        if done is not None:
            done.append(time.monotonic())

    await asyncio.gather(*(one() for _ in range(50)))


@pytest.mark.parametrize(
    ("limits", "data"), [(VccLimits(operations_s=RATE), b""), (VccLimits(bytes_s=1000 * RATE), bytes(1000))], ids=["operations", "bytes"]
)
async def test_requests_over_a_rate_wait(threaded: CardServer, limits: VccLimits, data: bytes) -> None:
    client, function = await serving(threaded)
    other, _ = await serving(threaded)
    done = list[float]()
    began = time.monotonic()
    threaded.limit(function.vcm, limits)
    limited = asyncio.create_task(fifty(client, data, done))
    await asyncio.sleep(0)
    await fifty(other, data)  # the others do not wait
    await client.submit(Operation.LEASE_NONCE)  # what the lease hangs on does not wait either
    assert not limited.done()
    while len(done) < 4:
        await asyncio.sleep(0.02)
    assert len(done) <= 2 + RATE * (time.monotonic() - began)  # what was saved up, and the one that the next pays for
    threaded.limit(function.vcm, VccLimits())
    await limited
    assert done[-1] - began < 50 / RATE
    await client.close()
    await other.close()


async def test_the_number_of_keys_is_limited_while_it_runs(threaded: CardServer) -> None:
    client, function = await serving(threaded)
    handles = [await generate(client) for _ in range(3)]
    threaded.limit(function.vcm, VccLimits(keys=2))
    with pytest.raises(LimitReached):
        await generate(client)
    await client.submit(Operation.RUN, handle=handles[2], parameters=stream(Verb.ENCRYPT), data=b"it stays")
    for handle in handles[1:]:
        await client.submit(Operation.UNLOAD, handle=handle)
    await generate(client)
    await client.close()


@pytest.mark.parametrize("depth", [1, 2])
async def test_depth_is_how_many_requests_are_worked_on_at_once(threaded: CardServer, gate: Gate, depth: int) -> None:
    client, function = await serving(threaded)
    threaded.limit(function.vcm, VccLimits(depth=depth))
    handle = await generate(client)
    calls = [
        asyncio.create_task(client.submit(Operation.RUN, handle=handle, parameters=stream(Verb.ENCRYPT), data=bytes(LONG)))
        for _ in range(4)
    ]
    await gate.until(depth)
    await asyncio.sleep(0.05)
    gate.opened.set()
    assert len({(await call).data for call in calls}) == 4
    assert gate.most == depth
    await client.close()


async def test_limits_of_what_is_not_there(threaded: CardServer) -> None:
    with pytest.raises(VcmUnknown):
        threaded.limit(VcmId("vcm-0000000000ff"), VccLimits())


def test_a_rate_is_kept_over_any_time() -> None:
    rate = Rate(100.0, 0.0)
    assert rate.wait_s(0.0) == 0
    rate.take(5)
    assert rate.wait_s(0.0) == 0  # the burst, to its end
    rate.take(10)
    assert rate.wait_s(0.0) == pytest.approx(0.1)
    assert rate.wait_s(0.05) == pytest.approx(0.05)
    assert rate.wait_s(1000.0) == 0
    rate.take(6)
    assert rate.wait_s(1000.0) == pytest.approx(0.01)  # idling saved a burst and no more
    free = Rate(0.0, 0.0)
    free.take(1e12)
    assert free.wait_s(0.0) == 0


# -- engine threads --------------------------------------------------------------------------------------------------------


async def test_long_work_keeps_nobody_waiting(threaded: CardServer, gate: Gate) -> None:
    client, _ = await serving(threaded)
    other, _ = await serving(threaded)
    digest = stream(Verb.DIGEST, digest="SHA-256")
    long = [asyncio.create_task(client.submit(Operation.RUN, parameters=digest, data=bytes(LONG))) for _ in range(5)]
    await gate.until(2)
    for quick in (client, other):  # the same vCC is held up only by its own order
        if quick is other:
            await asyncio.wait_for(quick.submit(Operation.RUN, parameters=digest, data=b"short"), 5)
        await asyncio.wait_for(quick.submit(Operation.LEASE_NONCE), 5)
    assert gate.most == 2
    gate.opened.set()
    assert len({(await call).data for call in long}) == 1
    await client.close()
    await other.close()


async def test_parts_of_one_message_are_worked_on_at_once(threaded: CardServer, gate: Gate) -> None:
    client, _ = await serving(threaded)
    for name in ("AES-256-GCM", "SM4-GCM"):
        gate.opened.clear()
        handle = await generate(client, name)
        plaintext = os.urandom(4 * LONG + 33)
        begun = await client.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.ENCRYPT))
        parts = [plaintext[at : at + LONG] for at in range(0, len(plaintext), LONG)]
        sealed = await _through(client, begun.value, parts, gate)
        opening = await client.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.DECRYPT, header=begun.data))
        gate.opened.clear()
        assert b"".join(await _through(client, opening.value, sealed, gate)) == plaintext


async def _through(client: RingCard, number: int, parts: list[bytes], gate: Gate) -> list[bytes]:
    calls = [asyncio.create_task(client.submit(Operation.UPDATE, handle=number, data=part)) for part in parts[:-1]]
    calls.append(asyncio.create_task(client.submit(Operation.FINISH, handle=number, data=parts[-1])))
    await gate.until(2)
    gate.opened.set()
    return [(await call).data for call in calls]


async def test_parts_of_one_digest_are_not(threaded: CardServer, gate: Gate) -> None:
    client, _ = await serving(threaded)
    begun = await client.submit(Operation.BEGIN, parameters=stream(Verb.DIGEST, digest="SHA-256"))
    calls = [asyncio.create_task(client.submit(Operation.UPDATE, handle=begun.value, data=bytes([n]) * LONG)) for n in range(4)]
    last = asyncio.create_task(client.submit(Operation.FINISH, handle=begun.value))
    await gate.until(1)
    await asyncio.sleep(0.02)
    gate.opened.set()
    await asyncio.gather(*calls)
    whole = b"".join(bytes([n]) * LONG for n in range(4))
    expected = await client.submit(Operation.RUN, parameters=stream(Verb.DIGEST, digest="SHA-256"), data=whole)
    assert (await last).data == expected.data
    assert gate.most == 1
    await client.close()


async def test_a_changed_part_ends_its_stream_and_no_other(threaded: CardServer) -> None:
    client, _ = await serving(threaded)
    handle = await generate(client)
    sealed = bytearray((await client.submit(Operation.RUN, handle=handle, parameters=stream(Verb.ENCRYPT), data=bytes(LONG))).data)
    header, body = bytes(sealed[:44]), sealed[len(sealed) - LONG - 4 * 16 :]
    header = bytes(sealed[: len(sealed) - len(body)])
    good = (await client.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.DECRYPT, header=header))).value
    bad = (await client.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.DECRYPT, header=header))).value
    part = 3 * (64 * 1024 + 16)
    changed = bytearray(body[:part])
    changed[-1] ^= 1
    with pytest.raises(Exception, match="changed"):
        await client.submit(Operation.UPDATE, handle=bad, data=changed)
    with pytest.raises(Exception, match="no stream"):
        await client.submit(Operation.UPDATE, handle=bad, data=body[:part])
    assert (await client.submit(Operation.UPDATE, handle=good, data=body[:part])).data == bytes(3 * 64 * 1024)
    assert (await client.submit(Operation.FINISH, handle=good, data=body[part:])).data == bytes(64 * 1024)
    await client.close()


async def test_what_a_thread_was_at_when_the_keys_went_is_thrown_away(threaded: CardServer, gate: Gate) -> None:
    client, function = await serving(threaded)
    handle = await generate(client)
    call = asyncio.create_task(client.submit(Operation.RUN, handle=handle, parameters=stream(Verb.ENCRYPT), data=bytes(LONG)))
    stream_ = await client.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.ENCRYPT))
    part = asyncio.create_task(client.submit(Operation.UPDATE, handle=stream_.value, data=bytes(LONG)))
    await gate.until(2)
    await client.submit(Operation.DROP)
    assert not function.serving
    gate.opened.set()
    for doomed in (call, part):
        with pytest.raises(ServiceOff):
            await doomed
    assert client._parts is not None
    assert not any(client._parts.memory.region[LONG : 8 * LONG : 4096])  # nothing of it is left where the VCM can see it
    await client.close()


@pytest.mark.parametrize("how", ["detached", "closed"])
async def test_a_vcc_that_ends_while_a_thread_is_at_it(threaded: CardServer, gate: Gate, how: str) -> None:
    client, function = await serving(threaded)
    other, _ = await serving(threaded)
    vcc: _Vcc = threaded._vccs[function.vcm]
    digest = stream(Verb.DIGEST, digest="SHA-256")
    call = asyncio.create_task(client.submit(Operation.RUN, parameters=digest, data=bytes(LONG)))
    await gate.until(1)
    if how == "detached":
        threaded.detach(function.vcm)
    else:
        await client.close()
    await other.submit(Operation.NULL)
    gate.opened.set()
    if how == "detached":
        with pytest.raises(CardUnavailable):
            await call
    else:
        call.cancel()
    await _until(lambda: _closed(vcc))
    await other.submit(Operation.RUN, parameters=digest, data=bytes(LONG))
    await other.close()


async def _closed(vcc: _Vcc) -> bool:
    return vcc._memory._map.closed


async def _until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await true():
            await asyncio.sleep(0.001)


def test_there_are_as_many_threads_as_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 2, 3, 4, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, cores=cores: set(range(cores)))
        found.append(helpers())
    assert found == [0, 0, 1, 2, MAX_THREADS - 1]


# -- what was counted ------------------------------------------------------------------------------------------------------


async def test_requests_are_counted_by_their_time(threaded: CardServer, gate: Gate) -> None:
    client, function = await serving(threaded)
    _, before = threaded.look(function.vcm)
    call = asyncio.create_task(client.submit(Operation.RUN, parameters=stream(Verb.DIGEST, digest="SHA-256"), data=bytes(LONG)))
    await gate.until(1)
    await asyncio.sleep(0.05)
    gate.opened.set()
    await call
    await asyncio.gather(*(client.submit(Operation.NULL) for _ in range(20)))
    limits, after = threaded.look(function.vcm)
    assert limits == VccLimits()
    assert sum(after.service_us) - sum(before.service_us) == sum(after.queue_us) - sum(before.queue_us) == 21
    assert sum(after.service_us[bucket(0.05) :]) >= 1
    await client.close()
    assert threaded.look(VcmId("vcm-0000000000ff"))[1].queue_us == ()


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(us / 1e6) for us in (-1, 0, 0.5, 1.5, 2.5, 3.5, 4.5, 1e12)] == [0, 0, 0, 1, 2, 2, 3, BUCKETS - 1]
    statistics = Statistics()
    statistics.queued(3e-6)
    statistics.served(100.0)
    assert statistics.report().queue_us == (0, 0, 1)
    assert statistics.report().service_us == (0,) * (BUCKETS - 1) + (1,)
