"""A new epoch of a consumer's escrow: the consumer accepts, with its Ukey, that it was restored from a backup."""

from functools import partial

from sqlalchemy import Connection, insert, select, update

from cipherfleet.channel import codec
from cipherfleet.contract.errors import EscrowRowTampered, Malformed, StateConflict
from cipherfleet.contract.escrow import LogEntry, Seen, epoch_subject, statement_digest
from cipherfleet.contract.identities import Peer
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.kmc_api import EpochRequest, EpochStatements, LogPage
from cipherfleet.contract.statements import EpochStatement, Signed
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow import Escrow, append_log, point_of
from cipherfleet.kmc.schema import consumers, epochs
from cipherfleet.kmc.service import Service
from cipherfleet.kmc.statements import read_numbered

MAX_EPOCH = 2**31 - 1


class Epochs:
    """All epochs of all consumers."""

    def __init__(self, center: Center, escrow: Escrow, service: Service) -> None:
        self._center, self._escrow, self._service = center, escrow, service

    async def statements(self, consumer: ConsumerId) -> EpochStatements:
        """Raises ``EscrowRowTampered``."""
        query = select(epochs.c.statement).where(epochs.c.consumer == consumer).order_by(epochs.c.epoch)
        try:
            return await self._center.database.read(lambda c: EpochStatements(tuple(codec.decode(raw, Signed) for raw in c.scalars(query))))
        except Malformed as exc:
            raise EscrowRowTampered(f"a statement on the epochs of {consumer} cannot be read") from exc

    async def begin(self, request: EpochRequest, peer: Peer) -> LogPage:
        """The epoch begins with the commit, and service as it was ends.

        Raises ``StatementForged``, ``StatementReplayed``, ``ForeignConsumer``, or ``StateConflict`` when the escrow is not where the
        statement says.
        """
        consumer, at = peer.identity.consumer, self._center.wall_clock()
        found = await self._center.database.read(partial(store.get_consumer, name=consumer))
        statement = _check(request.statement, found)
        await self._service.revoke.service(consumer, "new-epoch", actor=f"Ukey of {consumer}")
        most = self._center.settings.changes_per_consumer

        def commit(connection: Connection) -> tuple[LogEntry, ...]:
            _check(request.statement, store.get_consumer(connection, consumer))
            subject = epoch_subject(statement.new_epoch, statement.sequence)
            entries = append_log(connection, consumer, [(subject, statement_digest(request.statement))], most)
            raw = codec.encode(request.statement)
            connection.execute(insert(epochs).values(consumer=consumer, epoch=statement.new_epoch, statement=raw))
            values = {"epoch": statement.new_epoch, "statement_sequence": statement.sequence}
            connection.execute(update(consumers).where(consumers.c.name == consumer).values(**values))
            says = f"epoch {statement.new_epoch} from change {statement.accepted_sequence}; seen before: {statement.seen_sequence}"
            audit.append(connection, consumer, at=at, actor=f"Ukey of {consumer}", event="restore-accepted", subject=says)
            return entries

        await self._center.database.write(commit, lambda entries: self._escrow.note(consumer, entries))
        return await self._escrow.log_page(consumer, statement.accepted_sequence)


def _check(signed: Signed, consumer: store.Consumer) -> EpochStatement:
    statement = read_numbered(signed, EpochStatement, consumer)
    if Seen(statement.accepted_epoch, statement.accepted_sequence, statement.accepted_head) != point_of(consumer):
        raise StateConflict("the escrow is not where the statement says", "look again, and sign anew")
    if not max(consumer.epoch, statement.seen_epoch) < statement.new_epoch <= MAX_EPOCH:
        raise StateConflict(f"epoch {statement.new_epoch} does not follow epoch {consumer.epoch}")
    return statement
