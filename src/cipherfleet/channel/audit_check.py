"""Checking an audit log by oneself: the chain of its entries, and the HSM's signatures on points of it."""

from collections.abc import Iterable

import msgspec

from cipherfleet.channel import signing
from cipherfleet.contract.audit import AuditChain, AuditEntry, AuditLog, AuditPoint, AuditQuery, Sealing
from cipherfleet.contract.audit_seals import Tail
from cipherfleet.contract.errors import AuditBroken, AuditUnsealed, Malformed, StatementForged
from cipherfleet.contract.statements import AuditCheckpointStatement, Signed


class AuditVerdict(msgspec.Struct, frozen=True):
    """What was found good: ``verified`` entries, of which the first ``sealed`` are under a checkpoint or the Ukey's memory."""

    consumer: str
    verified: int
    sealed: int
    checkpoints: int
    digest: str  # of the last entry
    ukey: int | None = None  # the entry that the Ukey remembers
    late: int = 0  # entries whose seal came later than the rule says: the HSM was away, or a deleted seal was made anew


def read_audit_checkpoint(signed: Signed, consumer: str, signing_key: bytes) -> AuditCheckpointStatement:
    """Raises ``AuditBroken`` unless the KMC's HSM signed it for this consumer."""
    try:
        statement = signing.verify(signed, AuditCheckpointStatement, [signing_key])
    except (StatementForged, Malformed) as exc:
        raise AuditBroken(f"a checkpoint of the audit log of {consumer or 'the platform'} is not signed by the KMC's HSM") from exc
    if statement.consumer != consumer:
        raise AuditBroken(f"a checkpoint of the audit log of {consumer or 'the platform'} is another consumer's")
    return statement


class AuditCheck:
    """One log from its first entry to its last. ``seen``: what the Ukey remembers of it.

    Every method raises ``AuditBroken``, whose message names the first entry that is not as it was written. The rule by which the log
    is sealed comes with its pages; ``AuditUnsealed`` says that seals are missing.
    """

    def __init__(self, consumer: str, signing_key: bytes, *, seen: AuditPoint | None = None) -> None:
        self._consumer, self._key, self._seen = consumer, signing_key, seen
        self._chain = AuditChain(consumer, () if seen is None else (seen,))
        self._seals: dict[int, AuditCheckpointStatement] = {}
        self._last = 0  # the newest seal that was reached
        self._tail, self._late = Tail(), 0
        self.sealing: Sealing | None = None

    def page(self, page: AuditLog) -> AuditQuery | None:
        """The next page of an unfiltered log; what to ask for next, nothing when this was the last."""
        self.sealing = page.sealing
        self.checkpoints(page.checkpoints)
        for entry in page.entries:
            self.entry(entry)
        head = page.head
        if head is not None and head.consumer != self._consumer:
            raise AuditBroken("the end of another consumer's audit log was shown")
        if page.entries and head is not None and head.sequence > self._chain.point.sequence:
            return AuditQuery(after=self._chain.point.sequence)
        self._chain.end(AuditPoint(head.sequence, head.digest) if head is not None else None)
        return None

    def checkpoints(self, signed: Iterable[Signed]) -> None:
        for one in signed:
            statement = read_audit_checkpoint(one, self._consumer, self._key)
            self._seals[statement.sequence] = statement
            self._chain.expect(AuditPoint(statement.sequence, statement.digest))

    def entry(self, entry: AuditEntry) -> None:
        self._chain.add(entry)
        self._tail.add(entry, self.sealing)
        if self._chain.sealed == entry.sequence:
            self._sealed(entry.sequence)

    def _sealed(self, sequence: int) -> None:
        """A seal, or what the Ukey remembers, is on this entry."""
        statement = self._seals.get(sequence)
        if statement is not None:
            if statement.previous != self._last:
                missing = max(statement.previous, self._last)
                raise AuditUnsealed(f"the audit log of {self._whose} lacks its seal on entry {missing}, before the one on {sequence}")
            self._last = sequence
            if self.sealing is not None and self._tail.overdue(self.sealing, statement.at):
                self._late += self._tail.count
        self._tail.clear()

    @property
    def _whose(self) -> str:
        return self._consumer or "the platform"

    def end(self) -> AuditVerdict:
        """Nothing follows."""
        self._chain.end()
        self._check_tail()
        point = self._chain.point
        seen = None if self._seen is None else self._seen.sequence
        return AuditVerdict(self._consumer, point.sequence, self._chain.sealed, len(self._seals), point.digest, seen, self._late)

    def _check_tail(self) -> None:
        """What is not sealed yet is no older, and no more, than the rule allows."""
        if not self._tail.count:
            return
        if self.sealing is None:
            raise AuditUnsealed(f"it is not said by which rule the audit log of {self._whose} is sealed")
        if self._tail.overdue(self.sealing, self.sealing.at):
            first = self._chain.sealed + 1
            raise AuditUnsealed(
                f"entries {first} to {self._chain.point.sequence} of the audit log of {self._whose} are under no seal, and should have been"
                f" {self._tail.late_s(self.sealing, self.sealing.at):.0f} s ago: seals were deleted, or the KMC could not make them"
            )
