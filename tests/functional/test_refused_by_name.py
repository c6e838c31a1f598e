"""What a consumer of a KMS must be refused, each by its name, over the real service of a real cloud."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519

from cipherfleet import SyncClient
from cipherfleet.contract.key_terms import KeyTerms
from tests.support import Consumer, command, refusal

SPKI = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
PKCS8 = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.fixture
def client(plugged: Consumer) -> Iterator[SyncClient]:
    with plugged.client("refused") as made:
        yield made


def wrong_key_type(client: SyncClient) -> object:
    return client.sign(client.create_key("AES-256-GCM").id, b"data")


def wrong_usage(client: SyncClient) -> object:
    return client.agree(client.create_key("ECDSA-P-256").id, ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*SPKI))


def disabled(client: SyncClient) -> object:
    key = client.create_key("AES-256-GCM").id
    client.disable_key(key)
    return client.encrypt(key, b"data")


def expired(client: SyncClient) -> object:
    key = client.create_key("AES-256-GCM", terms=KeyTerms(not_after=time.time() + 1)).id
    time.sleep(1.1)  # the end of a key is a time of day
    return client.encrypt(key, b"data")


def over_limit(client: SyncClient) -> object:
    key = client.create_key("AES-256-GCM", terms=KeyTerms(max_uses=1)).id
    client.encrypt(key, b"data")
    return client.encrypt(key, b"data")


def pending_deletion(client: SyncClient) -> object:
    key = client.create_key("AES-256-GCM").id
    client.schedule_key_deletion(key)
    return client.encrypt(key, b"data")


def short_tag(client: SyncClient) -> object:
    key = client.create_key("AES-256-GCM", bare=True).id
    return client.decrypt(client.encrypt(key, b"")[:-4], key=key)


def wrong_context(client: SyncClient) -> object:
    return client.decrypt(client.encrypt(client.create_key("AES-256-GCM").id, b"data", context=b"one"), context=b"another")


def point_off_the_curve(client: SyncClient) -> object:
    point = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*SPKI)
    return client.agree(client.create_key("ECDH-P-256").id, point[:-1] + bytes([point[-1] ^ 1]))


def weak_exponent(client: SyncClient) -> object:
    return client.import_key("RSA-2048-PSS", rsa.generate_private_key(3, 2048).private_bytes(*PKCS8))


def shared_secret_of_zeros(client: SyncClient) -> object:
    return client.agree(client.create_key("X25519").id, x25519.X25519PublicKey.from_public_bytes(bytes(32)).public_bytes(*SPKI))


REFUSED: dict[Callable[[SyncClient], object], str] = {
    wrong_key_type: "wrong-key-type",
    wrong_usage: "wrong-key-type",
    disabled: "key-disabled",
    expired: "key-expired",
    over_limit: "key-uses-spent",
    pending_deletion: "key-pending-deletion",
    short_tag: "tag-too-short",
    wrong_context: "ciphertext-invalid",
    point_off_the_curve: "public-key-invalid",
    weak_exponent: "rsa-exponent-weak",
    shared_secret_of_zeros: "shared-secret-zero",
}


@pytest.mark.parametrize(("work", "code"), REFUSED.items(), ids=[work.__name__ for work in REFUSED])
def test_it_is_refused_by_name(client: SyncClient, work: Callable[[SyncClient], object], code: str) -> None:
    assert refusal(lambda: work(client)) == code


def test_a_grant_of_another_application_is_none(plugged: Consumer, client: SyncClient, tmp_path: Path) -> None:
    key, pin = client.create_key("AES-256-GCM").id, tmp_path / "pin"
    pin.write_text(plugged.pin)
    for name, grants in (("holder", ("--grant", f"encrypt:key={key}")), ("stranger", ("--allow", "random"))):
        ukey = ("--ukey", plugged.ukey, "--pin-file", pin)
        assert command("app", "add", name, "--out", tmp_path / name, *grants, *ukey).status == 0
    with SyncClient(tmp_path / "holder") as holder, SyncClient(tmp_path / "stranger") as stranger:
        assert refusal(lambda: holder.encrypt(key, b"data")) == ""
        assert refusal(lambda: stranger.encrypt(key, b"data")) == "not-permitted"
