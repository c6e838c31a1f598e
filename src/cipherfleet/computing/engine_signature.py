"""Signatures and MACs: the message goes in piece by piece, a signature comes out, or a signature is checked.

FIPS 186-5 (RSA, ECDSA, Ed25519, Ed448), FIPS 204 (ML-DSA), GB/T 32918.2 (SM2), FIPS 198-1 (HMAC), SP 800-38B (CMAC).
"""

from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import cmac, constant_time, hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from cipherfleet.computing import engine, engine_sm2
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_bare import block_cipher, chosen_digest
from cipherfleet.computing.engine_keys import Edwards, MlDsa
from cipherfleet.computing.engine_memory import PART_BYTES, Data, Pause, no_pause
from cipherfleet.contract.algorithms import Kind
from cipherfleet.contract.errors import MacInvalid, Malformed, SignatureInvalid, TagTooShort, TooLarge
from cipherfleet.contract.vcc import StreamRequest

MAX_WHOLE_MESSAGE_BYTES = 1024 * 1024
"""Ed25519 and Ed448 sign whole messages (RFC 8032 reads the message twice), so they are held in the card."""
MU_BYTES = 64
MAX_CONTEXT_STRING_BYTES = 255


class Hashing:
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


class Digest(Hashing):
    def __init__(self, name: str, length: int = 0) -> None:
        self._hash = engine.digest(name, length)

    def _take(self, data: Data) -> None:
        self._hash.update(data)

    def _result(self) -> bytes:
        return self._hash.finalize()


class Mac(Hashing):
    """Makes the MAC, or checks ``expected`` in constant time and gives nothing."""

    def __init__(self, key: Key, expected: bytes | None = None) -> None:
        """Raises ``WrongKeyType``, ``TagTooShort`` or ``MacInvalid``."""
        key.require(Kind.MAC)
        chosen = key.algorithm
        self._running: hmac.HMAC | cmac.CMAC | None
        if chosen.mode == "CMAC":
            self._running, size = cmac.CMAC(block_cipher(key)), 16
        else:
            digest = engine.DIGESTS[chosen.digest]
            self._running, size = hmac.HMAC(key.secret, digest), digest.digest_size
        if expected is not None and len(expected) < size:
            raise TagTooShort(f"a MAC of {chosen.name} has {size} bytes, this one has {len(expected)}")
        self._expected = expected

    def _take(self, data: Data) -> None:
        self._open().update(data)  # type: ignore[arg-type]  # CMAC takes any buffer, its stub says less

    def _result(self) -> bytes:
        made = self._open().finalize()
        if self._expected is None:
            return made
        if not constant_time.bytes_eq(made, self._expected):
            raise MacInvalid("the MAC is not of this data and key")
        return b""

    def close(self) -> None:
        self._running = None

    def _open(self) -> hmac.HMAC | cmac.CMAC:
        if self._running is None:
            raise RuntimeError("the key of this stream is gone")
        return self._running


class Scheme(Protocol):
    """One signature of one private key: ``sign`` and ``verify`` end what ``update`` was given. ``held``: bytes that wait in memory."""

    held: int

    def update(self, data: Data) -> None: ...

    def sign(self) -> bytes: ...

    def verify(self, signature: bytes) -> None:
        """Raises ``InvalidSignature`` or ``SignatureInvalid``."""
        ...


class Hashed:
    """RSA and ECDSA over a digest that is made here, or was made by the caller."""

    held = 0

    def __init__(self, private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, mode: str, digest: str, *, prehashed: bool) -> None:
        self._private = private
        self._algorithm = engine.DIGESTS[digest]
        self._hash = None if prehashed else hashes.Hash(self._algorithm)
        self._given = bytearray()
        self._mode, self._digest = mode, digest

    def update(self, data: Data) -> None:
        if self._hash is not None:
            self._hash.update(data)
            return
        if len(self._given) + len(data) > self._algorithm.digest_size:
            raise Malformed(f"a digest of {self._digest} has {self._algorithm.digest_size} bytes")
        self._given += data

    def sign(self) -> bytes:
        digest, private = self._value(), self._private
        if isinstance(private, rsa.RSAPrivateKey):
            return private.sign(digest, self._padding(), Prehashed(self._algorithm))
        return private.sign(digest, ec.ECDSA(Prehashed(self._algorithm)))

    def verify(self, signature: bytes) -> None:
        digest, public = self._value(), self._private.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            public.verify(signature, digest, self._padding(), Prehashed(self._algorithm))
        else:
            public.verify(signature, digest, ec.ECDSA(Prehashed(self._algorithm)))

    def _value(self) -> bytes:
        if self._hash is not None:
            return self._hash.finalize()
        if len(self._given) != self._algorithm.digest_size:
            raise Malformed(f"a digest of {self._digest} has {self._algorithm.digest_size} bytes")
        return bytes(self._given)

    def _padding(self) -> padding.PSS | padding.PKCS1v15:
        if self._mode == "PSS":
            return padding.PSS(padding.MGF1(self._algorithm), padding.PSS.DIGEST_LENGTH)
        return padding.PKCS1v15()


