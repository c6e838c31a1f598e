"""Every algorithm against published vectors: from the package ``cryptography_vectors`` (file names below) or the standard."""

import hashlib
import hmac
import re
from collections.abc import Iterator

import cryptography_vectors
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_aead import aead_of
from cipherfleet.computing.engine_memory import derive
from cipherfleet.computing.engine_message import Decryptor
from cipherfleet.computing.engine_signature import Digest, Mac, Signature
from cipherfleet.contract.algorithms import algorithm
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import SignatureInvalid
from cipherfleet.contract.ids import KeyId, new_key_id
from tests.unit.computing.card.consumer import key_of


def records(name: str) -> Iterator[dict[str, str]]:
    """The records of a NIST-style file, each with the ``[section]`` lines before it."""
    section: dict[str, str] = {}
    record: dict[str, str] = {}
    with cryptography_vectors.open_vector_file(name, "r") as file:
        for line in [*file.read().splitlines(), ""]:
            text = line.strip()
            if match := re.fullmatch(r"\[(.+?)(?: = (.+))?\]", text):
                section = {**(section if match[2] else {}), match[1]: match[2] or ""}
            elif not text and record:
                yield {**section, **record}
                record = {}
            elif " = " in text + " " and not text.startswith("#"):
                key, _, value = (text + " ").partition(" = ")
                record[key.strip()] = value.strip()


def test_aes_256_gcm_sp800_38d() -> None:
    """ciphers/AES/GCM/gcmEncryptExtIV256.rsp (NIST CAVP), those with 96-bit nonces, whole tags and no associated data."""
    count = 0
    for r in records("ciphers/AES/GCM/gcmEncryptExtIV256.rsp"):
        if (r.get("IVlen"), r.get("AADlen"), r.get("Taglen")) != ("96", "0", "128") or "Key" not in r:
            continue
        key, nonce, plaintext = (bytes.fromhex(r[n]) for n in ("Key", "IV", "PT"))
        sealed = bytearray(len(plaintext) + 16)
        aead_of(algorithm("AES-256-GCM"), bytearray(key)).seal(nonce, memoryview(plaintext), memoryview(sealed))
        assert sealed.hex() == r["CT"] + r["Tag"]
        opened = bytearray(len(plaintext))
        aead_of(algorithm("AES-256-GCM"), bytearray(key)).open(nonce, memoryview(sealed), memoryview(opened))
        assert opened == plaintext
        count += 1
    assert count >= 60


def ghash_tag(key: bytes, nonce: bytes, aad: bytes, ciphertext: bytes) -> bytes:
    """The tag of SM4-GCM, from the formulas of SP 800-38D, sections 6.3 and 7.1, over the bare block cipher."""

    def block(value: bytes) -> int:
        return int.from_bytes(Cipher(algorithms.SM4(key), modes.ECB()).encryptor().update(value), "big")  # noqa: S305

    def multiply(x: int, y: int) -> int:
        product = 0
        for bit in range(127, -1, -1):
            if x >> bit & 1:
                product ^= y
            y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
        return product

    h, total = block(bytes(16)), 0
    padded = [part + bytes(-len(part) % 16) for part in (aad, ciphertext)]
    lengths = (len(aad) * 8).to_bytes(8, "big") + (len(ciphertext) * 8).to_bytes(8, "big")
    whole = b"".join(padded) + lengths
    for position in range(0, len(whole), 16):
        total = multiply(total ^ int.from_bytes(whole[position : position + 16], "big"), h)
    return (total ^ block(nonce + b"\0\0\0\1")).to_bytes(16, "big")


def test_sm4_gcm_rfc8998() -> None:
    """ciphers/SM4/rfc8998.txt (RFC 8998, A.2). We use no associated data, so the tag is checked by the formula."""
    (r,) = [r for r in records("ciphers/SM4/rfc8998.txt") if "KEY" in r and len(r["IV"]) == 24 and "TAG" in r][:1]
    key, nonce, aad, plaintext = (bytes.fromhex(r[n]) for n in ("KEY", "IV", "AAD", "PLAINTEXT"))
    assert ghash_tag(key, nonce, aad, bytes.fromhex(r["CIPHERTEXT"])).hex() == r["TAG"]
    sealed = bytearray(len(plaintext) + 16)
    cipher = aead_of(algorithm("SM4-GCM"), bytearray(key))
    cipher.seal(nonce, memoryview(plaintext), memoryview(sealed))
    assert sealed[:-16].hex() == r["CIPHERTEXT"]
    assert bytes(sealed[-16:]) == ghash_tag(key, nonce, b"", bytes(sealed[:-16]))
    opened = bytearray(len(plaintext))
    cipher.open(nonce, memoryview(sealed), memoryview(opened))
    assert opened == plaintext
    sealed[0] ^= 1
    with pytest.raises(InvalidTag):
        cipher.open(nonce, memoryview(sealed), memoryview(opened))
    assert not any(opened)


