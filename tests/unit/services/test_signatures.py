"""Sign, verify, MAC, digest, random: right answers, checked outside our code where that is possible."""

import hashlib
import hmac
import os

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cipherfleet import Client
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    KeyDisabled,
    KeyUnknown,
    MacInvalid,
    Malformed,
    SignatureInvalid,
    TagTooShort,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.vcc import CHUNK_BYTES
from tests.unit.services.stage import Stage

SIZES = [0, 1, CHUNK_BYTES, 8 * CHUNK_BYTES, 8 * CHUNK_BYTES + 1, 33 * CHUNK_BYTES + 7]
SIGNERS = ["ECDSA-P-256", "Ed25519", "RSA-3072-PSS"]


def check(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Outside our code: pyca/cryptography."""
    key = load_der_public_key(public_key)
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, rsa.RSAPublicKey):
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
        key.verify(signature, message, pss, hashes.SHA256())
    else:
        assert isinstance(key, ed25519.Ed25519PublicKey)
        key.verify(signature, message)


@pytest.mark.parametrize("algorithm", SIGNERS)
async def test_signatures_are_good_and_bad_ones_refused(client: Client, stage: Stage, algorithm: str) -> None:
    key = await client.create_key(algorithm)
    for size in SIZES if algorithm != "Ed25519" else SIZES[:-1]:
        message = os.urandom(size)
        made = await client.sign_with_version(key.id, message)
        assert (made.key, made.version, made.algorithm) == (key.id, 1, algorithm)
        check(key.public_key, made.signature, message)
        await client.verify(key.id, message, made.signature)
        await client.verify(key.id, message, made.signature, version=1)
        for changed, signature in ((message + b"!", made.signature), (message, made.signature[:-1] + b"\0\0"), (message, b"x")):
            with pytest.raises(SignatureInvalid):
                await client.verify(key.id, changed, signature)
    assert not stage.host.card.open_streams


async def test_ed25519_has_a_longest_message(client: Client) -> None:
    key = await client.create_key("Ed25519")
    with pytest.raises(TooLarge):
        await client.sign(key.id, bytes(3_000_000))


@pytest.mark.parametrize("size", [10, 20 * CHUNK_BYTES])
async def test_a_signature_of_an_older_version_is_good(client: Client, size: int) -> None:
    key = await client.create_key("ECDSA-P-256")
    message = os.urandom(size)
    old = await client.sign(key.id, message)
    await client.rotate_key(key.id)
    new = await client.sign_with_version(key.id, message)
    assert new.version == 2
    await client.verify(key.id, message, old)
    await client.verify(key.id, message, old, version=1)
    await client.verify(key.id, message, new.signature, version=2)
    with pytest.raises(SignatureInvalid):
        await client.verify(key.id, message, old, version=2)
    with pytest.raises(KeyUnknown):
        await client.verify(key.id, message, old, version=3)
    with pytest.raises(Malformed):
        await client.verify(key.id, message, old, version=0)


@pytest.mark.parametrize("size", SIZES)
async def test_macs(client: Client, size: int) -> None:
    key = await client.create_key("HMAC-SHA-256")
    message = os.urandom(size)
    code = await client.mac(key.id, message)
    assert len(code) == 32
    await client.verify_mac(key.id, message, code)
    for changed, value in ((message + b"!", code), (message, bytes(32))):
        with pytest.raises(MacInvalid):
            await client.verify_mac(key.id, changed, value)
    with pytest.raises(TagTooShort):
        await client.verify_mac(key.id, message, code[:-1])


@pytest.mark.parametrize("size", SIZES)
async def test_digests(client: Client, size: int) -> None:
    message = os.urandom(size)
    for name in ("SHA-256", "SHA-384", "SHA-512"):
        assert await client.digest(name, message) == hashlib.new(name.replace("-", ""), message).digest()
    assert await client.digest("sha-256", [message[:100], b"", message[100:]]) == hashlib.sha256(message).digest()


async def test_sm3_matches_the_standard(client: Client) -> None:
    """GB/T 32905-2016, example 1."""
    expected = "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"
    assert (await client.digest("SM3", b"abc")).hex() == expected


async def test_digests_that_are_none(client: Client) -> None:
    for name, error in (("MD5", AlgorithmUnknown), ("AES-256-GCM", WrongKeyType), ("a/b", AlgorithmUnknown), ("ä", AlgorithmUnknown)):
        with pytest.raises(error):
            await client.digest(name, b"")


async def test_a_key_does_what_it_is_for(client: Client) -> None:
    aead, mac, signer = [(await client.create_key(a)).id for a in ("AES-256-GCM", "HMAC-SHA-256", "Ed25519")]
    for attempt in (
        client.sign(aead, b""),
        client.sign(mac, b""),
        client.mac(signer, b""),
        client.mac(aead, b""),
        client.verify(mac, b"", b"s"),
        client.verify_mac(signer, b"", b"s"),
    ):
        with pytest.raises(WrongKeyType):
            await attempt


async def test_a_disabled_key_neither_signs_nor_verifies(client: Client) -> None:
    key = await client.create_key("Ed25519")
    signature = await client.sign(key.id, b"data")
    await client.disable_key(key.id)
    with pytest.raises(KeyDisabled):
        await client.sign(key.id, b"data")
    with pytest.raises(KeyDisabled):
        await client.verify(key.id, b"data", signature)


async def test_a_signature_has_to_be_given_and_bounded(client: Client) -> None:
    key = await client.create_key("Ed25519")
    with pytest.raises(Malformed):
        await client.verify(key.id, b"data", b"")
    with pytest.raises(TooLarge):
        await client.verify(key.id, b"data", bytes(5121))


async def test_random_bytes(client: Client) -> None:
    assert len(await client.random(1)) == 1
    first, second = await client.random(1024 * 1024), await client.random(1024 * 1024)
    assert len(first) == len(second) == 1024 * 1024
    assert not hmac.compare_digest(first, second)
    for length in (0, -1, 1024 * 1024 + 1, 10**12):
        with pytest.raises(Malformed):
            await client.random(length)
