"""Key pairs: what the card makes the ``openssl`` program takes, and the other way round.

Each in two ways: a key that the card made, of which openssl has the public half; and one that openssl made and the card imported.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from cipherfleet.contract.algorithms import REGISTRY, Algorithm, Kind
from cipherfleet.contract.errors import CiphertextInvalid, SignatureInvalid
from cipherfleet.contract.vcc import Verb
from tests.unit.computing.card.consumer import Function
from tests.unit.computing.card.openssl_program import (
    CardKey,
    Openssl,
    brought,
    digest_name,
    entries,
    made,
    meets,
    meets_each_digest,
)

DATA = hashlib.shake_256(b"openssl").digest(5_003)
SHORT = DATA[:48]
MU = DATA[:64]
LATTICE = "ML-"


class Pair(NamedTuple):
    """One key of the card's own, and one that openssl made and both have. Paths are of DER files that openssl reads."""

    own: CardKey
    own_public: Path
    shared: CardKey
    private: Path
    public: Path


class Bench:
    """A card, the program, and their keys, each made once."""

    def __init__(self, folder: Path) -> None:
        self.function, self.openssl = Function(), Openssl(folder)
        self.pair = cache(self._pair)
        self.private_key = cache(self._private_key)

    def _pair(self, name: str) -> Pair:
        chosen = REGISTRY[name]
        private = self.private_key(chosen.family, chosen.key_bits)
        own, shared = made(self.function, name), brought(self.function, name, private)
        assert shared.public == self.openssl("pkey", "-inform", "DER", "-pubout", "-outform", "DER", given=private)
        return Pair(own, self.file(own.public), shared, self.file(private), self.file(shared.public))

    def _private_key(self, family: str, bits: int) -> bytes:
        if family == "RSA":
            return self.openssl.private_key("-algorithm", "RSA", "-pkeyopt", f"rsa_keygen_bits:{bits}")
        if family.startswith(("P-", "secp")):
            named = ("-pkeyopt", f"ec_paramgen_curve:{family}", "-pkeyopt", "ec_param_enc:named_curve")
            return self.openssl.private_key("-algorithm", "EC", *named)
        if family.startswith(LATTICE):
            self.openssl.needs("kem-algorithms" if "KEM" in family else "signature-algorithms", family)
            seed_only = f"{family[: family.rindex('-')].lower()}.output_formats=seed-only"  # the form that the card's library reads
            return self.openssl("genpkey", "-algorithm", family, "-provparam", seed_only, "-outform", "DER")
        return self.openssl.private_key("-algorithm", family)

    def file(self, data: bytes) -> Path:
        return self.openssl.file(data)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("openssl"))


def private(path: Path) -> tuple[object, ...]:
    return "-keyform", "DER", "-inkey", path


def public(path: Path) -> tuple[object, ...]:
    return "-pubin", "-keyform", "DER", "-inkey", path


def signatures_hold(bench: Bench, pair: Pair, data: bytes, options: tuple[object, ...], **how: object) -> None:
    """`openssl pkeyutl` with ``options`` and the card asked ``how`` take each other's signatures, and none of other data."""
    theirs = bench.openssl("pkeyutl", "-sign", *private(pair.private), "-in", bench.file(data), *options)
    changed = bytes([data[0] ^ 1]) + data[1:]
    pair.shared.run(Verb.VERIFY, data, signature=theirs, **how)
    with pytest.raises(SignatureInvalid):
        pair.shared.run(Verb.VERIFY, changed, signature=theirs, **how)
    for key, file in ((pair.own, pair.own_public), (pair.shared, pair.public)):
        verify = ("pkeyutl", "-verify", *public(file), "-sigfile", bench.file(key.run(Verb.SIGN, data, **how)), *options, "-in")
        bench.openssl(*verify, bench.file(data))
        assert "Failure" in bench.openssl.refuses(*verify, bench.file(changed))


def opt(*options: str) -> tuple[str, ...]:
    return tuple(part for option in options for part in ("-pkeyopt", option))


HASHED = tuple(entries(lambda a: a.kind is Kind.SIGNATURE and (a.family == "RSA" or a.name.startswith("ECDSA"))))


@meets_each_digest(*HASHED)
def test_rsa_and_ecdsa(bench: Bench, chosen: Algorithm, digest: str) -> None:
    """Of the message by `openssl dgst`, and of its digest by `openssl pkeyutl`."""
    pair, openssl, name = bench.pair(chosen.name), bench.openssl, digest_name(digest).lower()
    pss = ("rsa_padding_mode:pss", "rsa_pss_saltlen:digest") if chosen.mode == "PSS" else ()
    sigopt, data = [part for option in pss for part in ("-sigopt", option)], bench.file(DATA)
    theirs = openssl("dgst", f"-{name}", "-keyform", "DER", "-sign", pair.private, *sigopt, data)
    pair.shared.run(Verb.VERIFY, DATA, signature=theirs, digest=digest)
    with pytest.raises(SignatureInvalid):
        pair.shared.run(Verb.VERIFY, DATA + b"!", signature=theirs, digest=digest)
    ours = bench.file(pair.own.run(Verb.SIGN, DATA, digest=digest))
    verify = ("dgst", f"-{name}", "-keyform", "DER", "-verify", pair.own_public, "-signature", ours, *sigopt)
    openssl(*verify, data)
    openssl.refuses(*verify, bench.file(DATA + b"!"))

    prehashed = openssl("dgst", "-binary", f"-{name}", given=DATA)
    signatures_hold(bench, pair, prehashed, opt(f"digest:{name}", *pss), digest=digest, prehashed=True)


