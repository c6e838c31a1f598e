"""Every error a caller can meet, one tree, each with a stable code and an HTTP status.

::

    CipherfleetError
    ├── BadInput (400)        malformed, truncated, too-large, out-of-order, unsupported
    ├── Unauthorised (401)    certificate-*, challenge-*, token-stale, statement-forged, pin-wrong, login-refused
    ├── Forbidden (403)       not-permitted, grant-expired, delegation-*, rate-limited, application-*, *-revoked, foreign-*, policy-refused
    ├── NotFound (404)        key-unknown, vcm-unknown, consumer-unknown, route-unknown
    ├── Conflict (409)        exists, key-disabled, state-*, mark-mismatch, wrong-key-type
    ├── Tampered (422)        ciphertext-*, escrow-*, signature-invalid, mac-invalid, checkpoint-*
    ├── ServiceOff (503)      ukey-absent, lease-*, service-off, *-unavailable, no-capacity
    └── Environment (500)     port-taken, state-not-writable, state-newer, disk-full

A leaf states its code once, here. The message says what is wrong with which thing, the hint what to do about it.
Neither ever holds a secret. Foreign exceptions are mapped at the seam of the driver that met them.
"""

from typing import ClassVar

import msgspec


class ErrorBody(msgspec.Struct, frozen=True):
    """The wire form: ``{"error": {"code", "message", "hint"}}``."""

    code: str
    message: str
    hint: str = ""


class ErrorReply(msgspec.Struct, frozen=True):
    error: ErrorBody


class CipherfleetError(Exception):
    """The root. ``code`` is stable, ``status`` is the HTTP status of a reply that carries it."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    default_hint: ClassVar[str] = ""
    _by_code: ClassVar[dict[str, type["CipherfleetError"]]] = {}

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "code" in cls.__dict__:
            if cls.code in CipherfleetError._by_code:
                raise RuntimeError(f"error code {cls.code} is defined twice")
            CipherfleetError._by_code[cls.code] = cls

    def __reduce__(self) -> tuple[type["CipherfleetError"], tuple[str, str]]:
        return type(self), (self.message, self.hint)

    def to_reply(self) -> ErrorReply:
        return ErrorReply(ErrorBody(self.code, self.message, self.hint))

    @staticmethod
    def from_body(body: ErrorBody) -> "CipherfleetError":
        """The error a peer sent, as the class of its code (an unknown code becomes ``peer-error``)."""
        kind = CipherfleetError._by_code.get(body.code)
        if kind is None:
            return PeerError(f"{body.code}: {body.message}", body.hint)
        return kind(body.message, body.hint)

    @staticmethod
    def from_text(text: str) -> "CipherfleetError":
        """The error that a report tells as ``code: message``; without a known code it is ``service-off``."""
        code, _, message = text.partition(": ")
        kind = CipherfleetError._by_code.get(code, ServiceOff)
        return kind(message if kind.code == code else text)

    @staticmethod
    def codes() -> dict[str, type["CipherfleetError"]]:
        """All stable codes, for the reference and the tests."""
        return dict(CipherfleetError._by_code)


class Internal(CipherfleetError):
    """A defect of ours; the peer learns no detail."""

    code = "internal"


class PeerError(CipherfleetError):
    code = "peer-error"
    status = 502


# -- bad input ---------------------------------------------------------------------------------------------------------


class BadInput(CipherfleetError):
    status = 400


class Malformed(BadInput):
    code = "malformed"


class Truncated(BadInput):
    code = "truncated"
    default_hint = "the input ends too early; send all of it"


class TooLarge(BadInput):
    code = "too-large"
    status = 413


class OutOfOrder(BadInput):
    code = "out-of-order"


class Unsupported(BadInput):
    code = "unsupported"


class KeyMaterialInvalid(BadInput):
    code = "key-material-invalid"


class ImportTokenInvalid(BadInput):
    """It is not of this consumer's cards, was changed, or is for another key."""

    code = "import-token-invalid"


