"""Signatures, agreement, KEM and encryption to a public key against published vectors. File names are of ``cryptography_vectors``.

Where a signature is random, the published one is verified; where it is not (Ed25519, Ed448, PKCS#1 v1.5), it is made as well.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, mlkem, rsa, x448, x25519
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from cipherfleet.computing.engine_keys import Hybrid
from cipherfleet.contract.errors import CiphertextInvalid, SignatureInvalid
from cipherfleet.contract.vcc import Operation, StreamRequest, Verb
from tests.unit.computing.card.consumer import Function
from tests.unit.computing.card.published import lines, octets, records, shows

CURVES: dict[str, ec.EllipticCurve] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
    "secp256k1": ec.SECP256K1(),
}


@pytest.fixture(scope="module")
def function() -> Function:
    return Function()


def pkcs8(private: Any) -> bytes:
    encoded: bytes = private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return encoded


def spki(public: Any) -> bytes:
    encoded: bytes = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded


def verified(function: Function, handle: int, message: bytes, signature: bytes, **how: Any) -> None:
    """That the signature is of the message, and of no other."""
    request = StreamRequest(Verb.VERIFY, signature=signature, **how)
    function.run(request, message, handle=handle)
    with pytest.raises(SignatureInvalid):
        function.run(request, message + b"!", handle=handle)


def signed(function: Function, handle: int, message: bytes, **how: Any) -> bytes:
    return function.run(StreamRequest(Verb.SIGN, **how), message, handle=handle)


@shows(*(f"ECDSA-{curve}" for curve in CURVES))
@pytest.mark.parametrize("curve", CURVES)
def test_ecdsa_fips186(function: Function, curve: str) -> None:
    """asymmetric/ECDSA/FIPS_186-3/SigGen.txt (NIST CAVP), SECP256K1/SigGen.txt: each digest that the algorithm allows."""
    k1 = curve == "secp256k1"
    file = "asymmetric/ECDSA/SECP256K1/SigGen.txt" if k1 else "asymmetric/ECDSA/FIPS_186-3/SigGen.txt"
    sections = {f"{'K-256' if k1 else curve},SHA-{bits}": f"SHA-{bits}" for bits in (256, 384, 512)}
    seen = set()
    for r in records(file):
        digest = next((digest for section, digest in sections.items() if section in r), None)
        if digest is None or "d" not in r:
            continue
        private = ec.derive_private_key(int(r["d"], 16), CURVES[curve])
        handle = function.load(f"ECDSA-{curve}", pkcs8(private))
        verified(function, handle, bytes.fromhex(r["Msg"]), encode_dss_signature(int(r["R"], 16), int(r["S"], 16)), digest=digest)
        function.do(Operation.UNLOAD, handle=handle)
        seen.add(digest)
    assert seen == set(sections.values())


@shows("Ed25519")
def test_ed25519_rfc8032(function: Function) -> None:
    """asymmetric/Ed25519/sign.input, which RFC 8032, section 7.1, takes its own from: every eighth."""
    known = lines("asymmetric/Ed25519/sign.input")
    assert len(known) == 1024
    for line in known[::8]:
        secret, _, message, both = line.split(":")[:4]
        private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)[:32])
        handle = function.load("Ed25519", pkcs8(private))
        assert signed(function, handle, bytes.fromhex(message)).hex() == both[:128]
        verified(function, handle, bytes.fromhex(message), bytes.fromhex(both[:128]))
        function.do(Operation.UNLOAD, handle=handle)


@shows("Ed448")
def test_ed448_rfc8032(function: Function) -> None:
    """asymmetric/Ed448/rfc8032.txt (section 7.4), those without a context."""
    count = 0
    for r in records("asymmetric/Ed448/rfc8032.txt"):
        if "SECRET" not in r or "CONTEXT" in r:
            continue
        secret, message, signature = octets(r, "SECRET", "MESSAGE", "SIGNATURE")
        handle = function.load("Ed448", pkcs8(ed448.Ed448PrivateKey.from_private_bytes(secret)))
        assert signed(function, handle, message) == signature
        verified(function, handle, message, signature)
        count += 1
    assert count >= 7


MLDSA: dict[int, Any] = {44: mldsa.MLDSA44PrivateKey, 65: mldsa.MLDSA65PrivateKey, 87: mldsa.MLDSA87PrivateKey}


@shows("ML-DSA-44", "ML-DSA-65", "ML-DSA-87")
@pytest.mark.parametrize("level", MLDSA)
def test_ml_dsa_fips204(function: Function, level: int) -> None:
    """asymmetric/MLDSA/kat_MLDSA_*_det_pure.rsp: seed, public key, and signatures with a context string."""
    count = 0
    for r in records(f"asymmetric/MLDSA/kat_MLDSA_{level}_det_pure.rsp", begins="count"):
        if "xi" not in r or count == 20:
            continue
        seed, public, message, both, context = octets(r, "xi", "pk", "msg", "sm", "ctx")
        private = MLDSA[level].from_seed_bytes(seed)
        assert private.public_key().public_bytes_raw() == public
        handle = function.load(f"ML-DSA-{level}", pkcs8(private))
        verified(function, handle, message, both[: len(both) - len(message)], context=context)
        verified(function, handle, message, signed(function, handle, message, context=context), context=context)
        function.do(Operation.UNLOAD, handle=handle)
        count += 1
    assert count == 20


MLKEM: dict[int, Any] = {768: mlkem.MLKEM768PrivateKey, 1024: mlkem.MLKEM1024PrivateKey}


@shows("ML-KEM-768", "ML-KEM-1024")
@pytest.mark.parametrize("size", MLKEM)
def test_ml_kem_fips203(function: Function, size: int) -> None:
    """asymmetric/MLKEM/kat_MLKEM_*.rsp: public key from its seed, the secret of a ciphertext, and what a wrong one gives."""
    count = 0
    for r in records(f"asymmetric/MLKEM/kat_MLKEM_{size}.rsp", begins="count"):
        if "ct" not in r or count == 20:
            continue
        d, z, public, ciphertext, secret, wrong, rejected = octets(r, "d", "z", "pk", "ct", "ss", "ct_n", "ss_n")
        private = MLKEM[size].from_seed_bytes(d + z)
        assert private.public_key().public_bytes_raw() == public
        handle = function.load(f"ML-KEM-{size}", pkcs8(private))
        assert function.run(StreamRequest(Verb.DECAPSULATE), ciphertext, handle=handle) == secret
        assert function.run(StreamRequest(Verb.DECAPSULATE), wrong, handle=handle) == rejected
        function.do(Operation.UNLOAD, handle=handle)
        count += 1
    assert count == 20


@shows("ECDH-P-256", "ECDH-P-384", "ECDH-P-521")
def test_ecdh_sp800_56a(function: Function) -> None:
    """asymmetric/ECDH/KASValidityTest_ECCStaticUnified_NOKC_ZZOnly_init.fax (NIST CAVP), those whose shared secret is right."""
    sections = {"EC - SHA256": "P-256", "ED - SHA384": "P-384", "EE - SHA512": "P-521"}
    seen = dict.fromkeys(sections.values(), 0)
    for r in records("asymmetric/ECDH/KASValidityTest_ECCStaticUnified_NOKC_ZZOnly_init.fax"):
        curve = next((curve for section, curve in sections.items() if section in r), None)
        if curve is None or "Z" not in r or not r["Result"].startswith("P"):
            continue
        private = ec.derive_private_key(int(r["dsIUT"], 16), CURVES[curve])
        peer = ec.EllipticCurvePublicNumbers(int(r["QsCAVSx"], 16), int(r["QsCAVSy"], 16), CURVES[curve]).public_key()
        handle = function.load(f"ECDH-{curve}", pkcs8(private))
        assert function.run(StreamRequest(Verb.AGREE, peer=spki(peer)), handle=handle).hex() == r["Z"]
        function.do(Operation.UNLOAD, handle=handle)
        seen[curve] += 1
    assert min(seen.values()) >= 5


@shows("ECDH-secp256k1")
def test_ecdh_secp256k1_by_a_multiple_of_its_base_point(function: Function) -> None:
    """SEC 2, section 2.4.1: with the scalar 2 and the base point as the peer, the secret is the abscissa of twice the base point."""
    x = 0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798
    y = 0x483ADA7726A3C4655DA4FBFC0E1108A8FD17B448A68554199C47D08FFB10D4B8
    p = 2**256 - 2**32 - 977
    slope = 3 * x * x * pow(2 * y, -1, p) % p
    handle = function.load("ECDH-secp256k1", pkcs8(ec.derive_private_key(2, ec.SECP256K1())))
    peer = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256K1()).public_key()
    assert int.from_bytes(function.run(StreamRequest(Verb.AGREE, peer=spki(peer)), handle=handle), "big") == (slope * slope - 2 * x) % p


@shows("X25519", "X448")
@pytest.mark.parametrize(
    ("name", "private", "public"),
    [("X25519", x25519.X25519PrivateKey, x25519.X25519PublicKey), ("X448", x448.X448PrivateKey, x448.X448PublicKey)],
)
def test_montgomery_curves_rfc7748(function: Function, name: str, private: Any, public: Any) -> None:
    """asymmetric/X25519/rfc7748.txt and X448/rfc7748.txt (section 5.2)."""
    count = 0
    for r in records(f"asymmetric/{name}/rfc7748.txt"):
        if "OUTPUT_U" not in r:
            continue
        scalar, u = octets(r, "INPUT_SCALAR", "INPUT_U")
        handle = function.load(name, pkcs8(private.from_private_bytes(scalar)))
        assert function.run(StreamRequest(Verb.AGREE, peer=spki(public.from_public_bytes(u))), handle=handle).hex() == r["OUTPUT_U"]
        count += 1
    assert count >= 3


def rsa_key(p: int, q: int, e: int, d: int) -> rsa.RSAPrivateKey:
    numbers = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), rsa.RSAPublicNumbers(e, p * q))
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


@shows("RSA-2048-PKCS1", "RSA-3072-PKCS1")
@pytest.mark.parametrize("bits", [2048, 3072])
def test_rsa_pkcs1_fips186(function: Function, bits: int) -> None:
    """asymmetric/RSA/FIPS_186-2/SigVer15_186-3.rsp (NIST CAVP): good ones are made again and verified, bad ones refused."""
    count, refused, p, q = 0, 0, 0, 0
    for r in records("asymmetric/RSA/FIPS_186-2/SigVer15_186-3.rsp"):
        if r.get("mod") != str(bits):
            continue
        p, q = int(r.get("p", f"{p:x}"), 16), int(r.get("q", f"{q:x}"), 16)
        digest = {"SHA256": "SHA-256", "SHA384": "SHA-384", "SHA512": "SHA-512"}.get(r.get("SHAAlg", ""))
        if digest is None or int(r["e"], 16) * int(r["d"], 16) % math.lcm(p - 1, q - 1) != 1:
            continue
        message, signature = octets(r, "Msg", "S")
        handle = function.load(f"RSA-{bits}-PKCS1", pkcs8(rsa_key(p, q, int(r["e"], 16), int(r["d"], 16))))
        if r["Result"].startswith("P"):
            verified(function, handle, message, signature, digest=digest)
            assert signed(function, handle, message, digest=digest) == signature
            count += 1
        else:
            with pytest.raises(SignatureInvalid):
                function.run(StreamRequest(Verb.VERIFY, signature=signature, digest=digest), message, handle=handle)
            refused += 1
        function.do(Operation.UNLOAD, handle=handle)
    assert count >= 3
    assert refused >= 10


@shows("RSA-2048-PSS", "RSA-3072-PSS", "RSA-4096-PSS", "RSA-4096-PKCS1")
@pytest.mark.parametrize(("bits", "mode"), [(2048, "PSS"), (3072, "PSS"), (4096, "PSS"), (4096, "PKCS1")])
def test_rsa_by_the_encoding_of_rfc8017(function: Function, bits: int, mode: str) -> None:
    """RFC 8017, sections 9.1.2 and 9.2, by hand: published PSS vectors have other salts than ours, and none come with 4096 bits.

    The PSS formula itself is held against NIST's vectors in ``test_vectors.py``.
    """
    private = rsa.generate_private_key(65537, bits)
    handle = function.load(f"RSA-{bits}-{mode}", pkcs8(private))
    numbers = private.public_key().public_numbers()
    for name in ("sha256", "sha384", "sha512"):
        signature = signed(function, handle, b"message", digest=f"SHA-{name[3:]}")
        encoded = pow(int.from_bytes(signature, "big"), numbers.e, numbers.n).to_bytes(bits // 8, "big")
        digest = hashlib.new(name, b"message").digest()
        if mode == "PKCS1":
            prefix = {"sha256": "3031300d060960864801650304020105000420", "sha384": "3041300d060960864801650304020205000430"}
            info = bytes.fromhex(prefix.get(name, "3051300d060960864801650304020305000440")) + digest
            assert encoded == b"\0\1" + b"\xff" * (bits // 8 - len(info) - 3) + b"\0" + info
            continue
        size = len(digest)
        masked, hashed, trailer = encoded[: -size - 1], encoded[-size - 1 : -1], encoded[-1]
        mask = b"".join(hashlib.new(name, hashed + i.to_bytes(4, "big")).digest() for i in range(len(masked) // size + 1))
        block = bytes(a ^ b for a, b in zip(masked, mask, strict=False))
        salt = block[-size:]
        assert trailer == 0xBC
        assert bytes([block[0] & 0x7F]) + block[1 : -size - 1] == bytes(len(block) - size - 1)
        assert block[-size - 1] == 1
        assert hashlib.new(name, bytes(8) + digest + salt).digest() == hashed


@shows("RSA-2048-OAEP")
@pytest.mark.parametrize("bits", [256, 384, 512])
def test_rsa_oaep(function: Function, bits: int) -> None:
    """asymmetric/RSA/oaep-custom/oaep-sha*-sha*.txt, the keys of 2048 bits."""
    count = 0
    for private, plaintext, ciphertext in oaep_examples(f"asymmetric/RSA/oaep-custom/oaep-sha{bits}-sha{bits}.txt"):
        if private.key_size != 2048:
            continue
        handle = function.load("RSA-2048-OAEP", pkcs8(private))
        request = StreamRequest(Verb.DECRYPT, digest=f"SHA-{bits}")
        assert function.run(request, ciphertext, handle=handle) == plaintext
        with pytest.raises(CiphertextInvalid):
            function.run(request, ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]), handle=handle)
        function.do(Operation.UNLOAD, handle=handle)
        count += 1
    assert count >= 6


def oaep_examples(name: str) -> Iterator[tuple[rsa.RSAPrivateKey, bytes, bytes]]:
    """Key, message and encryption of each example of a file in the form of RSA Security's vectors."""
    values: dict[str, str] = {}
    field = half = ""
    for line in lines(name):
        if line.startswith("#"):
            field = line.strip("# :").lower()
            half = {"public key": "public", "private key": "private"}.get(field, half)
        elif line:
            values[f"{half} {field}"] = line
            if field == "encryption":
                names = ("private prime 1", "private prime 2", "public exponent", "private exponent")
                yield rsa_key(*(int(values[n], 16) for n in names)), bytes.fromhex(values["private message"]), bytes.fromhex(line)


