"""A body through the card: one ``RUN`` when it is small, else a stream of whole chunks, answered while it still comes in."""

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Self

from aiohttp import web

from cipherfleet.channel import codec
from cipherfleet.contract.ciphertext import TAG_BYTES
from cipherfleet.contract.errors import CipherfleetError, Internal, TimedOut
from cipherfleet.contract.vcc import CHUNK_BYTES, Operation, StreamRequest, Verb, VirtualCryptoCard
from cipherfleet.services.components.bodies import Body

BLOCK_CHUNKS = 8
"""Chunks per ``UPDATE``: 512 KiB."""
IN_FLIGHT = 3
"""Updates of one message that the card may have at once: its chunks are independent of each other."""


def chunk_bytes(verb: Verb) -> int:
    """The size of a whole chunk of what ``verb`` reads."""
    return CHUNK_BYTES + TAG_BYTES if verb in (Verb.DECRYPT, Verb.REENCRYPT) else CHUNK_BYTES


class CardStream:
    """One stream in the card, from ``BEGIN`` to ``FINISH``; aborted when the block is left before."""

    def __init__(self, card: VirtualCryptoCard, handle: int, request: StreamRequest) -> None:
        self._card, self._handle, self._request = card, handle, request
        self._stream = 0
        self._open = False
        self._running: set[asyncio.Task[bytes]] = set()
        self.head = b""

    async def __aenter__(self) -> Self:
        begun = await self._card.submit(Operation.BEGIN, handle=self._handle, parameters=codec.encode(self._request))
        self._stream, self.head, self._open = begun.value, begun.data, True
        return self

    async def __aexit__(self, *exc: object) -> None:
        for update in self._running:
            update.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._open:
            with suppress(CipherfleetError):  # the card may have dropped it already
                await asyncio.shield(self._card.submit(Operation.ABORT, handle=self._stream))

    def start_update(self, data: bytes | memoryview) -> asyncio.Task[bytes]:
        """Give whole chunks to the card, and go on reading while it works. Updates reach it in the order of these calls."""
        update = asyncio.create_task(self.update(data))
        self._running.add(update)
        update.add_done_callback(self._running.discard)
        return update

    async def update(self, data: bytes | memoryview) -> bytes:
        return (await self._card.submit(Operation.UPDATE, handle=self._stream, data=data)).data

    async def finish(self, data: bytes | memoryview) -> bytes:
        """The last data, at most one chunk."""
        finished = await self._card.submit(Operation.FINISH, handle=self._stream, data=data)
        self._open = False
        return finished.data


async def run(card: VirtualCryptoCard, handle: int, request: StreamRequest, data: bytes) -> bytes:
    """A small body in one operation."""
    return (await card.submit(Operation.RUN, handle=handle, parameters=codec.encode(request), data=data)).data


async def absorb(card: VirtualCryptoCard, uses: Sequence[tuple[int, StreamRequest]], body: Body) -> list[bytes | CipherfleetError]:
    """Feed the body to one or more streams that answer at the end (digest, MAC, signature): each one's answer or error."""
    block = BLOCK_CHUNKS * CHUNK_BYTES
    if not await body.fill(block):
        data = body.take(block)
        return await _gather(*(run(card, handle, request, data) for handle, request in uses))
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(CardStream(card, handle, request)) for handle, request in uses]
        while await body.fill(block):
            data = body.take(block)
            updates = [stream.start_update(data) for stream in streams]
            await body.fill(block)
            for update in updates:
                await update
        rest = memoryview(body.take(block))
        whole = _whole_chunks(len(rest), CHUNK_BYTES)
        if whole:
            for stream in streams:
                await stream.update(rest[:whole])
        return await _gather(*(stream.finish(rest[whole:]) for stream in streams))