class ExponentWeak(KeyMaterialInvalid):
    """An RSA key whose public exponent is even, or below 65537 (FIPS 186-5, section 5.1)."""

    code = "rsa-exponent-weak"
    default_hint = "FIPS 186-5 asks for an odd exponent of 65537 or more"


class PublicKeyInvalid(BadInput):
    """Somebody's public key is none: no point of the curve, of another curve, or not to be read."""

    code = "public-key-invalid"


class SharedSecretZero(BadInput):
    """A point of low order was given: what would be agreed on is known to everybody (RFC 7748, section 6)."""

    code = "shared-secret-zero"


class AlgorithmUnknown(BadInput):
    code = "algorithm-unknown"
    default_hint = "see: cipherfleet algorithms"


# -- who are you -------------------------------------------------------------------------------------------------------


class Unauthorised(CipherfleetError):
    status = 401


class CertificateInvalid(Unauthorised):
    code = "certificate-invalid"


class CertificateExpired(Unauthorised):
    code = "certificate-expired"


class CertificateRevoked(Unauthorised):
    code = "certificate-revoked"


class ChallengeUnknown(Unauthorised):
    code = "challenge-unknown"


class ChallengeReplayed(Unauthorised):
    code = "challenge-replayed"


class TokenStale(Unauthorised):
    code = "token-stale"


class StatementForged(Unauthorised):
    code = "statement-forged"


class StatementReplayed(Unauthorised):
    code = "statement-replayed"


class StatementExpired(Unauthorised):
    code = "statement-expired"


class PinWrong(Unauthorised):
    code = "pin-wrong"
    default_hint = "give the Ukey's PIN with --pin-file or at the prompt"


class LoginRefused(Unauthorised):
    code = "login-refused"


# -- may you -----------------------------------------------------------------------------------------------------------


class Forbidden(CipherfleetError):
    status = 403


class NotPermitted(Forbidden):
    code = "not-permitted"


class ApplicationUnknown(Forbidden):
    code = "application-unknown"
    default_hint = "the consumer signs an application in with: cipherfleet app add"


class ApplicationRevoked(Forbidden):
    code = "application-revoked"


class ConsumerRevoked(Forbidden):
    """The operator revoked this consumer's Ukey, for good."""

    code = "consumer-revoked"


class UkeyRevoked(Forbidden):
    """This Ukey was revoked; the consumer's other ones go on."""

    code = "ukey-revoked"


class ForeignConsumer(Forbidden):
    code = "foreign-consumer"


class GrantExpired(Forbidden):
    code = "grant-expired"
    default_hint = "the consumer grants it anew with: cipherfleet app grant"


class DelegationTooWide(Forbidden):
    """An application delegates more than a grant of its own, which the Ukey made delegable, gives it."""

    code = "delegation-too-wide"


class ContextNotGranted(Forbidden):
    """The grant is bound to an encryption context, and this is another."""

    code = "context-not-granted"


class RateLimited(Forbidden):
    """More operations than the grant allows. ``wait_s``: seconds until there is one, if it is known."""

    code = "rate-limited"
    status = 429

    def __init__(self, message: str, hint: str = "", *, wait_s: float = 0.0) -> None:
        super().__init__(message, hint or (f"wait {wait_s:.1f} s" if wait_s else ""))
        self.wait_s = wait_s


class PolicyRefused(Forbidden):
    code = "policy-refused"


# -- what is not there -------------------------------------------------------------------------------------------------


class NotFound(CipherfleetError):
    status = 404


class KeyUnknown(NotFound):
    code = "key-unknown"


class AliasUnknown(NotFound):
    code = "alias-unknown"


class VcmUnknown(NotFound):
    code = "vcm-unknown"


class ConsumerUnknown(NotFound):
    code = "consumer-unknown"


class UkeyUnknown(NotFound):
    code = "ukey-unknown"
    default_hint = "see: cipherfleet ukey list"


