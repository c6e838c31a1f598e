"""Several Ukeys of one consumer: what each knows of the others, from what they signed, not from what the platform says."""

from collections.abc import Sequence

from cipherfleet.channel import codec, signing
from cipherfleet.contract.errors import EscrowRolledBack, ForeignConsumer, StatementForged
from cipherfleet.contract.escrow import LogEntry, statement_digest
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.contract.statements import Signed, UkeyStatement
from cipherfleet.terminal.memory import KnownUkey
from cipherfleet.terminal.ukey import Ukey


def all_known(ukey: Ukey) -> tuple[KnownUkey, ...]:
    """The consumer's Ukeys as this one knows them; itself at least."""
    return ukey.memory.known.ukeys or (KnownUkey(UkeyId(ukey.record.serial), ukey.signer.public_key),)


def follow(
    consumer: ConsumerId, ukeys: tuple[KnownUkey, ...], number: int, statements: Sequence[Signed]
) -> tuple[tuple[KnownUkey, ...], int]:
    """The Ukeys and the number of the newest statement after ``statements``, each signed by one that counted by then.

    Raises ``StatementForged``, ``ForeignConsumer`` or ``Malformed``.
    """
    for signed in statements:
        if signed.kind != UkeyStatement.KIND:
            raise StatementForged("the KMC shows something else than a statement on a Ukey")
        if codec.decode(signed.payload, UkeyStatement).sequence <= number:
            continue  # known; whoever signed it may be revoked by now
        statement = signing.verify(signed, UkeyStatement, [ukey.public_key for ukey in ukeys if not ukey.until])
        if statement.consumer != consumer:
            raise ForeignConsumer("the statement on a Ukey is another consumer's")
        until = statement.sequence if statement.revoked else 0
        others = tuple(ukey for ukey in ukeys if ukey.public_key != statement.public_key)
        ukeys, number = (*others, KnownUkey(statement.ukey, statement.public_key, until)), statement.sequence
    return ukeys, number


def check_told(about: Sequence[LogEntry], statements: Sequence[Signed]) -> None:
    """That each statement on a Ukey that the log names is shown, too. Raises ``EscrowRolledBack``."""
    shown = {statement_digest(signed) for signed in statements}
    for entry in about:
        if entry.digest not in shown:
            raise EscrowRolledBack(f"the KMC does not show {entry.subject}, which its log names")
