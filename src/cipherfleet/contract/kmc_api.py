"""The key management center: its routes, by the role that may call them, and their messages.

::

    operator   POST   /v1/certificates/{role}/{id}         CertificateRequest -> Chain        platform processes, operator
    operator   POST   /v1/consumers                        EnrolRequest -> EnrolReply         (consumer is pending)
    operator   POST   /v1/consumers/{consumer}/confirm     EnrolConfirmation -> Done          idempotent; exists for another Ukey
    operator   DELETE /v1/consumers/{consumer}             -> Done                            (only while pending)
    operator   POST   /v1/consumers/{consumer}/revoke-ukey -> Done                            the Ukey is stolen: off for good; idempotent
    operator   GET    /v1/consumers                        -> ConsumerList
    operator   GET    /v1/applications                     -> ApplicationList
    operator   POST   /v1/applications/{consumer}/{name}/revoke -> Done
    operator   GET    /v1/audit?consumer=&after=&since=&event=&key=&newest=&limit=  -> AuditLog
    operator   GET    /v1/audit/heads                      -> AuditHeads                      where each log ends
    management POST   /v1/identity/challenges              ChallengeRequest -> Challenge
    management POST   /v1/identity/verify                  Signed[IdentityRequest] -> IdentityReply   (creation, deletion step 2)
    management PUT    /v1/vcms/{vcm}                       VcmAuthorisation -> Done           binds token, VCM, machine
    management DELETE /v1/vcms/{vcm}                       -> Done                            revoke all of it; idempotent
    management DELETE /v1/tokens/{token_id}                -> Done                            idempotent
    management GET    /v1/vcms/{vcm}                       -> VcmKmcState
    management POST   /v1/audit/events                     ManagementEvents -> Done           its decisions, for the log; idempotent
    management POST   /v1/consumers/{consumer}/revoke      -> Done                            service off: revoke everything
    machine    POST   /v1/cards                            CardRequest -> CardReply           certify a freshly started card
    machine    POST   /v1/vcms/{vcm}/certificate           VcmCertificateRequest -> Chain     (flow step e)
    vcm        POST   /v1/certificate                      CertificateRequest -> Chain        renewal
    vcm        GET    /v1/escrow?after=                    -> LogPage                         (flow step g)
    vcm        POST   /v1/escrow                           EscrowWrite -> EscrowReceipt
    vcm        POST   /v1/escrow/rows                      RowsRequest -> RowsReply           the rows that are named
    vcm        GET    /v1/escrow/rows?after=               -> RowsReply                       all rows, by key and version, in pages
    vcm        POST   /v1/escrow/search                    KeySearch -> KeysFound             a hint: each row is checked by who asks
    vcm        POST   /v1/escrow/statements                StatementsRequest -> StatementsReply
    vcm        POST   /v1/escrow/delegations               DelegationsRequest -> DelegationsFound    what applications have delegated
    vcm        POST   /v1/delegations                      DelegationRequest -> EscrowReceipt        an application delegates
    vcm        GET    /v1/escrow/receipts/{key}            -> Signed[DestructionStatement]    of material that was destroyed
    terminal   GET    /v1/escrow?after=                    -> LogPage                         for a Ukey that is far behind
    vcm        GET    /v1/audit                            -> AuditLog                        as the operator; own consumer only
    vcm        POST   /v1/usage                            UsageReport -> Done                operations on data, counted
    vcm        GET    /v1/usage/{key}                      -> KeyUsage
    vcm        WS     /v1/vcm                              VcmToKmc / KmcToVcm
    terminal   GET    /v1/audit                            -> AuditLog                        own consumer only
    terminal   WS     /v1/terminal                         TerminalToKmc / KmcToTerminal
    terminal   POST   /v1/applications                     ApplicationRequest -> ApplicationReply
    terminal   GET    /v1/ukeys/statements                 -> UkeyStatements                  who may sign for the consumer, and since when
    terminal   POST   /v1/ukeys                            UkeyRequest -> UkeyReply           a spare Ukey comes in, or one goes
    terminal   POST   /v1/policies                         PolicyRequest -> PolicyReply       what the consumer permits itself
    terminal   POST   /v1/epochs                           EpochRequest -> LogPage            a restore is accepted; service ends
    terminal   GET    /v1/epochs                           -> EpochStatements
    operator   GET    /v1/ukeys?consumer=                  -> UkeyList
    terminal   GET    /v1/ukeys                            -> UkeyList                        own consumer only
    operator   POST   /v1/ukeys/{consumer}/{ukey}/revoke   -> Done                            one of several is stolen; idempotent
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from cipherfleet.contract.audit import UsageReport
from cipherfleet.contract.escrow import DelegationName, EscrowRow, LogEntry, RowName, RowWrite, StatementEntry
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, CardId, ConsumerId, KeyId, MachineId, Serial, TokenId, UkeyId, VcmId
from cipherfleet.contract.messages import Chain, Message
from cipherfleet.contract.statements import Purpose, Right, Signed

MAX_ROW_NAMES = 512
MAX_STATEMENT_NAMES = 256
MAX_KEYS_FOUND = 1000


class EnrolRequest(Message, frozen=True):
    """A consumer is enrolled; both keys were made on the Ukey. ``*_csr``: PKCS#10, DER."""

    consumer: ConsumerId
    identity_csr: bytes
    channel_csr: bytes