class MachineUnknown(NotFound):
    code = "machine-unknown"


class RouteUnknown(NotFound):
    code = "route-unknown"


# -- not in this state -------------------------------------------------------------------------------------------------


class Conflict(CipherfleetError):
    status = 409


class Exists(Conflict):
    code = "exists"


class KeyDisabled(Conflict):
    code = "key-disabled"
    default_hint = "enable it with: cipherfleet key enable"


class KeyDeleted(Conflict):
    code = "key-deleted"


class SecondPersonNeeded(Conflict):
    """The key is under the two-person rule; this consent is kept until another application wants the same."""

    code = "second-person-needed"
    default_hint = "another application that may manage the key asks for the same within a week"


class KeyPendingDeletion(Conflict):
    """Its deletion is scheduled, so nothing is done with it; its material is still there."""

    code = "key-pending-deletion"
    default_hint = "until it is destroyed, get it back with: cipherfleet key cancel-deletion"


class KeyVersionTrimmed(Conflict):
    """This version's material is destroyed, and with it what only it could decrypt or verify."""

    code = "key-version-trimmed"


class KeyNotYetValid(Conflict):
    code = "key-not-yet-valid"


class KeyExpired(Conflict):
    """Its time to protect anything is over; what it protected is still read and checked."""

    code = "key-expired"
    default_hint = "re-encrypt what it encrypted to another key"


class KeyNotExportable(Conflict):
    """A key leaves the card only if it was made for that."""

    code = "key-not-exportable"


class ImportTokenExpired(Conflict):
    code = "import-token-expired"
    default_hint = "ask for new import parameters"


class ImportTokenUsed(Conflict):
    """A token is good for one import."""

    code = "import-token-used"
    default_hint = "ask for new import parameters"


class KeyUsesSpent(Conflict):
    """As many uses as the key may have are reserved by VCMs."""

    code = "key-uses-spent"
    default_hint = "use another key, or raise the limit with: cipherfleet key update --max-uses"


class WrongKeyType(Conflict):
    code = "wrong-key-type"


class KeyExhausted(Conflict):
    """The mode's limit of messages under one key version is reached (SP 800-38D, section 8.3)."""

    code = "key-exhausted"
    default_hint = "rotate the key"


class LimitReached(Conflict):
    code = "limit-reached"


class StateConflict(Conflict):
    """Somebody else changed it first; read it again and retry."""

    code = "state-conflict"


class MarkMismatch(Conflict):
    """The download signal does not match the terminal's mark, so the ciphertext CMK stays on the Ukey."""

    code = "mark-mismatch"


class AlreadyRunning(Conflict):
    code = "already-running"


class NotRunning(Conflict):
    code = "not-running"
    default_hint = "start the cloud with: cipherfleet up"


# -- somebody changed it -----------------------------------------------------------------------------------------------


class Tampered(CipherfleetError):
    status = 422


class CiphertextInvalid(Tampered):
    """Changed, cut, reordered, duplicated or mixed chunks, or another context."""

    code = "ciphertext-invalid"


class CiphertextTruncated(Tampered):
    code = "ciphertext-truncated"


class CiphertextForeignKey(Tampered):
    code = "ciphertext-foreign-key"


class SignatureInvalid(Tampered):
    code = "signature-invalid"


class MacInvalid(Tampered):
    code = "mac-invalid"


class TagTooShort(Tampered):
    """A MAC or authentication tag was cut: a short one is guessed soon (SP 800-107, section 5.3.3)."""

    code = "tag-too-short"


class EscrowRowTampered(Tampered):
    code = "escrow-row-tampered"


class EscrowRowForeign(Tampered):
    """A row that stands under another consumer or key than the one it was wrapped for."""

    code = "escrow-row-foreign"


class EscrowRolledBack(Tampered):
    code = "escrow-rolled-back"
    default_hint = "the key escrow shows an older state than the Ukey has seen; ask the operator which backup was restored"


