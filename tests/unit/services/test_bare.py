"""Bare keys: what comes out is what the standard says, checked outside our code, and what goes in is refused by name when it is not."""

import os

import pytest
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives import padding as block_padding
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESGCMSIV
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cipherfleet import Client
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    CiphertextForeignKey,
    CiphertextInvalid,
    CiphertextTruncated,
    KeyUnknown,
    Malformed,
    TagTooShort,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.vcc import CHUNK_BYTES, MAX_DATA_BYTES
from tests.unit.services.stage import Stage
from tests.unit.services.test_ciphers import in_pieces, joined

STREAMED = [0, 1, 15, 16, 17, CHUNK_BYTES, 8 * CHUNK_BYTES - 16, 8 * CHUNK_BYTES, 8 * CHUNK_BYTES + 1, 7_000_003]


@pytest.mark.parametrize("size", STREAMED)
@pytest.mark.parametrize("name", ["AES-256-CBC", "AES-128-CTR"])
async def test_block_modes_of_any_length(client: Client, stage: Stage, name: str, size: int) -> None:
    secret = os.urandom(32 if name == "AES-256-CBC" else 16)
    key = await client.import_key(name, secret)
    assert key.bare
    plaintext = os.urandom(size)
    ciphertext = await joined(client.encrypt_stream(key.id, in_pieces(plaintext)))
    iv, rest = ciphertext[:16], ciphertext[16:]
    mode = modes.CBC(iv) if name.endswith("CBC") else modes.CTR(iv)
    decryptor = Cipher(algorithms.AES(secret), mode).decryptor()
    opened = decryptor.update(rest) + decryptor.finalize()
    if name.endswith("CBC"):
        unpadder = block_padding.PKCS7(128).unpadder()
        opened = unpadder.update(opened) + unpadder.finalize()
    assert opened == plaintext
    assert await joined(client.decrypt_stream(in_pieces(ciphertext, 65_000), key=key.id)) == plaintext
    assert await client.encrypt(key.id, plaintext) != ciphertext
    assert not stage.host.card.open_streams


async def test_bare_aead_is_nonce_ciphertext_tag(client: Client) -> None:
    secret = os.urandom(32)
    for name, kind in (("AES-256-GCM", AESGCM), ("AES-256-GCM-SIV", AESGCMSIV)):
        key = await client.import_key(name, secret, bare=True)
        sealed = await client.encrypt(key.id, b"plaintext", context=b"who")
        assert kind(secret).decrypt(sealed[:12], sealed[12:], b"who") == b"plaintext"
        nonce = os.urandom(12)
        theirs = nonce + kind(secret).encrypt(nonce, b"from outside", b"who")
        assert await client.decrypt(theirs, key=key.id, context=b"who") == b"from outside"
        for wrong, context in ((theirs[:-1], b"who"), (theirs[:-8], b"who"), (theirs, b"whom"), (theirs[:-1] + b"\0", b"who")):
            with pytest.raises(CiphertextInvalid):
                await client.decrypt(wrong, key=key.id, context=context)
        with pytest.raises(TagTooShort):
            await client.decrypt(theirs[:20], key=key.id, context=b"who")
        with pytest.raises(TooLarge):
            await client.encrypt(key.id, bytes(MAX_DATA_BYTES + 1))


async def test_a_message_key_and_a_bare_one_do_not_mix(client: Client) -> None:
    message, bare = await client.create_key(), await client.create_key(bare=True)
    ciphertext = await client.encrypt(message.id, b"x")
    assert ciphertext[:4] == b"CFC1"
    assert await client.decrypt(ciphertext, key=message.id) == b"x"
    with pytest.raises(CiphertextInvalid):
        await client.decrypt(ciphertext, key=bare.id)
    with pytest.raises(CiphertextForeignKey):
        await client.decrypt(ciphertext, key=(await client.create_key()).id)
    with pytest.raises(WrongKeyType):
        await client.reencrypt(bare.id, ciphertext)
    with pytest.raises(WrongKeyType):
        await client.generate_data_key(bare.id)
    for name in ("HMAC-SHA-256", "Ed25519"):
        with pytest.raises(WrongKeyType):
            await client.create_key(name, bare=True)