def test_sm4_block_gbt_32907() -> None:
    """GB/T 32907-2016, annex A.1: the block cipher below SM4-GCM."""
    key = bytes.fromhex("0123456789abcdeffedcba9876543210")
    encrypted = Cipher(algorithms.SM4(key), modes.ECB()).encryptor().update(key)  # noqa: S305
    assert encrypted.hex() == "681edf34d206965e86b3e94f536e4246"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((f"SHA-{n}", f"hashes/SHA2/SHA{n}{kind}Msg.rsp") for n in (256, 384, 512) for kind in ("Short", "Long")),
        ("SM3", "hashes/SM3/oscca.txt"),
    ],
)
def test_digests_fips180_and_gbt32905(name: str, file: str) -> None:
    """FIPS 180-4 (NIST CAVP) and GB/T 32905 (its annex A and the vectors of OSCCA)."""
    count = 0
    for r in records(file):
        if "Msg" not in r:
            continue
        message = bytes.fromhex(r["Msg"])[: int(r["Len"]) // 8]
        stream = Digest(name)
        stream.update(message[:7])
        assert stream.finish(message[7:]).hex() == r["MD"]
        count += 1
    assert count >= 4


def test_hmac_sha_256_rfc4231() -> None:
    """HMAC/rfc-4231-sha256.txt; keys that are not 32 bytes long go through ``Key`` no more than in service, so those with 32 only,
    and the others against the standard library, which passes the whole file."""
    count = 0
    for r in records("HMAC/rfc-4231-sha256.txt"):
        secret, message = bytes.fromhex(r["Key"]), bytes.fromhex(r["Msg"])
        assert hmac.digest(secret, message, "sha256").hex() == r["MD"]
        # A key of another length equals the 32-byte key padded with zeros, or its digest (FIPS 198-1, section 4).
        short = secret + bytes(32 - len(secret)) if len(secret) <= 32 else hashlib.sha256(secret).digest()
        if 32 < len(secret) <= 64:
            continue
        key = Key(new_key_id(), 1, algorithm("HMAC-SHA-256"), bytearray(short))
        assert Mac(key).run(message).hex() == r["MD"]
        assert Mac(key, bytes.fromhex(r["MD"])).run(message) == b""
        count += 1
    assert count >= 6


def test_hkdf_rfc5869() -> None:
    """KDF/rfc-5869-HKDF-SHA256.txt: what message keys and the key chain are derived with."""
    count = 0
    r: dict[str, str] = {}
    for part in records("KDF/rfc-5869-HKDF-SHA256.txt"):
        r |= part
        if "OKM" not in part:
            continue
        derived = derive(bytes.fromhex(r["IKM"]), salt=bytes.fromhex(r["salt"]), info=bytes.fromhex(r["info"]), length=int(r["L"]))
        assert derived.hex() == r["OKM"]
        count += 1
    assert count == 3


def test_ecdsa_p256_fips186() -> None:
    """asymmetric/ECDSA/FIPS_186-3/SigGen.txt (NIST CAVP), section P-256,SHA-256."""
    count = 0
    for r in records("asymmetric/ECDSA/FIPS_186-3/SigGen.txt"):
        if "P-256,SHA-256" not in r or "d" not in r:
            continue
        key = key_of("ECDSA-P-256", ec.derive_private_key(int(r["d"], 16), ec.SECP256R1()))
        signature = encode_dss_signature(int(r["R"], 16), int(r["S"], 16))
        Signature(key, signature).run(bytes.fromhex(r["Msg"]))
        with pytest.raises(SignatureInvalid):
            Signature(key, signature).run(bytes.fromhex(r["Msg"]) + b"!")
        count += 1
    assert count == 15


def test_ed25519_rfc8032() -> None:
    """asymmetric/Ed25519/sign.input (the vectors that RFC 8032, 7.1 takes its own from): signatures are deterministic."""
    with cryptography_vectors.open_vector_file("asymmetric/Ed25519/sign.input", "r") as file:
        lines = file.read().splitlines()
    assert len(lines) == 1024
    for line in lines[::8]:
        secret, public, message, both = line.split(":")[:4]
        private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)[:32])
        material = private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        key = Key(new_key_id(), 1, algorithm("Ed25519"), bytearray(material))
        assert private.public_key().public_bytes_raw().hex() == public
        assert Signature(key).run(bytes.fromhex(message)).hex() == both[:128]
        assert Signature(key, bytes.fromhex(both[:128])).run(bytes.fromhex(message)) == b""


