"""Where the bytes of a request come from: memory, a binary file, any iterable. Read piece by piece, never twice at once."""

import asyncio
import io
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import BinaryIO, Self, TypeAlias

from cipherfleet.contract.errors import FileProblem

Bytes: TypeAlias = bytes | bytearray | memoryview
Source: TypeAlias = Bytes | BinaryIO | Iterable[Bytes] | AsyncIterable[Bytes]
Progress: TypeAlias = Callable[[int, int | None], object]
"""Called with (bytes taken from the source so far, all of them if known)."""

PIECE_BYTES = 256 * 1024
READ_BYTES = 1024 * 1024
GATHER_S = 0.02


class Upload:
    """The body of one request: an asynchronous iterator over pieces of at most ``PIECE_BYTES``.

    ``size``: bytes, when known; what is appended to a file later is not sent. ``failure``: what the source itself raised, for
    the caller to see as it was.
    """

    def __init__(self, data: Source, progress: Progress | None = None) -> None:
        self._data = data
        self._progress = progress
        self._position: int | None = None
        self._reading: asyncio.Future[Bytes] | None = None
        self._touched = False
        self.touch: Callable[[], None] = lambda: None
        self.failure: Exception | None = None
        self.sent = 0
        if isinstance(data, (bytes, bytearray, memoryview)):
            self.size: int | None = memoryview(data).nbytes
        elif isinstance(data, str):
            raise TypeError("text has to be encoded to bytes first")
        else:
            self.size, self._position = _extent(data)
        self._pieces = self._start()

    @property
    def replayable(self) -> bool:
        """Whether ``rewind`` works: from memory, from a file that can seek, or nothing was taken yet."""
        return not self._touched or self._position is not None or isinstance(self._data, (bytes, bytearray, memoryview))

    async def rewind(self) -> None:
        """Start again."""
        if not self._touched:
            return
        if isinstance(self._data, io.IOBase) and self._position is not None:
            if self._reading is not None:
                await asyncio.wait((self._reading,))
            self._data.seek(self._position)
        self._pieces = self._start()
        self._touched, self.sent, self.failure = False, 0, None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Bytes:
        self._touched = True
        try:
            piece = await self._next()
        except StopAsyncIteration:
            raise
        except Exception as exc:
            self.failure = exc
            raise
        self.sent += len(piece)
        self.touch()
        if self._progress is not None:
            self._progress(self.sent, self.size)
        return piece

    async def _next(self) -> Bytes:
        missing = None if self.size is None else self.size - self.sent
        if missing == 0:
            raise StopAsyncIteration
        piece = await anext(self._pieces, None)
        if piece is None:
            if missing:
                raise FileProblem(f"the source became shorter while it was read: {self.sent} bytes of {self.size}")
            raise StopAsyncIteration
        return piece[:missing]

    def _start(self) -> AsyncIterator[Bytes]:
        data = self._data
        if isinstance(data, (bytes, bytearray, memoryview)):
            return _cut_all(memoryview(data).cast("B"))
        if isinstance(data, AsyncIterable):
            return _asynchronous(data)
        if hasattr(data, "read"):
            return self._file(data.read1 if hasattr(data, "read1") else data.read)
        return _synchronous(iter(data))

    async def _file(self, read: Callable[[int], Bytes]) -> AsyncIterator[Bytes]:
        """Read in a thread: a pipe may block, a disk may be slow. ``read1`` gives what a pipe has instead of waiting for more."""
        while True:
            self._reading = asyncio.get_running_loop().run_in_executor(None, read, READ_BYTES)
            piece = await asyncio.shield(self._reading)
            if not piece:
                return
            for part in _cut(piece):
                yield part


def _extent(data: object) -> tuple[int | None, int | None]:
    """(bytes to read, position) of something that can seek, else (None, None)."""
    if not isinstance(data, io.IOBase) or not data.seekable():
        return None, None
    try:
        position = data.tell()
        end = data.seek(0, io.SEEK_END)
        data.seek(position)
    except (OSError, ValueError):  # a compressed file does not know its end
        return None, None
    return max(0, end - position), position


async def _cut_all(data: memoryview) -> AsyncIterator[Bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]
        await asyncio.sleep(0)  # so that a lost connection is noticed, and others have their turn


async def _asynchronous(data: AsyncIterable[Bytes]) -> AsyncIterator[Bytes]:
    async for item in data:
        for piece in _cut(item):
            yield piece


async def _synchronous(items: Iterator[Bytes]) -> AsyncIterator[Bytes]:
    """Pulled in a thread, small items gathered, so that neither a slow nor a fine-grained iterator holds up the loop."""
    while gathered := await asyncio.to_thread(_pull, items):
        for piece in _cut(gathered):
            yield piece


def _pull(items: Iterator[Bytes]) -> bytes | bytearray | memoryview:
    """The next bytes, from as many items as came within ``GATHER_S``; empty at the end."""
    gathered = bytearray()
    until = time.monotonic() + GATHER_S
    for item in items:
        _check(item)
        if not gathered and len(item) >= PIECE_BYTES:
            return item
        gathered += item
        if len(gathered) >= PIECE_BYTES or (gathered and time.monotonic() > until):
            break
    return gathered


def _cut(item: Bytes) -> Iterator[Bytes]:
    """What may change after we were given it is copied: the transport may still hold it then."""
    _check(item)
    if isinstance(item, bytes) and len(item) <= PIECE_BYTES:
        if item:
            yield item
        return
    view = memoryview(item).cast("B")
    for start in range(0, len(view), PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        yield piece if isinstance(item, bytes) else bytes(piece)


def _check(item: object) -> None:
    if not isinstance(item, (bytes, bytearray, memoryview)):
        raise TypeError(f"a source must give bytes, this one gave {type(item).__name__}")
