"""The registry of algorithms: what each is, what a key of it may do, and where it is specified.

A key is of one algorithm for all its life, and an algorithm has one purpose (SP 800-57 part 1, section 5.2). Where a standard
leaves a choice to the operation (the digest of a signature), ``digests`` lists what may be chosen; the first is the default.

Not here: PBKDF2 and scrypt. They harden passwords, which should not travel to a service; harden at home and add a key's MAC
(SP 800-63B, section 5.1.1.2). KMAC: the library has none.
"""

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from cipherfleet.contract.errors import AlgorithmUnknown


class Use(StrEnum):
    """What a key may be used for (NIST SP 800-57 part 1, section 5.1.1)."""

    ENCRYPT = "encrypt"
    SIGN = "sign"
    MAC = "mac"
    DIGEST = "digest"
    WRAP = "wrap"
    AGREE = "agree"
    ENCAPSULATE = "encapsulate"
    DERIVE = "derive"


class Kind(StrEnum):
    AEAD = "aead"
    CIPHER = "cipher"  # no authentication: what is decrypted is not verified
    KEY_WRAP = "key-wrap"
    PUBLIC_KEY_ENCRYPTION = "public-key-encryption"
    SIGNATURE = "signature"
    MAC = "mac"
    DIGEST = "digest"
    KEY_AGREEMENT = "key-agreement"
    KEM = "kem"
    KEY_DERIVATION = "key-derivation"


class Algorithm(msgspec.Struct, frozen=True):
    """One algorithm. ``number`` is what ciphertexts carry; it is never given out twice."""

    name: str
    number: int
    standard: str
    kind: Kind
    uses: tuple[Use, ...]
    profiles: tuple[str, ...]
    key_bits: int  # 0 for digests
    strength_bits: int
    digest: str = ""  # the digest a signature, MAC or derivation works over, if nothing else is chosen
    digests: tuple[str, ...] = ()  # what may be chosen, the default too; empty: no choice
    family: str = ""  # what the key material is: AES, SM4, ChaCha20, secret, RSA, a curve, ML-DSA, ...
    mode: str = ""  # of a block cipher or RSA: GCM, CBC, PSS, ...

    @property
    def secret_key(self) -> bool:
        """Whether its key material is plain secret bytes."""
        return self.family in _SECRET_FAMILIES

    @property
    def bare_only(self) -> bool:
        """Whether its ciphertexts are the standard's bare ones and never messages in our format."""
        return self.kind in (Kind.CIPHER, Kind.KEY_WRAP, Kind.PUBLIC_KEY_ENCRYPTION)


_SECRET_FAMILIES = frozenset({"AES", "SM4", "ChaCha20", "secret"})
_ANY, _FIPS, _GM = ("international",), ("international", "fips"), ("international", "gm")
_USES = {
    Kind.AEAD: (Use.ENCRYPT,),
    Kind.CIPHER: (Use.ENCRYPT,),
    Kind.KEY_WRAP: (Use.WRAP,),
    Kind.PUBLIC_KEY_ENCRYPTION: (Use.ENCRYPT,),
    Kind.SIGNATURE: (Use.SIGN,),
    Kind.MAC: (Use.MAC,),
    Kind.DIGEST: (Use.DIGEST,),
    Kind.KEY_AGREEMENT: (Use.AGREE,),
    Kind.KEM: (Use.ENCAPSULATE,),
    Kind.KEY_DERIVATION: (Use.DERIVE,),
}
_SHA2 = ("SHA-256", "SHA-384", "SHA-512")
_CURVES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("P-256", 256, _FIPS),
    ("P-384", 384, _FIPS),
    ("P-521", 521, _FIPS),
    ("secp256k1", 256, _ANY),
)
_RSA_STRENGTH = {2048: 112, 3072: 128, 4096: 152}  # SP 800-57 part 1, table 2; SP 800-56B, appendix D


def _entry(
    number: int,
    name: str,
    kind: Kind,
    standard: str,
    profiles: tuple[str, ...],
    bits: int,
    strength: int,
    *,
    digests: tuple[str, ...] = (),
    family: str = "",
    mode: str = "",
) -> Algorithm:
    chosen = digests if len(digests) > 1 else ()
    return Algorithm(
        name, number, standard, kind, _USES[kind], profiles, bits, strength, digests[0] if digests else "", chosen, family, mode
    )


