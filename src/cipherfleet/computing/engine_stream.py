"""The verbs: what a stream of data becomes, from BEGIN over UPDATE to FINISH, or all at once."""

from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from cipherfleet.computing import engine
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_memory import PART_BYTES, Data, Pause, no_pause
from cipherfleet.computing.engine_message import Decryptor, Encryptor, Reencryptor, check_context
from cipherfleet.contract.algorithms import Kind
from cipherfleet.contract.errors import MacInvalid, SignatureInvalid, TooLarge
from cipherfleet.contract.vcc import StreamRequest, Verb

MAX_WHOLE_MESSAGE_BYTES = 1024 * 1024
"""Ed25519 signs whole messages (RFC 8032 reads the message twice), so they are held in the card."""

_SHA256 = hashes.SHA256()
_PSS = padding.PSS(padding.MGF1(_SHA256), padding.PSS.DIGEST_LENGTH)


class Stream(Protocol):
    """``first`` is the data of BEGIN's completion; ``heavy``: even of short data it takes long. After an error a stream is of no use."""

    @property
    def first(self) -> bytes: ...

    @property
    def heavy(self) -> bool: ...

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data:
        """``into``: where the result may be written, if it is nobody's secret; what is returned is then a view of it."""
        ...

    def finish(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data: ...

    def run(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data: ...

    def close(self) -> None: ...


class _Hashing:
    """Streams that take data in and give one result at the end."""

    first = b""
    heavy = False

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytes:
        self._take_parts(data, pause)
        return b""

    def finish(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> bytes:
        self._take_parts(data, pause)
        return self._result()

    run = finish

    def close(self) -> None:
        return None

    def _take_parts(self, data: Data, pause: Pause) -> None:
        if len(data) <= PART_BYTES:
            self._take(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), PART_BYTES):
            if start:
                pause()
            self._take(view[start : start + PART_BYTES])

    def _take(self, data: Data) -> None:
        raise NotImplementedError

    def _result(self) -> bytes:
        raise NotImplementedError


class Digest(_Hashing):
    def __init__(self, name: str) -> None:
        self._hash = engine.digest(name)

    def _take(self, data: Data) -> None:
        self._hash.update(data)

    def _result(self) -> bytes:
        return self._hash.finalize()


class Mac(_Hashing):
    """HMAC-SHA-256 (FIPS 198-1): makes the MAC, or checks ``expected`` in constant time and gives nothing."""

    def __init__(self, key: Key, expected: bytes | None = None) -> None:
        key.require(Kind.MAC)
        self._hmac: hmac.HMAC | None = hmac.HMAC(key.secret, _SHA256)
        self._expected = expected

    def _take(self, data: Data) -> None:
        self._running().update(data)

    def _result(self) -> bytes:
        running = self._running()
        if self._expected is None:
            return running.finalize()
        try:
            running.verify(self._expected)
        except InvalidSignature as exc:
            raise MacInvalid("the MAC is not of this data and key") from exc
        return b""

    def close(self) -> None:
        self._hmac = None

    def _running(self) -> hmac.HMAC:
        if self._hmac is None:
            raise RuntimeError("the key of this stream is gone")
        return self._hmac


class Signature(_Hashing):
    """RSA-PSS, ECDSA (DER) or Ed25519: makes the signature, or checks ``expected`` and gives nothing."""

    def __init__(self, key: Key, expected: bytes | None = None) -> None:
        key.require(Kind.SIGNATURE)
        self._key: engine.PrivateKey | None = key.private
        self._expected = expected
        self._whole = bytearray()
        self.heavy = isinstance(key.private, rsa.RSAPrivateKey)
        self._hash = None if isinstance(key.private, ed25519.Ed25519PrivateKey) else engine.digest(key.algorithm.digest)

    @property
    def holds(self) -> bool:
        """Whether the message is held whole until FINISH."""
        return self._hash is None

    @property
    def held_bytes(self) -> int:
        """How much of the message is held in the card's memory."""
        return len(self._whole)

    def close(self) -> None:
        self._key = None
        self._whole.clear()

    def _take(self, data: Data) -> None:
        if self._hash is not None:
            self._hash.update(data)
            return
        if len(self._whole) + len(data) > MAX_WHOLE_MESSAGE_BYTES:
            raise TooLarge(
                f"Ed25519 signs messages of at most {MAX_WHOLE_MESSAGE_BYTES} bytes", "sign the digest of the data, or choose ECDSA-P-256"
            )
        self._whole += data

    def _result(self) -> bytes:
        key, message = self._key, self._hash.finalize() if self._hash is not None else bytes(self._whole)
        if key is None:
            raise RuntimeError("the key of this stream is gone")
        if self._expected is None:
            return _sign(key, message)
        try:
            _check(key, self._expected, message)
        except InvalidSignature as exc:
            raise SignatureInvalid("the signature is not of this data and key") from exc
        return b""


def _sign(key: engine.PrivateKey, message: bytes) -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(message, _PSS, Prehashed(_SHA256))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(Prehashed(_SHA256)))
    return key.sign(message)


def _check(key: engine.PrivateKey, signature: bytes, message: bytes) -> None:
    if isinstance(key, rsa.RSAPrivateKey):
        key.public_key().verify(signature, message, _PSS, Prehashed(_SHA256))
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        key.public_key().verify(signature, message, ec.ECDSA(Prehashed(_SHA256)))
    else:
        key.public_key().verify(signature, message)


def open_stream(request: StreamRequest, key: Key | None, target: Key | None = None) -> Stream:
    """The stream of a request. ``key`` is there for every verb but DIGEST, ``target`` for REENCRYPT.

    Raises ``WrongKeyType``, ``AlgorithmUnknown``, ``TooLarge`` or a ciphertext error.
    """
    check_context(request.context)
    if request.verb is Verb.DIGEST:
        return Digest(request.digest)
    if key is None:
        raise RuntimeError(f"{request.verb} needs a key")
    match request.verb:
        case Verb.ENCRYPT:
            return Encryptor(key, request.context)
        case Verb.DECRYPT:
            return Decryptor(key, request.header, request.context)
        case Verb.REENCRYPT:
            if target is None:
                raise RuntimeError("re-encryption needs a second key")
            return Reencryptor(Decryptor(key, request.header, request.context), Encryptor(target, request.target_context))
        case Verb.SIGN:
            return Signature(key)
        case Verb.VERIFY:
            return Signature(key, request.signature)
        case Verb.MAC:
            return Mac(key)
        case Verb.VERIFY_MAC:
            return Mac(key, request.signature)