def emsa_pss_salt(key: rsa.RSAPrivateKey, signature: bytes, message: bytes) -> bytes:
    """The salt of a PSS signature with SHA-256, everything else checked: RFC 8017, sections 8.1.2 and 9.1.2, by hand."""
    numbers = key.public_key().public_numbers()
    encoded = pow(int.from_bytes(signature, "big"), numbers.e, numbers.n).to_bytes(384, "big")
    masked, digest, trailer = encoded[:351], encoded[351:383], encoded[383]
    assert trailer == 0xBC
    mask = b"".join(hashlib.sha256(digest + i.to_bytes(4, "big")).digest() for i in range(11))[:351]
    block = bytes(a ^ b for a, b in zip(masked, mask, strict=True))
    block = bytes([block[0] & 0x7F]) + block[1:]
    salt = block.lstrip(b"\0")[1:]
    assert block.lstrip(b"\0")[0] == 1
    assert hashlib.sha256(bytes(8) + hashlib.sha256(message).digest() + salt).digest() == digest
    return salt


def test_rsa_3072_pss_rfc8017() -> None:
    """asymmetric/RSA/FIPS_186-2/SigVerPSS_186-3.rsp (NIST CAVP), 3072 bits, SHA-256.

    Its salts have 10 bytes, which FIPS 186-5 allows and our profile (salt = digest) does not: the file checks the formula,
    the formula checks our signatures, and our verification refuses the file's short salts.
    """
    count = p = q = 0
    for r in records("asymmetric/RSA/FIPS_186-2/SigVerPSS_186-3.rsp"):
        if r.get("mod") != "3072":
            continue
        if "p" in r:
            p = int(r["p"], 16)
        if "q" in r:
            q = int(r["q"], 16)
        if r.get("SHAAlg") != "SHA256" or not r["Result"].startswith("P"):
            continue
        e, d = int(r["e"], 16), int(r["d"], 16)
        public = rsa.RSAPublicNumbers(e, p * q)
        key = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public).private_key(
            unsafe_skip_rsa_key_validation=True
        )
        message, signature = bytes.fromhex(r["Msg"]), bytes.fromhex(r["S"])
        assert emsa_pss_salt(key, signature, message).hex() == r["SaltVal"]
        with pytest.raises(SignatureInvalid):
            Signature(key_of("RSA-3072-PSS", key), signature).run(message)
        ours = Signature(key_of("RSA-3072-PSS", key)).run(message)
        assert len(emsa_pss_salt(key, ours, message)) == 32
        Signature(key_of("RSA-3072-PSS", key), ours).run(message)
        count += 1
    assert count >= 1


def test_our_ciphertext_format_by_hand() -> None:
    """The format of ``contract.ciphertext``, put together from its docstring with other means than the card's."""
    dek, salt, context = bytes(range(32)), b"s" * 32, b"invoice 7"
    key_id = "00112233445566778899aabbccddeeff"
    header = b"CFC1" + b"\0\1" + bytes.fromhex(key_id) + (5).to_bytes(4, "big") + (65536).to_bytes(4, "big") + salt
    assert len(header) == HEADER_BYTES
    prk = hmac.digest(salt, dek, "sha256")
    message_key = hmac.digest(prk, b"cipherfleet message v1" + header + hashlib.sha256(context).digest() + b"\1", "sha256")
    plaintext = bytes(i % 251 for i in range(65536 + 100))
    chunks = []
    for index, last in ((0, 0), (1, 1)):
        nonce = bytes(7) + index.to_bytes(4, "big") + bytes([last])
        context_ = Cipher(algorithms.AES(message_key), modes.GCM(nonce)).encryptor()
        chunks.append(context_.update(plaintext[index * 65536 : (index + 1) * 65536]) + context_.finalize() + context_.tag)
    key = Key(KeyId(key_id), 5, algorithm("AES-256-GCM"), bytearray(dek))
    assert Decryptor(key, header, context).run(b"".join(chunks)) == plaintext
