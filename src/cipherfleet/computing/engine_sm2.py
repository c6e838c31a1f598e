"""SM2 (GB/T 32918, GM/T 0009) through the system's ``libcrypto.so.3``: the one seam to it, by cffi without a compiler.

Public: ``load``, ``generate``, ``check``, ``PrivateKey``, ``PublicKey``, ``Scheme``, ``identity_digest`` (Z), ``USUAL_ID``,
``MAX_USER_ID_BYTES``, ``MAX_PLAINTEXT_BYTES``, ``PRIVATE_KEY_BYTES``. Private keys are PKCS#8 DER of the named curve, public ones
SubjectPublicKeyInfo DER.

What is hashed is hashed here (SM3 over Z and the message), so that one stream may end in a signature or in a check of one. Key
agreement (GB/T 32918.3) is left out: OpenSSL 3.0 does not offer it. Keys may be used by many threads at once. Every call raises
``Unsupported`` where the system's library lacks SM2.
"""

from typing import Any, Protocol

from cryptography.hazmat.primitives import hashes

from cipherfleet.computing.engine_memory import Data, wipe
from cipherfleet.computing.engine_sm2_libcrypto import libcrypto
from cipherfleet.contract.errors import (
    CiphertextInvalid,
    Internal,
    KeyMaterialInvalid,
    Malformed,
    PublicKeyInvalid,
    SignatureInvalid,
    TooLarge,
)

USUAL_ID = b"1234567812345678"
"""The signer's id where none was agreed on (GM/T 0009)."""
MAX_USER_ID_BYTES = 8191
"""Its length in bits goes into 16 bits."""
DIGEST_BYTES = 32
MAX_PLAINTEXT_BYTES = 4096
PRIVATE_KEY_BYTES = 138

_ALGORITHM = bytes.fromhex("301306072a8648ce3d020106082a811ccf5501822d")  # id-ecPublicKey, 1.2.156.10197.1.301
_PRIVATE_PREFIX = bytes.fromhex("308187020100") + _ALGORITHM + bytes.fromhex("046d306b0201010420")
_PUBLIC_PREFIX = bytes.fromhex("3059") + _ALGORITHM + bytes.fromhex("03420004")
_P = bytes.fromhex("fffffffeffffffffffffffffffffffffffffffff00000000ffffffffffffffff")
_CURVE = bytes.fromhex(  # a, b and the base point, GB/T 32918.5
    "fffffffeffffffffffffffffffffffffffffffff00000000fffffffffffffffc"
    "28e9fa9e9d9f5e344d5a9e4bcf6509a7f39789f515ab8f92ddbcbd414d940e93"
    "32c4ae2c1f1981195f9904466a39c9948fe30bbff2660be1715a4589334c74c7"
    "bc3736a2f4f6779c59bdcee36b692153d0a9877cc62a474002df32e52139f0a0"
)
_MAX_CIPHERTEXT_BYTES = MAX_PLAINTEXT_BYTES + 128
_INTEGER, _OCTETS, _SEQUENCE = 0x02, 0x04, 0x30


class Scheme(Protocol):
    """One signature: ``update`` takes the message, ``sign`` or ``verify`` ends it. ``held``: bytes that wait in memory (0)."""

    held: int

    def update(self, data: Data) -> None: ...

    def sign(self) -> bytes: ...

    def verify(self, signature: bytes) -> None:
        """Raises ``SignatureInvalid``."""
        ...


def load() -> None:
    """Open the library: it must happen before a process gives its file system up. Raises ``Unsupported``."""
    libcrypto()


