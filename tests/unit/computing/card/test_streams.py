"""Signatures, MACs and digests: what they are, and that ``openssl`` agrees."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from cipherfleet.computing import engine
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_signature import MAX_WHOLE_MESSAGE_BYTES, Digest, Mac, Signature
from cipherfleet.computing.engine_stream import open_stream
from cipherfleet.contract.algorithms import REGISTRY, Algorithm, Kind, algorithm
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    Internal,
    MacInvalid,
    SignatureInvalid,
    TagTooShort,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.ids import new_key_id
from cipherfleet.contract.vcc import StreamRequest, Verb
from tests.unit.computing.card.consumer import make_key

SIGNATURES = [a.name for a in REGISTRY.values() if a.kind is Kind.SIGNATURE]
OLD_OPENSSL = {"ML-DSA-44", "ML-DSA-65", "ML-DSA-87"}
"""What the command line has from OpenSSL 3.5 on; older ones must refuse the key."""
MESSAGE = b"the quick brown fox" * 100


class Pair:
    """A key and its parts, in the card's form."""

    def __init__(self, name: str) -> None:
        chosen = algorithm(name)
        material = engine.generate_material(chosen)
        self.pkcs8 = bytes(material)
        self.spki = engine.public_key(chosen, material)
        self.key = Key(new_key_id(), 1, chosen, material)


