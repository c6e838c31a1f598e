"""A consumer's audit log: its entries, how they chain, and what a check of the whole needs. Pure: used by KMC, client and offline alike.

**The encoding that is hashed.** An entry's digest is SHA-256 over the previous entry's digest (32 bytes) and the JSON array
``["cipherfleet audit v2", sequence, at, consumer, actor, event, subject, outcome, count]``: UTF-8 without spaces, integers in
decimals, ``at`` (unix seconds, IEEE 754 double) in its shortest form that reads back as the same number. That is every field but the
digest itself. The first entry follows the digest of the text ``cipherfleet audit v2 CONSUMER``, the operator's own log that of the
empty consumer. The HSM signs points of the chain (``AuditCheckpointStatement``), the Ukey keeps the newest of them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal
from urllib.parse import urlencode

import msgspec
from msgspec import Meta

from cipherfleet.contract.errors import AuditBroken, Malformed
from cipherfleet.contract.ids import SLUG
from cipherfleet.contract.messages import Message
from cipherfleet.contract.statements import Signed

MAX_TEXT = 200
"""Characters of actor, event, subject and outcome; longer ones are cut."""
MAX_PAGE = 2000
"""Entries of one answer, so that it stays below the channel's limit whatever stands in them."""
MAX_EVENTS = 256
"""Decisions of the management platform in one delivery."""
MAX_LATE_S = 600.0
"""How much older than its entry's writing a reported time may be (seconds); what is older, or in the future, gets the time of writing."""
PLATFORM = "-"
"""What the operator's own log is called where a consumer is named."""


class AuditEntry(Message, frozen=True):
    """One entry; ``digest`` chains over all before it (hex SHA-256). ``count``: how many times it happened until ``at``."""

    sequence: int
    at: float
    consumer: str
    actor: str
    event: str
    subject: str
    outcome: str
    digest: str
    count: int = 1


class AuditPoint(msgspec.Struct, frozen=True):
    """A point of a log that is known from elsewhere. ``epoch`` is the escrow's at that time: a restore begins a new one."""

    sequence: int
    digest: str
    epoch: int = 0


class AuditHead(Message, frozen=True):
    """Where a log ends."""

    consumer: str
    sequence: int
    digest: str


class AuditHeads(Message, frozen=True):
    heads: tuple[AuditHead, ...]


class Sealing(Message, frozen=True):
    """The rule of a log, and when it was read: the word of who shows it. Unix seconds."""

    entries: Annotated[int, Meta(ge=1, le=100_000)]
    seconds: Annotated[float, Meta(gt=0, le=86400)]
    at: Annotated[float, Meta(ge=0)]


class AuditLog(Message, frozen=True):
    """A page. Without filters: with the checkpoints up to its end (all later ones when it is the last), and the log's head."""

    entries: tuple[AuditEntry, ...]
    checkpoints: tuple[Signed, ...] = ()
    head: AuditHead | None = None
    signing_key: bytes = b""  # SubjectPublicKeyInfo DER: the KMC's word alone, a consumer has it from its Ukey
    sealing: Sealing | None = None  # without filters: by which rule the log is sealed, and the KMC's time


class AuditQuery(msgspec.Struct, frozen=True):
    """What is asked for. ``after``: entries with a larger number. ``key``: its management and its uses. ``newest``: the last ones."""

    consumer: Annotated[str, Meta(pattern=rf"\A-?\Z|{SLUG}")] = ""  # for the operator: empty is everybody
    after: Annotated[int, Meta(ge=0, le=2**53)] = 0
    since: Annotated[float, Meta(ge=0)] = 0.0  # unix seconds
    event: Annotated[str, Meta(max_length=MAX_TEXT)] = ""
    key: Annotated[str, Meta(max_length=64)] = ""
    newest: bool = False
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE

    @property
    def filtered(self) -> bool:
        return bool(self.since or self.event or self.key or self.newest)

    @property
    def path(self) -> str:
        """``/v1/audit`` with what differs from the defaults."""
        fields = {f.name: getattr(self, f.name) for f in msgspec.structs.fields(self) if getattr(self, f.name) != f.default}
        return "/v1/audit" + (f"?{urlencode({**fields, 'newest': 'true'} if self.newest else fields)}" if fields else "")

    @staticmethod
    def parse(query: Mapping[str, str]) -> "AuditQuery":
        """Raises ``Malformed``."""
        try:
            return msgspec.convert(dict(query), AuditQuery, strict=False)
        except msgspec.ValidationError as exc:
            raise Malformed(f"the question to the audit log is not valid: {exc}") from exc


class DataUse(msgspec.Struct, frozen=True):
    """Operations on data that ended alike. ``key`` is empty for what needs none, or names none that exists; ``at``: of the last one."""

    application: Annotated[str, Meta(max_length=64)]
    key: Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{32})?\Z")]
    version: Annotated[int, Meta(ge=0, le=2**31)]
    operation: Annotated[str, Meta(pattern=r"\A[a-z-]{1,32}\Z")]
    outcome: Annotated[str, Meta(pattern=r"\A[a-z0-9-]{1,64}\Z")]  # ok, or the error's code
    count: Annotated[int, Meta(ge=1, le=2**53)]
    at: float


class UsageReport(Message, frozen=True):
    """What a VCM's applications did since its last report; ``number`` grows, so that one that is sent twice counts once.

    ``recorded``: entries for the log. ``counted``: uses beyond them, for the keys' "last used" alone.
    """

    number: Annotated[int, Meta(ge=1, le=2**53)]
    recorded: Annotated[tuple[DataUse, ...], Meta(max_length=4096)]
    counted: Annotated[tuple[DataUse, ...], Meta(max_length=4096)] = ()


