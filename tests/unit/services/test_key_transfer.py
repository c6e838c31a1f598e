"""Keys that come and go wrapped: with nothing but the openssl command on the other side."""

import secrets
import subprocess
import time
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cipherfleet import Client
from cipherfleet.app.commands.key import to_pem
from cipherfleet.channel import codec
from cipherfleet.contract.errors import (
    CipherfleetError,
    ImportTokenExpired,
    ImportTokenInvalid,
    ImportTokenUsed,
    KeyDeleted,
    KeyExpired,
    KeyMaterialInvalid,
    KeyNotExportable,
    Malformed,
    PublicKeyInvalid,
    WrongKeyType,
)
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.vcc import ImportToken
from tests.unit.services.stage import Stage

OAEP = ["-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt", "rsa_oaep_md:sha256", "-pkeyopt", "rsa_mgf1_md:sha256"]
KWP = ["enc", "-id-aes256-wrap-pad", "-iv", "A65959A6"]


def openssl(*args: str, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *args], input=data, capture_output=True, check=True).stdout


def oaep(public_key: bytes, secret: bytes, folder: Path) -> bytes:
    file = folder / "import.pem"
    file.write_bytes(to_pem(public_key))
    return openssl("pkeyutl", "-encrypt", "-pubin", "-inkey", str(file), *OAEP, data=secret)


def rsa_aes(public_key: bytes, material: bytes, folder: Path) -> bytes:
    """``CKM_RSA_AES_KEY_WRAP`` by openssl alone."""
    fresh = secrets.token_bytes(32)
    return oaep(public_key, fresh, folder) + openssl(*KWP, "-K", fresh.hex(), data=material)


def opened(wrapped: bytes, private: Path, size: int) -> bytes:
    fresh = openssl("pkeyutl", "-decrypt", "-inkey", str(private), *OAEP, data=wrapped[:size])
    return openssl(*KWP, "-d", "-K", fresh.hex(), data=wrapped[size:])


async def test_a_key_that_openssl_wrapped_is_imported_once(client: Client, tmp_path: Path) -> None:
    material = secrets.token_bytes(32)
    asked = await client.import_parameters("AES-256-GCM", bits=3072)
    assert abs(asked.expires_at - time.time() - 86400) < 60
    wrapped = oaep(asked.public_key, material, tmp_path)
    made = await client.import_wrapped(asked.token, wrapped, label="mine", terms=KeyTerms(exportable=True))
    assert (made.id, made.imported, made.label, made.algorithm) == (asked.key, True, "mine", "AES-256-GCM")
    assert await client.decrypt(await client.encrypt(made.id, b"data")) == b"data"
    private = rsa.generate_private_key(65537, 2048)
    file = tmp_path / "private.pem"
    file.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    exported = await client.export_key(made.id, public_key=spki(private))
    assert opened(exported.wrapped, file, 256) == material
    for again in (wrapped, oaep(asked.public_key, secrets.token_bytes(32), tmp_path)):
        with pytest.raises(ImportTokenUsed):
            await client.import_wrapped(asked.token, again)
    await client.delete_key(made.id)
    with pytest.raises(ImportTokenUsed):
        await client.import_wrapped(asked.token, wrapped)


