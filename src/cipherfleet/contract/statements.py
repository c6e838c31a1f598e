"""What is signed: one envelope, and the statements that travel in it.

A statement is signed over its exact bytes (DSSE's pre-authentication encoding), and those bytes travel with it, so
nothing is ever re-encoded before a check. ``channel.signing`` makes and checks signatures; here are only the values.
"""

from enum import StrEnum
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, CardId, ConsumerId, KeyId, UkeyId, VcmId
from cipherfleet.contract.policy import INTERNATIONAL, Policy
from cipherfleet.contract.rights import Right as Right


class Signature(msgspec.Struct, frozen=True):
    """``signer`` is the hex SHA-256 of the signer's SubjectPublicKeyInfo; ``value`` an ECDSA P-256 signature (DER)."""

    signer: str
    value: bytes


class Signed(msgspec.Struct, frozen=True):
    """A statement's bytes and the signatures over them."""

    kind: str
    payload: bytes
    signatures: tuple[Signature, ...] = ()


def signing_input(kind: str, payload: bytes) -> bytes:
    """DSSE PAE: unambiguous over (kind, payload), so a signature over one kind is never valid for another."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all that is signed; ``KIND`` separates the domains."""

    KIND: ClassVar[str] = ""


class Purpose(StrEnum):
    """What the consumer asks for when it proves its identity."""

    BUILD_VCM = "build-vcm"
    DELETE_VCM = "delete-vcm"


class IdentityRequest(Statement, frozen=True):
    """``auth_identity_request`` + ``build_vcm_request`` or ``delete_vcm_request`` (the paper, creation and deletion step 1)."""

    KIND: ClassVar[str] = "cipherfleet/identity-request/v1"
    consumer: ConsumerId
    nonce: bytes
    purpose: Purpose
    vcm: VcmId | None = None


class LeaseStatement(Statement, frozen=True):
    """The permission to serve: valid for ``duration_ms`` from the moment the card made ``nonce`` (16 bytes).

    ``epoch``, ``sequence`` and ``head`` are the newest point of the escrow that the Ukey has seen: nothing older is to be served.
    """

    KIND: ClassVar[str] = "cipherfleet/lease/v1"
    consumer: ConsumerId
    card: CardId
    vcm: VcmId
    nonce: bytes
    duration_ms: int
    epoch: int
    sequence: int
    head: bytes
    policy: Policy = INTERNATIONAL  # what the card permits as long as this lease lasts
    policy_epoch: int = 0  # where its statement stands in the series: a card goes back to none before
    policy_sequence: int = 0  # 0: none was ever set


class LoginStatement(Statement, frozen=True):
    """Creation step 8: the terminal logs in to its VCM instance. ``nonce`` (32 bytes) is what the card must confirm."""

    KIND: ClassVar[str] = "cipherfleet/login/v1"
    consumer: ConsumerId
    vcm: VcmId
    nonce: bytes


class ApplicationStatement(Statement, frozen=True):
    """The consumer signs an application in (``revoked`` signs it out). ``sequence`` grows with every statement.

    ``rights`` are good for every key, ``grants`` for those that they name.
    """

    KIND: ClassVar[str] = "cipherfleet/application/v1"
    consumer: ConsumerId
    name: ApplicationName
    public_key_sha256: bytes
    rights: tuple[Right, ...]
    not_after: int  # unix seconds
    sequence: int
    revoked: bool = False
    grants: tuple[Grant, ...] = ()


class DelegationStatement(Statement, frozen=True):
    """An application, ``delegator``, gives another one of what the Ukey lets it delegate, or takes it back (``revoked``).

    Signed by the delegator's own certificate key, ``public_key`` (SubjectPublicKeyInfo, DER), which its ``ApplicationStatement`` names.
    ``grants`` are for ``key`` alone, and replace what it gave this delegate for this key before. ``sequence`` grows with each of its
    statements on delegation.
    """

    KIND: ClassVar[str] = "cipherfleet/delegation/v1"
    consumer: ConsumerId
    delegator: ApplicationName
    delegate: ApplicationName
    key: KeyId
    grants: tuple[Grant, ...]
    sequence: Annotated[int, Meta(ge=1, le=2**53)]
    public_key: bytes
    revoked: bool = False