class EnrolReply(Message, frozen=True):
    """What goes onto the Ukey, and only there: ``ciphertext_cmk`` is the HSM share wrapped under the root key."""

    identity: Chain
    channel: Chain
    root: bytes
    domain: bytes
    kmc_signing_key: bytes  # SubjectPublicKeyInfo DER: signs checkpoints and leases
    ciphertext_cmk: bytes
    checkpoint: Signed


class EnrolConfirmation(Message, frozen=True):
    """The Ukey with this serial is written: of several enrolments of one name, the one that is confirmed."""

    ukey: str


class ConsumerEntry(Message, frozen=True):
    name: ConsumerId
    state: str  # pending | enrolled | revoked
    enrolled_at: float
    keys: int
    applications: int


class ConsumerList(Message, frozen=True):
    consumers: tuple[ConsumerEntry, ...]


class ApplicationEntry(Message, frozen=True):
    name: ApplicationName
    consumer: ConsumerId
    state: str  # active | revoked | expired
    rights: tuple[Right, ...]
    not_after: int
    serial: Serial
    grants: tuple[Grant, ...] = ()


class ApplicationList(Message, frozen=True):
    applications: tuple[ApplicationEntry, ...]


class ChallengeRequest(Message, frozen=True):
    consumer: ConsumerId


class Challenge(Message, frozen=True):
    """``nonce``: 32 bytes, to be answered once within ``expires_s``."""

    nonce: bytes
    expires_s: float


class IdentityReply(Message, frozen=True):
    """Identity true. For a build: the new ``user_vcm_token`` (32 bytes, KMC keeps its hash) and the download mark."""

    consumer: ConsumerId
    purpose: Purpose
    vcm: VcmId | None
    token_id: TokenId | None = None
    token: bytes = b""
    mark: bytes = b""


class VcmAuthorisation(Message, frozen=True):
    """``address``: host:port the VCM serves on, as in the machine's ``BuildOrder``."""

    consumer: ConsumerId
    machine: MachineId
    token_id: TokenId
    address: str


class VcmKmcState(Message, frozen=True):
    certified: bool
    connected: bool
    released: bool
    serving: bool


class CardRequest(Message, frozen=True):
    """``csr`` is over the RSA-3072 transport key (OAEP); ``hpke_public_key`` = ML-KEM-768 (1184) || X25519 (32)."""

    card: CardId
    csr: bytes
    hpke_public_key: bytes


class CardReply(Message, frozen=True):
    chain: Chain
    kmc_signing_key: bytes


class VcmCertificateRequest(Message, frozen=True):
    csr: bytes
    token: bytes
    card: CardId


