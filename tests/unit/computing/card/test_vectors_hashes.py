"""MACs, digests and derivation against published vectors, by handle. File names are of the package ``cryptography_vectors``."""

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cipherfleet.contract.vcc import StreamRequest, Verb
from tests.unit.computing.card.consumer import Function
from tests.unit.computing.card.published import octets, records, shows


@pytest.fixture(scope="module")
def function() -> Function:
    return Function()


def mac(function: Function, name: str, key: bytes, message: bytes) -> str:
    """The MAC, also found good by the card."""
    handle = function.load(name, key)
    made = function.run(StreamRequest(Verb.MAC), message, handle=handle)
    function.run(StreamRequest(Verb.VERIFY_MAC, signature=made), message, handle=handle)
    return made.hex()


@shows("HMAC-SHA-224", "HMAC-SHA-256", "HMAC-SHA-384", "HMAC-SHA-512")
@pytest.mark.parametrize("bits", [224, 256, 384, 512])
def test_hmac_rfc4231(function: Function, bits: int) -> None:
    """HMAC/rfc-4231-sha*.txt, but for the case whose key is shorter than the 112 bits of SP 800-131A."""
    count = 0
    for r in records(f"HMAC/rfc-4231-sha{bits}.txt"):
        key, message = octets(r, "Key", "Msg")
        if len(key) < 14:
            continue
        assert mac(function, f"HMAC-SHA-{bits}", key, message) == r["MD"].lower()
        count += 1
    assert count >= 5


SAMPLE = b"Sample message for keylen<blocklen"


