"""Secrets for the caller's own use, and batches: right answers and refusals by name."""

import hashlib
import io
import os

import aiohttp
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cipherfleet import Client
from cipherfleet.contract.errors import (
    CiphertextInvalid,
    Malformed,
    NotPermitted,
    PublicKeyInvalid,
    SharedSecretZero,
    SignatureInvalid,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import MAX_BATCH, Verb
from cipherfleet.services.wire import BatchAskItem, BatchReplyItem
from tests.unit.services.stage import Stage

SPKI = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


async def test_both_sides_agree(client: Client) -> None:
    key = await client.create_key("ECDH-P-384")
    ours = ec.generate_private_key(ec.SECP384R1())
    theirs = load_der_public_key(key.public_key)
    assert isinstance(theirs, ec.EllipticCurvePublicKey)
    shared = ours.exchange(ec.ECDH(), theirs)
    peer = ours.public_key().public_bytes(*SPKI)
    assert await client.agree(key.id, peer) == shared
    derived = HKDF(hashes.SHA256(), 48, b"salt", b"channel 1").derive(shared)
    assert await client.agree(key.id, peer, length=48, salt=b"salt", context=b"channel 1") == derived
    with pytest.raises(Malformed):
        await client.agree(key.id, peer, context=b"without a length")
    with pytest.raises(WrongKeyType):
        await client.agree((await client.create_key("ECDSA-P-384")).id, peer)


async def test_bad_public_keys(client: Client) -> None:
    p256, curve25519 = await client.create_key("ECDH-P-256"), await client.create_key("X25519")
    good = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*SPKI)
    off_the_curve = good[:-1] + bytes([good[-1] ^ 1])
    other_curve = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*SPKI)
    for peer in (b"", b"junk", good[:-1], off_the_curve, other_curve):
        with pytest.raises(PublicKeyInvalid):
            await client.agree(p256.id, peer)
    for low_order in (bytes(32), (1).to_bytes(32, "little")):
        peer = x25519.X25519PublicKey.from_public_bytes(low_order).public_bytes(*SPKI)
        with pytest.raises(SharedSecretZero):
            await client.agree(curve25519.id, peer)


async def test_derivation_is_hkdf(client: Client) -> None:
    secret = os.urandom(32)
    key = await client.import_key("HKDF-SHA-384", secret)
    expected = HKDF(hashes.SHA384(), 64, b"salt", b"purpose").derive(secret)
    assert await client.derive(key.id, 64, salt=b"salt", context=b"purpose") == expected
    await client.rotate_key(key.id)
    assert await client.derive(key.id, 64, salt=b"salt", context=b"purpose") != expected
    assert await client.derive(key.id, 64, salt=b"salt", context=b"purpose", version=1) == expected
    for length, error in ((0, Malformed), (-1, Malformed), (4097, TooLarge)):
        with pytest.raises(error):
            await client.derive(key.id, length)
    with pytest.raises(TooLarge):
        await client.derive(key.id, 32, salt=bytes(1025))


async def test_encapsulation(client: Client) -> None:
    key = await client.create_key("ML-KEM-768")
    made = await client.encapsulate(key.id)
    assert len(made.secret) == 32
    assert await client.decapsulate(key.id, made.ciphertext) == made.secret
    public = load_der_public_key(key.public_key)
    assert isinstance(public, mlkem.MLKEM768PublicKey)
    secret, ciphertext = public.encapsulate()
    assert await client.decapsulate(key.id, ciphertext) == secret
    changed = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
    assert await client.decapsulate(key.id, changed) != secret  # FIPS 203: implicit rejection
    with pytest.raises(CiphertextInvalid):
        await client.decapsulate(key.id, ciphertext[:-1])


async def test_a_batch_does_each_and_an_error_is_one_items_own(client: Client, stage: Stage) -> None:
    key, signer, bare = await client.create_key(), await client.create_key("Ed25519"), await client.create_key("AES-128-CTR")
    old = await client.encrypt(key.id, b"from before", context=b"c")
    signature = await client.sign(signer.id, b"m")
    await client.disable_key((off := await client.create_key()).id)
    answers = await client.batch(
        [
            BatchAskItem(Verb.ENCRYPT, key.id, data=b"one"),
            BatchAskItem(Verb.DECRYPT, data=old, context=b"c"),
            BatchAskItem(Verb.DECRYPT, data=old, context=b"other"),
            BatchAskItem(Verb.ENCRYPT, off.id, data=b"x"),
            BatchAskItem(Verb.VERIFY, signer.id, data=b"m", signature=signature),
            BatchAskItem(Verb.VERIFY, signer.id, data=b"n", signature=signature),
            BatchAskItem(Verb.DIGEST, digest="SHA-256", data=b"d"),
            BatchAskItem(Verb.SIGN, key.id, data=b"m"),
            BatchAskItem(Verb.ENCRYPT, bare.id, data=b"stream"),
            BatchAskItem(Verb.REENCRYPT, key.id, data=old, context=b"c", target_context=b"t"),
            BatchAskItem(Verb.MAC, "no id", data=b"m"),
            BatchAskItem(Verb.MAC, data=b"m"),
        ]
    )
    assert await client.decrypt(answers[0].result) == b"one"
    assert answers[1].result == b"from before"
    codes = [answer.error.code if answer.error else "" for answer in answers]
    refused = {2: "ciphertext-invalid", 3: "key-disabled", 5: "signature-invalid", 7: "wrong-key-type", 10: "malformed", 11: "malformed"}
    assert {number: code for number, code in enumerate(codes) if code} == refused
    assert answers[6].result == hashlib.sha256(b"d").digest()
    assert (answers[4].key, answers[4].version) == (signer.id, 1)
    assert await client.decrypt(answers[8].result, key=bare.id) == b"stream"
    assert await client.decrypt(answers[9].result, context=b"t") == b"from before"