@meets(*entries(lambda a: a.family in ("Ed25519", "Ed448")))
def test_edwards_curves(bench: Bench, chosen: Algorithm) -> None:
    signatures_hold(bench, bench.pair(chosen.name), DATA, ("-rawin",))


@meets(*entries(lambda a: a.kind is Kind.SIGNATURE and a.family == "SM2"))
def test_sm2_signatures(bench: Bench, chosen: Algorithm) -> None:
    pair = bench.pair(chosen.name)
    for user_id in ("1234567812345678", "bob@example.org"):
        signatures_hold(bench, pair, DATA, ("-rawin", "-digest", "sm3", *opt(f"distid:{user_id}")), context=user_id.encode())
    signatures_hold(bench, pair, DATA, ("-rawin", "-digest", "sm3", *opt("distid:1234567812345678")))  # the card's default
    signatures_hold(bench, pair, DATA[:32], (), prehashed=True)


@meets(*entries(lambda a: a.kind is Kind.SIGNATURE and a.family.startswith(LATTICE)))
def test_ml_dsa(bench: Bench, chosen: Algorithm) -> None:
    """With and without a context string, and of the message representative mu."""
    pair = bench.pair(chosen.name)
    signatures_hold(bench, pair, DATA, ("-rawin",))
    signatures_hold(bench, pair, DATA, ("-rawin", *opt("context-string:a context")), context=b"a context")
    signatures_hold(bench, pair, MU, opt("mu:1"), prehashed=True)


@meets_each_digest(*entries(lambda a: a.mode == "OAEP"))
def test_rsa_oaep(bench: Bench, chosen: Algorithm, digest: str) -> None:
    pair, name = bench.pair(chosen.name), digest_name(digest).lower()
    for label in (b"", b"a label"):
        options = opt("rsa_padding_mode:oaep", f"rsa_oaep_md:{name}", f"rsa_mgf1_md:{name}")
        options += opt(f"rsa_oaep_label:{label.hex()}") if label else ()
        encryption_holds(bench, pair, options, digest=digest, context=label)


@meets(*entries(lambda a: a.name == "SM2-ENCRYPT"))
def test_sm2_encryption(bench: Bench, chosen: Algorithm) -> None:
    encryption_holds(bench, bench.pair(chosen.name), ())


def encryption_holds(bench: Bench, pair: Pair, options: tuple[object, ...], **how: object) -> None:
    theirs = bench.openssl("pkeyutl", "-encrypt", *public(pair.own_public), *options, given=SHORT)
    assert pair.own.run(Verb.DECRYPT, theirs, **how) == SHORT
    with pytest.raises(CiphertextInvalid):
        pair.own.run(Verb.DECRYPT, theirs[:-1] + bytes([theirs[-1] ^ 1]), **how)
    ours = pair.shared.run(Verb.ENCRYPT, SHORT, **how)
    assert bench.openssl("pkeyutl", "-decrypt", *private(pair.private), *options, given=ours) == SHORT


@meets(*entries(lambda a: a.kind is Kind.KEY_AGREEMENT))
def test_key_agreement(bench: Bench, chosen: Algorithm) -> None:
    """openssl's key with the card's own, seen from both sides; and the same key of openssl's, imported, in its place."""
    pair, openssl = bench.pair(chosen.name), bench.openssl
    shared = openssl("pkeyutl", "-derive", *private(pair.private), "-peerform", "DER", "-peerkey", pair.own_public)
    assert pair.own.run(Verb.AGREE, peer=pair.shared.public) == shared
    assert pair.shared.run(Verb.AGREE, peer=pair.own.public) == shared

    openssl.needs("kdf-algorithms", "HKDF")
    how = ("-kdfopt", "digest:SHA256", "-kdfopt", f"hexkey:{shared.hex()}", "-kdfopt", "salt:salt", "-kdfopt", "info:a purpose")
    derived = openssl("kdf", "-keylen", 40, *how, "-binary", "HKDF")
    assert pair.own.run(Verb.AGREE, peer=pair.shared.public, length=40, salt=b"salt", context=b"a purpose") == derived


@meets(*entries(lambda a: a.kind is Kind.KEM))
def test_ml_kem(bench: Bench, chosen: Algorithm) -> None:
    bench.openssl.needs_option("pkeyutl", "-encap")
    pair, openssl = bench.pair(chosen.name), bench.openssl
    secret = bench.file(b"")
    ciphertext = openssl("pkeyutl", "-encap", *public(pair.own_public), "-secret", secret)
    assert pair.own.run(Verb.DECAPSULATE, ciphertext) == secret.read_bytes()
    both = pair.shared.run(Verb.ENCAPSULATE)
    openssl("pkeyutl", "-decap", *private(pair.private), "-in", bench.file(both[32:]), "-secret", secret)
    assert secret.read_bytes() == both[:32]
