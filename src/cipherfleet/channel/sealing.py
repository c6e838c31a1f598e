"""What only one card can open: its certificate, checked, and HPKE to the key in it (RFC 9180, ML-KEM-768 and X25519 combined).

Whoever relays what was sealed here cannot open it. ``info`` binds it to its purpose, card and VCM.
"""

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite

from cipherfleet.channel.certificates import HPKE_KEY_OID, check_chain, identity_of
from cipherfleet.contract.errors import CardUntrusted, Unauthorised
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import CardId, VcmId

SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_ML_KEM_BYTES, _X25519_BYTES = 1184, 32


def share_info(card: CardId, vcm: VcmId) -> bytes:
    """HPKE's info of a Ukey share: sealed for one card and VCM, it opens for no other."""
    return f"cipherfleet sealed share v1|{card}|{vcm}".encode()


def import_info(card: CardId, vcm: VcmId) -> bytes:
    """HPKE's info of key material that an application brings."""
    return f"cipherfleet key import v1|{card}|{vcm}".encode()


class TrustedCard(msgspec.Struct, frozen=True):
    """A card whose certificate was checked; made by ``check_card`` alone."""

    id: CardId
    transport_key: bytes  # raw: ML-KEM-768 (1184) || X25519 (32)

    def seal(self, plaintext: bytes, info: bytes) -> bytes:
        """Raises ``CardUntrusted`` when the card's key is none."""
        try:
            key = MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(self.transport_key[:_ML_KEM_BYTES]),
                X25519PublicKey.from_public_bytes(self.transport_key[_ML_KEM_BYTES:]),
            )
            return SUITE.encrypt(plaintext, key, info=info)
        except ValueError as exc:
            raise CardUntrusted(f"the HPKE key of {self.id} is not one") from exc


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