class EscrowWrite(Message, frozen=True):
    """All rows are committed together, or none."""

    writes: tuple[RowWrite, ...]
    actor: str = ""
    event: str = ""


class EscrowReceipt(Message, frozen=True):
    """Committed to disk. ``log`` holds the new entries, in order."""

    log: tuple[LogEntry, ...]


class LogPage(Message, frozen=True):
    """Entries after the one that was named; on the last page the HSM's word on where the log stands."""

    log: tuple[LogEntry, ...]
    checkpoint: Signed | None = None


class RowsRequest(Message, frozen=True):
    """At most ``MAX_ROW_NAMES``."""

    rows: tuple[RowName, ...]


class RowsReply(Message, frozen=True):
    """Those that are there; whoever asks checks each against the log. ``end``: of all rows in pages, these are the last."""

    rows: tuple[EscrowRow, ...]
    end: bool = False


class KeySearch(Message, frozen=True):
    """Keys whose label begins with ``label``, of that state and algorithm, that have all of ``terms``: empty is any.

    In the order of creation; with a ``label`` in the order of labels. ``after``: where the last page ended.
    """

    label: str = ""
    state: str = ""
    algorithm: str = ""
    terms: tuple[str, ...] = ()
    after: tuple[str, int] | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_KEYS_FOUND)] = 100


class KeysFound(Message, frozen=True):
    """``after``: where the next page begins, if there may be one."""

    keys: tuple[KeyId, ...]
    after: tuple[str, int] | None = None


class StatementsRequest(Message, frozen=True):
    """At most ``MAX_STATEMENT_NAMES``."""

    names: tuple[ApplicationName, ...]


class StatementsReply(Message, frozen=True):
    statements: tuple[StatementEntry, ...]


class DelegationRequest(Message, frozen=True):
    """``statement``: a ``DelegationStatement``, signed by the delegator."""

    statement: Signed


class DelegationsRequest(Message, frozen=True):
    """At most ``MAX_STATEMENT_NAMES``."""

    names: tuple[DelegationName, ...]


class DelegationsFound(Message, frozen=True):
    """The newest statements of those that are there, in no order."""

    statements: tuple[Signed, ...]


class VcmToKmc(msgspec.Struct, frozen=True, tag_field="type"):
    """Frames that a VCM sends."""


class CardReady(VcmToKmc, frozen=True):
    """step e: this VCM's vCC is up on ``card`` and waits for the CMK."""

    card: CardId


class CmkLoaded(VcmToKmc, frozen=True):
    """Both shares are combined in the card."""


class LeaseWanted(VcmToKmc, frozen=True):
    card: CardId
    nonce: bytes


class LastUses(VcmToKmc, frozen=True):
    """A VCM that ends: what its applications did and it had not reported. Taken as ``POST /v1/usage``, also right after ``Revoked``."""

    report: UsageReport


class Serving(VcmToKmc, frozen=True):
    """step h."""


class CmkRefused(VcmToKmc, frozen=True):
    code: str
    message: str


class KmcToVcm(msgspec.Struct, frozen=True, tag_field="type"):
    """Frames that the KMC sends to a VCM."""


class CmkDelivered(KmcToVcm, frozen=True):
    """step f: both shares, for the card to combine."""

    wrapped_hsm_share: bytes
    sealed_ukey_share: bytes


class LeaseGranted(KmcToVcm, frozen=True):
    lease: Signed


class EscrowChanged(KmcToVcm, frozen=True):
    """Another VCM of the consumer, or the Ukey, changed the escrow."""

    sequence: int


class CertificatesRevoked(KmcToVcm, frozen=True):
    """Close these peers' connections now, and refuse them from now on. The first frame after connecting lists all."""

    serials: tuple[Serial, ...]


class Revoked(KmcToVcm, frozen=True):
    """Service is off: drop the keys, close everything, end."""

    reason: str


class TerminalToKmc(msgspec.Struct, frozen=True, tag_field="type"):
    """Frames that a terminal sends to the KMC."""


