"""The card's end of its vCCs: requests are taken from the rings, in turn, and answered.

One run queue: deficit round robin between the vCCs, counted in cost and weighted. Each turn a vCC may spend so much, and
saves what a long request needs. Short requests are served in the loop's own thread, long ones by the engine threads beside it;
while those are all busy, whoever waits for one keeps its turn. While there is work the rings are polled; a vCC that has been
quiet for a while sleeps until its doorbell rings. What is no request ends that one vCC.
"""

import asyncio
import logging
import os
import resource
import select
import socket
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from enum import Enum, auto
from typing import Any

from cipherfleet.computing import vcc_memory
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_engine import Engine
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.card_rates import Rate, Statistics
from cipherfleet.computing.card_request import Answer, Work
from cipherfleet.computing.engine_memory import Pause, no_pause
from cipherfleet.computing.vcc_device import Device
from cipherfleet.contract.errors import CipherfleetError, Internal, Malformed, VcmUnknown
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.vcc import NO_LIMITS, Descriptor, Operation, VccLimits, VccStatistics

log = logging.getLogger(__name__)

QUANTUM = 1024 * 1024
"""What the heaviest of the vCCs that wait may spend in a turn, the others as much less as their weights: bytes, and ``OPERATION_COST``
for every request. Many requests a turn, as a VCM that is woken for each few of its answers spends more on that than on them."""
FIRST_QUANTUM = 64 * 1024
"""What it may spend in its first turn after it slept. That turn comes before all others': who asks little and seldom does not wait for
those who flood, and who floods gains nothing by sleeping in between."""
OPERATION_COST = 8 * 1024
INLINE_BYTES = 128 * 1024
"""More data is never worked on in the loop's thread while there are others: it would keep everybody waiting."""
TELL_S = 100e-6
"""A VCM that sleeps is not left waiting longer than this for an answer because others of its requests are still to be served."""
TURN_S = 0.002
"""How long requests are served before the loop looks at anything else."""
SHORTEST_POLL_S, POLL_S, LONGEST_POLL_S = 25e-6, 100e-6, 1e-3
"""How long a quiet vCC is polled before it sleeps: longer where requests came soon after it had gone to sleep, as one wake-up costs
as much as serving ten requests; shortest where others wait for the processor."""
LONGEST_TIMER_S = 1.0
"""Timers stop while a host sleeps, leases do not: so the clock is looked at this often."""
PAUSE_S = 0.05
"""How long a vCC that waits, for its rates or for a thread, sleeps at most before what is urgent is looked for."""
_URGENT = frozenset({Operation.LOAD_CMK, Operation.LEASE_NONCE, Operation.LEASE, Operation.DROP, Operation.CONFIRM, Operation.DESCRIBE})
"""The lease hangs on these: they overtake what waits for rates or threads."""
_MOVES_THE_DEADLINE = frozenset({Operation.LOAD_CMK, Operation.LEASE, Operation.DROP})


class _Turn(Enum):
    """How a vCC's turn ended."""

    POLL = auto()  # look again
    SLEEP = auto()  # its doorbell, or a timer, brings it back
    WAIT = auto()  # for a job to be done


