"""What the other vector tests stand on: formulas held against published vectors, our format by hand, and that no algorithm is left out."""

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, AESGCMSIV, ChaCha20Poly1305

from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_message import Decryptor
from cipherfleet.computing.engine_signature import Signature
from cipherfleet.contract.algorithms import REGISTRY, algorithm
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import SignatureInvalid
from cipherfleet.contract.ids import KeyId
from tests.unit.computing.card import test_sm2, test_vectors_ciphers, test_vectors_hashes, test_vectors_keys  # noqa: F401 - they tell SHOWN
from tests.unit.computing.card.consumer import key_of
from tests.unit.computing.card.published import SHOWN, records


def test_no_algorithm_is_without_vectors() -> None:
    assert set(REGISTRY) == SHOWN


def test_sm4_block_gbt_32907() -> None:
    """GB/T 32907-2016, annex A.1: the block cipher below SM4-GCM."""
    key = bytes.fromhex("0123456789abcdeffedcba9876543210")
    encrypted = Cipher(algorithms.SM4(key), modes.ECB()).encryptor().update(key)  # noqa: S305
    assert encrypted.hex() == "681edf34d206965e86b3e94f536e4246"


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


@pytest.mark.parametrize(
    ("name", "aead"),
    [
        *((f"AES-{bits}-GCM", AESGCM) for bits in (128, 192, 256)),
        *((f"AES-{bits}-CCM", AESCCM) for bits in (128, 192, 256)),
        *((f"AES-{bits}-GCM-SIV", AESGCMSIV) for bits in (128, 256)),
        ("ChaCha20-Poly1305", ChaCha20Poly1305),
    ],
)
def test_our_ciphertext_format_by_hand(name: str, aead: type[AESGCM | AESCCM | AESGCMSIV | ChaCha20Poly1305]) -> None:
    """The format of ``contract.ciphertext``, put together from its docstring with other means than the card's."""
    chosen = algorithm(name)
    dek, salt, context = bytes(range(chosen.key_bits // 8)), b"s" * 32, b"invoice 7"
    key_id = "00112233445566778899aabbccddeeff"
    header = b"CFC1" + chosen.number.to_bytes(2, "big") + bytes.fromhex(key_id) + (5).to_bytes(4, "big") + (65536).to_bytes(4, "big") + salt
    assert len(header) == HEADER_BYTES
    prk = hmac.digest(salt, dek, "sha256")
    message_key = hmac.digest(prk, b"cipherfleet message v1" + header + hashlib.sha256(context).digest() + b"\1", "sha256")
    plaintext = bytes(i % 251 for i in range(65536 + 100))
    mode, chunks = aead(message_key[: len(dek)]), []
    for index, last in ((0, 0), (1, 1)):
        nonce = bytes(7) + index.to_bytes(4, "big") + bytes([last])
        chunks.append(mode.encrypt(nonce, plaintext[index * 65536 : (index + 1) * 65536], None))
    key = Key(KeyId(key_id), 5, chosen, bytearray(dek))
    assert Decryptor(key, header, context).run(b"".join(chunks)) == plaintext