class CmkReleased(TerminalToKmc, frozen=True):
    """step f: the ciphertext CMK and the Ukey share sealed to the card, for one VCM."""

    vcm: VcmId
    ciphertext_cmk: bytes
    sealed_ukey_share: bytes


class ReleaseRefused(TerminalToKmc, frozen=True):
    vcm: VcmId
    code: str
    message: str


class LeaseSigned(TerminalToKmc, frozen=True):
    lease: Signed


class UkeyRemoved(TerminalToKmc, frozen=True):
    """The Ukey is gone: revoke everything of this consumer at once."""


class KmcToTerminal(msgspec.Struct, frozen=True, tag_field="type"):
    """Frames that the KMC sends to a terminal."""


class DownloadSignal(KmcToTerminal, frozen=True):
    """step f: the CMK download signal. ``log`` continues from what the terminal was told last, first from what it said in ``?since=``."""

    vcm: VcmId
    mark: bytes
    card: CardId
    card_chain: bytes  # PEM, leaf first
    checkpoint: Signed
    log: tuple[LogEntry, ...]


class LeaseRequested(KmcToTerminal, frozen=True):
    """The card's nonce, to be signed while the Ukey is seen; the newest checkpoints, of escrow and audit log, ride along."""

    vcm: VcmId
    card: CardId
    nonce: bytes
    checkpoint: Signed | None = None
    log: tuple[LogEntry, ...] = ()
    audit: Signed | None = None


class TerminalRefused(KmcToTerminal, frozen=True):
    """The KMC no longer serves this terminal; the connection closes."""

    code: str
    message: str


class ApplicationRequest(Message, frozen=True):
    """A Ukey-signed ``ApplicationStatement`` and the CSR (DER) whose key it names; ``since``: how much of the log the Ukey saw."""

    statement: Signed
    csr: bytes
    since: int = 0


class ApplicationReply(Message, frozen=True):
    """The certificate (empty after a signing out), and that the statement is in the escrow: ``log`` continues from ``since``."""

    chain: Chain
    checkpoint: Signed
    log: tuple[LogEntry, ...]


class UkeyEntry(Message, frozen=True):
    """``label``: spare, or which recovery kit. ``revoked_by``: consumer or operator, empty while it is active."""

    ukey: UkeyId
    consumer: ConsumerId
    state: str  # active | revoked
    added_at: float
    label: str
    revoked_by: str = ""


class UkeyList(Message, frozen=True):
    ukeys: tuple[UkeyEntry, ...]


class UkeyStatements(Message, frozen=True):
    """All ``UkeyStatement`` of the consumer, oldest first; ``newest`` is the last number of a statement that the KMC knows of.

    ``policy``: the newest ``PolicyStatement``, if there ever was one.
    """

    statements: tuple[Signed, ...]
    newest: int
    policy: Signed | None = None


class UkeyRequest(Message, frozen=True):
    """A ``UkeyStatement``, and for a new Ukey the requests (PKCS#10, DER) for its two keys."""

    statement: Signed
    identity_csr: bytes = b""
    channel_csr: bytes = b""
    since: int = 0


class UkeyReply(Message, frozen=True):
    """The certificates (empty after a revocation), and that the statement is in the escrow: ``log`` continues from ``since``."""

    identity: Chain
    channel: Chain
    checkpoint: Signed
    log: tuple[LogEntry, ...]


class PolicyRequest(Message, frozen=True):
    """A Ukey-signed ``PolicyStatement``; ``since``: how much of the log the Ukey saw."""

    statement: Signed
    since: int = 0


class PolicyReply(Message, frozen=True):
    """That the statement is in the escrow: ``log`` continues from ``since``."""

    checkpoint: Signed
    log: tuple[LogEntry, ...]


class EpochRequest(Message, frozen=True):
    """A Ukey-signed ``EpochStatement``. The answer is the log after what it accepts."""

    statement: Signed


class EpochStatements(Message, frozen=True):
    """All ``EpochStatement`` of the consumer, oldest first."""

    statements: tuple[Signed, ...]
