"""What applications delegate to others: their own signed statements, kept in the escrow.

Whether one counts decides the VCM, at each use, by what the Ukey signed. What is checked here keeps the log in order and bounded.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, func, select, tuple_
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.channel import codec
from cipherfleet.channel.delegations import is_signed_by, read_delegation
from cipherfleet.contract.errors import (
    ApplicationUnknown,
    EscrowRowTampered,
    ForeignConsumer,
    LimitReached,
    Malformed,
    StatementForged,
    StatementReplayed,
)
from cipherfleet.contract.escrow import DelegationName, statement_digest
from cipherfleet.contract.identities import Peer
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.kmc_api import MAX_STATEMENT_NAMES, DelegationRequest, DelegationsFound, EscrowReceipt
from cipherfleet.contract.statements import ApplicationStatement, DelegationStatement, Signed
from cipherfleet.kmc import audit
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow import STATEMENT_ENTRIES, Escrow, append_log
from cipherfleet.kmc.escrow_reads import as_bytes, read_statements
from cipherfleet.kmc.pace import Pace
from cipherfleet.kmc.schema import delegations

MAX_PER_DELEGATOR = 1024
"""Those that were taken back count: the log names them for ever."""
MAX_STEP = 1_000_000
"""Between two numbers of a delegator: who was led to sign a huge one could never take anything back."""
PER_SECOND, BURST = 10, 200


class Delegations:
    """Those of all consumers."""

    def __init__(self, center: Center, escrow: Escrow) -> None:
        self._center, self._escrow = center, escrow
        self._pace = Pace(PER_SECOND, BURST)

    async def delegate(self, request: DelegationRequest, peer: Peer) -> EscrowReceipt:
        """It takes effect with the commit.

        Raises ``StatementForged``, ``StatementReplayed``, ``ForeignConsumer``, ``ApplicationUnknown``, ``Malformed``, ``LimitReached``.
        """
        signed, consumer, at = request.statement, peer.identity.consumer, self._center.wall_clock()
        statement = read_delegation(signed)
        if statement.consumer != consumer:
            raise ForeignConsumer("the statement is another consumer's")
        self._pace.take(consumer, 1)
        name = DelegationName(statement.delegator, statement.delegate, statement.key)
        most = self._center.settings.changes_per_consumer - STATEMENT_ENTRIES

        def commit(connection: Connection) -> EscrowReceipt:
            _check_applications(connection, statement)
            _put(connection, statement, signed)
            entries = append_log(connection, consumer, [(name.subject(statement.sequence), statement_digest(signed))], most)
            event = "key-delegation-revoked" if statement.revoked else "key-delegated"
            actor = f"application/{statement.delegator} for application/{statement.delegate} via {peer.identity.id}"
            audit.append(connection, consumer, at=at, actor=actor, event=event, subject=statement.key)
            return EscrowReceipt(entries)

        return await self._center.database.write(commit, lambda receipt: self._escrow.note(consumer, receipt.log))

    async def statements(self, consumer: ConsumerId, names: Sequence[DelegationName]) -> DelegationsFound:
        """Those that there are. Raises ``Malformed`` or ``EscrowRowTampered``."""
        if len(names) > MAX_STATEMENT_NAMES:
            raise Malformed(f"at most {MAX_STATEMENT_NAMES} statements are asked for at once")
        wanted = [(name.delegator, name.delegate, name.key) for name in names]
        named = tuple_(delegations.c.delegator, delegations.c.delegate, delegations.c.key)
        query = select(delegations.c.statement).where(delegations.c.consumer == consumer, named.in_(wanted))
        found = await self._center.database.read(lambda connection: connection.scalars(query).all())
        try:
            return DelegationsFound(tuple(codec.decode(as_bytes(raw), Signed) for raw in found))
        except Malformed as exc:
            raise EscrowRowTampered(f"a delegation of {consumer} cannot be read") from exc


def _check_applications(connection: Connection, statement: DelegationStatement) -> None:
    """By the statements as they are kept here."""
    names = (statement.delegator, statement.delegate)
    kept = {entry.name: entry.statement for entry in read_statements(connection, statement.consumer, names)}
    if statement.delegator not in kept or (statement.delegate not in kept and not statement.revoked):
        missing = statement.delegate if statement.delegator in kept else statement.delegator
        raise ApplicationUnknown(f"{statement.consumer} has no application {missing}")
    own = codec.decode(kept[statement.delegator].payload, ApplicationStatement)
    if own.revoked or not is_signed_by(statement, own):
        raise StatementForged("the delegation is not signed by the key that the Ukey signed its delegator in with")


def _put(connection: Connection, statement: DelegationStatement, signed: Signed) -> None:
    of_delegator = (delegations.c.consumer == statement.consumer) & (delegations.c.delegator == statement.delegator)
    newest, count = connection.execute(select(func.max(delegations.c.sequence), func.count()).where(of_delegator)).one()
    if statement.sequence <= (newest or 0):
        raise StatementReplayed(f"delegation {statement.sequence} of {statement.delegator} came after number {newest}")
    if statement.sequence > (newest or 0) + MAX_STEP:
        raise Malformed(f"delegation {statement.sequence} of {statement.delegator} is too far after number {newest or 0}")
    here = of_delegator & (delegations.c.delegate == statement.delegate) & (delegations.c.key == statement.key)
    if connection.execute(select(delegations.c.sequence).where(here)).first() is None:
        if statement.revoked:
            raise ApplicationUnknown(f"{statement.delegator} delegated nothing of key {statement.key} to {statement.delegate}")
        if count >= MAX_PER_DELEGATOR:
            raise LimitReached(f"an application delegates at most {MAX_PER_DELEGATOR} times, to other applications or of other keys")
    values = {
        "consumer": statement.consumer,
        "delegator": statement.delegator,
        "delegate": statement.delegate,
        "key": statement.key,
        "sequence": statement.sequence,
        "statement": codec.encode(signed),
    }
    put = upsert(delegations).values(values)
    connection.execute(put.on_conflict_do_update(index_elements=["consumer", "delegator", "delegate", "key"], set_=values))
