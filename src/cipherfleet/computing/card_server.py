"""The card's end of its vCCs: requests come in, take turns, and are answered.

Round robin between vCCs, one request of each at a time; a vCC may send ahead, and is not read from when it sends too far
ahead or does not take its answers. What is no frame ends that one vCC.
"""

import asyncio
import logging
import socket
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

from cipherfleet.channel import codec
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_function import Answer, VirtualFunction, Work
from cipherfleet.computing.vcc_socket import DONE, FAILED, Frame, FrameReader, encode_completion, widen
from cipherfleet.contract.errors import CipherfleetError, Internal, Malformed
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.vcc import Operation

log = logging.getLogger(__name__)

QUEUE_BYTES = 4 * 1024 * 1024
QUEUE_REQUESTS = 256
WRITE_LIMIT_BYTES = 2 * 1024 * 1024
TURN_S = 0.002
"""How long requests are served before new input is looked at."""
LONGEST_TIMER_S = 1.0
"""Timers stop while a host sleeps, leases do not: so the clock is looked at this often."""
_MOVES_THE_DEADLINE = frozenset({Operation.LOAD_CMK, Operation.LEASE, Operation.DROP})


class CardServer:
    """Serves the vCCs of one card on the running loop."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self._connections: dict[VcmId, _Connection] = {}
        self._ready: deque[_Connection] = deque()
        self._scheduled = False
        self._threads = ThreadPoolExecutor(1, "key-generation")

    async def attach(self, vcm: VcmId, consumer: ConsumerId, sock: socket.socket) -> None:
        """Serve a new vCC on ``sock`` until it is detached or its other end is closed. Raises ``Exists``."""
        try:
            function = self.card.attach(vcm, consumer)
        except BaseException:
            sock.close()
            raise
        try:
            sock.setblocking(False)
            widen(sock)
            await asyncio.get_running_loop().create_unix_connection(lambda: _Connection(self, function), sock=sock)
        except BaseException:
            self.card.detach(function)
            sock.close()
            raise

    def detach(self, vcm: VcmId) -> None:
        """Zeroise a vCC's keys and close it, now. Detaching what is gone succeeds."""
        connection = self._connections.get(vcm)
        if connection is not None:
            connection.end()

    def close(self) -> None:
        for vcm in list(self._connections):
            self.detach(vcm)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def opened(self, connection: "_Connection") -> None:
        self._connections[connection.function.vcm] = connection

    def ended(self, connection: "_Connection") -> None:
        self.card.detach(connection.function)
        if self._connections.get(connection.function.vcm) is connection:
            del self._connections[connection.function.vcm]

    def ready(self, connection: "_Connection") -> None:
        """``connection`` has a request to be served."""
        self._ready.append(connection)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def start(self, work: Work) -> "Future[bytearray]":
        return self._threads.submit(work.run)

    def _turn(self) -> None:
        self._scheduled = False
        end = time.monotonic() + TURN_S
        while self._ready:
            self._ready.popleft().serve_one()
            if time.monotonic() >= end and self._ready:
                self._scheduled = True
                asyncio.get_running_loop().call_soon(self._turn)
                return


class _Connection(asyncio.BufferedProtocol):
    """One vCC."""

    def __init__(self, server: CardServer, function: VirtualFunction) -> None:
        self.function = function
        self._server = server
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._queue: deque[Frame] = deque()
        self._queued_bytes = 0
        self._in_turn = False  # waits for its turn, or its request is in work
        self._read_paused = self._write_paused = False
        self._timer: asyncio.TimerHandle | None = None

    # -- the transport -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._transport.set_write_buffer_limits(high=WRITE_LIMIT_BYTES)
        self._server.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            frames = self._reader.received(nbytes)
        except Malformed:
            log.warning("%s sent what is no request, its vCC is closed", self.function.vcm)
            self.end()
            return
        for frame in frames:
            self._queue.append(frame)
            self._queued_bytes += len(frame.parameters) + len(frame.data)
        self._look()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        """Zeroise and close."""
        self._server.ended(self)
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def _look(self) -> None:
        """Take a turn if there is something to do; read on if there is room."""
        if self._queue and not self._in_turn and not self._write_paused:
            self._in_turn = True
            self._server.ready(self)
        full = self._queued_bytes >= QUEUE_BYTES or len(self._queue) >= QUEUE_REQUESTS
        if self._transport is not None and full != self._read_paused:
            self._read_paused = full
            if full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # -- requests ------------------------------------------------------------------------------------------------------

    def serve_one(self) -> None:
        if self._transport is None or not self._queue:
            self._in_turn = False
            return
        frame = self._queue.popleft()
        self._queued_bytes -= len(frame.parameters) + len(frame.data)
        try:
            answer = self.function.execute(frame.operation, frame.handle, frame.parameters, frame.data)
            if isinstance(answer, Work):
                self._work(answer, frame.number)
                return
            self._write(DONE, frame.number, answer)
            if frame.operation in _MOVES_THE_DEADLINE:
                self._watch_deadline()
        except Exception as exc:
            self._fail(frame.number, exc)
        self._next()

    def _next(self) -> None:
        self._in_turn = False
        self._look()

    def _work(self, work: Work, number: int) -> None:
        loop = asyncio.get_running_loop()

        def done(future: "Future[bytearray]") -> None:
            if not future.cancelled():
                loop.call_soon_threadsafe(self._worked, work, number, future)

        self._server.start(work).add_done_callback(done)

    def _worked(self, work: Work, number: int, future: "Future[bytearray]") -> None:
        try:
            self._write(DONE, number, self.function.complete(work, future.result()))
        except Exception as exc:
            self._fail(number, exc)
        self._next()

    def _write(self, status: int, number: int, answer: Answer) -> None:
        if self._transport is None:
            return
        self._transport.write(encode_completion(status, number, answer.value, answer.parameters, len(answer.data)))
        if answer.data:
            self._transport.write(answer.data)

    def _fail(self, number: int, exc: Exception) -> None:
        if not isinstance(exc, CipherfleetError):
            # The type alone: a message could hold what must not be logged.
            log.error("internal error of the card: %s", type(exc).__name__)
            exc = Internal("something went wrong in the crypto card")
        self._write(FAILED, number, Answer(parameters=codec.encode(exc.to_reply().error)))

    # -- the deadline --------------------------------------------------------------------------------------------------

    def _watch_deadline(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.function.deadline
        if deadline is not None and self._transport is not None:
            delay = min(max(deadline - self._server.card.clock(), 0.001), LONGEST_TIMER_S)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.function.tick()
        self._watch_deadline()


__all__ = ["CardServer"]
