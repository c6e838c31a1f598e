"""Sealing the share to a card, and the card's confirmation."""

import hashlib
import hmac
import os

import pytest
from cryptography.exceptions import InvalidTag

from cipherfleet.channel.sealing import TrustedCard, check_card
from cipherfleet.contract.errors import CardUnconfirmed, CardUntrusted
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.statements import SealedShare
from cipherfleet.terminal.sealing import check_confirmation, confirmation, seal_share
from tests.pki import Authority
from tests.unit.terminal.platform import StandInCard

ACME, VCM, OTHER = ConsumerId("acme"), VcmId("vcm-0123456789ab"), VcmId("vcm-ba9876543210")
SEEN = Seen(1, 7, b"h" * 32)
SHARE = bytes(range(32))


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority("root")


@pytest.fixture(scope="module")
def card(root: Authority) -> StandInCard:
    return StandInCard(root.subordinate("platform"))


def sealed(card: StandInCard) -> bytes:
    trusted = TrustedCard(card.id, card.transport_key)
    return seal_share(SHARE, trusted, VCM, consumer=ACME, public_keys=(b"spki",), kmc_signing_key=b"kmc", seen=SEEN)


def test_what_is_sealed_opens_in_that_card(root: Authority, card: StandInCard) -> None:
    assert check_card(card.chain, root.pem, card.id) == TrustedCard(card.id, card.transport_key)
    assert card.open(sealed(card), VCM) == SealedShare(ACME, card.id, VCM, SHARE, (b"spki",), b"kmc", 1, 7, b"h" * 32)


def test_it_opens_for_no_other_card_or_vcm(root: Authority, card: StandInCard) -> None:
    other = StandInCard(root.subordinate("platform"))
    message = sealed(card)
    with pytest.raises((InvalidTag, ValueError)):
        card.open(message, OTHER)
    with pytest.raises((InvalidTag, ValueError)):
        card.open(message, VCM, card=other.id)
    with pytest.raises((InvalidTag, ValueError)):
        other.open(message, VCM, card=card.id)
    for position in (0, 600, len(message) - 1):
        changed = bytearray(message)
        changed[position] ^= 1
        with pytest.raises((InvalidTag, ValueError)):
            card.open(bytes(changed), VCM)


def test_no_two_messages_are_alike(card: StandInCard) -> None:
    assert sealed(card) != sealed(card)


def test_a_certificate_from_the_future_is_not_trusted(root: Authority, card: StandInCard) -> None:
    with pytest.raises(CardUntrusted):
        check_card(card.chain, root.pem, card.id, now=0)


def test_the_root_itself_is_no_card(root: Authority) -> None:
    with pytest.raises(CardUntrusted):
        check_card(root.pem, root.pem, CardId("card-m1-00000000"))


def test_the_confirmation_is_the_documented_one() -> None:
    """HMAC under HKDF-SHA-256 (RFC 5869) of the share, written out here once more from the standard alone."""
    nonce = os.urandom(32)
    label = b"cipherfleet card confirm v1"
    extracted = hmac.new(bytes(32), SHARE, hashlib.sha256).digest()
    key = hmac.new(extracted, label + b"\x01", hashlib.sha256).digest()
    expected = hmac.new(key, label + b"card-m1-00000000|vcm-0123456789ab|" + nonce, hashlib.sha256).digest()
    assert confirmation(SHARE, CardId("card-m1-00000000"), VCM, nonce) == expected


def test_a_confirmation_is_for_one_card_vcm_nonce_and_share() -> None:
    card, nonce = CardId("card-m1-00000000"), b"n" * 32
    good = confirmation(SHARE, card, VCM, nonce)
    check_confirmation(SHARE, card, VCM, nonce, good)
    for share, c, vcm, n, answer in (
        (bytes(32), card, VCM, nonce, good),
        (SHARE, CardId("card-m1-00000001"), VCM, nonce, good),
        (SHARE, card, OTHER, nonce, good),
        (SHARE, card, VCM, b"m" * 32, good),
        (SHARE, card, VCM, nonce, good[:-1]),
        (SHARE, card, VCM, nonce, b""),
    ):
        with pytest.raises(CardUnconfirmed):
            check_confirmation(share, c, vcm, n, answer)