class Whole:
    """Ed25519 and Ed448: the message is held whole."""

    def __init__(self, private: Edwards) -> None:
        self._private = private
        self._message = bytearray()
        self.held = 0

    def update(self, data: Data) -> None:
        if self.held + len(data) > MAX_WHOLE_MESSAGE_BYTES:
            raise TooLarge(
                f"Ed25519 and Ed448 sign messages of at most {MAX_WHOLE_MESSAGE_BYTES} bytes", "sign the data's digest, or choose ECDSA"
            )
        self._message += data
        self.held = len(self._message)

    def sign(self) -> bytes:
        return self._private.sign(bytes(self._message))

    def verify(self, signature: bytes) -> None:
        self._private.public_key().verify(signature, bytes(self._message))


class Lattice:
    """ML-DSA, hedged (FIPS 204, algorithms 2 and 7); the message is hashed to its representative mu here, or was by the caller."""

    held = 0

    def __init__(self, private: MlDsa, context: bytes, *, prehashed: bool) -> None:
        if len(context) > MAX_CONTEXT_STRING_BYTES:
            raise TooLarge(f"the context string of ML-DSA has at most {MAX_CONTEXT_STRING_BYTES} bytes")
        if prehashed and context:
            raise Malformed("mu has taken the context in already")
        self._private = private
        self._hasher = None if prehashed else mldsa.MLDSAMuHasher(private.public_key(), context or None)
        self._given = bytearray()

    def update(self, data: Data) -> None:
        if self._hasher is not None:
            self._hasher.update(data)
            return
        if len(self._given) + len(data) > MU_BYTES:
            raise Malformed(f"the message representative mu has {MU_BYTES} bytes")
        self._given += data

    def sign(self) -> bytes:
        return self._private.sign_mu(self._mu())

    def verify(self, signature: bytes) -> None:
        self._private.public_key().verify_mu(signature, self._mu())

    def _mu(self) -> bytes:
        if self._hasher is not None:
            return self._hasher.finalize()
        if len(self._given) != MU_BYTES:
            raise Malformed(f"the message representative mu has {MU_BYTES} bytes")
        return bytes(self._given)


class Signature(Hashing):
    """Makes the signature (ECDSA and SM2: DER), or checks ``expected`` and gives nothing."""

    def __init__(self, key: Key, expected: bytes | None = None, request: StreamRequest | None = None) -> None:
        key.require(Kind.SIGNATURE)
        self._scheme: Scheme | None = scheme(key, request)
        self._expected = expected
        self.holds = isinstance(self._scheme, Whole)
        """Whether the message is held whole until FINISH."""
        self.heavy = key.algorithm.family == "RSA"

    @property
    def held_bytes(self) -> int:
        """How much of the message is held in the card's memory."""
        return 0 if self._scheme is None else self._scheme.held

    def close(self) -> None:
        self._scheme = None

    def _take(self, data: Data) -> None:
        self._open().update(data)

    def _result(self) -> bytes:
        if self._expected is None:
            return self._open().sign()
        try:
            self._open().verify(self._expected)
        except InvalidSignature as exc:
            raise SignatureInvalid("the signature is not of this data and key") from exc
        return b""

    def _open(self) -> Scheme:
        if self._scheme is None:
            raise RuntimeError("the key of this stream is gone")
        return self._scheme


def scheme(key: Key, request: StreamRequest | None) -> Scheme:
    """How a key signs, as the request says. Raises ``Malformed`` or ``TooLarge``."""
    prehashed, context = (request.prehashed, request.context) if request is not None else (False, b"")
    digest = chosen_digest(request, key) if request is not None else key.algorithm.digest
    match key.private:
        case rsa.RSAPrivateKey() | ec.EllipticCurvePrivateKey() as private:
            if context:
                raise Malformed(f"{key.algorithm.name} signs no context")
            return Hashed(private, key.algorithm.mode, digest, prehashed=prehashed)
        case mldsa.MLDSA44PrivateKey() | mldsa.MLDSA65PrivateKey() | mldsa.MLDSA87PrivateKey() as private:
            return Lattice(private, context, prehashed=prehashed)
        case ed25519.Ed25519PrivateKey() | ed448.Ed448PrivateKey() as private:
            if context or prehashed:
                raise Malformed(f"{key.algorithm.name} signs whole messages, without a context")
            return Whole(private)
        case engine_sm2.PrivateKey() as private:
            return private.scheme(context, prehashed=prehashed)
    raise RuntimeError(f"{key.algorithm.name} is no signature")
