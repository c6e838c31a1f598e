"""The registry of algorithms: what each is, what a key of it may do, and where it is specified."""

from enum import StrEnum

import msgspec

from cipherfleet.contract.errors import AlgorithmUnknown


class Use(StrEnum):
    """What a key may be used for (NIST SP 800-57 part 1, section 5.1.1)."""

    ENCRYPT = "encrypt"
    SIGN = "sign"
    MAC = "mac"
    DIGEST = "digest"


class Kind(StrEnum):
    AEAD = "aead"
    SIGNATURE = "signature"
    MAC = "mac"
    DIGEST = "digest"


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
    digest: str = ""  # the digest a signature or MAC works over


_ALL = ("international", "fips")
_AEAD, _SIGN, _MAC, _HASH = (Use.ENCRYPT,), (Use.SIGN,), (Use.MAC,), (Use.DIGEST,)

REGISTRY: dict[str, Algorithm] = {
    a.name: a
    for a in (
        Algorithm("AES-256-GCM", 1, "SP 800-38D", Kind.AEAD, _AEAD, _ALL, 256, 256),
        Algorithm("SM4-GCM", 2, "GB/T 32907, RFC 8998", Kind.AEAD, _AEAD, ("international", "gm"), 128, 128),
        Algorithm("HMAC-SHA-256", 3, "FIPS 198-1", Kind.MAC, _MAC, _ALL, 256, 256, "SHA-256"),
        Algorithm("RSA-3072-PSS", 4, "FIPS 186-5, RFC 8017", Kind.SIGNATURE, _SIGN, _ALL, 3072, 128, "SHA-256"),
        Algorithm("ECDSA-P-256", 5, "FIPS 186-5", Kind.SIGNATURE, _SIGN, _ALL, 256, 128, "SHA-256"),
        Algorithm("Ed25519", 6, "FIPS 186-5, RFC 8032", Kind.SIGNATURE, _SIGN, _ALL, 256, 128),
        Algorithm("SHA-256", 7, "FIPS 180-4", Kind.DIGEST, _HASH, _ALL, 0, 128),
        Algorithm("SHA-384", 8, "FIPS 180-4", Kind.DIGEST, _HASH, _ALL, 0, 192),
        Algorithm("SHA-512", 9, "FIPS 180-4", Kind.DIGEST, _HASH, _ALL, 0, 256),
        Algorithm("SM3", 10, "GB/T 32905", Kind.DIGEST, _HASH, ("international", "gm"), 0, 128),
    )
}


def algorithm(name: str) -> Algorithm:
    """The algorithm called ``name`` (case does not matter).

    Raises ``AlgorithmUnknown``.
    """
    found = REGISTRY.get(name) or next((a for n, a in REGISTRY.items() if n.lower() == name.lower()), None)
    if found is None:
        raise AlgorithmUnknown(f"no algorithm is called {name!r}")
    return found


def by_number(number: int) -> Algorithm:
    """The algorithm that ciphertexts name by ``number``. Raises ``AlgorithmUnknown``."""
    for candidate in REGISTRY.values():
        if candidate.number == number:
            return candidate
    raise AlgorithmUnknown(f"no algorithm has the number {number}")