async def test_a_batch_has_bounds_and_rights(client: Client, stage: Stage, raw: aiohttp.ClientSession) -> None:
    key = await client.create_key("HMAC-SHA-256")
    full = await client.batch(BatchAskItem(Verb.MAC, key.id, data=b"%d" % n) for n in range(MAX_BATCH))
    assert len({answer.result for answer in full}) == MAX_BATCH
    for count in (0, MAX_BATCH + 1):
        with pytest.raises(Malformed):
            await client.batch(BatchAskItem(Verb.MAC, key.id) for _ in range(count))
    large = await client.batch(BatchAskItem(Verb.MAC, key.id, data=bytes(2_000_000)) for _ in range(3))
    assert not any(answer.error for answer in large)
    stage.host.rights["shop"] = (Right.DIGEST,)
    answers = await client.batch([BatchAskItem(Verb.MAC, key.id), BatchAskItem(Verb.DIGEST, digest="SM3")])
    assert answers[0].error is not None
    assert answers[0].error.code == NotPermitted.code
    assert answers[1] == BatchReplyItem(answers[1].result)
    assert len(answers[1].result) == 32
    for body in (b"", b"{", b'{"items": [{"operation": "format"}]}', b'{"items": 3}'):
        async with raw.post("/v1/batch", data=body) as refused:
            assert refused.status == 400
    async with raw.post("/v1/batch", data=io.BytesIO(bytes(9_000_000))) as refused:
        assert (refused.status, (await refused.json())["error"]["code"]) == (413, "too-large")


async def test_choices_of_a_signature(client: Client) -> None:
    key = await client.create_key("ECDSA-P-256")
    public = load_der_public_key(key.public_key)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    signature = await client.sign(key.id, b"message", digest="sha-512")
    public.verify(signature, b"message", ec.ECDSA(hashes.SHA512()))
    digest = hashlib.sha512(b"message").digest()
    await client.verify(key.id, digest, signature, digest="SHA-512", prehashed=True)
    signed = await client.sign(key.id, hashlib.sha256(b"message").digest(), prehashed=True)
    await client.verify(key.id, b"message", signed)
    with pytest.raises(Malformed):
        await client.sign(key.id, b"no digest", prehashed=True)
    with pytest.raises(Malformed):
        await client.sign(key.id, b"message", digest="SM3")
    with pytest.raises(Malformed):
        await client.sign(key.id, b"message", context=b"ECDSA has none")
    lattice = await client.create_key("ML-DSA-44")
    in_context = await client.sign(lattice.id, b"message" * 50_000, context=b"payments")
    await client.verify(lattice.id, b"message" * 50_000, in_context, context=b"payments")
    with pytest.raises(SignatureInvalid):
        await client.verify(lattice.id, b"message" * 50_000, in_context)


async def test_extendable_digests(client: Client) -> None:
    assert await client.digest("SHAKE256", b"x", length=100) == hashlib.shake_256(b"x").digest(100)
    assert await client.digest("SHAKE128", b"x") == hashlib.shake_128(b"x").digest(32)
    assert await client.digest("SHA-512/256", b"x") == hashlib.new("sha512_256", b"x").digest()
    assert await client.digest("BLAKE2b", b"x") == hashlib.blake2b(b"x").digest()
    for name, length in (("SHAKE128", 4097), ("SHA-256", 20)):
        with pytest.raises(Malformed):
            await client.digest(name, b"x", length=length)


async def test_a_derived_key_is_the_same_each_time(client: Client) -> None:
    secret = os.urandom(32)
    source = await client.import_key("HKDF-SHA-256", secret)
    one, two = [await client.derive_key(source.id, "AES-256-GCM", context=b"shop 7", bare=True) for _ in range(2)]
    other = await client.derive_key(source.id, "AES-256-GCM", context=b"shop 8", bare=True)
    assert len({one.id, two.id, other.id}) == 3
    assert not one.imported
    sealed = await client.encrypt(one.id, b"data")
    assert await client.decrypt(sealed, key=two.id) == b"data"
    with pytest.raises(CiphertextInvalid):
        await client.decrypt(sealed, key=other.id)
    expected = HKDF(hashes.SHA256(), 32, b"", b"cipherfleet derived key v1|AES-256-GCM|shop 7").derive(secret)
    assert AESGCM(expected).decrypt(sealed[:12], sealed[12:], None) == b"data"
    await client.rotate_key(source.id)
    again = await client.derive_key(source.id, "AES-256-GCM", context=b"shop 7", bare=True, version=1)
    assert await client.decrypt(sealed, key=again.id) == b"data"
    fresh = await client.derive_key(source.id, "AES-256-GCM", context=b"shop 7", bare=True)
    with pytest.raises(CiphertextInvalid):
        await client.decrypt(sealed, key=fresh.id)


async def test_what_cannot_be_derived(client: Client, stage: Stage) -> None:
    source = await client.create_key("HKDF-SHA-256")
    for name in ("ECDSA-P-256", "RSA-2048-PSS", "SHA-256"):
        with pytest.raises(WrongKeyType):
            await client.derive_key(source.id, name, context=b"c")
    with pytest.raises(WrongKeyType):
        await client.derive_key((await client.create_key()).id, "AES-256-GCM", context=b"c")
    with pytest.raises(TooLarge):
        await client.derive_key(source.id, "AES-256-GCM", context=bytes(5000))
    for rights in ((Right.DERIVE,), (Right.CREATE,)):
        stage.host.rights["shop"] = rights
        with pytest.raises(NotPermitted):
            await client.derive_key(source.id, "AES-256-GCM", context=b"c")
