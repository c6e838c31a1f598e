"""Ciphers, key wrap, MACs, digests and derivation: what the card makes the ``openssl`` program takes, and the other way round."""

import hashlib
import re

import pytest

from cipherfleet.contract.algorithms import Algorithm, Kind
from cipherfleet.contract.errors import CiphertextInvalid, MacInvalid
from cipherfleet.contract.vcc import Verb
from tests.unit.computing.card.consumer import Function
from tests.unit.computing.card.openssl_program import CardKey, Openssl, brought, digest_name, entries, meets

DATA = hashlib.shake_256(b"openssl").digest(5_003)
SECRET = hashlib.shake_256(b"secret").digest(64)
IV = bytes(range(16))
WRAP_IVS = {"KW": bytes.fromhex("a6a6a6a6a6a6a6a6"), "KWP": bytes.fromhex("a65959a6")}
"""RFC 3394, section 2.2.3.1; RFC 5649, section 3. openssl wants to be told."""


@pytest.fixture(scope="module")
def function() -> Function:
    return Function()


@pytest.fixture(scope="module")
def openssl(tmp_path_factory: pytest.TempPathFactory) -> Openssl:
    return Openssl(tmp_path_factory.mktemp("openssl"))


@meets(*entries(lambda a: a.kind is Kind.CIPHER))
def test_ciphers(function: Function, openssl: Openssl, chosen: Algorithm) -> None:
    cipher, secret = chosen.name.lower(), SECRET[: chosen.key_bits // 8]
    openssl.needs("cipher-algorithms", cipher)
    key = brought(function, chosen.name, secret)

    def enc(iv: bytes, data: bytes, *more: str) -> bytes:
        return openssl("enc", *more, f"-{cipher}", "-K", secret.hex(), "-iv", iv.hex(), given=data)

    for data in (DATA, DATA[:4096], b""):
        ciphertext = key.run(Verb.ENCRYPT, data)
        assert enc(ciphertext[:16], ciphertext[16:], "-d") == data
        assert key.run(Verb.DECRYPT, IV + enc(IV, data)) == data


@meets(*entries(lambda a: a.kind is Kind.KEY_WRAP))
def test_key_wrap(function: Function, openssl: Openssl, chosen: Algorithm) -> None:
    padded = "-pad" if chosen.mode == "KWP" else ""
    cipher, secret = f"id-aes{chosen.key_bits}-wrap{padded}", SECRET[: chosen.key_bits // 8]
    openssl.needs("cipher-algorithms", cipher)
    key, how = brought(function, chosen.name, secret), ("-K", secret.hex(), "-iv", WRAP_IVS[chosen.mode].hex())
    for size in (16, 32, 64, *((1, 20, 137) if padded else ())):
        assert openssl("enc", "-d", f"-{cipher}", *how, "-in", openssl.file(key.run(Verb.ENCRYPT, DATA[:size]))) == DATA[:size]
        wrapped = openssl("enc", f"-{cipher}", *how, "-in", openssl.file(DATA[:size]))
        assert key.run(Verb.DECRYPT, wrapped) == DATA[:size]
        with pytest.raises(CiphertextInvalid):
            key.run(Verb.DECRYPT, wrapped[:-1] + bytes([wrapped[-1] ^ 1]))


@meets(*entries(lambda a: a.family == "AES" and a.mode == "GCM"))
def test_gcm_in_a_message_of_cms(function: Function, openssl: Openssl, chosen: Algorithm) -> None:
    """RFC 5083: `openssl cms` wraps a fresh content key, which a KW key of the card unwraps; then each opens what the other has sealed."""
    openssl.needs("cipher-algorithms", chosen.name)
    how = ("-secretkey", SECRET[:32].hex(), "-secretkeyid", "01")
    message = openssl("cms", "-encrypt", "-binary", f"-{chosen.name.lower()}", *how, "-outform", "DER", "-in", openssl.file(DATA))
    at = [span(openssl, message, *where) for where in ((5, "OCTET STRING"), (6, "OCTET STRING"), (4, "cont"), (3, "OCTET STRING"))]
    wrapped, nonce, content, tag = (message[part] for part in at)
    content_key = brought(function, "AES-256-KW", SECRET[:32]).run(Verb.DECRYPT, wrapped)
    key = brought(function, chosen.name, content_key, bare=True)
    assert key.run(Verb.DECRYPT, nonce + content + tag) == DATA

    other = DATA[::-1]
    ours = key.run(Verb.ENCRYPT, other)
    changed = bytearray(message)
    for part, value in zip(at[1:], (ours[:12], ours[12:-16], ours[-16:]), strict=True):
        changed[part] = value
    decrypt = ("cms", "-decrypt", "-binary", *how, "-inform", "DER")
    assert openssl(*decrypt, given=bytes(changed)) == other
    changed[-1] ^= 1
    openssl.refuses(*decrypt, given=bytes(changed))


def span(openssl: Openssl, message: bytes, depth: int, kind: str) -> slice:
    """Where the contents of the last value of ``kind`` lie that is so deep in DER."""
    found = re.findall(
        r"^ *(\d+):d=(\d+) +hl=(\d+) l= *(\d+) prim: (.*)$", openssl("asn1parse", "-inform", "DER", given=message).decode(), re.M
    )
    at, head, size = next((int(a), int(h), int(n)) for a, d, h, n, what in reversed(found) if int(d) == depth and what.startswith(kind))
    return slice(at + head, at + head + size)


@meets(*entries(lambda a: a.mode == "Poly1305"))
def test_chacha20_poly1305_of_its_parts(function: Function, openssl: Openssl, chosen: Algorithm) -> None:
    """RFC 8439, section 2.8, of `openssl enc -chacha20` and `openssl mac POLY1305`: `openssl enc` does not put them together."""
    openssl.needs("mac-algorithms", "poly1305")
    openssl.needs("cipher-algorithms", "chacha20")
    secret, associated, nonce = SECRET[:32], b"associated", bytes(range(12))
    key = brought(function, chosen.name, secret, bare=True)

    def chacha20(nonce: bytes, counter: int, data: bytes) -> bytes:
        return openssl("enc", "-chacha20", "-K", secret.hex(), "-iv", (counter.to_bytes(4, "little") + nonce).hex(), given=data)

    def poly1305(nonce: bytes, ciphertext: bytes) -> bytes:
        padded = b"".join(part + bytes(-len(part) % 16) for part in (associated, ciphertext))
        sizes = len(associated).to_bytes(8, "little") + len(ciphertext).to_bytes(8, "little")
        once = chacha20(nonce, 0, bytes(32)).hex()
        return bytes.fromhex(openssl("mac", "-macopt", f"hexkey:{once}", "-in", openssl.file(padded + sizes), "POLY1305").decode())

    ours = key.run(Verb.ENCRYPT, DATA, context=associated)
    assert chacha20(ours[:12], 1, ours[12:-16]) == DATA
    assert poly1305(ours[:12], ours[12:-16]) == ours[-16:]
    theirs = chacha20(nonce, 1, DATA)
    assert key.run(Verb.DECRYPT, nonce + theirs + poly1305(nonce, theirs), context=associated) == DATA


@meets(*entries(lambda a: a.kind is Kind.MAC))
def test_macs(function: Function, openssl: Openssl, chosen: Algorithm) -> None:
    cmac = chosen.mode == "CMAC"
    name = chosen.name.replace("CMAC", "CBC") if cmac else digest_name(chosen.digest)
    openssl.needs("mac-algorithms", "CMAC" if cmac else "HMAC")
    openssl.needs("cipher-algorithms" if cmac else "digest-algorithms", name)
    secret = SECRET[: chosen.key_bits // 8]
    key, how = brought(function, chosen.name, secret), ("-cipher", name, "CMAC") if cmac else ("-digest", name, "HMAC")
    for data in (DATA, b""):
        theirs = bytes.fromhex(openssl("mac", "-macopt", f"hexkey:{secret.hex()}", "-in", openssl.file(data), *how).decode())
        assert key.run(Verb.MAC, data) == theirs
        key.run(Verb.VERIFY_MAC, data, signature=theirs)
        with pytest.raises(MacInvalid):
            key.run(Verb.VERIFY_MAC, data + b"!", signature=theirs)


@meets(*entries(lambda a: a.kind is Kind.DIGEST))
def test_digests(function: Function, openssl: Openssl, chosen: Algorithm) -> None:
    name = digest_name(chosen.name)
    openssl.needs("digest-algorithms", name)
    card = CardKey(function, 0, b"")
    for length in (16, 32, 64, 1000) if chosen.name.startswith("SHAKE") else (0,):
        if length:
            openssl.needs_option("dgst", "-xoflen")
        more = ("-xoflen", length) if length else ()
        for data in (DATA, b""):
            theirs = openssl("dgst", "-binary", f"-{name.lower()}", *more, given=data)
            assert card.run(Verb.DIGEST, data, digest=chosen.name, length=length) == theirs


@meets(*entries(lambda a: a.kind is Kind.KEY_DERIVATION))
def test_derivation(function: Function, openssl: Openssl, chosen: Algorithm) -> None:
    openssl.needs("kdf-algorithms", "HKDF")
    key, secret = brought(function, chosen.name, SECRET[:32]), SECRET[:32].hex()
    for salt, info in ((b"salt", b"a purpose"), (b"s" * 64, b"x" * 100)):
        how = (f"digest:{digest_name(chosen.digest)}", f"hexkey:{secret}", f"hexsalt:{salt.hex()}", f"hexinfo:{info.hex()}")
        options = [part for option in how for part in ("-kdfopt", option)]
        for length in (16, 48, 200):
            theirs = openssl("kdf", "-keylen", length, *options, "-binary", "HKDF")
            assert key.run(Verb.DERIVE, length=length, salt=salt, context=info) == theirs
