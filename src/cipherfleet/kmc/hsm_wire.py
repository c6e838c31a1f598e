"""What goes over the HSM's unix socket: a length (u32, big endian), then one JSON message of at most 64 KiB."""

import asyncio
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cipherfleet.channel import codec
from cipherfleet.contract.errors import TooLarge, Truncated
from cipherfleet.kmc.hsm import KeyHandle, Label

MAX_MESSAGE_BYTES = 64 * 1024
_LENGTH = struct.Struct(">I")
_MAX_SOCKET_PATH = 100


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    """Base of all requests; the subclass's name is the operation."""


class Login(Request, frozen=True):
    """The first message of every connection, as a token's user PIN."""

    pin: str

    def __repr__(self) -> str:
        return "Login(...)"


class Mechanisms(Request, frozen=True):
    pass


class GenerateKeyPair(Request, frozen=True):
    label: Label


class GenerateWrapKey(Request, frozen=True):
    label: Label


class Find(Request, frozen=True):
    label: Label


class PublicKey(Request, frozen=True):
    handle: KeyHandle


class Sign(Request, frozen=True):
    handle: KeyHandle
    data: bytes


class GenerateWrapped(Request, frozen=True):
    handle: KeyHandle


class Rewrap(Request, frozen=True):
    handle: KeyHandle
    wrapped: bytes
    recipient: bytes


class Destroy(Request, frozen=True):
    handle: KeyHandle


AnyRequest = Login | Mechanisms | GenerateKeyPair | GenerateWrapKey | Find | PublicKey | Sign | GenerateWrapped | Rewrap | Destroy


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer, or the error's code and message."""

    data: bytes = b""
    handle: KeyHandle | None = None
    names: tuple[str, ...] = ()
    code: str = ""
    message: str = ""


def frame(message: object) -> bytes:
    """A message with its length. Raises ``TooLarge``."""
    raw = codec.encode(message)
    if len(raw) > MAX_MESSAGE_BYTES:
        raise TooLarge(f"a message to the HSM has {len(raw)} bytes, {MAX_MESSAGE_BYTES} are allowed")
    return _LENGTH.pack(len(raw)) + raw


async def read_message(reader: asyncio.StreamReader, *, body_timeout: float) -> bytes | None:
    """The next message, ``None`` at a clean end. Raises ``TooLarge`` or ``Truncated``; ``TimeoutError`` when it does not go on."""
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as exc:
        if not exc.partial:
            return None
        raise Truncated("a message to the HSM ends in its length") from exc
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE_BYTES:
        raise TooLarge(f"a message to the HSM has {length} bytes, {MAX_MESSAGE_BYTES} are allowed")
    try:
        async with asyncio.timeout(body_timeout):
            return await reader.readexactly(length)
    except asyncio.IncompleteReadError as exc:
        raise Truncated("a message to the HSM ends too early") from exc


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """``path`` as a socket address: those of the kernel end at 107 bytes, so a long one goes by its folder's descriptor."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
