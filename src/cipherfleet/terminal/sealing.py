"""The Ukey share on its way to one card, and the card's answer that it arrived (the paper, flow step f).

The share leaves the terminal sealed (HPKE, RFC 9180, with ML-KEM-768 and X25519 combined) to a card whose certificate
leads to the root on the Ukey; whoever relays it cannot open it. The card then shows by a MAC that it holds the share.
"""

import hashlib
import hmac

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import HPKE_KEY_OID, check_chain, identity_of
from cipherfleet.contract.errors import CardUnconfirmed, CardUntrusted, Unauthorised
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.statements import SealedShare

SHARE_BYTES = 32
_ML_KEM_BYTES, _X25519_BYTES = 1184, 32
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_CONFIRM = b"cipherfleet card confirm v1"


class TrustedCard(msgspec.Struct, frozen=True):
    """A card whose certificate was checked; made by ``check_card`` alone."""

    id: CardId
    transport_key: bytes  # raw: ML-KEM-768 (1184) || X25519 (32)


def check_card(chain: bytes, root: bytes, card: CardId, *, now: float | None = None) -> TrustedCard:
    """That ``chain`` (PEM, leaf first) certifies ``card`` under ``root`` (PEM). Raises ``CardUntrusted``."""
    try:
        leaf = check_chain(chain, root, now=now)
        identity = identity_of(leaf)
    except Unauthorised as exc:
        raise CardUntrusted(f"the certificate of {card} is not to be trusted: {exc.message}") from exc
    except ValueError as exc:  # an extension that does not parse
        raise CardUntrusted(f"the certificate of {card} cannot be read") from exc
    if identity.role is not Role.CARD or identity.id != card:
        raise CardUntrusted(f"the certificate shown for {card} names {identity.uri}")
    try:
        extension = leaf.extensions.get_extension_for_oid(HPKE_KEY_OID).value
    except x509.ExtensionNotFound as exc:
        raise CardUntrusted(f"the certificate of {card} has no HPKE key") from exc
    if not isinstance(extension, x509.UnrecognizedExtension) or len(extension.value) != _ML_KEM_BYTES + _X25519_BYTES:
        raise CardUntrusted(f"the HPKE key in the certificate of {card} has the wrong size")
    return TrustedCard(card, extension.value)


def seal_share(
    share: bytes | bytearray,
    card: TrustedCard,
    vcm: VcmId,
    *,
    consumer: ConsumerId,
    public_keys: tuple[bytes, ...],
    kmc_signing_key: bytes,
    seen: Seen,
) -> bytes:
    """The share, sealed to ``card`` for ``vcm``. Raises ``CardUntrusted`` when the card's key is none."""
    statement = SealedShare(consumer, card.id, vcm, bytes(share), public_keys, kmc_signing_key, seen.epoch, seen.sequence, seen.head)
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(card.transport_key[:_ML_KEM_BYTES]),
            X25519PublicKey.from_public_bytes(card.transport_key[_ML_KEM_BYTES:]),
        )
        return _SUITE.encrypt(codec.encode(statement), key, info=sealing_info(card.id, vcm))
    except ValueError as exc:
        raise CardUntrusted(f"the HPKE key of {card.id} is not one") from exc


def sealing_info(card: CardId, vcm: VcmId) -> bytes:
    """The HPKE info: a share sealed for one card and VCM opens for no other."""
    return f"cipherfleet sealed share v1|{card}|{vcm}".encode()


def confirmation(share: bytes | bytearray, card: CardId, vcm: VcmId, nonce: bytes) -> bytes:
    """What a card with this share answers to ``nonce``: HMAC-SHA-256 under a key derived from the share alone."""
    key = HKDF(hashes.SHA256(), 32, salt=b"", info=_CONFIRM).derive(share)
    return hmac.new(key, _CONFIRM + f"{card}|{vcm}|".encode() + nonce, hashlib.sha256).digest()


def check_confirmation(share: bytes | bytearray, card: CardId, vcm: VcmId, nonce: bytes, answer: bytes) -> None:
    """Raises ``CardUnconfirmed`` unless ``answer`` was made with the share, for exactly this card, VCM and nonce."""
    if not hmac.compare_digest(answer, confirmation(share, card, vcm, nonce)):
        raise CardUnconfirmed(f"{card} could not show that it holds this Ukey's share")