def _ciphers() -> Iterator[Algorithm]:
    aead, cipher = Kind.AEAD, Kind.CIPHER
    yield _entry(1, "AES-256-GCM", aead, "SP 800-38D", _FIPS, 256, 256, family="AES", mode="GCM")
    yield _entry(11, "AES-128-GCM", aead, "SP 800-38D", _FIPS, 128, 128, family="AES", mode="GCM")
    yield _entry(12, "AES-192-GCM", aead, "SP 800-38D", _FIPS, 192, 192, family="AES", mode="GCM")
    for offset, bits in enumerate((128, 192, 256)):
        yield _entry(13 + offset, f"AES-{bits}-CCM", aead, "SP 800-38C", _FIPS, bits, bits, family="AES", mode="CCM")
    for offset, bits in enumerate((128, 256)):
        yield _entry(16 + offset, f"AES-{bits}-GCM-SIV", aead, "RFC 8452", _ANY, bits, bits, family="AES", mode="GCM-SIV")
    yield _entry(18, "ChaCha20-Poly1305", aead, "RFC 8439", _ANY, 256, 256, family="ChaCha20", mode="Poly1305")
    yield _entry(2, "SM4-GCM", aead, "GB/T 32907, RFC 8998", _GM, 128, 128, family="SM4", mode="GCM")
    for offset, bits in enumerate((128, 192, 256)):
        yield _entry(19 + offset, f"AES-{bits}-CBC", cipher, "SP 800-38A", _FIPS, bits, bits, family="AES", mode="CBC")
        yield _entry(22 + offset, f"AES-{bits}-CTR", cipher, "SP 800-38A", _FIPS, bits, bits, family="AES", mode="CTR")
    for offset, bits in enumerate((128, 256)):
        yield _entry(25 + offset, f"AES-{bits}-XTS", cipher, "SP 800-38E", _FIPS, 2 * bits, bits, family="AES", mode="XTS")
    yield _entry(27, "SM4-CBC", cipher, "GB/T 32907, GB/T 17964", _GM, 128, 128, family="SM4", mode="CBC")
    yield _entry(28, "SM4-CTR", cipher, "GB/T 32907, GB/T 17964", _GM, 128, 128, family="SM4", mode="CTR")
    for offset, bits in enumerate((128, 192, 256)):
        yield _entry(29 + offset, f"AES-{bits}-KW", Kind.KEY_WRAP, "SP 800-38F, RFC 3394", _FIPS, bits, bits, family="AES", mode="KW")
        yield _entry(32 + offset, f"AES-{bits}-KWP", Kind.KEY_WRAP, "SP 800-38F, RFC 5649", _FIPS, bits, bits, family="AES", mode="KWP")


def _codes_and_digests() -> Iterator[Algorithm]:
    mac, digest, derivation = Kind.MAC, Kind.DIGEST, Kind.KEY_DERIVATION
    yield _entry(3, "HMAC-SHA-256", mac, "FIPS 198-1", _FIPS, 256, 256, digests=("SHA-256",), family="secret")
    for number, name, bits in (
        (35, "SHA-224", 224),
        (36, "SHA-384", 384),
        (37, "SHA-512", 512),
        (38, "SHA3-256", 256),
        (39, "SHA3-384", 384),
        (40, "SHA3-512", 512),
    ):
        yield _entry(number, f"HMAC-{name}", mac, "FIPS 198-1", _FIPS, bits, min(bits, 256), digests=(name,), family="secret")
    yield _entry(41, "HMAC-SM3", mac, "GB/T 15852.2", _GM, 256, 256, digests=("SM3",), family="secret")
    for offset, bits in enumerate((128, 192, 256)):
        yield _entry(42 + offset, f"AES-{bits}-CMAC", mac, "SP 800-38B", _FIPS, bits, 128, family="AES", mode="CMAC")
    yield _entry(45, "SM4-CMAC", mac, "GB/T 32907, GB/T 15852.1", _GM, 128, 128, family="SM4", mode="CMAC")
    for number, name, standard, profiles, strength in (
        (7, "SHA-256", "FIPS 180-4", _FIPS, 128),
        (8, "SHA-384", "FIPS 180-4", _FIPS, 192),
        (9, "SHA-512", "FIPS 180-4", _FIPS, 256),
        (10, "SM3", "GB/T 32905", _GM, 128),
        (46, "SHA-224", "FIPS 180-4", _FIPS, 112),
        (47, "SHA-512/256", "FIPS 180-4", _FIPS, 128),
        (48, "SHA3-224", "FIPS 202", _FIPS, 112),
        (49, "SHA3-256", "FIPS 202", _FIPS, 128),
        (50, "SHA3-384", "FIPS 202", _FIPS, 192),
        (51, "SHA3-512", "FIPS 202", _FIPS, 256),
        (52, "SHAKE128", "FIPS 202", _FIPS, 128),
        (53, "SHAKE256", "FIPS 202", _FIPS, 256),
        (54, "BLAKE2b", "RFC 7693", _ANY, 256),
        (55, "BLAKE2s", "RFC 7693", _ANY, 128),
    ):
        yield _entry(number, name, digest, standard, profiles, 0, strength)
    for number, name in ((56, "SHA-256"), (57, "SHA-384"), (58, "SHA-512")):
        yield _entry(number, f"HKDF-{name}", derivation, "RFC 5869, SP 800-56C", _FIPS, 256, 256, digests=(name,), family="secret")
    yield _entry(59, "HKDF-SM3", derivation, "RFC 5869, GB/T 32905", _GM, 256, 256, digests=("SM3",), family="secret")