class PublicKey:
    """From SubjectPublicKeyInfo DER. Raises ``PublicKeyInvalid``."""

    def __init__(self, encoded: Data) -> None:
        library = libcrypto()
        key = library.decode(encoded, private=False)
        if key is None or not library.check(key, private=False) or not _is_ours(self._encoding(library.encode_public(key))):
            raise PublicKeyInvalid("that is no public key of SM2", "give SubjectPublicKeyInfo of the named curve")
        self._set(key)

    def _set(self, key: Any) -> None:
        self._key = key
        self._public = self._encoding(libcrypto().encode_public(key))

    @staticmethod
    def _encoding(encoded: bytes | None) -> bytes:
        if encoded is None:
            raise Internal("an SM2 key could not be encoded")
        return encoded

    def public_bytes(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return self._public

    def encrypt(self, data: Data) -> bytes:
        """GB/T 32918.4, C1C3C2 in DER (GM/T 0009). 1 to 4096 bytes: raises ``Malformed`` or ``TooLarge``."""
        if not len(data):
            raise Malformed("SM2 encrypts no empty message")
        if len(data) > MAX_PLAINTEXT_BYTES:
            raise TooLarge(f"SM2 encrypts at most {MAX_PLAINTEXT_BYTES} bytes here", "wrap a data key with it")
        made = libcrypto().encrypt(self._key, data)
        while made is not None and made.endswith(bytes(data)):  # a key stream of zeros: the standard draws again (6.1, A5)
            made = libcrypto().encrypt(self._key, data)
        if made is None:
            raise Internal("SM2 could not encrypt")
        return made

    def scheme(self, user_id: bytes = b"", *, prehashed: bool = False) -> "Signing":
        """With SM3 and the signer's id (empty: the usual one); ``prehashed``: the 32 bytes of SM3(Z || message) come in instead.

        Raises ``TooLarge`` for an id of more than 8191 bytes, ``Malformed`` for an id beside a digest.
        """
        return Signing(self._key, self._public, user_id, private=isinstance(self, PrivateKey), prehashed=prehashed)


class PrivateKey(PublicKey):
    """From PKCS#8 DER that ``generate`` or ``check`` gave (which stays the caller's to wipe). Raises ``KeyMaterialInvalid``.

    Its memory is OpenSSL's, cleared when it is freed with this object and its streams.
    """

    def __init__(self, material: Data) -> None:
        library = libcrypto()
        key = library.decode(material, private=True)
        if key is None or not library.check(key, private=True):
            raise KeyMaterialInvalid("that is no private key of SM2", "give PKCS#8 of the named curve, unencrypted")
        self._set(key)

    def private_bytes(self) -> bytearray:
        """PKCS#8, DER: the caller wipes it."""
        made = libcrypto().encode_private(self._key)
        if made is None or len(made) != PRIVATE_KEY_BYTES or not made.startswith(_PRIVATE_PREFIX):
            wipe(made or b"")
            raise KeyMaterialInvalid("an SM2 key is of the named curve", "give no explicit parameters")
        return made

    def decrypt(self, data: Data) -> bytearray:
        """The inverse of ``encrypt``. Raises ``CiphertextInvalid``: no point of the curve, changed, cut, or not DER."""
        _check_ciphertext(data)
        made = libcrypto().decrypt(self._key, data)
        if made is None:
            raise CiphertextInvalid("that is no ciphertext of this SM2 key")
        return made


class Signing:
    """One signature of one key: what ``update`` takes ends in ``sign`` or ``verify``."""

    held = 0

    def __init__(self, key: Any, public: bytes, user_id: bytes, *, private: bool, prehashed: bool) -> None:
        if prehashed and user_id:
            raise Malformed("the digest has taken the signer's id in already")
        self._key, self._private = key, private
        self._given = bytearray()
        self._hash: hashes.Hash | None = None
        if not prehashed:
            self._hash = hashes.Hash(hashes.SM3())
            self._hash.update(_identity_digest(public, user_id))

    def update(self, data: Data) -> None:
        """Raises ``Malformed`` for a digest that is too long."""
        if self._hash is not None:
            self._hash.update(data)
            return
        if len(self._given) + len(data) > DIGEST_BYTES:
            raise Malformed(f"a digest of SM3 has {DIGEST_BYTES} bytes")
        self._given += data

    def sign(self) -> bytes:
        """DER. Raises ``Malformed`` for a digest that is too short."""
        if not self._private:
            raise RuntimeError("a public key signs nothing")
        made = libcrypto().sign(self._key, self._value())
        if made is None:
            raise Internal("SM2 could not sign")
        return made

    def verify(self, signature: bytes) -> None:
        """Raises ``SignatureInvalid``, or ``Malformed`` for a digest that is too short."""
        if not libcrypto().verify(self._key, signature, self._value()):
            raise SignatureInvalid("the signature is not of this data and key")

    def _value(self) -> bytes:
        if self._hash is not None:
            return self._hash.finalize()
        if len(self._given) != DIGEST_BYTES:
            raise Malformed(f"a digest of SM3 has {DIGEST_BYTES} bytes")
        return bytes(self._given)


def generate() -> bytearray:
    """A fresh private key, PKCS#8 DER."""
    library = libcrypto()
    key = library.generate()
    made = None if key is None else library.encode_private(key)
    if made is None or len(made) != PRIVATE_KEY_BYTES or not made.startswith(_PRIVATE_PREFIX):
        wipe(made or b"")
        raise Internal("SM2 could not make a key")
    return made


def check(material: Data) -> bytearray:
    """A private key from outside, as ``generate`` would give it: scalar of 1 to n-2, the point its own. Raises ``KeyMaterialInvalid``."""
    return PrivateKey(material).private_bytes()


def identity_digest(public: bytes, user_id: bytes = b"") -> bytes:
    """Z of a signer (GB/T 32918.2, 5.5): SM3 of the id, the curve and the public key. Raises ``PublicKeyInvalid`` or ``TooLarge``."""
    return _identity_digest(PublicKey(public).public_bytes(), user_id)


def _identity_digest(public: bytes, user_id: bytes) -> bytes:
    identity = user_id or USUAL_ID
    if len(identity) > MAX_USER_ID_BYTES:
        raise TooLarge(f"a signer's id has at most {MAX_USER_ID_BYTES} bytes")
    running = hashes.Hash(hashes.SM3())
    running.update((len(identity) * 8).to_bytes(2, "big") + identity + _CURVE + public[len(_PUBLIC_PREFIX) :])
    return running.finalize()


def _is_ours(public: bytes) -> bool:
    return len(public) == len(_PUBLIC_PREFIX) + 64 and public.startswith(_PUBLIC_PREFIX)


def _check_ciphertext(data: Data) -> None:
    """One encoding for one ciphertext: OpenSSL takes any BER, and what follows it. Raises ``CiphertextInvalid``."""
    if len(data) > _MAX_CIPHERTEXT_BYTES:
        raise CiphertextInvalid("that is longer than any ciphertext of SM2")
    inside, rest = _element(bytes(data), _SEQUENCE)
    x, inside = _element(inside, _INTEGER)
    y, inside = _element(inside, _INTEGER)
    c3, inside = _element(inside, _OCTETS)
    c2, inside = _element(inside, _OCTETS)
    if rest or inside or len(c3) != DIGEST_BYTES or not c2 or not (_is_coordinate(x) and _is_coordinate(y)):
        raise CiphertextInvalid("that is no ciphertext of SM2")


def _is_coordinate(value: bytes) -> bool:
    if not value or value[0] >= 0x80 or (len(value) > 1 and value[0] == 0 and value[1] < 0x80):
        return False
    return int.from_bytes(value, "big") < int.from_bytes(_P, "big")


def _element(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """The value of the first DER element, and what follows."""
    start, size = 2, data[1] if len(data) > 1 else 0
    if size >= 0x80:
        start, digits = 2 + (size & 0x7F), data[2 : 2 + (size & 0x7F)]
        size = int.from_bytes(digits, "big")
        if not 1 <= len(digits) <= 2 or size < 0x80 or digits[0] == 0:
            raise CiphertextInvalid("that is no ciphertext of SM2")
    if len(data) < start + size or data[:1] != bytes((tag,)):
        raise CiphertextInvalid("that is no ciphertext of SM2")
    return data[start : start + size], data[start + size :]