@shows("RSA-3072-OAEP", "RSA-4096-OAEP")
@pytest.mark.parametrize("bits", [3072, 4096])
def test_rsa_oaep_by_the_encoding_of_rfc8017(function: Function, bits: int) -> None:
    """RFC 8017, section 7.1, by hand: no published vectors have keys of this size."""
    private = rsa.generate_private_key(65537, bits)
    numbers = private.public_key().public_numbers()
    size, label, seed, message = bits // 8, b"label", bytes(range(32)), b"a secret of some length"

    def mask(value: bytes, length: int) -> bytes:
        return b"".join(hashlib.sha256(value + i.to_bytes(4, "big")).digest() for i in range(length // 32 + 1))[:length]

    def xor(a: bytes, b: bytes) -> bytes:
        return bytes(x ^ y for x, y in zip(a, b, strict=True))

    block = hashlib.sha256(label).digest() + bytes(size - len(message) - 66) + b"\1" + message
    masked = xor(block, mask(seed, len(block)))
    encoded = b"\0" + xor(seed, mask(masked, 32)) + masked
    ciphertext = pow(int.from_bytes(encoded, "big"), numbers.e, numbers.n).to_bytes(size, "big")
    handle = function.load(f"RSA-{bits}-OAEP", pkcs8(private))
    assert function.run(StreamRequest(Verb.DECRYPT, label), ciphertext, handle=handle) == message


@shows("HPKE-ML-KEM-768-X25519")
def test_hpke_hybrid(function: Function) -> None:
    """HPKE/hpke-pq-test-vectors.json, KEM 0x647a: its key pair and encapsulation; with AES-256-GCM, which it lacks, by the library's parts.

    The published private key is the seed that SHAKE256 expands to ML-KEM's and X25519's.
    """
    with cryptography_vectors.open_vector_file("HPKE/hpke-pq-test-vectors.json", "r") as file:
        (r,) = [r for r in json.load(file) if (r["kem_id"], r["kdf_id"], r["aead_id"]) == (0x647A, 1, 3)]
    expanded = hashlib.shake_256(bytes.fromhex(r["skRm"])).digest(96)
    hybrid = Hybrid.load(expanded)
    assert hybrid.public_bytes().hex() == r["pkRm"]
    kem, exchange = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]), x25519.X25519PrivateKey.from_private_bytes(expanded[64:])
    key = MLKEM768X25519PrivateKey(kem, exchange)
    info = bytes.fromhex(r["info"])
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    first = r["encryptions"][0]
    published = bytes.fromhex(r["enc"]) + bytes.fromhex(first["ct"])
    opened = published_plaintext(suite, published, key, info, bytes.fromhex(first["aad"]))
    assert opened.hex() == first["pt"] if "pt" in first else r["pt"]
    handle = function.load("HPKE-ML-KEM-768-X25519", expanded)
    ours = function.run(StreamRequest(Verb.ENCRYPT, info), opened, handle=handle)
    assert Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM).decrypt(ours, key, info=info) == opened
    assert function.run(StreamRequest(Verb.DECRYPT, info), ours, handle=handle) == opened
    with pytest.raises(CiphertextInvalid):
        function.run(StreamRequest(Verb.DECRYPT, info + b"!"), ours, handle=handle)
    with pytest.raises(CiphertextInvalid):
        function.run(StreamRequest(Verb.DECRYPT, info), published, handle=handle)


def published_plaintext(suite: Suite, published: bytes, key: MLKEM768X25519PrivateKey, info: bytes, associated: bytes) -> bytes:
    """The library keeps associated data to itself, and to its own tests."""
    from cryptography.hazmat.bindings._rust import openssl

    opened: bytes = openssl.hpke._decrypt_with_aad(suite, published, key, info, associated)
    return opened
