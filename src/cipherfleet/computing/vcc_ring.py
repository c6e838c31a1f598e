"""A VCM's vCC in its event loop: requests over shared memory, doorbells for who sleeps, a socket that tells when the card is gone."""

import asyncio
import os
import socket
import time
from contextlib import suppress
from typing import NamedTuple

from cipherfleet.channel import codec
from cipherfleet.computing.vcc_driver import Answered, Data, Driver
from cipherfleet.computing.vcc_memory import WORD, Memory
from cipherfleet.contract.errors import CardUnavailable, CipherfleetError, ErrorBody, TooLarge
from cipherfleet.contract.vcc import MAX_DATA_BYTES, MAX_PARAMETER_BYTES, MAX_SUBMIT_BYTES, Completion, Operation, Status

LONGEST_SPIN_S = 150e-6
"""How long a call looks for its answer before it goes to sleep: less than it costs to be woken."""
SPIN_BYTES = 64 * 1024
MOST_SKIPPED = 63
START_S = 5.0
_UNDO = {
    Operation.BEGIN: Operation.ABORT,
    Operation.GENERATE: Operation.UNLOAD,
    Operation.IMPORT: Operation.UNLOAD,
    Operation.IMPORT_WRAPPED: Operation.UNLOAD,
    Operation.DERIVE_KEY: Operation.UNLOAD,
    Operation.LOAD: Operation.UNLOAD,
}


class _Pending(NamedTuple):
    operation: Operation
    future: "asyncio.Future[Completion]"


class _Parts(NamedTuple):
    """What a vCC consists of at this end."""

    driver: Driver
    memory: Memory
    card_bell: int
    own_bell: int


class RingCard:
    """A ``VirtualCryptoCard`` whose parts come over ``sock``, a connected unix socket, which this takes over."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._parts: _Parts | None = None
        self._number = 0
        self._pending: dict[int, _Pending] = {}
        self._order, self._room = asyncio.Lock(), asyncio.Event()
        self._card_slept = False
        self._skip = self._in_vain = 0

    async def start(self) -> None:
        """Raises ``CardUnavailable``."""
        try:
            self._socket.setblocking(False)
            descriptors = await self._receive()
        except (OSError, TimeoutError) as exc:
            raise CardUnavailable("the crypto card is gone") from exc
        try:
            memory = Memory(descriptors[0])
        except BaseException:
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            raise
        finally:
            os.close(descriptors[0])
        self._parts = _Parts(Driver(memory), memory, descriptors[1], descriptors[2])
        loop = asyncio.get_running_loop()
        loop.add_reader(self._parts.own_bell, self._rung)
        loop.add_reader(self._socket, self._lost)
        self._parts.driver.sleeps(True)

    async def _receive(self) -> list[int]:
        """Memory, the card's doorbell, our own."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._socket, readable.set)
        try:
            async with asyncio.timeout(START_S):
                await readable.wait()
        finally:
            loop.remove_reader(self._socket)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 3)
        if len(descriptors) != 3:
            for descriptor in descriptors:
                os.close(descriptor)
            raise CardUnavailable("the crypto card gave no vCC")
        return descriptors

    async def close(self) -> None:
        """End the vCC; what is under way fails with ``CardUnavailable``."""
        self._lost()

    @property
    def connected(self) -> bool:
        return self._parts is not None

    async def submit(self, operation: Operation, *, handle: int = 0, parameters: bytes = b"", data: Data = b"") -> Completion:
        """See ``VirtualCryptoCard``. Requests reach the card in the order of these calls. A cancelled call gives back what it opened."""
        if len(parameters) > MAX_PARAMETER_BYTES or len(data) > MAX_SUBMIT_BYTES:
            raise TooLarge(f"a request to a crypto card has at most {MAX_PARAMETER_BYTES} bytes of parameters, {MAX_DATA_BYTES} of data")
        async with self._order:
            while (number := self._push(operation, handle, parameters, data)) is None:
                self._room.clear()
                await self._room.wait()
        future = self._pending[number].future
        self._spin(future, len(data))
        return await future

    def _push(self, operation: Operation, handle: int, parameters: bytes, data: Data) -> int | None:
        """The number of a request that is under way now; None when the rings are full."""
        parts = self._parts
        if parts is None:
            raise CardUnavailable("the crypto card is gone")
        number = self._number = (self._number + 1) & WORD
        if number in self._pending or not parts.driver.push(operation, number, handle, parameters, data):
            return None
        self._pending[number] = _Pending(operation, asyncio.get_running_loop().create_future())
        self._card_slept = parts.driver.card_sleeps
        if self._card_slept:
            os.eventfd_write(parts.card_bell, 1)
        return number

    def _spin(self, future: "asyncio.Future[Completion]", data_bytes: int) -> None:
        """Look for the answer a little while: to be woken costs more. Where that was in vain lately it is left out for some calls."""
        parts = self._parts
        if parts is None or self._card_slept or data_bytes > SPIN_BYTES or len(self._pending) > 1:
            return
        if self._skip:
            self._skip -= 1
            return
        parts.driver.sleeps(False)
        end = time.perf_counter() + LONGEST_SPIN_S
        while not future.done() and time.perf_counter() < end:
            self._collect()
        if self._parts is None:
            return
        self._in_vain = 0 if future.done() else min(2 * self._in_vain + 1, MOST_SKIPPED)
        self._skip = self._in_vain
        parts.driver.sleeps(True)
        self._collect()

    def _rung(self) -> None:
        parts = self._parts
        if parts is not None:
            with suppress(BlockingIOError):
                os.eventfd_read(parts.own_bell)
            self._collect()

    def _collect(self) -> None:
        if self._parts is None:
            return
        try:
            answers = self._parts.driver.pull()
        except CardUnavailable:
            self._lost()
            return
        for answer in answers:
            self._answered(answer)
        if answers:
            self._room.set()

    def _answered(self, answer: Answered) -> None:
        pending = self._pending.pop(answer.number)
        if pending.future.cancelled():
            undo = _UNDO.get(pending.operation)
            if undo is not None and answer.status == Status.DONE:
                self._give_back(undo, answer.value)
        elif answer.status == Status.DONE:
            pending.future.set_result(Completion(answer.value, answer.parameters, answer.data))
        else:
            pending.future.set_exception(_error(answer.parameters))

    def _give_back(self, undo: Operation, value: int) -> None:
        number = self._push(undo, value, b"", b"")
        if number is not None:
            self._pending[number].future.cancel()

    def _lost(self) -> None:
        parts, self._parts = self._parts, None
        if parts is None:
            self._socket.close()
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        loop.remove_reader(parts.own_bell)
        parts.memory.close()
        os.close(parts.card_bell)
        os.close(parts.own_bell)
        self._socket.close()
        pending, self._pending = self._pending, {}
        for request in pending.values():
            if not request.future.done():
                request.future.set_exception(CardUnavailable("the crypto card is gone"))
        self._room.set()


def _error(parameters: bytes) -> CipherfleetError:
    try:
        return CipherfleetError.from_body(codec.decode(parameters, ErrorBody))
    except CipherfleetError:
        return CardUnavailable("the crypto card answered with an error that cannot be read")


__all__ = ["RingCard"]
