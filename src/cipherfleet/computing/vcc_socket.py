"""The vCC over a stream socket: how frames are cut, and the VCM's end of it.

A request is a descriptor, its parameters and its data; many may be under way, each known by its number. The card's end is
``card_server``. Nothing here knows a key.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, cast

from cipherfleet.channel import codec
from cipherfleet.contract.errors import CardUnavailable, CipherfleetError, ErrorBody, Malformed, TooLarge
from cipherfleet.contract.vcc import (
    DESCRIPTOR,
    MAX_DATA_BYTES,
    MAX_PARAMETER_BYTES,
    Completion,
    Operation,
    decode_descriptor,
    encode_request,
)

Data = bytes | bytearray | memoryview

DONE, FAILED = 0, 1
MAX_FRAME_DATA_BYTES = MAX_DATA_BYTES + 64 * 1024
SOCKET_BUFFER_BYTES = 1024 * 1024
_STAGE_BYTES = 64 * 1024
_WRITE_LIMIT_BYTES = 2 * 1024 * 1024


class Frame(NamedTuple):
    """A request, or a completion (``operation`` is its status then). ``data`` is a view into memory of this frame's own."""

    operation: int
    number: int
    handle: int
    parameters: bytes
    data: memoryview


class FrameReader:
    """Cuts a stream of bytes into frames; what is long is received in place."""

    def __init__(self) -> None:
        self._stage = bytearray(_STAGE_BYTES)
        self._staged = 0
        self._body: bytearray | None = None
        self._filled = 0
        self._head = (0, 0, 0, 0, 0)

    def buffer(self) -> memoryview:
        """Where the next bytes shall go; never empty."""
        if self._body is not None:
            return memoryview(self._body)[self._filled :]
        return memoryview(self._stage)[self._staged :]

    def received(self, count: int) -> list[Frame]:
        """The frames that ``count`` bytes more have made complete. Raises ``Malformed``; the stream is of no use then."""
        if self._body is not None:
            self._filled += count
            if self._filled < len(self._body):
                return []
            body, self._body = self._body, None
            return [_frame(self._head, body)]
        self._staged += count
        frames: list[Frame] = []
        position, stage = 0, memoryview(self._stage)
        while self._staged - position >= DESCRIPTOR.size:
            start = position + DESCRIPTOR.size
            head = decode_descriptor(bytes(stage[position:start]))
            end = start + head[3] + head[4]
            if end > self._staged:
                self._body, self._head, self._filled = bytearray(end - start), head, self._staged - start
                self._body[: self._filled] = stage[start : self._staged]
                self._staged = 0
                return frames
            frames.append(_frame(head, self._stage[start:end]))
            position = end
        rest = self._staged - position
        stage[:rest] = bytes(stage[position : self._staged])
        self._staged = rest
        return frames


def _frame(head: tuple[int, int, int, int, int], body: bytearray) -> Frame:
    operation, number, handle, parameter_bytes, _ = head
    return Frame(operation, number, handle, bytes(body[:parameter_bytes]), memoryview(body)[parameter_bytes:])


def encode_completion(status: int, number: int, value: int, parameters: bytes, data_bytes: int) -> bytes:
    """The descriptor and parameters of a completion; the data follows as is."""
    return DESCRIPTOR.pack(status, 0, number, value, len(parameters), data_bytes) + parameters


