"""The key chain inside the card: two shares become the CMK, the CMK's wrapping key wraps and unwraps escrow rows.

RFC 8017 (OAEP), RFC 9180 (HPKE, with ML-KEM-768 and X25519 together), RFC 5869 (HKDF), SP 800-38D (AES-GCM).
"""

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import mlkem, padding, rsa, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cipherfleet.channel.sealing import SUITE
from cipherfleet.computing.engine_memory import derive, take, wipe
from cipherfleet.contract.errors import CmkInvalid, EscrowRowForeign, EscrowRowTampered, SealedForeign
from cipherfleet.contract.escrow import EscrowRow, associated_data
from cipherfleet.contract.ids import ConsumerId, KeyId

SHARE_BYTES = 32
NONCE_BYTES = 12
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class TransportKeys:
    """A card's two transport keys: made at its start, never stored."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(65537, 3072)
        first, second = mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()
        self._hpke = hpke.MLKEM768X25519PrivateKey(first, second)
        self.hpke_public_key = first.public_key().public_bytes_raw() + second.public_key().public_bytes_raw()

    @property
    def rsa_public_key(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return self.rsa.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)

    def open_hsm_share(self, wrapped: bytes) -> bytearray:
        """Raises ``CmkInvalid``."""
        try:
            share = self.rsa.decrypt(wrapped, OAEP)
        except ValueError as exc:
            raise CmkInvalid("the HSM's share of the CMK does not open in this card") from exc
        return take(share)

    def open_sealed(self, sealed: bytes, info: bytes) -> bytes:
        """Raises ``SealedForeign``."""
        try:
            return SUITE.decrypt(sealed, self._hpke, info)
        except (ValueError, InvalidTag) as exc:
            raise SealedForeign("what was sealed does not open in this card for this VCM") from exc


def combine(hsm_share: bytearray, ukey_share: bytearray, consumer: ConsumerId) -> bytearray:
    """The wrapping key (32 bytes) of the CMK that the two shares make. Wipes the HSM's share."""
    both = hsm_share + ukey_share
    cmk = derive(both, salt=b"cipherfleet cmk v1", info=consumer.encode(), length=32)
    wipe(both)
    wipe(hsm_share)
    wrapping = derive(cmk, salt=b"", info=b"cipherfleet dek wrap v1", length=32)
    wipe(cmk)
    return wrapping


def confirm_key(ukey_share: bytearray) -> bytearray:
    """The key by which a card shows the terminal that it has the Ukey's share."""
    return derive(ukey_share, salt=b"", info=b"cipherfleet card confirm v1", length=32)


def wrap(wrapping: bytearray, consumer: ConsumerId, key: KeyId, version: int, attributes: bytes, material: bytearray) -> EscrowRow:
    """A row for the escrow; ``material`` is empty for version 0."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    sealed = AESGCM(wrapping).encrypt(nonce, material, associated_data(consumer, key, version, attributes))
    return EscrowRow(consumer, key, version, attributes, nonce + sealed)


def unwrap(wrapping: bytearray, consumer: ConsumerId, row: EscrowRow) -> bytearray:
    """A row's key material. Raises ``EscrowRowForeign`` or ``EscrowRowTampered``."""
    if row.consumer != consumer:
        raise EscrowRowForeign(f"row {row.subject} belongs to another consumer")
    size = len(row.wrapped) - NONCE_BYTES - 16
    if size < 0:
        raise EscrowRowTampered(f"row {row.subject} is too short")
    material, sealed = bytearray(size), memoryview(row.wrapped)
    try:
        AESGCM(wrapping).decrypt_into(
            row.wrapped[:NONCE_BYTES], sealed[NONCE_BYTES:], associated_data(consumer, row.key, row.version, row.attributes), material
        )
    except InvalidTag as exc:
        raise EscrowRowTampered(f"row {row.subject} is not the one that was wrapped") from exc
    return material