@pytest.fixture(scope="module", params=SIGNATURES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(str(request.param))


def openssl(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    command = shutil.which("openssl")
    if command is None:
        pytest.skip("openssl is not installed")
    return subprocess.run([command, *arguments], capture_output=True, timeout=30, check=False)


def command_of(pair: Pair, tmp_path: Path, what: str) -> list[str]:
    key, form = ("spki", ["-pubin"]) if what == "verify" else ("pkcs8", [])
    (tmp_path / "key").write_bytes(getattr(pair, key))
    (tmp_path / "message").write_bytes(MESSAGE)
    raw = ["-rawin", "-in", str(tmp_path / "message"), "-inkey", str(tmp_path / "key"), "-keyform", "DER", *form]
    return ["pkeyutl", f"-{what}", *raw, *options(pair.key.algorithm)]


def options(chosen: Algorithm) -> list[str]:
    if not chosen.digest:
        return []
    name = chosen.digest.replace("-", "").lower()
    found = ["-digest", name]
    if chosen.mode == "PSS":
        found += ["-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "rsa_pss_saltlen:32", "-pkeyopt", f"rsa_mgf1_md:{name}"]
    if chosen.family == "SM2":
        found += ["-pkeyopt", "distid:1234567812345678"]
    return found


def knows(pair: Pair, tmp_path: Path) -> bool:
    """Whether this openssl has the algorithm: all have, but for what is new."""
    (tmp_path / "key").write_bytes(pair.pkcs8)
    known = openssl("pkey", "-in", str(tmp_path / "key"), "-inform", "DER", "-noout").returncode == 0
    assert known or pair.key.algorithm.name in OLD_OPENSSL
    return known


def test_openssl_takes_our_signatures(pair: Pair, tmp_path: Path) -> None:
    if not knows(pair, tmp_path):
        return
    signing = Signature(pair.key)
    signing.update(MESSAGE[:33])
    (tmp_path / "signature").write_bytes(signing.finish(MESSAGE[33:]))
    done = openssl(*command_of(pair, tmp_path, "verify"), "-sigfile", str(tmp_path / "signature"))
    assert done.returncode == 0, done.stderr
    (tmp_path / "signature").write_bytes(Signature(pair.key).run(MESSAGE + b"!"))
    assert openssl(*command_of(pair, tmp_path, "verify"), "-sigfile", str(tmp_path / "signature")).returncode != 0


def test_we_take_openssl_signatures(pair: Pair, tmp_path: Path) -> None:
    if not knows(pair, tmp_path):
        return
    done = openssl(*command_of(pair, tmp_path, "sign"))
    assert done.returncode == 0, done.stderr
    assert Signature(pair.key, done.stdout).run(MESSAGE) == b""


def test_changed_signatures_and_messages_are_refused(pair: Pair) -> None:
    signature = Signature(pair.key).run(MESSAGE)
    for position in range(0, len(signature), 5):
        changed = bytearray(signature)
        changed[position] ^= 4
        with pytest.raises(SignatureInvalid):
            Signature(pair.key, bytes(changed)).run(MESSAGE)
    for wrong in (b"", signature[:-1], signature + b"\0", b"\0" * len(signature)):
        with pytest.raises(SignatureInvalid):
            Signature(pair.key, wrong).run(MESSAGE)
    with pytest.raises(SignatureInvalid):
        Signature(pair.key, signature).run(MESSAGE + b" ")


def test_ed25519_holds_at_most_a_mebibyte() -> None:
    key = make_key("Ed25519")
    signing = Signature(key)
    signing.update(bytes(MAX_WHOLE_MESSAGE_BYTES))
    assert signing.held_bytes == MAX_WHOLE_MESSAGE_BYTES
    with pytest.raises(TooLarge):
        signing.update(b"x")
    assert Signature(key, signing.finish(b"")).run(bytes(MAX_WHOLE_MESSAGE_BYTES)) == b""


def test_mac() -> None:
    key = make_key("HMAC-SHA-256")
    mac = Mac(key).run(MESSAGE)
    assert len(mac) == 32
    checking = Mac(key, mac)
    checking.update(MESSAGE[:5])
    assert checking.finish(MESSAGE[5:]) == b""
    for wrong in (mac + b"\0", bytes([mac[0] ^ 1]) + mac[1:]):
        with pytest.raises(MacInvalid):
            Mac(key, wrong).run(MESSAGE)
    for short in (b"", mac[:8], mac[:-1]):
        with pytest.raises(TagTooShort):
            Mac(key, short)
    with pytest.raises(MacInvalid):
        Mac(make_key("HMAC-SHA-256"), mac).run(MESSAGE)


def test_digest_in_pieces() -> None:
    stream = Digest("sha-384")
    stream.update(MESSAGE[:100])
    stream.update(b"")
    assert stream.finish(MESSAGE[100:]) == hashlib.sha384(MESSAGE).digest()
    with pytest.raises(AlgorithmUnknown):
        Digest("MD5")
    with pytest.raises(WrongKeyType):
        Digest("AES-256-GCM")


@pytest.mark.parametrize("verb", [v for v in Verb if v is not Verb.DIGEST])
def test_each_verb_has_its_kind_of_key(verb: Verb) -> None:
    fitting = {Verb.SIGN: Kind.SIGNATURE, Verb.VERIFY: Kind.SIGNATURE, Verb.MAC: Kind.MAC, Verb.VERIFY_MAC: Kind.MAC}.get(verb, Kind.AEAD)
    request = StreamRequest(verb, header=bytes(62), signature=b"s")
    for name, kind in (("AES-256-GCM", Kind.AEAD), ("HMAC-SHA-256", Kind.MAC), ("ECDSA-P-256", Kind.SIGNATURE)):
        key = make_key(name)
        if kind is fitting:
            continue
        with pytest.raises(Exception) as refused:
            open_stream(request, key, key)
        # A ciphertext's header is looked at first, and names the key as foreign.
        assert refused.value.__class__.__name__ in {"WrongKeyType", "CiphertextInvalid"}


def test_streams_without_what_they_need_are_our_bug() -> None:
    with pytest.raises(RuntimeError):
        open_stream(StreamRequest(Verb.SIGN), None)
    with pytest.raises(RuntimeError):
        open_stream(StreamRequest(Verb.REENCRYPT), make_key("AES-256-GCM"))
    with pytest.raises(TooLarge):
        open_stream(StreamRequest(Verb.DIGEST, digest="SM3", context=bytes(5000)), None)


def test_a_closed_stream_has_no_key() -> None:
    for stream in (Signature(make_key("Ed25519")), Mac(make_key("HMAC-SHA-256"))):
        stream.close()
        with pytest.raises(RuntimeError):
            stream.finish(b"")


def test_material_must_fit_its_algorithm() -> None:
    rsa, p256, ed = (algorithm(n) for n in ("RSA-3072-PSS", "ECDSA-P-256", "Ed25519"))
    for chosen, other in ((rsa, p256), (p256, ed), (ed, p256)):
        with pytest.raises(Internal):
            Key(new_key_id(), 1, chosen, engine.generate_material(other))
    with pytest.raises(Internal):
        Key(new_key_id(), 1, p256, bytearray(b"no key at all"))
    with pytest.raises(Internal):
        Key(new_key_id(), 1, algorithm("AES-256-GCM"), bytearray(16))
    with pytest.raises(WrongKeyType):
        engine.generate_material(algorithm("SHA-256"))
    assert engine.is_slow(rsa)
    assert not engine.is_slow(p256)