Decider = Literal["operator", "consumer", "scheduler", "management"]
"""On whose behalf the management platform decided; ``management``: by itself."""


class ManagementEvent(msgspec.Struct, frozen=True):
    """What the management platform decided: its word alone. ``consumer`` is empty for what concerns none; ``at``: unix seconds."""

    number: Annotated[int, Meta(ge=1, le=2**53)]
    at: Annotated[float, Meta(ge=0)]
    consumer: Annotated[str, Meta(pattern=rf"\A\Z|{SLUG}")]
    by: Decider
    event: Annotated[str, Meta(pattern=r"\A[a-z-]{1,64}\Z")]  # one of MANAGEMENT_EVENTS
    subject: Annotated[str, Meta(max_length=MAX_TEXT, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
    outcome: Annotated[str, Meta(pattern=r"\A[a-z0-9-]{1,64}\Z")] = "ok"


class ManagementEvents(Message, frozen=True):
    """Decisions in their order, numbered without a gap. ``outbox`` names the series: another one begins wherever it says."""

    outbox: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    events: Annotated[tuple[ManagementEvent, ...], Meta(min_length=1, max_length=MAX_EVENTS)]


class KeyUsage(Message, frozen=True):
    """How often a key was used, and when last (unix seconds): the KMC's word, signed by nobody."""

    uses: int
    last_used_at: float | None


def genesis(consumer: str) -> str:
    """What the first entry of a log chains to."""
    return hashlib.sha256(f"cipherfleet audit v2 {consumer}".encode()).hexdigest()


def digest_of(previous: str, entry: AuditEntry) -> str:
    """Hex SHA-256 over the previous digest and every field of the entry but its own digest; see the module."""
    content = (
        "cipherfleet audit v2",
        entry.sequence,
        entry.at,
        entry.consumer,
        entry.actor,
        entry.event,
        entry.subject,
        entry.outcome,
        entry.count,
    )
    return hashlib.sha256(bytes.fromhex(previous) + msgspec.json.encode(content)).hexdigest()


class AuditChain:
    """One log, checked as its entries come, from the first on. ``known``: points that the log must lead through."""

    def __init__(self, consumer: str, known: Iterable[AuditPoint] = (), *, start: AuditPoint | None = None) -> None:
        self.consumer = consumer
        self.point = start or AuditPoint(0, genesis(consumer))
        self.sealed = 0  # the newest entry that a known point vouched for
        self._known: dict[int, str] = {}
        for point in known:
            self.expect(point)

    @property
    def _whose(self) -> str:
        return self.consumer or "the platform"

    def expect(self, point: AuditPoint) -> None:
        """A checkpoint, or what somebody has seen. Raises ``AuditBroken`` when it contradicts what is known."""
        known = self._known.setdefault(point.sequence, point.digest)
        if point.sequence == self.point.sequence:
            known = self.point.digest
            self.sealed = max(self.sealed, point.sequence)
        if known != point.digest or point.sequence < 0:
            raise AuditBroken(f"the audit log of {self._whose} differs at entry {point.sequence} from what was sealed")

    def add(self, entry: AuditEntry) -> None:
        """The next entry. Raises ``AuditBroken``, which names the first entry that is not as it was written."""
        expected = self.point.sequence + 1
        if entry.consumer != self.consumer:
            raise AuditBroken(f"entry {expected} of the audit log of {self._whose} is another consumer's")
        if entry.sequence > expected:
            raise AuditBroken(f"the audit log of {self._whose} lacks entry {expected}: entry {entry.sequence} stands in its place")
        if entry.sequence < expected:
            raise AuditBroken(f"entry {expected} of the audit log of {self._whose} is a second entry {entry.sequence}: it was put in")
        if entry.digest != digest_of(self.point.digest, entry):
            raise AuditBroken(f"entry {expected} of the audit log of {self._whose} was changed, or put in")
        self.point = AuditPoint(expected, entry.digest)
        if expected in self._known:
            if self._known[expected] != entry.digest:
                raise AuditBroken(f"entry {expected} of the audit log of {self._whose} is not the one that was sealed: it was changed")
            self.sealed = expected

    def end(self, head: AuditPoint | None = None) -> None:
        """No entry follows. Raises ``AuditBroken`` for a log that ends before ``head``, or before a known point."""
        last = max([*self._known, head.sequence if head is not None else 0])
        if last > self.point.sequence:
            missing = self.point.sequence + 1
            raise AuditBroken(f"the audit log of {self._whose} lacks entry {missing}: it was cut off, {last} entries were there")
        if head is not None and head.sequence == self.point.sequence and head.digest != self.point.digest:
            raise AuditBroken(f"entry {head.sequence} of the audit log of {self._whose} is not its last one")
        if head is not None and head.sequence < self.point.sequence:
            raise AuditBroken(f"entry {head.sequence + 1} of the audit log of {self._whose} is behind its end: it was put in")


def verify_audit(entries: Iterable[AuditEntry], heads: Mapping[str, tuple[int, str]] | None = None) -> None:
    """That the entries of each consumer are its whole log, in order, as far as ``heads`` says. Raises ``AuditBroken``."""
    chains: dict[str, AuditChain] = {}
    for entry in entries:
        chains.setdefault(entry.consumer, AuditChain(entry.consumer)).add(entry)
    for consumer, (sequence, digest) in (heads or {}).items():
        chains.setdefault(consumer, AuditChain(consumer)).end(AuditPoint(sequence, digest))
