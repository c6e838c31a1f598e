"""What the KMC shows of the consumer's policy, and whether a Ukey is to believe it. Pure."""

from collections.abc import Sequence

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import fingerprint
from cipherfleet.contract.errors import EscrowRolledBack, ForeignConsumer, StatementForged
from cipherfleet.contract.escrow import POLICY, LogEntry, policy_subject, statement_digest
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.statements import PolicyStatement, Signed
from cipherfleet.terminal.memory import KnownUkey, NewPolicy, Remembered

_MAX_DIGITS = 19


def read_policy_told(
    consumer: ConsumerId,
    known: Remembered,
    before: Sequence[KnownUkey],
    ukeys: Sequence[KnownUkey],
    about: Sequence[LogEntry],
    told: Signed | None,
) -> NewPolicy | None:
    """The policy that is ``told``, if it is news. ``about``: the log's new entries; ``before`` and after them: the consumer's ``ukeys``.

    Of what the log names the newest is to be shown. The word of a Ukey that was revoked since counts if the log has it before the
    revocation. Raises ``EscrowRolledBack``, ``StatementForged``, ``ForeignConsumer`` or ``Malformed``.
    """
    named = [entry for entry in about if entry.subject.startswith(POLICY)]
    digest = b"" if told is None else statement_digest(told)
    if not named and (told is None or digest == known.policy_digest):
        return None
    if told is None:
        raise EscrowRolledBack(f"the KMC does not show {named[-1].subject}, which its log names")
    statement = signing.verify(told, PolicyStatement, [ukey.public_key for ukey in ukeys])
    if len(told.signatures) != 1:
        raise StatementForged("the policy carries more than one Ukey's word")
    if statement.consumer != consumer:
        raise ForeignConsumer("the policy is another consumer's")
    recorded = bool(named) and named[-1].digest == digest
    if recorded and named[-1].subject != policy_subject(statement.policy.name, statement.sequence):
        raise EscrowRolledBack(f"the log names {named[-1].subject}, the Ukey signed number {statement.sequence}")
    if named and not recorded and statement.sequence <= _number(named[-1]):
        raise EscrowRolledBack(f"the KMC does not show {named[-1].subject}, which its log names")
    signer = next(ukey for ukey in ukeys if fingerprint(ukey.public_key) == told.signatures[0].signer)
    if signer.until:
        if not recorded:
            return None  # its time cannot be told; whoever knows this policy has it already
        if statement.sequence >= signer.until or _comes_late(signer, before, about):
            raise StatementForged(f"the policy is signed by {signer.ukey}, which had been revoked by then")
    return NewPolicy(statement.policy, (statement.epoch, statement.sequence), digest, signer.ukey, recorded)


def _comes_late(signer: KnownUkey, before: Sequence[KnownUkey], about: Sequence[LogEntry]) -> bool:
    """Whether the last policy of the log came after the signer's revocation."""
    if any(ukey.public_key == signer.public_key and ukey.until for ukey in before):
        return True
    policies = [place for place, entry in enumerate(about) if entry.subject.startswith(POLICY)]
    revoked = [place for place, entry in enumerate(about) if not entry.subject.startswith(POLICY) and _number(entry) == signer.until]
    return bool(revoked) and revoked[0] < policies[-1]


def _number(entry: LogEntry) -> int:
    """The number of the statement that an entry names. Raises ``EscrowRolledBack``."""
    number = entry.subject.rpartition("@")[2]
    if not (number.isascii() and number.isdigit() and len(number) <= _MAX_DIGITS):
        raise EscrowRolledBack(f"entry {entry.sequence} of the escrow's log is about {entry.subject[:80]}, which nobody wrote")
    return int(number)
