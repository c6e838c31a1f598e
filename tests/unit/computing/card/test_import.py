"""Key material from outside: only the card it was sealed to opens it, and only what is good becomes a key."""

import hashlib
import hmac
import secrets

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cipherfleet.channel import codec
from cipherfleet.channel.sealing import TrustedCard, import_info, share_info
from cipherfleet.contract.errors import CipherfleetError, KeyMaterialInvalid, Malformed, SealedForeign, ServiceOff, WrongKeyType
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes
from cipherfleet.contract.ids import CardId, new_key_id
from cipherfleet.contract.vcc import Operation, RowRequest, StreamRequest, Verb
from tests.unit.computing.card.consumer import CARD, CERTIFIED, OTHER_VCM, VCM, Consumer, Function, transport


def pkcs8(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.fixture
def function() -> Function:
    return Function()


def test_a_secret_key_works_as_it_does_outside(function: Function) -> None:
    secret = secrets.token_bytes(32)
    handle, row = function.bring("HMAC-SHA-256", function.seal("HMAC-SHA-256", secret))
    assert function.run(StreamRequest(Verb.MAC), b"m", handle=handle) == hmac.new(secret, b"m", hashlib.sha256).digest()
    assert secret not in row.wrapped
    assert msgspec.json.decode(row.attributes, type=VersionAttributes).imported
    function.do(Operation.UNLOAD, handle=handle)
    again = function.do(Operation.LOAD, row).value
    assert function.run(StreamRequest(Verb.MAC), b"m", handle=again) == hmac.new(secret, b"m", hashlib.sha256).digest()


PRIVATE: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey] = {
    "Ed25519": ed25519.Ed25519PrivateKey.generate(),
    "ECDSA-P-256": ec.generate_private_key(ec.SECP256R1()),
    "RSA-3072-PSS": rsa.generate_private_key(65537, 3072),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_key_signs_for_its_public_half(function: Function, name: str) -> None:
    private = PRIVATE[name]
    handle, row = function.bring(name, function.seal(name, pkcs8(private)))
    public = private.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert msgspec.json.decode(row.attributes, type=VersionAttributes).public_key == public
    signature = function.run(StreamRequest(Verb.SIGN), b"m", handle=handle)
    function.run(StreamRequest(Verb.VERIFY, signature=signature), b"m", handle=handle)


def test_what_a_card_made_is_not_called_imported(function: Function) -> None:
    lie = codec.encode(VersionAttributes("AES-256-GCM", 1.5, imported=True))
    answer = function.do(Operation.GENERATE, RowRequest(new_key_id(), 1, lie))
    row = msgspec.json.decode(answer.parameters, type=EscrowRow)
    assert not msgspec.json.decode(row.attributes, type=VersionAttributes).imported


BAD_MATERIAL = {
    "too short": ("AES-256-GCM", bytes(31)),
    "too long": ("SM4-GCM", bytes(32)),
    "empty": ("HMAC-SHA-256", b""),
    "no PKCS#8": ("Ed25519", b"x" * 48),
    "another curve": ("ECDSA-P-256", pkcs8(ec.generate_private_key(ec.SECP384R1()))),
    "another kind": ("Ed25519", pkcs8(ec.generate_private_key(ec.SECP256R1()))),
    "too small an RSA key": ("RSA-3072-PSS", pkcs8(rsa.generate_private_key(65537, 2048))),
    "an RSA key with exponent 3": ("RSA-3072-PSS", pkcs8(rsa.generate_private_key(3, 3072))),
    "cut off": ("Ed25519", pkcs8(ed25519.Ed25519PrivateKey.generate())[:-1]),
}


@pytest.mark.parametrize("case", BAD_MATERIAL)
def test_bad_material_makes_no_key(function: Function, case: str) -> None:
    name, material = BAD_MATERIAL[case]
    with pytest.raises(KeyMaterialInvalid) as refused:
        function.bring(name, function.seal(name, material))
    assert not material or material.hex() not in refused.value.message
    assert function.inner.keys == 0


def test_what_was_sealed_for_something_else_does_not_open(function: Function) -> None:
    aes, secret, elsewhere = "AES-256-GCM", bytes(32), CardId("card-m1-00000000")
    good = function.seal(aes, secret)
    cases: dict[str, tuple[str, bytes, type[CipherfleetError]]] = {
        "another algorithm": ("SM4-GCM", good, SealedForeign),
        "another VCM": (aes, function.seal(aes, secret, info=import_info(CARD, OTHER_VCM)), SealedForeign),
        "another card": (
            aes,
            function.seal(aes, secret, info=import_info(elsewhere, VCM)),
            SealedForeign,
        ),
        "a Ukey share": (aes, function.seal(aes, secret, info=share_info(CARD, VCM)), SealedForeign),
        "another consumer": (aes, Function(Consumer("bob"), serving=False).seal(aes, secret), SealedForeign),
        "changed": (aes, good[:-1] + bytes([good[-1] ^ 1]), SealedForeign),
        "cut off": (aes, good[:40], SealedForeign),
        "nothing": (aes, b"", SealedForeign),
        "no message": (aes, TrustedCard(CARD, transport().hpke_public_key).seal(b"{}", import_info(CARD, VCM)), Malformed),
        "a digest": ("SHA-256", good, WrongKeyType),
    }
    for case, (name, raw, error) in cases.items():
        with pytest.raises(error):
            function.bring(name, raw)
        assert function.inner.keys == 0, case


def test_without_a_lease_nothing_is_opened() -> None:
    function = Function(serving=False)
    with pytest.raises(ServiceOff):
        function.bring("AES-256-GCM", function.seal("AES-256-GCM", bytes(32)))


def test_the_card_shows_its_certificate(function: Function) -> None:
    assert bytes(function.do(Operation.TRANSPORT).data) == CERTIFIED.chain.chain
