"""The body of a request, however long, read in blocks with bounded memory."""

import asyncio
import re
from collections import deque
from typing import TypeVar

import aiohttp
from aiohttp import web

from cipherfleet.channel import codec
from cipherfleet.contract.algorithms import algorithm
from cipherfleet.contract.errors import Malformed, TimedOut, TooLarge, Truncated, Unsupported
from cipherfleet.services import wire

T = TypeVar("T")

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")


class Body:
    """A request's body. A peer that stops sending for ``stall_s`` seconds is given up (``TimedOut``)."""

    def __init__(self, request: web.Request, stall_s: float) -> None:
        if request.version < aiohttp.HttpVersion11:
            # HTTP/1.0 ends an answer by closing the connection: a cut one would look whole.
            raise Unsupported("speak HTTP/1.1")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Unsupported("a body must not have a Content-Encoding", "send the bytes as they are")
        self.length = None if "chunked" in request.headers.get("Transfer-Encoding", "").lower() else request.content_length or 0
        self.ended = False
        self.size = 0
        self._content = request.content
        self._pieces: deque[bytes | memoryview] = deque()
        self._stall_s = stall_s

    async def fill(self, count: int) -> bool:
        """Read until more than ``count`` bytes are here; ``False`` when the body ended before.

        Raises ``TimedOut``, ``Truncated`` or ``ConnectionError``.
        """
        while self.size <= count and not self.ended:
            try:
                async with asyncio.timeout(self._stall_s):
                    piece = await self._content.readany()
            except TimeoutError as exc:
                raise TimedOut(f"the request's body stood still for {self._stall_s:g} s") from exc
            except web.RequestPayloadError as exc:
                raise Truncated("the request's body is not whole") from exc
            except aiohttp.ClientError as exc:
                raise ConnectionResetError from exc
            if piece:
                self._pieces.append(piece)
                self.size += len(piece)
            else:
                self.ended = True
        return self.size > count

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes of those that are here, copied once."""
        taken: list[bytes | memoryview] = []
        missing = min(count, self.size)
        self.size -= missing
        while missing:
            piece = self._pieces.popleft()
            if len(piece) > missing:
                view = memoryview(piece)
                self._pieces.appendleft(view[missing:])
                piece = view[:missing]
            taken.append(piece)
            missing -= len(piece)
        return b"".join(taken)

    async def whole(self, limit: int) -> bytes:
        """All of a body that has to be small. Raises ``TooLarge``."""
        if (self.length or 0) > limit or await self.fill(limit):
            raise TooLarge(f"the request's body has more than {limit} bytes")
        return self.take(limit)

    async def message(self, kind: type[T], *, limit: int = wire.MAX_JSON_BYTES) -> T:
        """A JSON body of at most ``limit`` bytes. Raises ``Malformed`` or ``TooLarge``."""
        return codec.decode(await self.whole(limit), kind, what="the request's body")


def header_bytes(request: web.Request, name: str, limit: int) -> bytes:
    """The decoded bytes of a base64 header, empty when it is not there. Raises ``Malformed`` or ``TooLarge``."""
    values = request.headers.getall(name, [])
    if len(values) > 1:
        raise Malformed(f"the header {name} is there twice")
    return wire.from_header(name, values[0], limit) if values else b""


def header_version(request: web.Request) -> int | None:
    """The key version that the caller names, if it does. Raises ``Malformed``."""
    text = request.headers.get(wire.KEY_VERSION)
    if text is None:
        return None
    return whole_number(text, wire.KEY_VERSION, 1, 2**32 - 1)


def digest_choice(request: web.Request) -> str:
    """The digest that the caller chose, or nothing. Raises ``AlgorithmUnknown``."""
    text = request.headers.get(wire.DIGEST, "")
    return algorithm(text).name if text else ""


def prehashed(request: web.Request) -> bool:
    """Whether the body is a digest already. Raises ``Malformed``."""
    text = request.headers.get(wire.PREHASHED, "false").lower()
    if text not in ("true", "false"):
        raise Malformed(f"the header {wire.PREHASHED} is true or false")
    return text == "true"


def request_id(request: web.Request) -> str | None:
    """The caller's name for this request, if it gave one. Raises ``Malformed``."""
    text = request.headers.get(wire.REQUEST)
    if text is not None and _REQUEST_ID.fullmatch(text) is None:
        raise Malformed(f"the header {wire.REQUEST} is not 32 hex digits")
    return text


def whole_number(text: str, what: str, lowest: int, highest: int) -> int:
    """A plain decimal number within bounds. Raises ``Malformed``."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10) or not lowest <= int(text) <= highest:
        raise Malformed(f"{what} must be a whole number from {lowest} to {highest}")
    return int(text)
