"""step f, inside the card: both shares of the CMK arrive, each sealed to this card alone, and become its wrapping key."""

import hashlib
from typing import TypeVar

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cipherfleet.channel import codec, signing
from cipherfleet.channel.certificates import fingerprint
from cipherfleet.channel.sealing import share_info
from cipherfleet.computing import engine_wrap
from cipherfleet.computing.engine_memory import derive, wipe
from cipherfleet.contract.errors import CmkInvalid, Malformed, SealedForeign, StatementForged
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.statements import ApplicationStatement, SealedShare, Signed, Statement
from cipherfleet.contract.vcc import CmkDelivery

S = TypeVar("S", bound=Statement)

MAX_UKEYS, MAX_REVOKED = 8, 64
NUMBERED_KINDS = (ApplicationStatement,)
"""Statements whose ``sequence`` is of the consumer's series, which the escrow's log keeps in order."""


class Deliveries:
    """The sealed shares that this card has opened: each is good for one vCC, once. So a recorded one brings no CMK back."""

    def __init__(self) -> None:
        self._spent: set[bytes] = set()

    def spend(self, sealed: bytes) -> None:
        """Raises ``CmkInvalid`` the second time."""
        name = hashlib.sha256(sealed).digest()
        if name in self._spent:
            raise CmkInvalid("this release of the CMK was used before", "the terminal must release it again")
        self._spent.add(name)


class KeyChain:
    """What the two shares become, and what the consumer's terminal said with them. Takes the keys over."""

    def __init__(self, wrapping: bytearray, confirm: bytearray, share: SealedShare) -> None:
        self.wrapping, self.confirm = wrapping, confirm
        self.ukey_keys = share.ukey_public_keys
        self._revoked = {revoked.public_key: revoked.until for revoked in share.revoked_ukeys}
        self.kmc_key = share.kmc_signing_key
        self.fingerprint = _fingerprint(wrapping, share.ukey_public_keys)
        self.point = (share.epoch, share.sequence)
        self.head = share.head

    def __repr__(self) -> str:
        return "KeyChain(...)"

    def verify(self, signed: Signed, kind: type[S]) -> S:
        """What a Ukey of the consumer signed; of a revoked one what is numbered and came before its revocation.

        The log takes numbers in rising order alone, so nobody can bring such a statement after the revocation. Raises ``StatementForged``.
        """
        numbered = kind in NUMBERED_KINDS
        statement = signing.verify(signed, kind, [*self.ukey_keys, *(self._revoked if numbered else ())])
        if numbered:
            by = {fingerprint(key): until for key, until in self._revoked.items()}
            untils = [by[signature.signer] for signature in signed.signatures if signature.signer in by]
            if any(getattr(statement, "sequence", until) >= until for until in untils):
                raise StatementForged("the statement is signed by a Ukey that had been revoked by then")
        return statement

    def close(self) -> None:
        wipe(self.wrapping)
        wipe(self.confirm)


def _fingerprint(wrapping: bytearray, ukey_keys: tuple[bytes, ...]) -> bytes:
    """What tells one CMK and its Ukeys from any other, and gives nothing of either away."""
    derived = derive(wrapping, salt=b"", info=b"cipherfleet cmk fingerprint v1", length=32)
    return hashlib.sha256(bytes(derived) + b"".join(hashlib.sha256(key).digest() for key in ukey_keys)).digest()


def open_delivery(delivery: CmkDelivery, transport: engine_wrap.TransportKeys, consumer: ConsumerId, card: CardId, vcm: VcmId) -> KeyChain:
    """Combine both shares. Raises ``CmkInvalid`` when one does not open here, or is for somebody else."""
    share = _open_share(delivery.sealed_ukey_share, transport, consumer, card, vcm)
    ukey_share = bytearray(share.ukey_share)
    wipe(share.ukey_share)
    try:
        hsm_share = transport.open_hsm_share(delivery.wrapped_hsm_share)
        if len(hsm_share) != engine_wrap.SHARE_BYTES:
            wipe(hsm_share)
            raise CmkInvalid("the HSM's share of the CMK has the wrong size")
        wrapping = engine_wrap.combine(hsm_share, ukey_share, consumer)
        return KeyChain(wrapping, engine_wrap.confirm_key(ukey_share), msgspec.structs.replace(share, ukey_share=b""))
    finally:
        wipe(ukey_share)


def _open_share(sealed: bytes, transport: engine_wrap.TransportKeys, consumer: ConsumerId, card: CardId, vcm: VcmId) -> SealedShare:
    try:
        plaintext = transport.open_sealed(sealed, share_info(card, vcm))
    except SealedForeign as exc:
        raise CmkInvalid("the Ukey's share of the CMK does not open in this card for this VCM") from exc
    try:
        share = codec.decode(plaintext, SealedShare, what="the sealed share")
    except Malformed as exc:
        raise CmkInvalid("the sealed share cannot be read") from exc
    finally:
        wipe(plaintext)
    if (share.consumer, share.card, share.vcm) != (consumer, card, vcm):
        raise CmkInvalid("the sealed share is for another consumer, card or VCM")
    if len(share.ukey_share) != engine_wrap.SHARE_BYTES:
        raise CmkInvalid("the Ukey's share of the CMK has the wrong size")
    if not 1 <= len(share.ukey_public_keys) <= MAX_UKEYS or not all(_is_p256(spki) for spki in share.ukey_public_keys):
        raise CmkInvalid("the sealed share does not name the Ukey's public keys")
    revoked = {ukey.public_key for ukey in share.revoked_ukeys}
    if len(revoked) > MAX_REVOKED or not all(_is_p256(spki) for spki in revoked) or revoked & set(share.ukey_public_keys):
        raise CmkInvalid("the sealed share does not say which Ukeys are revoked")
    if not _is_p256(share.kmc_signing_key):
        raise CmkInvalid("the sealed share does not name the KMC's signing key")
    return share


def _is_p256(spki: bytes) -> bool:
    try:
        key = serialization.load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
