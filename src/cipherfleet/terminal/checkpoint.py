"""Whether the escrow moved on honestly since the Ukey last looked. Pure."""

from collections.abc import Sequence

from cipherfleet.channel import signing
from cipherfleet.contract.errors import CheckpointForged, EscrowRolledBack, Malformed, StatementForged
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
