"""What a consumer's Ukeys sign in one numbered series, as the KMC takes it."""

from typing import TypeVar

from cipherfleet.channel import signing
from cipherfleet.contract.errors import ForeignConsumer, StatementForged, StatementReplayed
from cipherfleet.contract.statements import ApplicationStatement, EpochStatement, PolicyStatement, Signed, UkeyStatement
from cipherfleet.kmc import store

S = TypeVar("S", ApplicationStatement, UkeyStatement, EpochStatement, PolicyStatement)

MAX_STATEMENT_BYTES = 32 * 1024
MAX_SEQUENCE = 2**62


def read_numbered(signed: Signed, kind: type[S], consumer: store.Consumer) -> S:
    """A statement that one of the consumer's Ukeys signed, and whose number is its next.

    Raises ``StatementForged``, ``ForeignConsumer`` or ``StatementReplayed``.
    """
    statement = signing.verify(signed, kind, consumer.ukey_keys)
    if len(signed.signatures) != 1 or len(signed.payload) > MAX_STATEMENT_BYTES:
        raise StatementForged("the statement carries more than the Ukey's word")
    if statement.consumer != consumer.name:
        raise ForeignConsumer("the statement is another consumer's")
    check_sequence(statement.sequence, consumer)
    return statement


def check_sequence(sequence: int, consumer: store.Consumer) -> None:
    """That a statement's number is the consumer's next. Raises ``StatementReplayed``."""
    if not consumer.statement_sequence < sequence <= MAX_SEQUENCE:
        raise StatementReplayed(f"statement {sequence} came after number {consumer.statement_sequence}")