class CardServer:
    """Serves the vCCs of one card on the running loop, with ``threads`` engine threads beside it."""

    def __init__(self, card: Card, threads: int = 0) -> None:
        self.card = card
        self.engine = Engine(threads, self._finished)
        self._vccs: dict[VcmId, _Vcc] = {}
        self._first: dict[_Vcc, None] = {}  # just woken, or who waited: their turns come first
        self._awake: dict[_Vcc, None] = {}  # in the order of their turns
        self._waiting: dict[_Vcc, None] = {}
        self.heaviest = 1.0  # weight among those that wait
        self._bells, self._by_bell = select.epoll(), dict[int, _Vcc]()
        self._scheduled = False
        self._put_off = 0  # times that this thread had to leave its processor
        self._crowded: bool | None = None
        self._lasting = ThreadPoolExecutor(1, "key-generation")

    async def attach(self, vcm: VcmId, consumer: ConsumerId, sock: socket.socket, limits: VccLimits = NO_LIMITS) -> None:
        """Serve a new vCC within ``limits``, its parts given over ``sock``, until it is detached or its socket ends. Raises ``Exists``."""
        try:
            function = self.card.attach(vcm, consumer)
        except BaseException:
            sock.close()
            raise
        try:
            self._vccs[vcm] = _Vcc(self, function, sock, limits)
        except BaseException:
            self.card.detach(function)
            sock.close()
            raise

    def detach(self, vcm: VcmId) -> None:
        """Zeroise a vCC's keys and close it, now. Detaching what is gone succeeds."""
        vcc = self._vccs.get(vcm)
        if vcc is not None:
            vcc.end()

    def limit(self, vcm: VcmId, limits: VccLimits) -> None:
        """Hold a vCC to ``limits`` from now on. Raises ``VcmUnknown``."""
        vcc = self._vccs.get(vcm)
        if vcc is None:
            raise VcmUnknown(f"{vcm} has no vCC of this card")
        vcc.limit(limits)

    def look(self, vcm: VcmId) -> tuple[VccLimits, VccStatistics]:
        """What a vCC is held to, and what it was seen to use."""
        vcc = self._vccs.get(vcm)
        return (vcc.limits, vcc.statistics.report()) if vcc is not None else (VccLimits(), VccStatistics())

    def close(self) -> None:
        for vcm in list(self._vccs):
            self.detach(vcm)
        self._bells.close()
        self.engine.close()
        self._lasting.shutdown(wait=False, cancel_futures=True)

    def ended(self, vcc: "_Vcc") -> None:
        self.card.detach(vcc.function)
        self._bells.unregister(vcc.bell)
        del self._by_bell[vcc.bell]
        for queue in (self._first, self._awake, self._waiting):
            queue.pop(vcc, None)
        if self._vccs.get(vcc.function.vcm) is vcc:
            del self._vccs[vcc.function.vcm]

    def wake(self, vcc: "_Vcc") -> None:
        """``vcc`` is polled from now on."""
        if vcc not in self._awake:
            self._first[vcc] = None
        self.heaviest = max(self.heaviest, vcc.limits.weight)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def hear(self, vcc: "_Vcc") -> None:
        """Its doorbell is listened to between parts of long work, too."""
        self._by_bell[vcc.bell] = vcc
        self._bells.register(vcc.bell, select.EPOLLIN)

    def let_others_in(self) -> None:
        """Between parts of long work in the loop's thread: who slept and has rung gets its small first turn."""
        if len(self._vccs) == 1:
            return
        for bell, _ in self._bells.poll(0):
            self._by_bell[bell].rung()
        for vcc in [vcc for vcc in self._first if vcc.fresh]:
            del self._first[vcc]
            self._take_turn(vcc, time.monotonic())

    @property
    def busy(self) -> bool:
        """Whether there are turns to come (asked in a turn: of others)."""
        return bool(self._first or self._awake)

    def crowded(self) -> bool:
        """Whether others wanted this thread's processor since it was last asked: a poller should make room for them then."""
        if self._crowded is None:
            before, self._put_off = self._put_off, resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
            self._crowded = self._put_off != before
        return self._crowded

    def start_lasting(self, work: Work) -> "Future[Any]":
        return self._lasting.submit(work.run, no_pause)

    def resume(self) -> None:
        """A job is done: who waited goes on, in the order in which it began to wait."""
        if self._waiting:
            self._first, self._waiting = {**self._waiting, **self._first}, {}
            self.wake(next(iter(self._first)))

    def _finished(self) -> None:
        while (job := self.engine.done()) is not None:
            assert isinstance(job, _Job)  # noqa: S101 - no others are started
            job.finish()
            job.vcc.tell()
            self.resume()

    def _turn(self) -> None:
        self._scheduled = False
        self.engine.awaited = False
        self.heaviest = max((vcc.limits.weight for vcc in (*self._first, *self._awake)), default=1.0)
        now = time.monotonic()
        end = now + TURN_S
        while now < end:
            self._finished()
            self._crowded = None
            queue = self._first or self._awake
            if not queue:
                break
            vcc = next(iter(queue))
            del queue[vcc]
            self._take_turn(vcc, now)
            now = time.monotonic()
        self.engine.awaited = True
        self._finished()  # of a job that ended before that nobody tells
        if self.busy and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _take_turn(self, vcc: "_Vcc", now: float) -> None:
        turn = vcc.serve(now)
        if turn is _Turn.POLL:
            self._awake[vcc] = None
        elif turn is _Turn.WAIT:
            self._waiting[vcc] = None


class _Job:
    """The work of one request in an engine thread."""

    def __init__(self, vcc: "_Vcc", request: Descriptor, work: Work, views: tuple[memoryview, ...], begun: float) -> None:
        self.vcc = vcc
        self._request, self._work, self._views, self._begun = request, work, views, begun
        self._result: Any = None
        self._error: Exception | None = None

    def run(self, pause: Pause = no_pause) -> None:
        try:
            self._result = self._work.run(pause)
        except Exception as exc:
            self._error = exc

    def finish(self) -> None:
        self.vcc.worked(self._request, self._work, self._result, self._error, self._begun)
        for view in self._views:
            view.release()
        self.vcc.left()


