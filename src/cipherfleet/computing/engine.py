"""The algorithms: key material, its public half, digests. Pure functions and values; who may use them is decided above.

Secret key material is raw bytes, or what ``engine_keys`` says of private keys.
"""

import secrets

from cryptography.hazmat.primitives import hashes

from cipherfleet.computing import engine_keys
from cipherfleet.computing.engine_keys import PrivateKey
from cipherfleet.computing.engine_memory import Data, take, wipe
from cipherfleet.contract.algorithms import Algorithm, Kind, algorithm
from cipherfleet.contract.errors import Internal, KeyMaterialInvalid, Malformed, TooLarge, WrongKeyType
from cipherfleet.contract.escrow import VersionAttributes
from cipherfleet.contract.ids import KeyId

DIGESTS: dict[str, hashes.HashAlgorithm] = {
    "SHA-224": hashes.SHA224(),
    "SHA-256": hashes.SHA256(),
    "SHA-384": hashes.SHA384(),
    "SHA-512": hashes.SHA512(),
    "SHA-512/256": hashes.SHA512_256(),
    "SHA3-224": hashes.SHA3_224(),
    "SHA3-256": hashes.SHA3_256(),
    "SHA3-384": hashes.SHA3_384(),
    "SHA3-512": hashes.SHA3_512(),
    "SM3": hashes.SM3(),
    "BLAKE2b": hashes.BLAKE2b(64),
    "BLAKE2s": hashes.BLAKE2s(32),
}
_EXTENDABLE: dict[str, tuple[type[hashes.SHAKE128 | hashes.SHAKE256], int]] = {
    "SHAKE128": (hashes.SHAKE128, 32),
    "SHAKE256": (hashes.SHAKE256, 64),
}
MAX_SHAKE_BYTES = 4096
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 14, 512
"""Of keys for HMAC and HKDF that come from outside: 112 bits (SP 800-131A, section 10) up to more than any digest's block."""


def digest(name: str, length: int = 0) -> hashes.Hash:
    """A running digest; ``length``: bytes wanted of an extendable one, of which 0 is the usual.

    FIPS 180-4, FIPS 202, GB/T 32905, RFC 7693. Raises ``AlgorithmUnknown``, ``WrongKeyType``, ``Malformed`` or ``TooLarge``.
    """
    found = algorithm(name)
    if found.kind is not Kind.DIGEST:
        raise WrongKeyType(f"{found.name} is not a digest")
    if found.name not in _EXTENDABLE:
        if length and length != DIGESTS[found.name].digest_size:
            raise Malformed(f"{found.name} has {DIGESTS[found.name].digest_size} bytes and no other length")
        return hashes.Hash(DIGESTS[found.name])
    kind, usual = _EXTENDABLE[found.name]
    if length < 0:
        raise Malformed("a length is not negative")
    if length > MAX_SHAKE_BYTES:
        raise TooLarge(f"at most {MAX_SHAKE_BYTES} bytes of {found.name} at a time")
    return hashes.Hash(kind(length or usual))


def is_slow(chosen: Algorithm) -> bool:
    """Whether making or checking a key takes so long (RSA: a good part of a second) that it belongs into a thread."""
    return chosen.family == engine_keys.RSA


def generate_material(chosen: Algorithm) -> bytearray:
    """Fresh key material for ``chosen``. Raises ``WrongKeyType`` for a digest."""
    if chosen.kind is Kind.DIGEST:
        raise WrongKeyType(f"there are no keys of {chosen.name}")
    if chosen.secret_key:
        return take(secrets.token_bytes(chosen.key_bits // 8))
    return engine_keys.generate(chosen)


def check_material(chosen: Algorithm, material: bytes) -> bytearray:
    """Key material from outside, as ``generate_material`` would give it. Wipes ``material``.

    Raises ``KeyMaterialInvalid`` or ``ExponentWeak``.
    """
    try:
        if not chosen.secret_key:
            return engine_keys.check(chosen, material)
        if not _fits(chosen, len(material)):
            raise KeyMaterialInvalid(f"a key of {chosen.name} has {_sizes(chosen)} bytes")
        half = len(material) // 2
        if chosen.mode == "XTS" and material[:half] == material[half:]:
            raise KeyMaterialInvalid("the two halves of an XTS key must differ", "see SP 800-38E and IEEE 1619")
        return bytearray(material)
    finally:
        wipe(material)


def _fits(chosen: Algorithm, size: int) -> bool:
    if chosen.family == "secret":
        return MIN_SECRET_BYTES <= size <= MAX_SECRET_BYTES
    return size * 8 == chosen.key_bits


def _sizes(chosen: Algorithm) -> str:
    return f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}" if chosen.family == "secret" else str(chosen.key_bits // 8)


def public_key(chosen: Algorithm, material: Data) -> bytes:
    """The public half of key material, as ``engine_keys.public_bytes``; empty when it is symmetric. Raises ``Internal``."""
    return b"" if chosen.secret_key else engine_keys.public_bytes(engine_keys.load(chosen, material))


class Key:
    """One version of a key, usable: ``secret`` (wiped by ``close``) or ``private`` (its memory is OpenSSL's, cleared when freed)."""

    def __init__(
        self, key: KeyId, version: int, chosen: Algorithm, material: bytearray, attributes: VersionAttributes | None = None
    ) -> None:
        """Takes ``material`` over. Raises ``Internal`` when it does not fit the algorithm."""
        self.id, self.version, self.algorithm = key, version, chosen
        self.bare = chosen.bare_only or (attributes is not None and attributes.bare)
        self.created_at = 0.0 if attributes is None else attributes.created_at
        self.imported = attributes is not None and attributes.imported
        self.exportable = attributes is not None and attributes.exportable
        self.not_after = 0.0 if attributes is None else attributes.not_after
        self.secret = bytearray()
        self.private: PrivateKey | None = None
        if chosen.secret_key and _fits(chosen, len(material)):
            self.secret = material
            return
        try:
            if chosen.secret_key or chosen.kind is Kind.DIGEST:
                raise Internal(f"the key material does not fit {chosen.name}")
            self.private = engine_keys.load(chosen, material)
        finally:
            wipe(material)

    def __repr__(self) -> str:
        return f"Key({self.id}/{self.version}, {self.algorithm.name})"

    def close(self) -> None:
        """Zeroise: this object is of no use any more."""
        wipe(self.secret)
        self.secret = bytearray()
        self.private = None

    def require(self, kind: Kind) -> None:
        """Raises ``WrongKeyType`` unless this is a key of ``kind``, and ``RuntimeError`` when it is closed."""
        if not self.secret and self.private is None:
            raise RuntimeError("the key is gone")
        if self.algorithm.kind is not kind:
            raise WrongKeyType(f"key {self.id} is of {self.algorithm.name} and cannot do that", f"choose a key of kind {kind}")
