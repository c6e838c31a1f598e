"""Encrypting and decrypting messages in the format of ``contract.ciphertext``: a key per message, a nonce per chunk.

What a decryptor gives out has been authenticated, chunk by chunk, as *this* chunk of *this* message. RFC 5869 (HKDF; SM4's
with SM3), Hoang, Reyhanitabar, Rogaway, Vizár 2015 (STREAM).
"""

import hashlib
import secrets
from collections.abc import Callable
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes

from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_aead import Aead, aead_of
from cipherfleet.computing.engine_memory import PART_BYTES, Data, Pause, derive, no_pause, wipe
from cipherfleet.contract.algorithms import Kind
from cipherfleet.contract.ciphertext import HEADER_BYTES, MAX_CHUNKS, SALT_BYTES, TAG_BYTES, Header, chunk_nonce
from cipherfleet.contract.errors import (
    CiphertextForeignKey,
    CiphertextInvalid,
    CiphertextTruncated,
    Malformed,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.vcc import CHUNK_BYTES, MAX_DATA_BYTES

SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
MAX_SEALED_BYTES = MAX_DATA_BYTES // CHUNK_BYTES * SEALED_CHUNK_BYTES
MAX_CONTEXT_BYTES = 4096
_INFO = b"cipherfleet message v1"
_PART_CHUNKS = PART_BYTES // CHUNK_BYTES


def check_context(context: bytes) -> None:
    """Raises ``TooLarge``."""
    if len(context) > MAX_CONTEXT_BYTES:
        raise TooLarge(f"a context has at most {MAX_CONTEXT_BYTES} bytes, this one has {len(context)}")


def message_aead(key: Key, header: Header, context: bytes) -> Aead:
    """The key of one message. Raises ``WrongKeyType`` or ``TooLarge``."""
    key.require(Kind.AEAD)
    if key.bare:
        raise WrongKeyType(f"key {key.id} is a bare one and has no messages")
    check_context(context)
    info = _INFO + header.encode() + hashlib.sha256(context).digest()
    hash_ = hashes.SM3() if key.algorithm.family == "SM4" else hashes.SHA256()
    return aead_of(key.algorithm, derive(key.secret, salt=header.salt, info=info, length=key.algorithm.key_bits // 8, hash_=hash_))


class Encryptor:
    """One message from plaintext to ciphertext. ``first`` is its header."""

    heavy = False

    def __init__(self, key: Key, context: bytes) -> None:
        header = Header(key.algorithm.number, key.id, key.version, secrets.token_bytes(SALT_BYTES))
        self._aead = message_aead(key, header, context)
        self.first = header.encode()
        self._index = 0

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray | memoryview:
        """Whole chunks of plaintext -> as many of ciphertext. Raises ``Malformed`` or ``TooLarge``."""
        return self.begin(data, into, last=False)(pause)

    def finish(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray | memoryview:
        """The rest, at most one chunk."""
        return self.begin(data, into, last=True)(pause)

    def begin(self, data: Data, into: memoryview | None, *, last: bool) -> "Step":
        """``update`` or ``finish``, with its place in the message taken now and its work done by whoever calls the result."""
        if last and len(data) > CHUNK_BYTES:
            raise TooLarge(f"the last chunk has at most {CHUNK_BYTES} bytes")
        if len(data) > MAX_DATA_BYTES:
            raise TooLarge(f"at most {MAX_DATA_BYTES} bytes at a time")
        if not last and len(data) % CHUNK_BYTES:
            raise Malformed(f"a stream is encrypted in chunks of {CHUNK_BYTES} bytes")
        return self._seal(memoryview(data), last=last, into=into)

    def run(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray | memoryview:
        """A whole message, header and all."""
        if len(data) > MAX_DATA_BYTES:
            raise TooLarge(f"at most {MAX_DATA_BYTES} bytes at a time; longer input is a stream")
        return self._seal(memoryview(data), last=True, before=self.first, into=into)(pause)

    def close(self) -> None:
        self._aead.close()

    def _seal(self, data: memoryview, *, last: bool, before: bytes = b"", into: memoryview | None = None) -> "Step":
        count = max(-(-len(data) // CHUNK_BYTES), int(last))
        index = self._index
        if index + count > MAX_CHUNKS:
            raise TooLarge(f"a message has at most {MAX_CHUNKS} chunks", "split the input")
        self._index += count

        def work(pause: Pause) -> bytearray | memoryview:
            size = len(before) + len(data) + count * TAG_BYTES
            out = into[:size] if into is not None and len(into) >= size else bytearray(size)
            view = memoryview(out)
            view[: len(before)] = before
            position, seal = len(before), self._aead.seal
            for number in range(count):
                if number and number % _PART_CHUNKS == 0:
                    pause()
                chunk = data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
                end = position + len(chunk) + TAG_BYTES
                seal(chunk_nonce(index + number, last=last and number == count - 1), chunk, view[position:end])
                position = end
            return out

        return work


class Decryptor:
    """One message from ciphertext (after its header) to plaintext."""

    first = b""
    heavy = False

    def __init__(self, key: Key, header: bytes, context: bytes) -> None:
        """Raises ``CiphertextTruncated``, ``CiphertextInvalid``, ``CiphertextForeignKey``, ``WrongKeyType`` or ``TooLarge``."""
        if len(header) > HEADER_BYTES:
            raise Malformed(f"a header has {HEADER_BYTES} bytes")
        said = Header.decode(header)
        if (said.key, said.version, said.algorithm) != (key.id, key.version, key.algorithm.number):
            raise CiphertextForeignKey(f"the ciphertext was made with another key than version {key.version} of {key.id}")
        self._aead = message_aead(key, said, context)
        self._index = 0

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray:
        """Whole chunks of ciphertext, none of them the last."""
        return self.begin(data, into, last=False)(pause)

    def finish(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray:
        """The last chunk. Raises ``CiphertextTruncated`` when the ciphertext ends before it."""
        return self.begin(data, into, last=True)(pause)

    def begin(self, data: Data, into: memoryview | None, *, last: bool) -> Callable[[Pause], bytearray]:
        """As ``Encryptor.begin``; what comes out is never written into ``into``, which others may read."""
        if last and len(data) > SEALED_CHUNK_BYTES:
            raise TooLarge(f"the last chunk has at most {SEALED_CHUNK_BYTES} bytes")
        if len(data) > MAX_SEALED_BYTES:
            raise TooLarge(f"at most {MAX_SEALED_BYTES} bytes at a time")
        if not last and len(data) % SEALED_CHUNK_BYTES:
            raise Malformed(f"a stream is decrypted in chunks of {SEALED_CHUNK_BYTES} bytes")
        return self._open(memoryview(data), last=last)

    def run(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray:
        """All chunks of a message."""
        if len(data) > MAX_SEALED_BYTES:
            raise TooLarge(f"at most {MAX_SEALED_BYTES} bytes at a time; longer input is a stream")
        return self._open(memoryview(data), last=True)(pause)

    def close(self) -> None:
        self._aead.close()

    def _open(self, data: memoryview, *, last: bool) -> Callable[[Pause], bytearray]:
        count = -(-len(data) // SEALED_CHUNK_BYTES)
        if last and len(data) - max(count - 1, 0) * SEALED_CHUNK_BYTES < TAG_BYTES:
            raise CiphertextTruncated("the ciphertext ends before its last chunk")
        index = self._index
        if index + count > MAX_CHUNKS:
            raise CiphertextInvalid(f"a message has at most {MAX_CHUNKS} chunks")
        self._index += count

        def work(pause: Pause) -> bytearray:
            out = bytearray(len(data) - count * TAG_BYTES)
            view = memoryview(out)
            for number in range(count):
                if number and number % _PART_CHUNKS == 0:
                    pause()
                sealed = data[number * SEALED_CHUNK_BYTES : (number + 1) * SEALED_CHUNK_BYTES]
                into = view[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
                final = last and number == count - 1
                try:
                    self._aead.open(chunk_nonce(index + number, last=final), sealed, into)
                except InvalidTag as exc:
                    wipe_view(view)
                    if final and self._goes_on(index + number, sealed):
                        raise CiphertextTruncated("the ciphertext ends before its last chunk") from exc
                    raise CiphertextInvalid("the ciphertext was changed, or belongs to another context") from exc
            return out

        return work

    def _goes_on(self, index: int, sealed: memoryview) -> bool:
        """Whether a chunk that should be the last is a good one from the middle: then the end was cut off at a chunk."""
        into = memoryview(bytearray(len(sealed) - TAG_BYTES))
        try:
            self._aead.open(chunk_nonce(index, last=False), sealed, into)
        except InvalidTag:
            return False
        wipe_view(into)
        return True


class Reencryptor:
    """From one key to another; the plaintext stays here."""

    heavy = False

    def __init__(self, source: Decryptor, target: Encryptor) -> None:
        self._source, self._target = source, target
        self.first = target.first

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray | memoryview:
        return self._pass(self._source.update(data, None, pause), self._target.update, into, pause)

    def finish(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray | memoryview:
        return self._pass(self._source.finish(data, None, pause), self._target.finish, into, pause)

    def run(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytearray | memoryview:
        return self._pass(self._source.run(data, None, pause), self._target.run, into, pause)

    def close(self) -> None:
        self._source.close()
        self._target.close()

    @staticmethod
    def _pass(plaintext: bytearray, encrypt: "_Encrypt", into: memoryview | None, pause: Pause) -> bytearray | memoryview:
        try:
            return encrypt(plaintext, into, pause)
        finally:
            wipe(plaintext)


Step = Callable[[Pause], bytearray | memoryview]


class _Encrypt(Protocol):
    def __call__(self, data: Data, into: memoryview | None, pause: Pause) -> bytearray | memoryview: ...


def wipe_view(view: memoryview) -> None:
    """Overwrite a buffer with zeros."""
    view[:] = bytes(len(view))