class UkeyStatement(Statement, frozen=True):
    """Another Ukey of the consumer comes in, or goes (``revoked``). ``sequence`` is of the same series as applications' statements.

    ``ukey`` is its serial, ``public_key`` of its identity key (SubjectPublicKeyInfo, DER), ``label`` what it is for.
    """

    KIND: ClassVar[str] = "cipherfleet/ukey/v1"
    consumer: ConsumerId
    ukey: UkeyId
    public_key: bytes
    sequence: int
    label: str = ""
    revoked: bool = False


class EpochStatement(Statement, frozen=True):
    """The consumer accepts that the escrow was restored from a backup: from ``accepted_*`` on it goes on in ``new_epoch``.

    ``seen_*`` is what the signing Ukey had seen of the escrow before. ``sequence`` is of the same series as applications' statements.
    """

    KIND: ClassVar[str] = "cipherfleet/epoch/v1"
    consumer: ConsumerId
    new_epoch: int
    sequence: int
    seen_epoch: int
    seen_sequence: int
    seen_head: bytes
    accepted_epoch: int
    accepted_sequence: int
    accepted_head: bytes


class PolicyStatement(Statement, frozen=True):
    """What the consumer permits itself from now on, at all its Ukeys. ``sequence`` is of the same series as applications' statements.

    ``epoch`` is the one that the signing Ukey lives in; of two statements the newer is the one with the larger (epoch, sequence).
    """

    KIND: ClassVar[str] = "cipherfleet/policy/v1"
    consumer: ConsumerId
    policy: Policy
    epoch: int
    sequence: int


class CheckpointStatement(Statement, frozen=True):
    """The HSM's word on a consumer's escrow: after ``sequence`` entries the log's head is ``head`` (32 bytes)."""

    KIND: ClassVar[str] = "cipherfleet/checkpoint/v1"
    consumer: ConsumerId
    epoch: int
    sequence: int
    head: bytes


class Destroyed(msgspec.Struct, frozen=True):
    """One version's material: the SHA-256 of the row that held it, as the log has it."""

    version: int
    digest: bytes


class DestructionStatement(Statement, frozen=True):
    """The HSM's receipt: these versions of a key were erased from the escrow; change ``sequence`` of its log made it so."""

    KIND: ClassVar[str] = "cipherfleet/key-destruction/v1"
    consumer: ConsumerId
    key: KeyId
    epoch: int
    sequence: int
    destroyed_at: float  # unix seconds, as the key's attributes say; 0: trimmed
    material: tuple[Destroyed, ...]


class RevokedUkey(msgspec.Struct, frozen=True):
    """A Ukey that counts no more: of its numbered statements those below ``until`` (its revocation's number) stay good."""

    public_key: bytes
    until: int


class AuditCheckpointStatement(Statement, frozen=True):
    """The HSM's word on a consumer's audit log (empty: the operator's own): entry ``sequence`` has the digest ``digest`` (hex).

    ``previous``: the entry of the seal before this one, 0 for the first; so a seal that is missing shows.
    """

    KIND: ClassVar[str] = "cipherfleet/audit-checkpoint/v1"
    consumer: str
    epoch: int
    sequence: int
    digest: str
    at: float  # unix seconds
    previous: int


class SealedShare(Statement, frozen=True):
    """What the terminal seals (HPKE) to one card: never signed, never seen by anyone else."""

    KIND: ClassVar[str] = "cipherfleet/sealed-share/v1"
    consumer: ConsumerId
    card: CardId
    vcm: VcmId
    ukey_share: bytes  # 32 bytes
    ukey_public_keys: tuple[bytes, ...]  # SubjectPublicKeyInfo, DER: whose signatures count
    kmc_signing_key: bytes  # SubjectPublicKeyInfo, DER, from the Ukey: whose leases and checkpoints count
    epoch: int
    sequence: int  # the newest checkpoint this Ukey has seen: older state is refused
    head: bytes
    revoked_ukeys: tuple[RevokedUkey, ...] = ()
