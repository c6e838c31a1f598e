"""The key escrow's rows, their log and the checkpoint over it: what the VCM stores and how a rollback shows.

Every change of a row appends an entry to the consumer's log; the log's head is a hash chain over all entries. The HSM
signs (sequence, head), the Ukey keeps the newest one it saw, and a VCM replays the chain before it trusts a row (see
``escrow_state``). So a row that was removed, edited, moved or set back does not pass, not even by the one who runs the database.

Whoever runs the HSM, too, can append what was written before, or what was made and kept back. What the consumer's side
signed and sealed says what it follows (a statement's sequence, ``KeyAttributes.previous``), so that is found as well.
"""

import hashlib
import re
from enum import StrEnum

import msgspec

from cipherfleet.contract.errors import EscrowRolledBack, EscrowRowTampered, Malformed
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId, UkeyId, is_slug
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.statements import Signed

FIRST_EPOCH = 1
APPLICATION, UKEY, EPOCH, POLICY = "application/", "ukey/", "epoch/", "policy/"
DELEGATION = "delegation/"
NUMBERED = (APPLICATION, UKEY, EPOCH, POLICY)
"""What the consumer's Ukeys sign about these has numbers of one series."""


class KeyState(StrEnum):
    ENABLED = "enabled"
    DISABLED = "disabled"
    PENDING_DELETION = "pending-deletion"
    DELETED = "deleted"


