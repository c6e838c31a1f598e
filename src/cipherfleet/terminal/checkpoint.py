"""Whether the escrow moved on honestly since the Ukey last looked. Pure."""

from collections.abc import Sequence

from cipherfleet.channel import signing
from cipherfleet.channel.audit_check import read_audit_checkpoint
from cipherfleet.contract.audit import AuditPoint
from cipherfleet.contract.errors import AuditBroken, CheckpointForged, EscrowRolledBack, Malformed, StatementForged
from cipherfleet.contract.escrow import LogEntry, Seen, replay
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.statements import CheckpointStatement, Signed


def read_checkpoint(consumer: ConsumerId, checkpoint: Signed, kmc_signing_key: bytes) -> Seen:
    """The point a checkpoint names. Raises ``CheckpointForged`` unless the KMC signed it for this consumer."""
    try:
        statement = signing.verify(checkpoint, CheckpointStatement, [kmc_signing_key])
    except (StatementForged, Malformed) as exc:
        raise CheckpointForged("the escrow's checkpoint is not signed by the KMC that this Ukey knows") from exc
    if statement.consumer != consumer:
        raise CheckpointForged("the escrow's checkpoint is another consumer's")
    return Seen(statement.epoch, statement.sequence, statement.head)


def advance(consumer: ConsumerId, seen: Seen, checkpoint: Signed, log: Sequence[LogEntry], kmc_signing_key: bytes) -> Seen:
    """The newest point, once ``log`` was shown to lead from ``seen`` to the signed ``checkpoint``.

    Entries up to ``seen`` may be sent again; only what follows counts, and it must chain to the head that was seen.
    Raises ``CheckpointForged``, or ``EscrowRolledBack`` for an older, forked or incomplete history.
    """
    point = read_checkpoint(consumer, checkpoint, kmc_signing_key)
    if point.epoch != seen.epoch:
        raise EscrowRolledBack(f"the escrow is in epoch {point.epoch}, the Ukey saw {seen.epoch}")
    if point.sequence < seen.sequence:
        raise EscrowRolledBack(f"the escrow shows {point.sequence} changes, the Ukey saw {seen.sequence}")
    following = tuple(entry for entry in log if seen.sequence < entry.sequence <= point.sequence)
    if replay(seen, following) != point:
        raise EscrowRolledBack("the escrow's history differs from the one the Ukey saw")
    return point


def check_recorded(log: Sequence[LogEntry], seen: Seen, point: Seen, subject: str, digest: bytes) -> None:
    """That a log from ``seen`` to ``point``, which ``advance`` has checked, holds an entry. Raises ``EscrowRolledBack``."""
    following = [entry for entry in log if seen.sequence < entry.sequence <= point.sequence]
    if not any(entry.subject == subject and entry.digest == digest for entry in following):
        raise EscrowRolledBack(f"the escrow did not write {subject} down", "what was signed may be used against you: sign anew")


def advance_audit(consumer: ConsumerId, known: AuditPoint | None, epoch: int, checkpoint: Signed, kmc_signing_key: bytes) -> AuditPoint:
    """The point of the audit log to remember, after the KMC showed a seal on it; ``epoch`` is the one the Ukey lives in.

    Raises ``AuditBroken`` for a seal that is forged, or of a log that is shorter than, or differs from, what the Ukey remembers.
    """
    statement = read_audit_checkpoint(checkpoint, consumer, kmc_signing_key)
    point = AuditPoint(statement.sequence, statement.digest, statement.epoch)
    if point.epoch != epoch:
        raise AuditBroken(f"the audit log is sealed in epoch {point.epoch}, the Ukey is in {epoch}")
    if known is None or known.epoch < point.epoch:  # a restore, which the Ukey agreed to
        return point
    if point.sequence < known.sequence:
        raise AuditBroken(f"the audit log of {consumer} lacks entry {point.sequence + 1}: the Ukey remembers {known.sequence} entries")
    if point.sequence == known.sequence and point.digest != known.digest:
        raise AuditBroken(f"entry {point.sequence} of the audit log of {consumer} is not the one that the Ukey remembers")
    return point
