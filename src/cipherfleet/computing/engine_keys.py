"""Private keys by family: how each is made, told from others, encoded and shown. Pure functions.

Private keys are PKCS#8 DER, public ones SubjectPublicKeyInfo DER. HPKE's hybrid key, for which no such encoding is standard, is raw:
ML-KEM-768 seed (64) || X25519 (32), and ML-KEM-768 (1184) || X25519 (32) in public.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, mlkem, rsa, x448, x25519

from cipherfleet.computing import engine_sm2
from cipherfleet.computing.engine_memory import Data, take
from cipherfleet.contract.algorithms import Algorithm
from cipherfleet.contract.errors import ExponentWeak, Internal, KeyMaterialInvalid, PublicKeyInvalid

MlDsa: TypeAlias = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
MlKem: TypeAlias = mlkem.MLKEM768PrivateKey | mlkem.MLKEM1024PrivateKey
Exchange: TypeAlias = x25519.X25519PrivateKey | x448.X448PrivateKey
Edwards: TypeAlias = ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
Encodable: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | Edwards | Exchange | MlDsa | MlKem


class Hybrid:
    """The two keys of HPKE with ML-KEM-768 and X25519 together."""

    SEED_BYTES, BYTES = 64, 96
    PUBLIC_KEM_BYTES, PUBLIC_BYTES = 1184, 1216

    def __init__(self, kem: mlkem.MLKEM768PrivateKey, exchange: x25519.X25519PrivateKey) -> None:
        self._kem, self._exchange = kem, exchange
        self.key = hpke.MLKEM768X25519PrivateKey(kem, exchange)

    @staticmethod
    def generate() -> "Hybrid":
        return Hybrid(mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate())

    @staticmethod
    def load(material: Data) -> "Hybrid":
        """Raises ``ValueError``."""
        if len(material) != Hybrid.BYTES:
            raise ValueError(f"a hybrid key has {Hybrid.BYTES} bytes")
        view = memoryview(material)
        kem = mlkem.MLKEM768PrivateKey.from_seed_bytes(view[: Hybrid.SEED_BYTES])
        return Hybrid(kem, x25519.X25519PrivateKey.from_private_bytes(view[Hybrid.SEED_BYTES :]))

    def private_bytes(self) -> bytearray:
        return take(self._kem.private_bytes_raw()) + take(self._exchange.private_bytes_raw())

    def public_bytes(self) -> bytes:
        return self._kem.public_key().public_bytes_raw() + self._exchange.public_key().public_bytes_raw()


PrivateKey: TypeAlias = Encodable | Hybrid | engine_sm2.PrivateKey

CURVES: dict[str, type[ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1,
    "P-384": ec.SECP384R1,
    "P-521": ec.SECP521R1,
    "secp256k1": ec.SECP256K1,
}
_PLAIN: dict[str, tuple[type[Any], Callable[[], Encodable]]] = {
    "Ed25519": (ed25519.Ed25519PrivateKey, ed25519.Ed25519PrivateKey.generate),
    "Ed448": (ed448.Ed448PrivateKey, ed448.Ed448PrivateKey.generate),
    "X25519": (x25519.X25519PrivateKey, x25519.X25519PrivateKey.generate),
    "X448": (x448.X448PrivateKey, x448.X448PrivateKey.generate),
    "ML-DSA-44": (mldsa.MLDSA44PrivateKey, mldsa.MLDSA44PrivateKey.generate),
    "ML-DSA-65": (mldsa.MLDSA65PrivateKey, mldsa.MLDSA65PrivateKey.generate),
    "ML-DSA-87": (mldsa.MLDSA87PrivateKey, mldsa.MLDSA87PrivateKey.generate),
    "ML-KEM-768": (mlkem.MLKEM768PrivateKey, mlkem.MLKEM768PrivateKey.generate),
    "ML-KEM-1024": (mlkem.MLKEM1024PrivateKey, mlkem.MLKEM1024PrivateKey.generate),
}
HYBRID, SM2, RSA = "ML-KEM-768-X25519", "SM2", "RSA"
MIN_RSA_EXPONENT = 65537


def generate(chosen: Algorithm) -> bytearray:
    """A fresh private key, encoded. Raises ``Unsupported`` for SM2 where the system lacks it."""
    if chosen.family == SM2:
        return engine_sm2.generate()
    if chosen.family == HYBRID:
        return Hybrid.generate().private_bytes()
    if chosen.family == RSA:
        return encode(rsa.generate_private_key(MIN_RSA_EXPONENT, chosen.key_bits))
    if chosen.family in CURVES:
        return encode(ec.generate_private_key(CURVES[chosen.family]()))
    return encode(_PLAIN[chosen.family][1]())


def encode(private: Encodable) -> bytearray:
    """PKCS#8, DER."""
    return take(private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


def load(chosen: Algorithm, material: Data) -> PrivateKey:
    """A private key that a card made or checked, from its encoding. Raises ``Internal``."""
    try:
        # RSA's primes were checked when the key came: once more would cost 0.1 s.
        return _load(chosen, material, checked=True)
    except (ValueError, TypeError, UnsupportedAlgorithm, KeyMaterialInvalid) as exc:
        raise Internal(f"the key material is no {chosen.name} key") from exc


def check(chosen: Algorithm, material: bytes) -> bytearray:
    """A private key from outside, as ``generate`` would give it. Raises ``KeyMaterialInvalid`` or ``ExponentWeak``."""
    if chosen.family == SM2:
        return engine_sm2.check(material)
    try:
        private = _load(chosen, material, checked=False)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        how = "give PKCS#8, unencrypted" + (", with the seed alone" if chosen.family.startswith("ML-") else "")
        raise KeyMaterialInvalid(f"that is no private key of {chosen.name}", how) from exc
    if isinstance(private, rsa.RSAPrivateKey):
        exponent = private.public_key().public_numbers().e
        if exponent < MIN_RSA_EXPONENT or exponent % 2 == 0:
            raise ExponentWeak("the RSA key's public exponent is too small")
    if isinstance(private, Hybrid):
        return private.private_bytes()
    if isinstance(private, engine_sm2.PrivateKey):
        raise Internal("an SM2 key was taken for another")
    return encode(private)


def _load(chosen: Algorithm, material: Data, *, checked: bool) -> PrivateKey:
    """Raises ``ValueError`` and the like."""
    if chosen.family == SM2:
        return engine_sm2.PrivateKey(material)
    if chosen.family == HYBRID:
        return Hybrid.load(material)
    key = serialization.load_der_private_key(material, None, unsafe_skip_rsa_key_validation=checked)
    if chosen.family == RSA:
        if isinstance(key, rsa.RSAPrivateKey) and key.key_size == chosen.key_bits:
            return key
    elif chosen.family in CURVES:
        if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, CURVES[chosen.family]):
            return key
    elif isinstance(key, _PLAIN[chosen.family][0]):
        found: Encodable = key
        return found
    raise ValueError(f"not a key of {chosen.name}")


