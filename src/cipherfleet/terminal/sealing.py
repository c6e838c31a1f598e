"""The Ukey share on its way to one card, and the card's answer that it arrived (the paper, flow step f).

The share leaves the terminal sealed to a card whose certificate leads to the root on the Ukey (``channel.sealing``). The
card then shows by a MAC that it holds the share.
"""

import hashlib
import hmac

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cipherfleet.channel import codec
from cipherfleet.channel.sealing import TrustedCard, share_info
from cipherfleet.contract.errors import CardUnconfirmed
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.statements import RevokedUkey, SealedShare

SHARE_BYTES = 32
_CONFIRM = b"cipherfleet card confirm v1"


def seal_share(
    share: bytes | bytearray,
    card: TrustedCard,
    vcm: VcmId,
    *,
    consumer: ConsumerId,
    public_keys: tuple[bytes, ...],
    kmc_signing_key: bytes,
    seen: Seen,
    revoked: tuple[RevokedUkey, ...] = (),
) -> bytes:
    """The share, sealed to ``card`` for ``vcm``. Raises ``CardUntrusted`` when the card's key is none."""
    point = (seen.epoch, seen.sequence, seen.head)
    statement = SealedShare(consumer, card.id, vcm, bytes(share), public_keys, kmc_signing_key, *point, revoked)
    return card.seal(codec.encode(statement), share_info(card.id, vcm))


def confirmation(share: bytes | bytearray, card: CardId, vcm: VcmId, nonce: bytes) -> bytes:
    """What a card with this share answers to ``nonce``: HMAC-SHA-256 under a key derived from the share alone."""
    key = HKDF(hashes.SHA256(), 32, salt=b"", info=_CONFIRM).derive(share)
    return hmac.new(key, _CONFIRM + f"{card}|{vcm}|".encode() + nonce, hashlib.sha256).digest()


def check_confirmation(share: bytes | bytearray, card: CardId, vcm: VcmId, nonce: bytes, answer: bytes) -> None:
    """Raises ``CardUnconfirmed`` unless ``answer`` was made with the share, for exactly this card, VCM and nonce."""
    if not hmac.compare_digest(answer, confirmation(share, card, vcm, nonce)):
        raise CardUnconfirmed(f"{card} could not show that it holds this Ukey's share")