async def test_a_private_key_of_openssl_is_imported(client: Client, tmp_path: Path) -> None:
    pem = tmp_path / "signer.pem"
    pem.write_bytes(openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"))
    pkcs8 = openssl("pkcs8", "-topk8", "-nocrypt", "-in", str(pem), "-outform", "DER")
    asked = await client.import_parameters("ECDSA-P-256", bits=4096)
    made = await client.import_wrapped(asked.token, rsa_aes(asked.public_key, pkcs8, tmp_path))
    assert made.public_key == openssl("pkey", "-in", str(pem), "-pubout", "-outform", "DER")
    await client.verify(made.id, b"message", openssl("dgst", "-sha256", "-sign", str(pem), data=b"message"))


async def test_tokens_that_are_not_good(client: Client, stage: Stage, tmp_path: Path) -> None:
    asked = await client.import_parameters("AES-256-GCM", bits=3072)
    wrapped = oaep(asked.public_key, bytes(32), tmp_path)
    token = codec.decode(asked.token, ImportToken)
    other = codec.decode((await client.import_parameters("AES-256-GCM", bits=3072)).token, ImportToken)
    forged = [
        msgspec.structs.replace(token, expires_at=token.expires_at + 1),
        msgspec.structs.replace(token, algorithm="AES-256-CTR", bare=True),
        msgspec.structs.replace(token, key=other.key),
        msgspec.structs.replace(token, sealed=token.sealed[:-1]),
        msgspec.structs.replace(token, sealed=b""),
    ]
    for bad in (b"", b"{", b"{}", *map(codec.encode, forged)):
        with pytest.raises(ImportTokenInvalid):
            await client.import_wrapped(bad, wrapped)
    for bad in (b"", wrapped[:-1], wrapped + b"x", bytes(384), oaep(asked.public_key, bytes(31), tmp_path)):
        with pytest.raises(KeyMaterialInvalid):
            await client.import_wrapped(asked.token, bad)
    stage.host.card.function.permit.wall_clock = lambda: asked.expires_at
    with pytest.raises(ImportTokenExpired):
        await client.import_wrapped(asked.token, wrapped)
    assert not await client.list_keys()
    with pytest.raises(WrongKeyType):
        await client.import_parameters("SHA-256")
    with pytest.raises(Malformed):
        await client.import_parameters("AES-256-GCM", bits=1024)


async def test_another_consumers_token_opens_nothing(client: Client, tmp_path: Path) -> None:
    rival = await Stage.start()
    async with rival.client() as other:
        asked = await other.import_parameters("AES-256-GCM", bits=3072)
    await rival.stop()
    with pytest.raises(ImportTokenInvalid):
        await client.import_wrapped(asked.token, oaep(asked.public_key, bytes(32), tmp_path))


async def test_only_a_key_that_was_made_for_it_leaves_the_card(client: Client, stage: Stage) -> None:
    wrap, public_key = await client.create_key("AES-256-KWP"), spki(rsa.generate_private_key(65537, 2048))
    kept = await client.create_key()
    for how in ({"public_key": public_key}, {"wrapping_key": wrap.id}):
        with pytest.raises(KeyNotExportable):
            await client.export_key(kept.id, **how)
    made = await client.create_key("Ed25519", terms=KeyTerms(exportable=True))
    assert made.terms.exportable
    exported = await client.export_key(made.id, wrapping_key=wrap.id)
    assert (exported.version, exported.algorithm, exported.mechanism) == (1, "Ed25519", "AES-256-KWP")
    material = await client.decrypt(exported.wrapped, key=wrap.id)
    loaded = serialization.load_der_private_key(material, None)
    assert spki(loaded) == made.public_key
    gcm = await client.create_key()
    refused: list[tuple[type[CipherfleetError], dict[str, object]]] = [
        (Malformed, {}),
        (Malformed, {"public_key": public_key, "wrapping_key": wrap.id}),
        (WrongKeyType, {"wrapping_key": gcm.id}),
        (PublicKeyInvalid, {"public_key": b"x"}),
        (PublicKeyInvalid, {"public_key": spki(rsa.generate_private_key(65537, 1024))}),  # noqa: S505
        (PublicKeyInvalid, {"public_key": spki(ec.generate_private_key(ec.SECP256R1()))}),
    ]
    for error, how_not in refused:
        with pytest.raises(error):
            await client.export_key(made.id, **how_not)  # type: ignore[arg-type]
    expiring = await client.create_key(terms=KeyTerms(exportable=True, not_after=time.time() + 100))
    stage.host.card.function.permit.wall_clock = lambda: time.time() + 101
    with pytest.raises(KeyExpired):
        await client.export_key(expiring.id, wrapping_key=wrap.id)
    await client.delete_key(made.id)
    with pytest.raises(KeyDeleted):
        await client.export_key(made.id, wrapping_key=wrap.id)


def spki(private: object) -> bytes:
    public = private.public_key()  # type: ignore[attr-defined]
    encoded: bytes = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded
