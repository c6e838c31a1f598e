"""Secrets in memory: derived into buffers that can be wiped, and wiped."""

import ctypes
from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Data = bytes | bytearray | memoryview
Pause = Callable[[], None]
"""Called between the parts of long data, by work that lets others have their turn meanwhile."""
PART_BYTES = 128 * 1024

_BYTES_HEADER = bytes.__basicsize__ - 1


def no_pause() -> None:
    """Work to the end."""


def wipe(secret: bytes | bytearray) -> None:
    """Overwrite a secret with zeros.

    Libraries hand secrets out as ``bytes``; such an object must be the caller's alone, and of 16 bytes or more (shorter
    ones CPython may share).
    """
    if isinstance(secret, bytearray):
        ctypes.memset((ctypes.c_char * len(secret)).from_buffer(secret), 0, len(secret)) if secret else None
    elif len(secret) >= 16:
        ctypes.memset(id(secret) + _BYTES_HEADER, 0, len(secret))


def take(secret: bytes) -> bytearray:
    """A secret that a library handed out, in a buffer that can be wiped; the original is wiped."""
    taken = bytearray(secret)
    wipe(secret)
    return taken


def derive(secret: Data, *, salt: bytes, info: bytes, length: int, hash_: hashes.HashAlgorithm | None = None) -> bytearray:
    """HKDF (RFC 5869), SHA-256 unless told otherwise, into a buffer of ``length`` bytes."""
    result = bytearray(length)
    HKDF(hash_ or hashes.SHA256(), length, salt, info).derive_into(secret, result)
    return result