def _public_keys() -> Iterator[Algorithm]:
    signature, agreement, encryption = Kind.SIGNATURE, Kind.KEY_AGREEMENT, Kind.PUBLIC_KEY_ENCRYPTION
    rsa, oaep = "FIPS 186-5, RFC 8017", "SP 800-56B, RFC 8017"
    for offset, (bits, strength) in enumerate(_RSA_STRENGTH.items()):
        number = (60, 4, 61)[offset]
        yield _entry(number, f"RSA-{bits}-PSS", signature, rsa, _FIPS, bits, strength, digests=_SHA2, family="RSA", mode="PSS")
        yield _entry(62 + offset, f"RSA-{bits}-PKCS1", signature, rsa, _FIPS, bits, strength, digests=_SHA2, family="RSA", mode="PKCS1")
        yield _entry(65 + offset, f"RSA-{bits}-OAEP", encryption, oaep, _FIPS, bits, strength, digests=_SHA2, family="RSA", mode="OAEP")
    for number, (curve, bits, profiles), first in zip((5, 68, 69, 70), _CURVES, (*_SHA2, _SHA2[0]), strict=True):
        digests = (first, *(d for d in _SHA2 if d != first))
        standard = "FIPS 186-5" if profiles is _FIPS else "SEC 1, SEC 2"
        yield _entry(number, f"ECDSA-{curve}", signature, standard, profiles, bits, min(bits // 2, 256), digests=digests, family=curve)
    yield _entry(6, "Ed25519", signature, "FIPS 186-5, RFC 8032", _FIPS, 256, 128, family="Ed25519")
    yield _entry(71, "Ed448", signature, "FIPS 186-5, RFC 8032", _FIPS, 456, 224, family="Ed448")
    yield _entry(72, "SM2", signature, "GB/T 32918.2", _GM, 256, 128, digests=("SM3",), family="SM2")
    for offset, (level, strength) in enumerate(((44, 128), (65, 192), (87, 256))):
        yield _entry(73 + offset, f"ML-DSA-{level}", signature, "FIPS 204", _FIPS, 256, strength, family=f"ML-DSA-{level}")
    for offset, (curve, bits, profiles) in enumerate(_CURVES):
        standard = "SP 800-56A" if profiles is _FIPS else "SEC 1, SEC 2"
        yield _entry(76 + offset, f"ECDH-{curve}", agreement, standard, profiles, bits, min(bits // 2, 256), family=curve)
    yield _entry(80, "X25519", agreement, "RFC 7748", _ANY, 256, 128, family="X25519")
    yield _entry(81, "X448", agreement, "RFC 7748", _ANY, 448, 224, family="X448")
    yield _entry(82, "ML-KEM-768", Kind.KEM, "FIPS 203", _FIPS, 512, 192, family="ML-KEM-768")
    yield _entry(83, "ML-KEM-1024", Kind.KEM, "FIPS 203", _FIPS, 512, 256, family="ML-KEM-1024")
    yield _entry(84, "SM2-ENCRYPT", encryption, "GB/T 32918.4", _GM, 256, 128, family="SM2")
    yield _entry(85, "HPKE-ML-KEM-768-X25519", encryption, "RFC 9180, FIPS 203", _ANY, 768, 192, family="ML-KEM-768-X25519")


REGISTRY: dict[str, Algorithm] = {a.name: a for part in (_ciphers(), _codes_and_digests(), _public_keys()) for a in part}
_BY_NUMBER = {a.number: a for a in REGISTRY.values()}
_BY_LOWER_NAME = {name.lower(): a for name, a in REGISTRY.items()}


def algorithm(name: str) -> Algorithm:
    """The algorithm called ``name`` (case does not matter).

    Raises ``AlgorithmUnknown``.
    """
    found = REGISTRY.get(name) or _BY_LOWER_NAME.get(name.lower())
    if found is None:
        raise AlgorithmUnknown(f"no algorithm is called {name!r}")
    return found


def by_number(number: int) -> Algorithm:
    """The algorithm that ciphertexts name by ``number``. Raises ``AlgorithmUnknown``."""
    found = _BY_NUMBER.get(number)
    if found is None:
        raise AlgorithmUnknown(f"no algorithm has the number {number}")
    return found
