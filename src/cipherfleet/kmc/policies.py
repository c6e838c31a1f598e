"""What consumers permit themselves: the newest policy that a Ukey signed, kept for the consumer's other Ukeys."""

from functools import partial

from sqlalchemy import Connection, update
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.channel import codec
from cipherfleet.contract.errors import StateConflict
from cipherfleet.contract.escrow import LogEntry, policy_subject, statement_digest
from cipherfleet.contract.identities import Peer
from cipherfleet.contract.kmc_api import PolicyReply, PolicyRequest
from cipherfleet.contract.statements import PolicyStatement, Signed
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow import Escrow, append_log
from cipherfleet.kmc.schema import consumers, policies
from cipherfleet.kmc.service import Service
from cipherfleet.kmc.statements import read_numbered


class Policies:
    """The policies of all consumers. The KMC keeps and shows them; Ukeys check them, and cards enforce them."""

    def __init__(self, center: Center, escrow: Escrow, service: Service) -> None:
        self._center, self._escrow, self._service = center, escrow, service

    async def submit(self, request: PolicyRequest, peer: Peer) -> PolicyReply:
        """The consumer's policy; it counts with the commit.

        Raises ``StatementForged``, ``StatementReplayed``, ``ForeignConsumer``, ``StateConflict`` when the escrow is in another epoch,
        ``LimitReached`` or ``Malformed``. With ``HsmUnavailable`` it may have taken effect.
        """
        center, consumer, at = self._center, peer.identity.consumer, self._center.wall_clock()
        most = center.settings.changes_per_consumer
        statement = _check(request.statement, await center.database.read(partial(store.get_consumer, name=consumer)))

        def commit(connection: Connection) -> tuple[LogEntry, ...]:
            _check(request.statement, store.get_consumer(connection, consumer))
            values = {"consumer": consumer, "statement": codec.encode(request.statement)}
            put = upsert(policies).values(values).on_conflict_do_update(index_elements=["consumer"], set_=values)
            connection.execute(put)
            newest = update(consumers).where(consumers.c.name == consumer).values(statement_sequence=statement.sequence)
            connection.execute(newest)
            says = f"{statement.policy.name}@{statement.sequence}"
            audit.append(connection, consumer, at=at, actor=f"Ukey of {consumer}", event="policy-set", subject=says)
            subject = policy_subject(statement.policy.name, statement.sequence)
            return append_log(connection, consumer, [(subject, statement_digest(request.statement))], most)

        def committed(entries: tuple[LogEntry, ...]) -> None:
            self._escrow.note(consumer, entries)
            self._service.escrow_changed(consumer, entries[-1].sequence)

        await center.database.write(commit, committed)
        _, checkpoint, entries = await self._escrow.since(consumer, min(max(request.since, 0), most))
        return PolicyReply(checkpoint, entries)


def _check(signed: Signed, consumer: store.Consumer) -> PolicyStatement:
    statement = read_numbered(signed, PolicyStatement, consumer)
    if statement.epoch != consumer.epoch:
        raise StateConflict(f"the escrow is in epoch {consumer.epoch}, the statement is of epoch {statement.epoch}")
    return statement