def widen(sock: socket.socket) -> None:
    """Larger kernel buffers, as far as the kernel allows: fewer wake-ups for long data."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


class _Link(asyncio.BufferedProtocol):
    """The transport's side of a ``SocketCard``."""

    def __init__(self, frame: Callable[[Frame], None], lost: Callable[[], None]) -> None:
        self._frame, self._lost = frame, lost
        self._reader = FrameReader()
        self.transport: asyncio.Transport | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.transport.set_write_buffer_limits(high=_WRITE_LIMIT_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for frame in self._reader.received(nbytes):
                self._frame(frame)
        except Malformed:
            self.abort()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.writable.set()
        self.closed.set()
        self._lost()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Pending(NamedTuple):
    operation: Operation
    future: "asyncio.Future[Completion]"


class SocketCard:
    """A ``VirtualCryptoCard`` at the other end of ``sock``, a connected unix stream socket, which this takes over."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._link: _Link | None = None
        self._order = asyncio.Lock()
        self._number = 0
        self._pending: dict[int, _Pending] = {}

    async def start(self) -> None:
        """Raises ``CardUnavailable``."""
        link = _Link(self._completed, self._lost)
        try:
            self._socket.setblocking(False)
            widen(self._socket)
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=self._socket)
        except OSError as exc:
            raise CardUnavailable("the crypto card is gone") from exc
        self._link = link

    async def close(self) -> None:
        """End the connection; what is under way fails with ``CardUnavailable``."""
        link, self._link = self._link, None
        if link is None:
            self._socket.close()
            return
        link.abort()
        await link.closed.wait()

    @property
    def connected(self) -> bool:
        return self._link is not None and self._link.transport is not None

    async def submit(self, operation: Operation, *, handle: int = 0, parameters: bytes = b"", data: Data = b"") -> Completion:
        """See ``VirtualCryptoCard``. ``data`` must not change until this returns.

        Requests reach the card in the order of these calls. A cancelled call gives back what it opened.
        """
        if len(parameters) > MAX_PARAMETER_BYTES or len(data) > MAX_FRAME_DATA_BYTES:
            raise TooLarge(f"a request to a crypto card has at most {MAX_PARAMETER_BYTES} bytes of parameters, {MAX_DATA_BYTES} of data")
        async with self._order:
            link = self._link
            if link is not None:
                await link.writable.wait()
            if link is None or link.transport is None:
                raise CardUnavailable("the crypto card is gone")
            number = self._next_number()
            pending = _Pending(operation, asyncio.get_running_loop().create_future())
            self._pending[number] = pending
            link.transport.write(encode_request(operation, number, handle, parameters, len(data)))
            if data:
                link.transport.write(data)
        return await pending.future

    def _next_number(self) -> int:
        while True:
            self._number = (self._number + 1) & 0xFFFFFFFF
            if self._number not in self._pending:
                return self._number

    def _completed(self, frame: Frame) -> None:
        pending = self._pending.get(frame.number)
        if pending is None or frame.operation not in (DONE, FAILED):
            raise Malformed("the crypto card answered what nobody asked")
        del self._pending[frame.number]
        if pending.future.cancelled():
            if frame.operation == DONE:
                self._give_back(pending.operation, frame.handle)
        elif frame.operation == DONE:
            pending.future.set_result(Completion(frame.handle, frame.parameters, bytes(frame.data)))
        else:
            pending.future.set_exception(_error(frame.parameters))

    def _give_back(self, operation: Operation, value: int) -> None:
        undo = {Operation.BEGIN: Operation.ABORT, Operation.GENERATE: Operation.UNLOAD, Operation.LOAD: Operation.UNLOAD}.get(operation)
        if undo is None or self._link is None or self._link.transport is None:
            return
        number = self._next_number()
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        future.cancel()
        self._pending[number] = _Pending(undo, future)
        self._link.transport.write(encode_request(undo, number, value, b"", 0))

    def _lost(self) -> None:
        pending, self._pending = self._pending, {}
        for request in pending.values():
            if not request.future.done():
                request.future.set_exception(CardUnavailable("the crypto card is gone"))


def _error(parameters: bytes) -> CipherfleetError:
    try:
        return CipherfleetError.from_body(codec.decode(parameters, ErrorBody))
    except CipherfleetError:
        return CardUnavailable("the crypto card answered with an error that cannot be read")


__all__ = ["Frame", "FrameReader", "SocketCard", "encode_completion", "widen"]