class Answer:
    """A raw answer that is written while the request still comes in; ``length``: bytes, when known beforehand.

    One piece is always held back until the next one is there, or the end: so all the announced bytes are out only when the
    last chunk has been verified, and an answer that is broken off looks broken to every HTTP client.
    """

    def __init__(self, request: web.Request, headers: dict[str, str], length: int | None, stall_s: float) -> None:
        self._request, self._stall_s = request, stall_s
        self.response = web.StreamResponse(headers=headers)
        self.response.content_type = "application/octet-stream"
        if length is None:
            self.response.enable_chunked_encoding()
        else:
            self.response.content_length = length
        self._missing = length
        self._held = b""
        self.begun = False

    async def write(self, data: bytes) -> None:
        """Raises ``TimedOut`` when the peer takes nothing for a while, ``ConnectionError`` when it is gone."""
        held, self._held = self._held, data
        if held:
            await self._send(held)

    async def end(self, data: bytes) -> None:
        """The last piece, and the end."""
        for piece in (self._held, data):
            if piece:
                await self._send(piece)
        if self._missing:
            raise Internal("an answer is shorter than announced")
        await self.response.write_eof()

    def break_off(self) -> None:
        """Make what was sent so far visibly incomplete."""
        transport = self._request.transport
        if transport is not None:
            transport.abort()
        self._request.protocol.force_close()

    async def _send(self, data: bytes) -> None:
        if not self.begun:
            self.begun = True
            await self.response.prepare(self._request)
        if self._missing is not None:
            self._missing -= len(data)
            if self._missing < 0:
                raise Internal("an answer is longer than announced")
        waiting = -1
        writing = asyncio.ensure_future(self.response.write(data))
        try:
            while True:
                done, _ = await asyncio.wait((writing,), timeout=self._stall_s)
                if done:
                    writing.result()
                    return
                transport = self._request.transport
                left = transport.get_write_buffer_size() if transport is not None else 0
                if left == waiting:
                    raise TimedOut(f"the caller took nothing of the answer for {self._stall_s:g} s")
                waiting = left
        finally:
            writing.cancel()


async def transform(
    card: VirtualCryptoCard,
    handle: int,
    stream_request: StreamRequest,
    body: Body,
    answer: Answer,
    *,
    plain_headers: dict[str, str],
    bare: bool = False,
) -> web.StreamResponse:
    """Encrypt, decrypt or re-encrypt the body into the answer; ``bare``: in chunks that carry no tags.

    Raises while nothing was sent; later errors are the caller's to handle, who sees ``answer.begun``.
    """
    chunk = CHUNK_BYTES if bare else chunk_bytes(stream_request.verb)
    block = BLOCK_CHUNKS * chunk
    if not await body.fill(block):
        data = await run(card, handle, stream_request, body.take(block))
        return web.Response(body=data, headers=plain_headers, content_type="application/octet-stream")
    async with CardStream(card, handle, stream_request) as stream:
        head = stream.head
        updates: deque[asyncio.Task[bytes]] = deque()

        async def give() -> None:
            nonlocal head
            piece = await updates.popleft()
            await answer.write(head + piece if head else piece)
            head = b""

        while await body.fill(block):  # the network goes on while the card works
            updates.append(stream.start_update(body.take(block)))
            if len(updates) == IN_FLIGHT:
                await give()
        rest = memoryview(body.take(block))
        whole = _whole_chunks(len(rest), chunk)
        if whole:
            updates.append(stream.start_update(rest[:whole]))
        while updates:
            await give()
        await answer.end(await stream.finish(rest[whole:]))
    return answer.response


def _whole_chunks(size: int, chunk: int) -> int:
    """Bytes of the chunks before the last one."""
    return (size - 1) // chunk * chunk


async def _gather(*work: Coroutine[Any, Any, bytes]) -> list[bytes | CipherfleetError]:
    answers = await asyncio.gather(*work, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, CipherfleetError):
            raise answer
    return [a for a in answers if isinstance(a, (bytes, CipherfleetError))]