async def test_a_version_is_named_since_the_ciphertext_names_none(client: Client) -> None:
    key = await client.create_key(bare=True)
    old = await client.encrypt(key.id, b"from before")
    await client.rotate_key(key.id)
    assert (await client.describe_key(key.id)).bare
    with pytest.raises(CiphertextInvalid):
        await client.decrypt(old, key=key.id)
    assert await client.decrypt(old, key=key.id, version=1) == b"from before"
    with pytest.raises(KeyUnknown):
        await client.decrypt(old, key=key.id, version=7)


async def test_cut_ciphertexts_of_block_modes(client: Client) -> None:
    key = await client.create_key("AES-128-CBC")
    ciphertext = await client.encrypt(key.id, bytes(100))
    for cut in (b"", ciphertext[:8], ciphertext[:16], ciphertext[:-1]):
        with pytest.raises(CiphertextTruncated):
            await client.decrypt(cut, key=key.id)
    with pytest.raises(Malformed):
        await client.encrypt(key.id, b"x", context=b"authenticates nothing")
    long = await client.encrypt(key.id, bytes(9 * CHUNK_BYTES))
    with pytest.raises(CiphertextTruncated):
        await joined(client.decrypt_stream(in_pieces(long[:-1]), key=key.id))


async def test_xts(client: Client) -> None:
    secret = os.urandom(64)
    key = await client.import_key("AES-256-XTS", secret)
    sector = (77).to_bytes(16, "little")
    ciphertext = await client.encrypt(key.id, bytes(512), context=sector)
    encryptor = Cipher(algorithms.AES(secret), modes.XTS(sector)).encryptor()
    assert ciphertext == encryptor.update(bytes(512)) + encryptor.finalize()
    assert await client.decrypt(ciphertext, key=key.id, context=sector) == bytes(512)
    for data, tweak in ((b"short", sector), (bytes(16), b"77")):
        with pytest.raises(Malformed):
            await client.encrypt(key.id, data, context=tweak)


async def test_key_wrap(client: Client) -> None:
    secret = os.urandom(32)
    kw, kwp = await client.import_key("AES-256-KW", secret), await client.import_key("AES-256-KWP", secret)
    assert await client.encrypt(kw.id, bytes(32)) == keywrap.aes_key_wrap(secret, bytes(32))
    assert await client.encrypt(kwp.id, bytes(7)) == keywrap.aes_key_wrap_with_padding(secret, bytes(7))
    assert await client.decrypt(keywrap.aes_key_wrap(secret, b"k" * 24), key=kw.id) == b"k" * 24
    for wrong in (b"", bytes(24), keywrap.aes_key_wrap(secret, bytes(32))[:-1]):
        with pytest.raises(CiphertextInvalid):
            await client.decrypt(wrong, key=kw.id)
    with pytest.raises(Malformed):
        await client.encrypt(kw.id, bytes(17))


async def test_rsa_oaep(client: Client) -> None:
    key = await client.create_key("RSA-2048-OAEP")
    public = load_der_public_key(key.public_key)
    assert isinstance(public, rsa.RSAPublicKey)
    for name, digest in (("", hashes.SHA256()), ("SHA-512", hashes.SHA512())):
        scheme = padding.OAEP(padding.MGF1(digest), digest, b"label")
        assert await client.decrypt(public.encrypt(b"hello", scheme), key=key.id, context=b"label", digest=name) == b"hello"
    ciphertext = await client.encrypt(key.id, b"back")
    assert await client.decrypt(ciphertext, key=key.id) == b"back"
    for context, digest_ in ((b"label", ""), (b"", "SHA-384")):
        with pytest.raises(CiphertextInvalid):
            await client.decrypt(ciphertext, key=key.id, context=context, digest=digest_)
    with pytest.raises(TooLarge):
        await client.encrypt(key.id, bytes(191))
    with pytest.raises(Malformed):
        await client.encrypt(key.id, b"", digest="SM3")
    with pytest.raises(AlgorithmUnknown):
        await client.encrypt(key.id, b"", digest="MD5")
