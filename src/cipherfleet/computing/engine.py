"""The algorithms: key material, its public half, digests. Pure functions and values; who may use them is decided above.

Secret key material is raw bytes (AES, SM4, HMAC) or PKCS#8 DER; public keys are SubjectPublicKeyInfo DER.
"""

import secrets

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cipherfleet.computing.engine_memory import Data, wipe
from cipherfleet.contract.algorithms import Algorithm, Kind, algorithm
from cipherfleet.contract.errors import Internal, KeyMaterialInvalid, WrongKeyType
from cipherfleet.contract.ids import KeyId

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

_DIGESTS: dict[str, type[hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | hashes.SM3]] = {
    "SHA-256": hashes.SHA256,
    "SHA-384": hashes.SHA384,
    "SHA-512": hashes.SHA512,
    "SM3": hashes.SM3,
}


def digest(name: str) -> hashes.Hash:
    """A running digest (FIPS 180-4, GB/T 32905). Raises ``AlgorithmUnknown`` or ``WrongKeyType``."""
    found = algorithm(name)
    if found.kind is not Kind.DIGEST:
        raise WrongKeyType(f"{found.name} is not a digest")
    return hashes.Hash(_DIGESTS[found.name]())


def is_slow(chosen: Algorithm) -> bool:
    """Whether making or checking a key takes so long (RSA: a good part of a second) that it belongs into a thread."""
    return chosen.name == "RSA-3072-PSS"


def generate_material(chosen: Algorithm) -> bytearray:
    """Fresh key material for ``chosen``. Raises ``WrongKeyType`` for a digest."""
    private: PrivateKey
    match chosen.name:
        case "AES-256-GCM" | "SM4-GCM" | "HMAC-SHA-256":
            return _take(secrets.token_bytes(chosen.key_bits // 8))
        case "RSA-3072-PSS":
            private = rsa.generate_private_key(65537, chosen.key_bits)
        case "ECDSA-P-256":
            private = ec.generate_private_key(ec.SECP256R1())
        case "Ed25519":
            private = ed25519.Ed25519PrivateKey.generate()
        case _:
            raise WrongKeyType(f"there are no keys of {chosen.name}")
    return _encode(private)


def check_material(chosen: Algorithm, material: bytes) -> bytearray:
    """Key material from outside, as ``generate_material`` would give it. Wipes ``material``. Raises ``KeyMaterialInvalid``."""
    try:
        if chosen.kind is not Kind.SIGNATURE:
            if len(material) * 8 != chosen.key_bits:
                raise KeyMaterialInvalid(f"a key of {chosen.name} has {chosen.key_bits // 8} bytes")
            return bytearray(material)
        try:
            private = _of_kind(chosen, serialization.load_der_private_key(material, None))
        except (ValueError, TypeError, UnsupportedAlgorithm, Internal) as exc:
            raise KeyMaterialInvalid(f"that is no private key of {chosen.name}", "give PKCS#8, unencrypted") from exc
        if isinstance(private, rsa.RSAPrivateKey) and private.public_key().public_numbers().e < 65537:
            raise KeyMaterialInvalid("the RSA key's public exponent is too small", "FIPS 186-5 asks for 65537 or more")
        return _encode(private)
    finally:
        wipe(material)


def _encode(private: PrivateKey) -> bytearray:
    return _take(private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


def _take(secret: bytes) -> bytearray:
    taken = bytearray(secret)
    wipe(secret)
    return taken


def public_key(chosen: Algorithm, material: Data) -> bytes:
    """SubjectPublicKeyInfo, DER, of key material; empty when it is symmetric. Raises ``Internal``."""
    if chosen.kind is not Kind.SIGNATURE:
        return b""
    public = _load(chosen, material).public_key()
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


class Key:
    """One version of a key, usable: ``secret`` (wiped by ``close``) or ``private`` (its memory is OpenSSL's, cleared when freed)."""

    def __init__(self, key: KeyId, version: int, chosen: Algorithm, material: bytearray) -> None:
        """Takes ``material`` over. Raises ``Internal`` when it does not fit the algorithm."""
        self.id, self.version, self.algorithm = key, version, chosen
        self.secret = bytearray()
        self.private: PrivateKey | None = None
        if chosen.kind is Kind.SIGNATURE:
            try:
                self.private = _load(chosen, material)
            finally:
                wipe(material)
        elif chosen.key_bits and len(material) * 8 == chosen.key_bits:
            self.secret = material
        else:
            wipe(material)
            raise Internal(f"the key material does not fit {chosen.name}")

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


def _load(chosen: Algorithm, material: Data) -> PrivateKey:
    try:
        # The card made this key and authenticated it: checking RSA's primes once more would cost 0.1 s.
        key = serialization.load_der_private_key(material, None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise Internal(f"the key material is no {chosen.name} key") from exc
    return _of_kind(chosen, key)


def _of_kind(chosen: Algorithm, key: object) -> PrivateKey:
    match chosen.name, key:
        case "RSA-3072-PSS", rsa.RSAPrivateKey() if key.key_size == chosen.key_bits:
            return key
        case "ECDSA-P-256", ec.EllipticCurvePrivateKey() if isinstance(key.curve, ec.SECP256R1):
            return key
        case "Ed25519", ed25519.Ed25519PrivateKey():
            return key
    raise Internal(f"the key material is no {chosen.name} key")