class Consent(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first of two persons' word: ``action`` is what it is for, ``by`` whose it is, ``until`` unix seconds."""

    action: str = ""
    by: str = ""
    until: float = 0.0


NO_CONSENT = Consent()


class KeyAttributes(msgspec.Struct, frozen=True, omit_defaults=True):
    """Row version 0 of a key: what is true of the key as a whole. ``revision`` grows with every change.

    ``previous`` is the digest of the row that this one replaces, empty for the first. Times are unix seconds; 0 is "never" or "not set".
    """

    algorithm: str
    state: KeyState
    current_version: int
    revision: int
    created_at: float
    label: str = ""
    created_by: str = ""
    previous: bytes = b""
    bare: bool = False
    aliases: tuple[str, ...] = ()  # each has a row of its own, too: ``AliasAttributes``
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    delete_at: float = 0.0  # when its material is to be destroyed, or was
    oldest_version: int = 1  # versions below are trimmed: destroyed
    terms: KeyTerms = NO_TERMS
    rotated_at: float = 0.0  # when the current version was made, 0: at ``created_at``
    used: int = 0  # uses reserved by VCMs, of all versions
    version_used: int = 0  # of the current version
    consent: Consent = NO_CONSENT


class AliasAttributes(msgspec.Struct, frozen=True, tag_field="kind", tag="alias"):
    """Row version 0 under ``alias_id``: which key a name is for. ``target`` is empty once the alias is deleted."""

    name: str
    target: str
    revision: int
    previous: bytes = b""


_ALIAS = b'{"kind":"alias",'


class VersionAttributes(msgspec.Struct, frozen=True):
    """Row version 1, 2, ...: one generation of key material. ``public_key`` is SubjectPublicKeyInfo DER, or empty.

    ``imported``: it was not made in a card. Both are the card's word. ``bare``: what it encrypts is
    what the standard says, not a message of ours.
    """

    algorithm: str
    created_at: float
    public_key: bytes = b""
    imported: bool = False
    bare: bool = False
    exportable: bool = False  # the card gives it out, wrapped
    not_after: float = 0.0  # unix seconds: the card protects nothing with it from then on; 0: for ever


class EscrowRow(msgspec.Struct, frozen=True):
    """One wrapped row. ``attributes`` is JSON of ``KeyAttributes`` or ``AliasAttributes`` (version 0), or ``VersionAttributes``.

    ``wrapped`` is nonce(12) || AES-256-GCM under the CMK's wrapping key, over the key material (version >= 1) or over
    nothing (version 0), with ``associated_data`` of the row. Consumer, key, version and attributes are all authenticated.
    """

    consumer: ConsumerId
    key: KeyId
    version: int
    attributes: bytes
    wrapped: bytes

    @property
    def subject(self) -> str:
        return f"key/{self.key}/{self.version}"


class RowName(msgspec.Struct, frozen=True, array_like=True):
    """Which row: version 0 is the key's attributes."""

    key: KeyId
    version: int

    @property
    def subject(self) -> str:
        return f"key/{self.key}/{self.version}"


class LogEntry(msgspec.Struct, frozen=True, array_like=True):
    """One change: ``subject`` got a row (or statement) whose SHA-256 is ``digest``."""

    sequence: int
    subject: str
    digest: bytes


class RowWrite(msgspec.Struct, frozen=True):
    """A row to store; ``previous`` is the digest of the row it replaces, empty when it must not exist yet."""

    row: EscrowRow
    previous: bytes = b""


class StatementEntry(msgspec.Struct, frozen=True):
    """An application's newest Ukey-signed statement, as the escrow keeps it. ``sequence`` is the statement's own."""

    name: ApplicationName
    statement: Signed
    sequence: int

    @property
    def subject(self) -> str:
        return f"{APPLICATION}{self.name}@{self.sequence}"


class DelegationName(msgspec.Struct, frozen=True, array_like=True):
    """Who delegated which key to whom: of each there is one newest statement."""

    delegator: ApplicationName
    delegate: ApplicationName
    key: KeyId

    def subject(self, sequence: int) -> str:
        """The log's name for the statement; ``sequence`` is its own."""
        return f"{DELEGATION}{self.delegator}/{self.delegate}/{self.key}@{sequence}"


class Seen(msgspec.Struct, frozen=True):
    """A point of the log that somebody (the Ukey, a VCM) has already seen."""

    epoch: int
    sequence: int
    head: bytes


def ukey_subject(ukey: UkeyId, sequence: int) -> str:
    """The log's name for a ``UkeyStatement``; ``sequence`` is the statement's own."""
    return f"{UKEY}{ukey}@{sequence}"


def epoch_subject(epoch: int, sequence: int) -> str:
    """The log's name for an ``EpochStatement``; ``sequence`` is the statement's own."""
    return f"{EPOCH}{epoch}@{sequence}"


def policy_subject(name: str, sequence: int) -> str:
    """The log's name for a ``PolicyStatement``; ``sequence`` is the statement's own."""
    return f"{POLICY}{name}@{sequence}"


def epoch_of(subject: str) -> int:
    """The epoch that begins with an entry of this subject, 0 if none does."""
    number, _, _ = subject.removeprefix(EPOCH).partition("@")
    return int(number) if subject.startswith(EPOCH) and number.isdecimal() and len(number) < 11 else 0


def delegation_of(subject: str) -> tuple[DelegationName, int] | None:
    """What an entry of this subject names, if it is written in the one way there is."""
    named, _, number = subject.removeprefix(DELEGATION).partition("@")
    parts = named.split("/")
    if len(parts) != 3 or not number.isascii() or not number.isdigit() or len(number) > 16:
        return None
    delegator, delegate, key = parts
    name = DelegationName(ApplicationName(delegator), ApplicationName(delegate), KeyId(key))
    good = is_slug(delegator) and is_slug(delegate) and re.fullmatch("[0-9a-f]{32}", key) and name.subject(int(number)) == subject
    return (name, int(number)) if good else None


def genesis(consumer: ConsumerId, epoch: int) -> bytes:
    """The head of an empty log (32 bytes)."""
    return hashlib.sha256(f"cipherfleet log v1 {consumer} {epoch}".encode()).digest()


def extend(head: bytes, entry: LogEntry) -> bytes:
    """The head after ``entry``."""
    return hashlib.sha256(head + msgspec.json.encode(entry)).digest()


def associated_data(consumer: ConsumerId, key: KeyId, version: int, attributes: bytes) -> bytes:
    """What the card authenticates with a wrapped row; JSON arrays make the parts unambiguous."""
    return msgspec.json.encode(["cipherfleet row v1", consumer, key, version, attributes])


def row_digest(row: EscrowRow) -> bytes:
    return hashlib.sha256(msgspec.json.encode(row)).digest()


def statement_digest(statement: Signed) -> bytes:
    """Over kind and payload: a signature can be written in more than one way, what is signed cannot."""
    return hashlib.sha256(msgspec.json.encode([statement.kind, statement.payload])).digest()


def replay(start: Seen, log: tuple[LogEntry, ...]) -> Seen:
    """The point after ``log``, which must continue ``start`` without a gap.

    Raises ``EscrowRolledBack`` when it does not.
    """
    sequence, head = start.sequence, start.head
    for entry in log:
        sequence += 1
        if entry.sequence != sequence:
            raise EscrowRolledBack(f"the escrow's log lacks entry {sequence}")
        head = extend(head, entry)
    return Seen(start.epoch, sequence, head)


def check_follows(row: EscrowRow, previous: bytes) -> None:
    """That a key's attributes replace what the log has before them (a digest, or empty), and that its material replaces nothing.

    Raises ``EscrowRolledBack`` or ``EscrowRowTampered``.
    """
    if row.version != 0:
        # A sibling that was made and kept back is sealed just as well: the material of a version is the one written first.
        if previous:
            raise EscrowRolledBack(f"row {row.subject} was written a second time")
        return
    try:
        attributes = decode_attributes(row)
    except Malformed as exc:
        raise EscrowRowTampered(f"row {row.subject} cannot be read") from exc
    if isinstance(attributes, VersionAttributes) or attributes.previous != previous:
        raise EscrowRolledBack(f"row {row.subject} was not made to replace the one before it")


def is_destroyed(attributes: KeyAttributes, version: int) -> bool:
    """Whether the material of a version is to be nowhere any more: the row that held it may be missing."""
    return attributes.state is KeyState.DELETED or version < attributes.oldest_version


def was_destroyed(row: EscrowRow, version: int) -> bool:
    """Whether a key's own attributes say so. Raises ``Malformed``."""
    attributes = None if is_alias(row) else decode_attributes(row)
    return isinstance(attributes, KeyAttributes) and is_destroyed(attributes, version)


def is_alias(row: EscrowRow) -> bool:
    """Whether a row of version 0 is an alias', not a key's. The attributes are authenticated byte by byte."""
    return row.version == 0 and row.attributes.startswith(_ALIAS)


def alias_id(name: str) -> KeyId:
    """Under which id an alias has its row: of two who make the same alias at once, the escrow takes one."""
    return KeyId(hashlib.sha256(f"cipherfleet alias v1 {name}".encode()).hexdigest()[:32])


Attributes = KeyAttributes | AliasAttributes | VersionAttributes


def decode_attributes(row: EscrowRow) -> Attributes:
    """The attributes of a row. Raises ``Malformed``."""
    kind: type[Attributes] = VersionAttributes if row.version != 0 else AliasAttributes if is_alias(row) else KeyAttributes
    try:
        return msgspec.json.decode(row.attributes, type=kind)
    except msgspec.MsgspecError as exc:
        raise Malformed(f"attributes of {row.subject} cannot be read") from exc
