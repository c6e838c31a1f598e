"""Typed frames over a WebSocket: one tagged union each way, JSON, in order."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from aiohttp import ClientWebSocketResponse, WSMsgType, web

from cipherfleet.channel import codec

In = TypeVar("In")
Out = TypeVar("Out")


def _union(base: Any) -> Any:
    """The tagged union of all direct subclasses of ``base``."""
    members = tuple(base.__subclasses__())
    union = members[0]
    for member in members[1:]:
        union = union | member
    return union


class Frames(Generic[In, Out]):
    """Send and receive frames; iteration ends when the other side is gone."""

    def __init__(self, socket: web.WebSocketResponse | ClientWebSocketResponse, receives: Any) -> None:
        self.socket = socket
        self._receives = _union(receives)
        self._sending = asyncio.Lock()

    async def send(self, frame: Out) -> None:
        """Raises ``ConnectionError`` when the other side is gone."""
        async with self._sending:
            if self.socket.closed:
                raise ConnectionResetError("the channel is closed")
            await self.socket.send_bytes(codec.encode(frame))

    async def __aiter__(self) -> AsyncIterator[In]:
        """Frames as they come. Raises ``Malformed`` on one that is not of the union."""
        async for message in self.socket:
            if message.type is WSMsgType.BINARY:
                yield codec.decode(message.data, self._receives, what="a frame")
            else:
                break

    @property
    def response(self) -> web.StreamResponse:
        """What a handler returns for a channel that has ended."""
        if not isinstance(self.socket, web.WebSocketResponse):
            raise RuntimeError("only a server answers with its channel")  # noqa: TRY004
        return self.socket

    async def close(self) -> None:
        await self.socket.close()
