"""SM2: published vectors, the openssl program both ways, bad input of every kind, threads, memory."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cipherfleet.computing import engine_sm2, engine_sm2_libcrypto
from cipherfleet.computing.engine_memory import wipe
from cipherfleet.computing.engine_sm2 import PrivateKey, PublicKey
from cipherfleet.contract.errors import (
    CiphertextInvalid,
    KeyMaterialInvalid,
    Malformed,
    PublicKeyInvalid,
    SignatureInvalid,
    TooLarge,
    Unsupported,
)
from tests.unit.computing.card.published import shows

# GB/T 32918.5-2017, annex A: the key, the signature of "message digest" and its steps; annex C: the encryption of "encryption standard".
SCALAR = bytes.fromhex("3945208f7b2144b13f36e38ac6d39f95889393692860b51a42fb81ef4df7c5b8")
POINT = bytes.fromhex(
    "09f9df311e5421a150dd7d161e4bc5c672179fad1833fc076bb08ff356f35020ccea490ce26775a52dc6ea718cc1aa600aed05fbf35e084a6632f6072da9ad13"
)
Z = bytes.fromhex("b2e14c5c79c6df5b85f4fe7ed8db7a262b9da7e07ccb0ea9f4747b8ccda8a4f3")
E = bytes.fromhex("f0b43e94ba45accaace692ed534382eb17e6ab5a19ce7b31f4486fdfc0d28640")
SIGNATURE = bytes.fromhex(
    "3046022100f5a03b0648d2c4630eeac513e1bb81a15944da3827d5b74143ac7eaceee720b3"
    "022100b1b6aa29df212fd8763182bc0d421ca1bb9038fd1f7f42d4840b69c485bbc1aa"
)
CIPHERTEXT = bytes.fromhex(
    "307c022004ebfc718e8d1798620432268e77feb6415e2ede0e073c0f4f640ecd2e149a73"
    "022100e858f9d81e5430a57b36daab8f950a3c64e6ee6a63094d99283aff767e124df0"
    "042059983c18f809e262923c53aec295d30383b54e39d609d160afcb1908d0bd8766041321886ca989ca9c7d58087307ca93092d651efa"
)
N = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFF7203DF6B21C6052B53BBF40939D54123

_PREFIX = bytes.fromhex("308187020100301306072a8648ce3d020106082a811ccf5501822d046d306b0201010420")


def encoded(scalar: bytes, point: bytes) -> bytes:
    return _PREFIX + scalar + bytes.fromhex("a14403420004") + point


def signed(key: PrivateKey, message: bytes, user_id: bytes = b"", *, prehashed: bool = False) -> bytes:
    scheme = key.scheme(user_id, prehashed=prehashed)
    scheme.update(message)
    return scheme.sign()


def verify(key: PublicKey, signature: bytes, message: bytes, user_id: bytes = b"", *, prehashed: bool = False) -> None:
    scheme = key.scheme(user_id, prehashed=prehashed)
    scheme.update(message)
    scheme.verify(signature)


@pytest.fixture(scope="module")
def key() -> PrivateKey:
    return PrivateKey(encoded(SCALAR, POINT))


def openssl(*arguments: str, given: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *arguments], input=given, capture_output=True, check=True).stdout


@shows("SM2")
def test_the_published_signature_holds_and_so_do_its_steps(key: PrivateKey) -> None:
    assert engine_sm2.identity_digest(key.public_bytes()) == Z
    running = hashes.Hash(hashes.SM3())
    running.update(Z + b"message digest")
    assert running.finalize() == E
    verify(key, SIGNATURE, b"message digest")
    verify(PublicKey(key.public_bytes()), SIGNATURE, E, prehashed=True)


@shows("SM2-ENCRYPT")
def test_the_published_ciphertext_opens(key: PrivateKey) -> None:
    assert key.decrypt(CIPHERTEXT) == b"encryption standard"


def test_a_fresh_key_signs_and_decrypts() -> None:
    material = engine_sm2.generate()
    assert len(material) == engine_sm2.PRIVATE_KEY_BYTES
    assert engine_sm2.check(bytes(material)) == material != engine_sm2.generate()
    key = PrivateKey(material)
    for size in (1, 16, engine_sm2.MAX_PLAINTEXT_BYTES):
        assert key.decrypt(PublicKey(key.public_bytes()).encrypt(b"\x5a" * size)) == b"\x5a" * size
    scheme = key.scheme(b"ALICE")
    for part in (b"mess", b"", b"age"):
        scheme.update(part)
    verify(key, scheme.sign(), b"message", b"ALICE")


@pytest.fixture
def files(tmp_path: Path, key: PrivateKey) -> Iterator[tuple[str, str, Path]]:
    private, public = tmp_path / "key.der", tmp_path / "public.der"
    private.write_bytes(key.private_bytes())
    public.write_bytes(key.public_bytes())
    yield str(private), str(public), tmp_path


@pytest.mark.parametrize("user_id", ["1234567812345678", "bob@example.org"])
def test_openssl_and_we_take_each_others_signatures(key: PrivateKey, files: tuple[str, str, Path], user_id: str) -> None:
    private, public, room = files
    message, signature = room / "message", room / "signature"
    message.write_bytes(b"to be signed")
    options = ("-rawin", "-digest", "sm3", "-pkeyopt", f"distid:{user_id}", "-in", str(message))
    verify(key, openssl("pkeyutl", "-sign", "-keyform", "DER", "-inkey", private, *options), b"to be signed", user_id.encode())
    signature.write_bytes(signed(key, b"to be signed", user_id.encode()))
    given = ("-pubin", "-keyform", "DER", "-inkey", public, "-sigfile", str(signature))
    assert b"Verified Successfully" in openssl("pkeyutl", "-verify", *given, *options)


def test_openssl_and_we_take_each_others_ciphertexts_and_keys(key: PrivateKey, files: tuple[str, str, Path]) -> None:
    private, public, _ = files
    made = openssl("pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-inkey", public, given=b"data key")
    assert key.decrypt(made) == b"data key"
    assert openssl("pkeyutl", "-decrypt", "-keyform", "DER", "-inkey", private, given=key.encrypt(b"data key")) == b"data key"
    theirs = openssl("pkcs8", "-topk8", "-nocrypt", "-outform", "DER", given=openssl("genpkey", "-algorithm", "SM2"))
    assert engine_sm2.check(theirs) == theirs
    assert PrivateKey(theirs).public_bytes() == openssl("pkey", "-inform", "DER", "-pubout", "-outform", "DER", given=theirs)


def other_curve() -> bytes:
    form = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(*form)


GOOD = encoded(SCALAR, POINT)


@pytest.mark.parametrize(
    "material",
    [
        b"",
        b"\x30",
        GOOD[:-1],
        GOOD[:40],
        GOOD + b"\0",
        b"\0" * 138,
        b"\x30" * 100_000,
        pytest.param(other_curve(), id="another-curve"),
        encoded(bytes(32), POINT),
        encoded(N.to_bytes(32, "big"), POINT),
        encoded((N - 1).to_bytes(32, "big"), POINT),
        encoded(b"\xff" * 32, POINT),
        encoded(SCALAR, POINT[:-1] + b"\x14"),
        encoded(SCALAR, bytes(64)),
        encoded(SCALAR[:-1] + b"\xb9", POINT),
    ],
    ids=lambda material: f"{len(material)}-{material[36:40].hex()}-{material[-2:].hex()}",
)
def test_what_is_no_private_key_is_refused(material: bytes) -> None:
    with pytest.raises(KeyMaterialInvalid):
        engine_sm2.check(material)


def test_what_is_no_public_key_is_refused(key: PrivateKey) -> None:
    good = key.public_bytes()
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    p256 = other.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    for bad in (b"", good[:-1], good + b"\0", good[:-1] + b"\x14", good[:-64] + bytes(64), p256, GOOD):
        with pytest.raises(PublicKeyInvalid):
            PublicKey(bad)


def test_every_flipped_bit_of_a_signature_is_refused(key: PrivateKey) -> None:
    for bit in range(len(SIGNATURE) * 8):
        changed = bytearray(SIGNATURE)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SignatureInvalid):
            verify(key, bytes(changed), b"message digest")


@pytest.mark.parametrize(
    "signature", [b"", SIGNATURE[:-1], SIGNATURE + b"\0", b"\0" * 72, b"\xff" * 5000, bytes.fromhex("3006020100020100")]
)
def test_what_is_no_signature_is_refused(key: PrivateKey, signature: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        verify(key, signature, b"message digest")


def test_a_signature_is_of_one_message_one_id_and_one_key(key: PrivateKey) -> None:
    with pytest.raises(SignatureInvalid):
        verify(key, SIGNATURE, b"message digesT")
    with pytest.raises(SignatureInvalid):
        verify(key, SIGNATURE, b"message digest", b"ALICE")
    with pytest.raises(SignatureInvalid):
        verify(PrivateKey(engine_sm2.generate()), SIGNATURE, b"message digest")


def test_every_flipped_bit_of_a_ciphertext_is_refused(key: PrivateKey) -> None:
    for bit in range(len(CIPHERTEXT) * 8):
        changed = bytearray(CIPHERTEXT)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CiphertextInvalid):
            key.decrypt(changed)


@pytest.mark.parametrize("size", range(0, len(CIPHERTEXT), 9))
def test_a_cut_ciphertext_is_refused(key: PrivateKey, size: int) -> None:
    with pytest.raises(CiphertextInvalid):
        key.decrypt(CIPHERTEXT[:size])


def test_long_ciphertexts_and_what_follows_one_are_refused(key: PrivateKey) -> None:
    for bad in (CIPHERTEXT + b"\0", b"\x30" * 100_000, b"\x30\x84\xff\xff\xff\xff"):
        with pytest.raises(CiphertextInvalid):
            key.decrypt(bad)
    with pytest.raises(CiphertextInvalid):
        PrivateKey(engine_sm2.generate()).decrypt(CIPHERTEXT)


def test_messages_ids_and_digests_have_their_sizes(key: PrivateKey) -> None:
    with pytest.raises(Malformed):
        key.encrypt(b"")
    with pytest.raises(TooLarge):
        key.encrypt(bytes(engine_sm2.MAX_PLAINTEXT_BYTES + 1))
    longest = b"i" * engine_sm2.MAX_USER_ID_BYTES
    verify(key, signed(key, b"m", longest), b"m", longest)
    verify(key, signed(key, b"m", b""), b"m", engine_sm2.USUAL_ID)
    with pytest.raises(TooLarge):
        key.scheme(longest + b"i")
    with pytest.raises(Malformed):
        key.scheme(b"id", prehashed=True)
    for size in (0, 31, 33):
        with pytest.raises(Malformed):
            signed(key, bytes(size), prehashed=True)


def test_a_public_key_signs_nothing(key: PrivateKey) -> None:
    with pytest.raises(RuntimeError):
        PublicKey(key.public_bytes()).scheme().sign()


def test_many_threads_share_a_key(key: PrivateKey) -> None:
    def work(number: int) -> bool:
        message = number.to_bytes(4, "big")
        verify(key, signed(key, message), message)
        with pytest.raises(SignatureInvalid):
            verify(key, SIGNATURE, message)
        return key.decrypt(key.encrypt(message)) == message

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(200)))


def test_no_buffer_keeps_what_was_decrypted(key: PrivateKey, monkeypatch: pytest.MonkeyPatch) -> None:
    wiped: list[bytearray] = []

    def watch(secret: Any) -> None:
        assert b"encryption standard" in bytes(secret)
        wipe(secret)
        wiped.append(secret)

    monkeypatch.setattr(engine_sm2_libcrypto, "wipe", watch)
    key.decrypt(CIPHERTEXT)
    assert [bytes(buffer).strip(b"\0") for buffer in wiped] == [b""]


def test_a_system_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_sm2_libcrypto, "LIBRARY", "libcrypto.so.none")
    engine_sm2_libcrypto._opened.cache_clear()
    with pytest.raises(Unsupported, match=r"SM2 needs libcrypto\.so\.3"):
        engine_sm2.generate()
    monkeypatch.undo()
    assert engine_sm2.generate()


def test_no_plaintext_stands_open_in_its_ciphertext(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key stream of zeros, one in 256 for a single byte, is drawn again (GB/T 32918.4, 6.1, step A5)."""
    key, library = PrivateKey(engine_sm2.generate()), engine_sm2_libcrypto.libcrypto()
    encrypt, made = library.encrypt, [CIPHERTEXT[:-1] + b"x"]
    monkeypatch.setattr(type(library), "encrypt", lambda _self, handle, data: made.pop() if made else encrypt(handle, data))
    ciphertext = key.encrypt(b"x")
    assert not ciphertext.endswith(b"x")
    assert key.decrypt(ciphertext) == b"x"
