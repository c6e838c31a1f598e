"""An open channel to a terminal or a VCM: what is posted goes out in order, and nobody waits for a slow reader."""

import asyncio
import contextlib
from typing import Any, Generic, TypeVar

from cipherfleet.channel.frames import Frames

Out = TypeVar("Out")

MAX_WAITING = 128


class Channel(Generic[Out]):
    """The sending half of a WebSocket. A reader that lets ``MAX_WAITING`` frames pile up is cut off."""

    def __init__(self, frames: Frames[Any, Out]) -> None:
        self._frames = frames
        self._waiting: asyncio.Queue[Out | None] = asyncio.Queue(MAX_WAITING)
        self.finished = False
        self._linger_s = 0.0
        self._left = asyncio.Event()
        self._writer = asyncio.get_running_loop().create_task(self._write())

    def post(self, frame: Out) -> None:
        """Returns at once; after ``finish`` it does nothing."""
        if self.finished:
            return
        try:
            self._waiting.put_nowait(frame)
        except asyncio.QueueFull:
            self.finished = True
            self._writer.cancel()

    def finish(self, linger_s: float = 0.0) -> None:
        """Send what waits, then close: when the other side has, or after ``linger_s`` seconds, for its last words. Idempotent."""
        if not self.finished:
            self.finished = True
            self._linger_s = linger_s
            try:
                self._waiting.put_nowait(None)
            except asyncio.QueueFull:
                self._writer.cancel()

    def left(self) -> None:
        """The other side says nothing more."""
        self._left.set()

    async def closed(self, timeout: float | None = None) -> None:
        """Wait until the channel is closed, at most ``timeout`` seconds."""
        await asyncio.wait({self._writer}, timeout=timeout)

    async def _write(self) -> None:
        try:
            while (frame := await self._waiting.get()) is not None:
                await self._frames.send(frame)
        except OSError:
            pass
        finally:
            self.finished = True
            if self._linger_s:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._left.wait(), self._linger_s)
            with contextlib.suppress(OSError):
                await self._frames.close()
