"""One channel to the platform that is kept up while the Ukey is in."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from cipherfleet.channel.client import Caller
from cipherfleet.channel.frames import Frames
from cipherfleet.contract.errors import BadInput, CertificateInvalid, CipherfleetError, PeerError, ServiceUnavailable

FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 2.0
PATIENCE_S = 3.0
"""How long the very first connection is tried before its error is the terminal's."""
_CLOSE_S = 0.25

_TRANSIENT = (ServiceUnavailable, BadInput, PeerError, CertificateInvalid, ConnectionError)


class Link:
    """Connects, says hello, hands over frames one by one; when the connection is lost, all over again.

    ``prepare`` comes before every connection, and ``path`` is asked at each. A frame that cannot be decoded costs the peer its connection.
    """

    def __init__(
        self,
        caller: Caller,
        path: Callable[[], str],
        receives: Any,
        *,
        hello: Callable[[], Awaitable[None]],
        receive: Callable[[Any], Awaitable[None]],
        lost: Callable[[str], None],
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._caller, self._path, self._receives = caller, path, receives
        self._hello, self._receive, self._lost, self._prepare = hello, receive, lost, prepare
        self._frames: Frames[Any, Any] | None = None
        self._leaving = False
        self.opened = asyncio.Event()  # once set it stays set: the platform was there

    async def keep(self) -> None:
        """Runs until cancelled. Raises what hinders the first connection, and what connecting again would not mend."""
        delay, started = FIRST_DELAY_S, time.monotonic()
        while True:
            connected = time.monotonic()
            try:
                if self._prepare is not None:
                    await self._prepare()
                async with self._caller.frames(self._path(), self._receives) as frames:
                    self._frames = frames
                    self.opened.set()
                    await self._hello()
                    async for frame in frames:
                        if not self._leaving:
                            await self._receive(frame)
                why = "closed"
            except _TRANSIENT as exc:
                if not self.opened.is_set() and (isinstance(exc, CertificateInvalid) or time.monotonic() - started > PATIENCE_S):
                    raise
                why = exc.code if isinstance(exc, CipherfleetError) else "broken"
            finally:
                self._frames = None
            if self._leaving:
                await asyncio.get_running_loop().create_future()  # until we are cancelled
            self._lost(why)
            if time.monotonic() - connected > LONGEST_DELAY_S:
                delay = FIRST_DELAY_S
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)

    async def send(self, frame: object) -> None:
        """Nothing is kept for later: whoever is not connected learns what matters from ``hello``. Raises ``ConnectionError``."""
        frames = self._frames
        if frames is None:
            raise ConnectionResetError("the channel is not open")
        await frames.send(frame)

    async def try_send(self, frame: object) -> bool:
        """Send if the other side is there; whether it went out."""
        with suppress(ConnectionError):
            await self.send(frame)
            return True
        return False

    async def say_goodbye(self, *frames: object, within: float) -> None:
        """Send the last frames and close, all within ``within`` seconds, whatever the other side does.

        From the first moment on nothing that still comes in is heard, and nothing is connected again.
        """
        self._leaving = True
        open_ = self._frames
        if open_ is None:
            return
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(within):
                for frame in frames:
                    await open_.send(frame)
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_CLOSE_S):
                await open_.close()