def public_bytes(private: PrivateKey) -> bytes:
    """SubjectPublicKeyInfo, DER; of HPKE's hybrid: raw."""
    if isinstance(private, Hybrid | engine_sm2.PrivateKey):
        return private.public_bytes()
    return private.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def agree(private: PrivateKey, peer: bytes) -> bytes:
    """The shared secret with the holder of the public key ``peer`` (SubjectPublicKeyInfo, DER): SP 800-56A, RFC 7748.

    Raises ``PublicKeyInvalid`` for a point that is none or of another curve, ``ValueError`` when all of the secret is zero.
    """
    try:
        public = serialization.load_der_public_key(peer)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise PublicKeyInvalid(
            "the other side's public key cannot be read, or is no point of its curve", "give SubjectPublicKeyInfo"
        ) from exc
    match private, public:
        case ec.EllipticCurvePrivateKey(), ec.EllipticCurvePublicKey() if public.curve.name == private.curve.name:
            return private.exchange(ec.ECDH(), public)
        case x25519.X25519PrivateKey(), x25519.X25519PublicKey():
            return private.exchange(public)
        case x448.X448PrivateKey(), x448.X448PublicKey():
            return private.exchange(public)
    raise PublicKeyInvalid("the other side's public key is of another curve or algorithm")