class CheckpointForged(Tampered):
    code = "checkpoint-forged"


class CmkInvalid(Tampered):
    code = "cmk-invalid"


class SealedForeign(Tampered):
    code = "sealed-foreign"
    default_hint = "it was sealed for another card or VCM: try again"


class CardUntrusted(Tampered):
    code = "card-untrusted"


class CardUnconfirmed(Tampered):
    """The card could not show that it holds this Ukey's share."""

    code = "card-unconfirmed"


class AuditBroken(Tampered):
    code = "audit-broken"


class AuditUnsealed(AuditBroken):
    """Entries that should be under a seal are not, or a seal is missing: seals were deleted, or the KMC could not make them."""

    code = "audit-unsealed"
    default_hint = "look whether the KMC's HSM is there; if it is, somebody deleted seals: compare with what the Ukey remembers"


class BackupInvalid(Tampered):
    code = "backup-invalid"


class ShareInvalid(Tampered):
    """A custodian's share that was changed or cut off, or does not fit the others."""

    code = "share-invalid"
    default_hint = "ask the custodian for the file again, or take another one's"


class ShareForeign(Tampered):
    code = "share-foreign"
    default_hint = "all shares must be of one recovery kit"


class ShareRepeated(Conflict):
    code = "share-repeated"
    default_hint = "each custodian's share counts once"


class SharesTooFew(Conflict):
    code = "shares-too-few"


class BackupTruncated(Tampered):
    code = "backup-truncated"
    default_hint = "the file ends too early; use another copy of it"


# -- not now -----------------------------------------------------------------------------------------------------------


class ServiceUnavailable(CipherfleetError):
    status = 503


class UkeyAbsent(ServiceUnavailable):
    code = "ukey-absent"
    default_hint = "plug the Ukey in and run: cipherfleet terminal --ukey DIR"


class ServiceOff(ServiceUnavailable):
    code = "service-off"
    default_hint = "service is on while the consumer's Ukey is plugged in: cipherfleet terminal --ukey DIR"


class LeaseExpired(ServiceUnavailable):
    code = "lease-expired"
    default_hint = "the Ukey has not been seen within the lease; plug it in"


class LeaseReplayed(Unauthorised):
    code = "lease-replayed"


class LeaseForged(Unauthorised):
    code = "lease-forged"


class LeaseForeign(Unauthorised):
    """A lease for another card or another VCM."""

    code = "lease-foreign"


class LeaseStale(Unauthorised):
    """A lease that arrived too late or after a newer one."""

    code = "lease-stale"


class KmcUnavailable(ServiceUnavailable):
    code = "kmc-unavailable"


class HsmUnavailable(ServiceUnavailable):
    code = "hsm-unavailable"


class ManagementUnavailable(ServiceUnavailable):
    code = "management-unavailable"


class MachineUnavailable(ServiceUnavailable):
    code = "machine-unavailable"


class CardUnavailable(ServiceUnavailable):
    code = "card-unavailable"


class NoCapacity(ServiceUnavailable):
    code = "no-capacity"


class TimedOut(ServiceUnavailable):
    code = "timed-out"
    status = 504


# -- the machine we run on ---------------------------------------------------------------------------------------------


class EnvironmentFault(CipherfleetError):
    status = 500


class PortTaken(EnvironmentFault):
    code = "port-taken"


class StateNotWritable(EnvironmentFault):
    code = "state-not-writable"


class StateNewer(EnvironmentFault):
    code = "state-newer"
    default_hint = "this state was written by a newer cipherfleet; upgrade, or choose another --state"


class DiskFull(EnvironmentFault):
    code = "disk-full"


class FileProblem(EnvironmentFault):
    code = "file-problem"


class PassphraseWrong(EnvironmentFault):
    code = "passphrase-wrong"


class IsolationUnavailable(EnvironmentFault):
    code = "isolation-unavailable"


class UkeyInvalid(EnvironmentFault):
    code = "ukey-invalid"