class _Vcc:
    """One vCC. It ends with its socket."""

    def __init__(self, server: CardServer, function: VirtualFunction, sock: socket.socket, limits: VccLimits) -> None:
        self.function = function
        self.statistics = Statistics()
        self._server, self._socket = server, sock
        self._urgent: deque[tuple[Descriptor, float]] = deque()
        self._normal: deque[tuple[Descriptor, float]] = deque()
        self._deficit = 0.0
        self._in_turn, self._slept = False, True
        self._quiet_since = self._slept_at = self._told_at = 0.0
        self._poll_s = POLL_S
        self._under_way = 0
        self._alone = self._ended = self._answered = False
        self._timer: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self.limit(limits)
        descriptor = vcc_memory.create()
        bells: list[int] = []
        try:
            bells += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
            self.bell, self._vcm_bell = bells
            self._memory = vcc_memory.Memory(descriptor)
            sock.setblocking(False)
            socket.send_fds(sock, [b"v"], [descriptor, *bells])
        except BaseException:
            for bell in bells:
                os.close(bell)
            raise
        finally:
            os.close(descriptor)
        self._device = Device(self._memory)
        loop = asyncio.get_running_loop()
        loop.add_reader(self.bell, self.rung)
        server.hear(self)
        loop.add_reader(sock, self.end)  # nothing is ever sent over it: it was closed, or its owner does what it should not
        self._device.sleeps(True)

    @property
    def fresh(self) -> bool:
        """Whether its next turn is a first one, which begins nothing that pauses."""
        return self._slept and not self._under_way

    def limit(self, limits: VccLimits) -> None:
        now = time.monotonic()  # who pauses looks again within PAUSE_S
        self.limits = limits
        self._operations, self._bytes = Rate(limits.operations_s, now), Rate(limits.bytes_s, now)
        self.function.limit_keys(limits.keys)

    def end(self) -> None:
        """Zeroise and close."""
        if self._ended:
            return
        self._ended = True
        self._server.ended(self)
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.bell)
        loop.remove_reader(self._socket)
        for timer in (self._timer, self._again):
            if timer is not None:
                timer.cancel()
        self._socket.close()
        os.close(self.bell)
        os.close(self._vcm_bell)
        if not self._under_way:
            self._memory.close()

    def left(self) -> None:
        """One request less under way; the memory goes with the last one, as threads may be at it."""
        self._under_way -= 1
        if self._ended and not self._under_way:
            self._memory.close()

    def rung(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self.bell)
        quiet_s = time.monotonic() - self._slept_at + self._poll_s
        self._poll_s = min(2 * self._poll_s, LONGEST_POLL_S) if quiet_s < 2 * LONGEST_POLL_S else POLL_S
        self._wake()

    def _wake(self) -> None:
        if not self._ended:
            self._quiet_since = 0.0
            self._device.sleeps(False)
            self._server.wake(self)

    # -- requests ------------------------------------------------------------------------------------------------------

    def serve(self, now: float) -> _Turn:
        """A turn: as much as may be spent."""
        if self._ended:
            return _Turn.SLEEP
        try:
            return self._serve(now)
        except Malformed:
            log.warning("%s wrote what is no request, its vCC is closed", self.function.vcm)
            self.end()
            return _Turn.SLEEP
        finally:
            self.tell()

    def _serve(self, now: float) -> _Turn:
        if not self._look(now):
            return self._poll(now)
        self._quiet_since = 0.0
        while True:
            urgent = bool(self._urgent)
            queue = self._urgent or self._normal
            if not queue:
                if not self._look(now):
                    return _Turn.POLL
                continue
            request, seen = queue[0]
            if not urgent and self._must_wait(request):
                self._look_again(PAUSE_S)
                return _Turn.WAIT
            if not self._in_turn:
                self._deficit += (FIRST_QUANTUM if self._slept else QUANTUM) * self.limits.weight / self._server.heaviest
                self._in_turn, self._slept = True, False
            cost = OPERATION_COST + request.parameter_bytes + request.data_bytes
            if cost > self._deficit:
                self._in_turn = False
                return _Turn.POLL
            if not urgent and (pause := max(self._operations.wait_s(now), self._bytes.wait_s(now))):
                self._look_again(min(pause, PAUSE_S))
                return _Turn.SLEEP
            queue.popleft()
            self._deficit -= cost
            if not urgent:
                self._operations.take(1)
                self._bytes.take(request.data_bytes)
            self._begin(request, seen)
            if self._ended:
                return _Turn.SLEEP
            if self._answered and not self._server.busy and time.monotonic() - self._told_at > TELL_S:
                self.tell()  # the VCM goes on with these while the rest is worked on

    def _look_again(self, pause_s: float) -> None:
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(pause_s, self._pause_over)

    def _pause_over(self) -> None:
        self._again = None
        self._wake()

    def _look(self, now: float) -> bool:
        """Take what is in the ring; whether there is anything to do. Who has nothing to do saves nothing for later."""
        while (request := self._device.take()) is not None:
            (self._urgent if request.operation in _URGENT else self._normal).append((request, now))
        if self._urgent or self._normal:
            return True
        self._in_turn, self._deficit = False, 0.0
        return False

    def _must_wait(self, request: Descriptor) -> bool:
        """Whether something has to be done before this request may begin."""
        if self._alone or self._under_way >= self.limits.depth:
            return True
        engine = self._server.engine
        return request.data_bytes > INLINE_BYTES and engine.threads > 0 and not engine.free

    def _poll(self, now: float) -> _Turn:
        crowded = self._server.crowded()
        if not self._quiet_since:
            self._quiet_since = now
        elif crowded:
            self._poll_s = SHORTEST_POLL_S
        if now - self._quiet_since < self._poll_s:
            return _Turn.POLL
        self._device.sleeps(True)
        if not self._look(now):
            self._slept, self._slept_at = True, now
            return _Turn.SLEEP
        self._device.sleeps(False)
        self._quiet_since = 0.0
        return _Turn.POLL

    def tell(self) -> None:
        """Ring the VCM's doorbell if there are answers and it sleeps: once for all of them."""
        if self._answered and not self._ended:
            self._answered, self._told_at = False, time.monotonic()
            if self._device.vcm_sleeps:
                with suppress(BlockingIOError):
                    os.eventfd_write(self._vcm_bell, 1)

    def _begin(self, request: Descriptor, seen: float) -> None:
        """Begin one request, and end it, too, unless a thread does."""
        device, begun = self._device, time.monotonic()
        self.statistics.queued(begun - seen)
        data, room = device.data(request), device.room(request)
        try:
            answer = self.function.execute(request.operation, request.handle, device.parameters(request), data, room)
        except Exception as exc:
            self._fail(request, exc, begun)
        else:
            if not isinstance(answer, Work):
                self._complete(request, answer, begun)
            elif self._start(request, answer, (data, room), begun):
                return
        data.release()
        room.release()

    def _start(self, request: Descriptor, work: Work, views: tuple[memoryview, ...], begun: float) -> bool:
        """Do the work; whether it is left to a thread."""
        engine = self._server.engine
        self._under_way += 1
        self._alone = work.alone
        if work.lasting:
            self._last(request, work, views, begun)
            return True
        job = _Job(self, request, work, views, begun)
        if engine.free:
            engine.start(job)
            return True
        job.run(self._server.let_others_in)
        job.finish()
        return False

    def _last(self, request: Descriptor, work: Work, views: tuple[memoryview, ...], begun: float) -> None:
        loop = asyncio.get_running_loop()

        def finish(future: "Future[Any]") -> None:
            error = future.exception()
            self.worked(request, work, None if error else future.result(), error if isinstance(error, Exception) else None, begun)
            for view in views:
                view.release()
            self.left()
            self.tell()
            self._server.resume()

        def done(future: "Future[Any]") -> None:
            if not future.cancelled():
                loop.call_soon_threadsafe(finish, future)

        self._server.start_lasting(work).add_done_callback(done)

    def worked(self, request: Descriptor, work: Work, result: Any, error: Exception | None, begun: float) -> None:
        """The end of a request whose work is done."""
        if work.alone:
            self._alone = False
        try:
            answer = self.function.complete(work, result, error)
        except Exception as exc:
            self._fail(request, exc, begun)
        else:
            self._complete(request, answer, begun)

    def _complete(self, request: Descriptor, answer: Answer, begun: float) -> None:
        if self._ended:
            return
        self._device.complete(request, answer.value, answer.parameters, answer.data)
        if isinstance(answer.data, memoryview):
            answer.data.release()
        if request.operation in _MOVES_THE_DEADLINE:
            self._watch_deadline()
        self._count(begun)

    def _fail(self, request: Descriptor, exc: Exception, begun: float) -> None:
        if not isinstance(exc, CipherfleetError):
            # The type alone: a message could hold what must not be logged.
            log.error("internal error of the card: %s", type(exc).__name__)
            exc = Internal("something went wrong in the crypto card")
        if not self._ended:
            self._device.fail(request, exc)
            self._count(begun)

    def _count(self, begun: float) -> None:
        self._answered = True
        self.statistics.served(time.monotonic() - begun)

    # -- the deadline --------------------------------------------------------------------------------------------------

    def _watch_deadline(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.function.deadline
        if deadline is not None and not self._ended:
            delay = min(max(deadline - self._server.card.clock(), 0.001), LONGEST_TIMER_S)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.function.tick()
        self._watch_deadline()


__all__ = ["CardServer"]
