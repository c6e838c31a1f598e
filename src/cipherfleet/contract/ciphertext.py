"""The format of our ciphertexts: one header, then chunks of authenticated encryption.

::

    magic "CFC1" | algorithm u16 | key id 16 | key version u32 | chunk bytes u32 | salt 32       = 62 bytes, big endian
    chunk 0: plaintext (chunk bytes) encrypted + tag 16
    ...
    last chunk: 0 to chunk bytes, encrypted + tag 16

Every message has a key of its own, derived in the card: HKDF(DEK, salt, "cipherfleet message v1" | header | SHA-256(context)).
The nonce of chunk *i* is seven zero bytes, *i* as u32, and 1 for the last chunk, else 0 (the STREAM construction, Hoang,
Reyhanitabar, Rogaway, Vizár 2015). So a chunk that was changed, cut off, reordered, repeated or taken from another message
does not decrypt, and what comes out of a chunk has been verified.
"""

import struct

import msgspec

from cipherfleet.contract.errors import CiphertextInvalid, CiphertextTruncated
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.vcc import CHUNK_BYTES

MAGIC = b"CFC1"
TAG_BYTES = 16
SALT_BYTES = 32
_HEADER = struct.Struct(">4sH16sII32s")
HEADER_BYTES = _HEADER.size
MAX_CHUNKS = 2**32 - 1


class Header(msgspec.Struct, frozen=True):
    algorithm: int
    key: KeyId
    version: int
    salt: bytes
    chunk_bytes: int = CHUNK_BYTES

    def encode(self) -> bytes:
        return _HEADER.pack(MAGIC, self.algorithm, bytes.fromhex(self.key), self.version, self.chunk_bytes, self.salt)

    @staticmethod
    def decode(raw: bytes) -> "Header":
        """The header of a ciphertext. Raises ``CiphertextTruncated`` or ``CiphertextInvalid``."""
        if len(raw) < HEADER_BYTES:
            raise CiphertextTruncated(f"a ciphertext has at least {HEADER_BYTES + TAG_BYTES} bytes, this one has {len(raw)}")
        magic, algorithm, key, version, chunk_bytes, salt = _HEADER.unpack(raw[:HEADER_BYTES])
        if magic != MAGIC:
            raise CiphertextInvalid("this is not a ciphertext of Cipherfleet")
        if chunk_bytes != CHUNK_BYTES:
            raise CiphertextInvalid(f"chunks of {chunk_bytes} bytes are not supported")
        return Header(algorithm, KeyId(key.hex()), version, salt, chunk_bytes)


def chunk_nonce(index: int, *, last: bool) -> bytes:
    """The 12-byte nonce of chunk ``index``."""
    return b"\0" * 7 + index.to_bytes(4, "big") + (b"\1" if last else b"\0")


def sealed_length(plaintext_bytes: int) -> int:
    """Size of the ciphertext of a plaintext, header included."""
    chunks = max(1, -(-plaintext_bytes // CHUNK_BYTES))
    return HEADER_BYTES + plaintext_bytes + chunks * TAG_BYTES
