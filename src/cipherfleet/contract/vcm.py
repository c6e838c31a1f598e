"""What a VCM gives to the network components it hosts: the port between ``computing`` and ``services``."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from cipherfleet.contract.audit import AuditLog, AuditQuery, KeyUsage
from cipherfleet.contract.escrow import KeyState
from cipherfleet.contract.identities import Peer
from cipherfleet.contract.ids import ConsumerId, KeyId, VcmId
from cipherfleet.contract.key_life import NO_TAGS, KeyUpdate
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.policy import Policy
from cipherfleet.contract.statements import Right, Signed
from cipherfleet.contract.vcc import VirtualCryptoCard
from cipherfleet.contract.vcm_api import (
    AliasEntry,
    Delegation,
    DelegationsReply,
    ExportReply,
    ImportParameters,
    ImportParametersRequest,
    KeyDescription,
    KeyImportRequest,
    KeyListReply,
    KeyQuery,
    KeysCreateRequest,
    LoginReply,
    ReceiptReply,
    WrappedImportRequest,
)


class KeyUse(msgspec.Struct, frozen=True):
    """A key version, loaded into the vCC."""

    key: KeyId
    version: int
    algorithm: str
    handle: int
    bare: bool = False


class KeyStore(Protocol):
    """The consumer's keys as one VCM sees them. Every change is acknowledged only after the escrow has committed it."""

    @property
    def policy(self) -> Policy:
        """What the consumer permits itself; the card enforces it."""
        ...

    async def create(
        self,
        algorithm: str,
        *,
        label: str,
        actor: str,
        bare: bool = False,
        terms: KeyTerms = NO_TERMS,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> KeyDescription: ...

    async def import_key(self, key: KeyImportRequest, *, actor: str) -> KeyDescription: ...

    async def derive(
        self, source: KeyUse, algorithm: str, context: bytes, salt: bytes, *, label: str, actor: str, bare: bool, terms: KeyTerms
    ) -> KeyDescription: ...

    async def create_many(self, wanted: KeysCreateRequest, *, actor: str) -> Sequence[KeyDescription]:
        """All of them, or none."""
        ...

    async def import_many(self, keys: Sequence[KeyImportRequest], *, actor: str) -> Sequence[KeyDescription]:
        """All of them, or none."""
        ...

    async def rotate(self, key: KeyId, *, actor: str) -> KeyDescription: ...

    async def set_state(self, key: KeyId, state: KeyState, *, actor: str) -> KeyDescription: ...

    async def destroy(self, key: KeyId, *, actor: str) -> KeyDescription:
        """At once, and for good."""
        ...

    async def describe(self, key: KeyId) -> KeyDescription:
        """Raises ``KeyUnknown``; looks at the escrow again before it says so."""
        ...

    async def list_keys(self, query: KeyQuery) -> KeyListReply:
        """One page. Raises ``Malformed`` for a token that is none of ours."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """What ``use`` gives within stays loaded until the end; without, it may be unloaded when the vCC is full."""
        ...

    async def use(self, key: KeyId, *, version: int | None = None, protects: bool = False) -> KeyUse:
        """The handle of a version (default: the current one); ``protects``: something new is made with it, which may be counted.

        Raises ``KeyUnknown``, ``KeyDisabled``, ``KeyDeleted``, ``KeyPendingDeletion``, ``KeyNotYetValid``, ``KeyVersionTrimmed``, and
        who protects ``KeyExpired`` or ``KeyUsesSpent``.
        """
        ...


class KeyLife(Protocol):
    """What becomes of a key after it was made."""

    async def update(self, key: KeyId, change: KeyUpdate, *, actor: str) -> KeyDescription: ...

    async def resolve(self, name: str) -> KeyId:
        """Which key an alias is for. Raises ``AliasUnknown``."""
        ...

    async def set_alias(self, name: str, key: KeyId, *, actor: str) -> KeyDescription: ...

    async def delete_alias(self, name: str, *, actor: str) -> None: ...

    async def list_aliases(self) -> Sequence[AliasEntry]: ...

    async def schedule_deletion(self, key: KeyId, days: float | None, *, actor: str) -> KeyDescription: ...

    async def receipt(self, key: KeyId) -> ReceiptReply: ...

    async def trim(self, key: KeyId, before: int, *, actor: str) -> KeyDescription: ...

    async def cancel_deletion(self, key: KeyId, *, actor: str) -> KeyDescription: ...


class KeyTransfer(Protocol):
    """Keys that come and go wrapped."""

    async def import_parameters(self, wanted: ImportParametersRequest) -> ImportParameters: ...

    async def import_wrapped(self, request: WrappedImportRequest, *, actor: str) -> KeyDescription: ...

    async def export(self, key: KeyId, version: int | None, *, public_key: bytes, wrapping: KeyId | None) -> ExportReply: ...


class VcmHost(Protocol):
    """One VCM, as its components see it."""

    @property
    def id(self) -> VcmId: ...

    @property
    def consumer(self) -> ConsumerId: ...

    @property
    def card(self) -> VirtualCryptoCard: ...

    @property
    def keys(self) -> KeyStore: ...

    @property
    def transfer(self) -> KeyTransfer: ...

    @property
    def key_life(self) -> KeyLife: ...

    async def authorise(self, peer: Peer, right: Right) -> None:
        """That ``peer`` has a Ukey-signed statement granting ``right``.

        Raises ``ApplicationUnknown``, ``ApplicationRevoked``, ``StatementExpired``, ``NotPermitted`` or ``ForeignConsumer``.
        """
        ...

    async def may_some(self, peer: Peer, right: Right) -> bool:
        """Whether ``peer`` has ``right`` for every key; without, some grant must give it for some: ``authorise_key`` tells which.

        Raises as ``authorise``.
        """
        ...

    async def authorise_key(self, peer: Peer, right: Right, key: KeyId, context: bytes) -> None:
        """That ``peer`` may do this with this key in this context. It counts as one operation.

        Raises as ``authorise``, ``GrantExpired``, ``ContextNotGranted`` or ``RateLimited``.
        """
        ...

    def note_use(self, peer: Peer, operation: str, key: str, version: int, outcome: str) -> None:
        """An operation on data has ended, for the audit log; ``key`` is empty where there is none, ``outcome`` ok or a code."""
        ...

    async def ask_use(self, peer: Peer, *uses: tuple[str, str, int]) -> None:
        """These (operation, key, version) are about to begin. Where each is to be in the audit log it is when this returns.

        Raises ``KmcUnavailable``.
        """
        ...

    async def usage(self, key: KeyId) -> KeyUsage:
        """What is known of a key's use: the KMC's and the VCMs' word. Raises ``KmcUnavailable``."""
        ...

    async def delegate(self, peer: Peer, key: KeyId, statement: Signed) -> Delegation:
        """``peer`` delegates, or takes back; the escrow has it then.

        Raises ``StatementForged``, ``StatementReplayed``, ``DelegationTooWide``, ``ApplicationUnknown`` (the delegate), ``Malformed``,
        ``ForeignConsumer`` or ``LimitReached``.
        """
        ...

    async def delegations(self, peer: Peer, key: KeyId) -> DelegationsReply:
        """Those of a key that ``peer`` gave or got; with the right to show every key, all."""
        ...

    async def login(self, peer: Peer, statement: Signed) -> LoginReply:
        """Creation step 8. Raises ``ServiceOff`` until CMK and lease are there, ``LoginRefused`` when it may not be."""
        ...

    async def endpoints(self) -> Sequence[str]: ...

    async def audit(self, query: AuditQuery) -> AuditLog:
        """Of this consumer, whatever the query says."""
        ...