@shows("HMAC-SHA3-256", "HMAC-SHA3-384", "HMAC-SHA3-512")
@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (256, "4fe8e202c4f058e8dddc23d8c34e467343e23555e24fc2f025d598f558f67205"),
        (384, "d588a3c51f3f2d906e8298c1199aa8ff6296218127f6b38a90b6afe2c5617725bc99987f79b22a557b6520db710b7f42"),
        (
            512,
            "4efd629d6c71bf86162658f29943b1c308ce27cdfa6db0d9c3ce81763f9cbce5f7ebe9868031db1a8f8eb7b6b95e5c5e3f657a8996c86a2f6527e307f0213196",
        ),
    ],
)
def test_hmac_sha3_nist_examples(function: Function, bits: int, expected: str) -> None:
    """NIST, Examples with Intermediate Values: HMAC_SHA3-*.pdf, sample 1 (a key as long as the digest: 00 01 02 ...)."""
    assert mac(function, f"HMAC-SHA3-{bits}", bytes(range(bits // 8)), SAMPLE) == expected


@shows("HMAC-SM3")
def test_hmac_sm3_gmt_0042(function: Function) -> None:
    """GM/T 0042-2015, appendix A: key 01 02 ... 20, message "abcdbcdecdef..." twice."""
    message = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq" * 2
    expected = "ca05e144ed05d1857840d1f318a4a8669e559fc8391f414485bfdf7bb408963a"
    assert mac(function, "HMAC-SM3", bytes(range(1, 33)), message) == expected


@shows("AES-128-CMAC", "AES-192-CMAC", "AES-256-CMAC")
@pytest.mark.parametrize("bits", [128, 192, 256])
def test_cmac_sp800_38b(function: Function, bits: int) -> None:
    """CMAC/nist-800-38b-aes*.txt."""
    count = 0
    for r in records(f"CMAC/nist-800-38b-aes{bits}.txt"):
        key, message = octets(r, "KEY", "MESSAGE")
        assert mac(function, f"AES-{bits}-CMAC", key, message) == r["OUTPUT"]
        count += 1
    assert count >= 4


@shows("SM4-CMAC")
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 40])
def test_sm4_cmac_by_its_construction(function: Function, size: int) -> None:
    """SP 800-38B, sections 6.1 and 6.2, over the block cipher of GB/T 32907, whose own example is checked elsewhere."""
    key, message = bytes.fromhex("0123456789abcdeffedcba9876543210"), bytes(range(size))

    def block(value: int) -> int:
        encryptor = Cipher(algorithms.SM4(key), modes.ECB()).encryptor()  # noqa: S305
        return int.from_bytes(encryptor.update(value.to_bytes(16, "big")), "big")

    def doubled(value: int) -> int:
        return (value << 1 & (1 << 128) - 1) ^ (0x87 if value >> 127 else 0)

    first = doubled(block(0))
    whole = size > 0 and size % 16 == 0
    padded = message if whole else message + b"\x80" + bytes(-(size + 1) % 16)
    blocks = [int.from_bytes(padded[i : i + 16], "big") for i in range(0, len(padded), 16)]
    blocks[-1] ^= first if whole else doubled(first)
    state = 0
    for value in blocks:
        state = block(state ^ value)
    assert mac(function, "SM4-CMAC", key, message) == state.to_bytes(16, "big").hex()


def digest(function: Function, name: str, message: bytes, length: int = 0) -> str:
    """In one piece; a stream must give the same."""
    request = StreamRequest(Verb.DIGEST, digest=name, length=length)
    return function.run(request, message).hex()


@shows("SHA-224", "SHA-256", "SHA-384", "SHA-512", "SHA-512/256")
@pytest.mark.parametrize(
    ("name", "file"),
    [("SHA-224", "SHA224"), ("SHA-256", "SHA256"), ("SHA-384", "SHA384"), ("SHA-512", "SHA512"), ("SHA-512/256", "SHA512_256")],
)
def test_sha2_fips180(function: Function, name: str, file: str) -> None:
    """hashes/SHA2/*ShortMsg.rsp and *LongMsg.rsp (NIST CAVP)."""
    check_digests(function, name, *(f"hashes/SHA2/{file}{kind}Msg.rsp" for kind in ("Short", "Long")), least=100)


@shows("SHA3-224", "SHA3-256", "SHA3-384", "SHA3-512")
@pytest.mark.parametrize("bits", [224, 256, 384, 512])
def test_sha3_fips202(function: Function, bits: int) -> None:
    """hashes/SHA3/*ShortMsg.rsp and *LongMsg.rsp (NIST CAVP)."""
    check_digests(function, f"SHA3-{bits}", *(f"hashes/SHA3/SHA3_{bits}{kind}Msg.rsp" for kind in ("Short", "Long")), least=100)


@shows("SM3")
def test_sm3_gbt32905(function: Function) -> None:
    """hashes/SM3/oscca.txt (GB/T 32905, appendix A, and OSCCA's)."""
    check_digests(function, "SM3", "hashes/SM3/oscca.txt", least=4)


@shows("BLAKE2b", "BLAKE2s")
@pytest.mark.parametrize("kind", ["b", "s"])
def test_blake2_rfc7693(function: Function, kind: str) -> None:
    """hashes/blake2/blake2*.txt."""
    check_digests(function, f"BLAKE2{kind}", f"hashes/blake2/blake2{kind}.txt", least=5)


def check_digests(function: Function, name: str, *files: str, least: int) -> None:
    count = 0
    for file in files:
        for r in records(file):
            if "Msg" in r:
                assert digest(function, name, bytes.fromhex(r["Msg"])[: int(r["Len"]) // 8]) == r["MD"]
                count += 1
    assert count >= least


@shows("SHAKE128", "SHAKE256")
@pytest.mark.parametrize("bits", [128, 256])
def test_shake_fips202(function: Function, bits: int) -> None:
    """hashes/SHAKE/SHAKE*VariableOut.rsp (NIST CAVP): outputs of every length."""
    count = 0
    for r in records(f"hashes/SHAKE/SHAKE{bits}VariableOut.rsp"):
        if "Output" in r:
            assert digest(function, f"SHAKE{bits}", bytes.fromhex(r["Msg"]), int(r["Outputlen"]) // 8) == r["Output"]
            count += 1
    assert count >= 500


def derived(function: Function, name: str, key: bytes, salt: bytes, info: bytes, length: int) -> str:
    handle = function.load(name, key)
    return function.run(StreamRequest(Verb.DERIVE, info, length=length, salt=salt), handle=handle).hex()


@shows("HKDF-SHA-256")
def test_hkdf_rfc5869(function: Function) -> None:
    """KDF/rfc-5869-HKDF-SHA256.txt, and the long one of KDF/hkdf-generated.txt."""
    count = 0
    r: dict[str, str] = {}
    for part in [*records("KDF/rfc-5869-HKDF-SHA256.txt"), *records("KDF/hkdf-generated.txt")]:
        r |= part
        if "OKM" not in part:
            continue
        key, salt, info = octets(r, "IKM", "salt", "info")
        assert derived(function, "HKDF-SHA-256", key, salt, info, int(r["L"])) == r["OKM"]
        count += 1
    assert count == 4


@shows("HKDF-SHA-384", "HKDF-SHA-512", "HKDF-SM3")
@pytest.mark.parametrize(("name", "digest_name"), [("SHA-384", "sha384"), ("SHA-512", "sha512"), ("SM3", "sm3")])
def test_hkdf_by_its_formula(function: Function, name: str, digest_name: str) -> None:
    """RFC 5869, sections 2.2 and 2.3, with the standard library's HMAC: the RFC has no vectors for these digests."""
    key, salt, info, length = bytes(range(32)), b"salt", b"info", 150

    def hmac_(secret: bytes, message: bytes) -> bytes:
        if digest_name == "sm3" and "sm3" not in hashlib.algorithms_available:
            return bytes.fromhex(mac(function, "HMAC-SM3", secret.ljust(64, b"\0"), message))
        return hmac.new(secret, message, digest_name).digest()

    extracted, okm, block = hmac_(salt, key), b"", b""
    for number in range(1, 256):
        block = hmac_(extracted, block + info + bytes([number]))
        okm += block
        if len(okm) >= length:
            break
    assert derived(function, f"HKDF-{name}", key, salt, info, length) == okm[:length].hex()
