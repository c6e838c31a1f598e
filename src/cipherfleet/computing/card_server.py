"""The card's end of its vCCs: requests are taken from the rings, in turn, and answered.

Deficit round robin between vCCs, counted in cost: each turn a vCC may spend so much, and saves what a long request needs.
While there is work the rings are polled; a vCC that has been quiet for a while sleeps until its doorbell rings. One thread
serves all, so nothing of a virtual function is ever seen by two. What is no request ends that one vCC.
"""

import asyncio
import logging
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from cipherfleet.computing import vcc_memory
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_function import VirtualFunction, Work
from cipherfleet.computing.vcc_device import Device
from cipherfleet.contract.errors import CipherfleetError, Internal, Malformed
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.vcc import Descriptor, Operation

log = logging.getLogger(__name__)

QUANTUM = 128 * 1024
"""What a vCC may spend in a turn: bytes, and ``OPERATION_COST`` for every request."""
OPERATION_COST = 8 * 1024
TURN_S = 0.002
"""How long requests are served before the loop looks at anything else."""
POLL_S = 100e-6
"""How long a quiet vCC is polled before it sleeps."""
LONGEST_TIMER_S = 1.0
"""Timers stop while a host sleeps, leases do not: so the clock is looked at this often."""
_MOVES_THE_DEADLINE = frozenset({Operation.LOAD_CMK, Operation.LEASE, Operation.DROP})


class CardServer:
    """Serves the vCCs of one card on the running loop."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self._vccs: dict[VcmId, _Vcc] = {}
        self._awake: dict[_Vcc, None] = {}  # in the order of their turns
        self._scheduled = False
        self._threads = ThreadPoolExecutor(1, "key-generation")

    async def attach(self, vcm: VcmId, consumer: ConsumerId, sock: socket.socket) -> None:
        """Serve a new vCC, its parts given over ``sock``, until it is detached or the other end is closed. Raises ``Exists``."""
        try:
            function = self.card.attach(vcm, consumer)
        except BaseException:
            sock.close()
            raise
        try:
            self._vccs[vcm] = _Vcc(self, function, sock)
        except BaseException:
            self.card.detach(function)
            sock.close()
            raise

    def detach(self, vcm: VcmId) -> None:
        """Zeroise a vCC's keys and close it, now. Detaching what is gone succeeds."""
        vcc = self._vccs.get(vcm)
        if vcc is not None:
            vcc.end()

    def close(self) -> None:
        for vcm in list(self._vccs):
            self.detach(vcm)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def ended(self, vcc: "_Vcc") -> None:
        self.card.detach(vcc.function)
        self._awake.pop(vcc, None)
        if self._vccs.get(vcc.function.vcm) is vcc:
            del self._vccs[vcc.function.vcm]

    def wake(self, vcc: "_Vcc") -> None:
        """``vcc`` is polled from now on."""
        self._awake[vcc] = None
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def start(self, work: Work) -> "Future[bytearray]":
        return self._threads.submit(work.run)

    def _turn(self) -> None:
        self._scheduled = False
        now = time.monotonic()
        end = now + TURN_S
        while now < end:
            for vcc in tuple(self._awake):
                if not vcc.serve(now):
                    self._awake.pop(vcc, None)
            if not self._awake:
                return
            now = time.monotonic()
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._turn)


class _Vcc:
    """One vCC. It ends with its socket."""

    def __init__(self, server: CardServer, function: VirtualFunction, sock: socket.socket) -> None:
        self.function = function
        self._server, self._socket = server, sock
        self._next: Descriptor | None = None
        self._deficit = 0
        self._quiet_since = 0.0
        self._working = self._ended = self._answered = False
        self._timer: asyncio.TimerHandle | None = None
        descriptor = vcc_memory.create()
        bells: list[int] = []
        try:
            bells += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
            self._bell, self._vcm_bell = bells
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
        loop.add_reader(self._bell, self._rung)
        loop.add_reader(sock, self.end)  # nothing is ever sent over it: it was closed, or its owner does what it should not
        self._device.sleeps(True)

    def end(self) -> None:
        """Zeroise and close."""
        if self._ended:
            return
        self._ended = True
        self._server.ended(self)
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._bell)
        loop.remove_reader(self._socket)
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close()
        os.close(self._bell)
        os.close(self._vcm_bell)
        self._memory.close()

    def _rung(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        self._wake()

    def _wake(self) -> None:
        if not self._ended:
            self._quiet_since = 0.0
            self._device.sleeps(False)
            self._server.wake(self)

    # -- requests ------------------------------------------------------------------------------------------------------

    def serve(self, now: float) -> bool:
        """A turn: as much as may be spent. Whether this vCC is to be polled on."""
        if self._ended or self._working:
            return False
        try:
            request = self._next or self._device.take()
            if request is None:
                return self._poll(now)
            self._next = request
            self._quiet_since = 0.0
            self._deficit += QUANTUM
            while request is not None and self._deficit >= (cost := OPERATION_COST + request.parameter_bytes + request.data_bytes):
                self._deficit -= cost
                if not self._serve(request):
                    return False
                request = self._next = self._device.take()
            if request is None:
                self._deficit = 0
            return True
        except Malformed:
            log.warning("%s wrote what is no request, its vCC is closed", self.function.vcm)
            self.end()
            return False
        finally:
            if self._answered and not self._ended:
                self._answered = False
                if self._device.vcm_sleeps:
                    self._ring()

    def _poll(self, now: float) -> bool:
        if not self._quiet_since:
            self._quiet_since = now
        if now - self._quiet_since < POLL_S:
            return True
        self._device.sleeps(True)
        self._next = self._device.take()
        if self._next is None:
            return False
        self._device.sleeps(False)
        self._quiet_since = 0.0
        return True

    def _ring(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_write(self._vcm_bell, 1)

    def _serve(self, request: Descriptor) -> bool:
        """Run one request. Whether the next one may follow at once."""
        device = self._device
        self._next, self._answered = None, True
        data, room = device.data(request), device.room(request)
        try:
            answer = self.function.execute(request.operation, request.handle, device.parameters(request), data, room)
            if isinstance(answer, Work):
                self._work(answer, request)
                return False
            device.complete(request, answer.value, answer.parameters, answer.data)
            if isinstance(answer.data, memoryview):
                answer.data.release()
            if request.operation in _MOVES_THE_DEADLINE:
                self._watch_deadline()
        except Exception as exc:
            self._fail(request, exc)
        finally:
            data.release()
            room.release()
        return True

    def _work(self, work: Work, request: Descriptor) -> None:
        loop = asyncio.get_running_loop()
        self._working = True

        def done(future: "Future[bytearray]") -> None:
            if not future.cancelled():
                loop.call_soon_threadsafe(self._worked, work, request, future)

        self._server.start(work).add_done_callback(done)

    def _worked(self, work: Work, request: Descriptor, future: "Future[bytearray]") -> None:
        self._working = False
        try:
            answer = self.function.complete(work, future.result())
            if not self._ended:
                self._device.complete(request, answer.value, answer.parameters, answer.data)
        except Exception as exc:
            self._fail(request, exc)
        if not self._ended:
            self._ring()
            self._wake()

    def _fail(self, request: Descriptor, exc: Exception) -> None:
        if not isinstance(exc, CipherfleetError):
            # The type alone: a message could hold what must not be logged.
            log.error("internal error of the card: %s", type(exc).__name__)
            exc = Internal("something went wrong in the crypto card")
        if not self._ended:
            self._device.fail(request, exc)

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
