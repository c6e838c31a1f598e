"""JSON in and out, strict and bounded: what cannot be decoded is ``malformed`` and says where."""

from typing import TypeVar

import msgspec

from cipherfleet.contract.errors import Malformed, TooLarge

T = TypeVar("T")

MAX_BODY_BYTES = 16 * 1024 * 1024
"""The largest message at all, an answer of the KMC's escrow."""
MAX_CALL_BYTES = 256 * 1024
"""What a server takes in a call or a frame, when the route says nothing else."""


def encode(value: object) -> bytes:
    return msgspec.json.encode(value)


def decode(raw: bytes | bytearray | memoryview, kind: type[T], *, what: str = "the message", limit: int = MAX_BODY_BYTES) -> T:
    """``raw`` as a ``kind``. Raises ``TooLarge`` or ``Malformed``.

    That one says where. Of values it quotes those alone that should have been one of our own names: an enumeration's member,
    a frame's type, a field. Texts, numbers and bytes it never quotes.
    """
    if len(raw) > limit:
        raise TooLarge(f"{what} has {len(raw)} bytes, {limit} are allowed")
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise Malformed(f"{what} is not valid: {exc}") from exc
