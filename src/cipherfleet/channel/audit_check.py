"""Checking an audit log by oneself: the chain of its entries, and the HSM's signatures on points of it."""

from collections.abc import Iterable

import msgspec

from cipherfleet.channel import signing
from cipherfleet.contract.audit import AuditChain, AuditEntry, AuditLog, AuditPoint, AuditQuery
from cipherfleet.contract.errors import AuditBroken, Malformed, StatementForged
from cipherfleet.contract.statements import AuditCheckpointStatement, Signed


class AuditVerdict(msgspec.Struct, frozen=True):
    """What was found good: ``verified`` entries, of which the first ``sealed`` are under a checkpoint or the Ukey's memory."""

    consumer: str
    verified: int
    sealed: int
    checkpoints: int
    digest: str  # of the last entry
    ukey: int | None = None  # the entry that the Ukey remembers


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

    Every method raises ``AuditBroken``, whose message names the first entry that is not as it was written.
    """

    def __init__(self, consumer: str, signing_key: bytes, *, seen: AuditPoint | None = None) -> None:
        self._consumer, self._key, self._seen = consumer, signing_key, seen
        self._chain = AuditChain(consumer, () if seen is None else (seen,))
        self._checkpoints = 0

    def page(self, page: AuditLog) -> AuditQuery | None:
        """The next page of an unfiltered log; what to ask for next, nothing when this was the last."""
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
            self._checkpoints += 1
            self._chain.expect(AuditPoint(statement.sequence, statement.digest))

    def entry(self, entry: AuditEntry) -> None:
        self._chain.add(entry)

    def end(self) -> AuditVerdict:
        """Nothing follows."""
        self._chain.end()
        point = self._chain.point
        seen = None if self._seen is None else self._seen.sequence
        return AuditVerdict(self._consumer, point.sequence, self._chain.sealed, self._checkpoints, point.digest, seen)
