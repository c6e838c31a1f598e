"""Applications: the consumer's Ukey signs them in and out, the operator may only revoke."""

import hashlib
import hmac
from functools import partial

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import public_key_der
from cipherfleet.contract.errors import (
    ApplicationUnknown,
    LimitReached,
    Malformed,
    PolicyRefused,
    StatementExpired,
    StatementForged,
)
from cipherfleet.contract.escrow import LogEntry, StatementEntry, statement_digest
from cipherfleet.contract.grants import check_grants
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ApplicationName, ConsumerId, Serial
from cipherfleet.contract.kmc_api import ApplicationEntry, ApplicationList, ApplicationReply, ApplicationRequest
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.statements import ApplicationStatement, Signed
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow import Escrow, append_log
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.requests import subject_key
from cipherfleet.kmc.schema import consumers, statements
from cipherfleet.kmc.service import Service
from cipherfleet.kmc.statements import check_sequence, read_numbered

MAX_APPLICATIONS = 512
MAX_DAYS = 826  # the longest that settings allow, and a day for clocks


class Applications:
    """All applications of all consumers."""

    def __init__(self, center: Center, escrow: Escrow, service: Service) -> None:
        self._center, self._escrow, self._service = center, escrow, service

    async def sign(self, request: ApplicationRequest, peer: Peer) -> ApplicationReply:
        """Sign an application in, or out. The statement takes effect with the commit, and with it the certificate.

        Raises ``StatementForged``, ``StatementReplayed``, ``StatementExpired``, ``ForeignConsumer``, ``PolicyRefused``, or what is
        wrong with the request. A signing out answers with an empty chain. With ``HsmUnavailable`` it may have taken effect.
        """
        center, consumer, at = self._center, peer.identity.consumer, self._center.wall_clock()
        most = center.settings.changes_per_consumer
        found = await center.database.read(partial(store.get_consumer, name=consumer))
        statement = self._check(request.statement, found)
        issued = None if statement.revoked else await self._certify(statement, request.csr)

        def commit(connection: Connection) -> tuple[tuple[Serial, ...], tuple[LogEntry, ...]]:
            check_sequence(statement.sequence, store.get_consumer(connection, consumer))
            superseded = store.revoke_holders(connection, Role.APPLICATION, consumer, id_=statement.name)
            _put(connection, statement, request.statement, issued)
            entry = StatementEntry(statement.name, request.statement, statement.sequence)
            entries = append_log(connection, consumer, [(entry.subject, statement_digest(request.statement))], most)
            if issued is not None:
                store.add_certificate(connection, issued)
            event = "application-signed-out" if statement.revoked else "application-signed-in"
            audit.append(connection, consumer, at=at, actor=f"Ukey of {consumer}", event=event, subject=statement.name)
            return superseded, entries

        def committed(done: tuple[tuple[Serial, ...], tuple[LogEntry, ...]]) -> None:
            self._escrow.note(consumer, done[1])
            if issued is not None:
                center.recorded(issued)
            self._service.escrow_changed(consumer, done[1][-1].sequence)
            center.revoked(done[0])

        await center.database.write(commit, committed)
        chain = center.certification.chain(issued) if issued is not None else Chain(b"", center.certification.domain_pem(consumer))
        _, checkpoint, entries = await self._escrow.since(consumer, min(max(request.since, 0), most))
        return ApplicationReply(chain, checkpoint, entries)

    async def revoke(self, consumer: ConsumerId, name: ApplicationName, *, actor: str) -> None:
        """The operator's revocation, which only another statement of the consumer undoes. Raises ``ApplicationUnknown``."""
        at = self._center.wall_clock()

        def commit(connection: Connection) -> tuple[Serial, ...]:
            here = (statements.c.consumer == consumer) & (statements.c.name == name)
            if connection.execute(update(statements).where(here).values(revoked=True)).rowcount == 0:
                raise ApplicationUnknown(f"{consumer} has no application {name}")
            audit.append(connection, consumer, at=at, actor=actor, event="application-revoked", subject=name)
            return store.revoke_holders(connection, Role.APPLICATION, consumer, id_=name)

        await self._center.database.write(commit, self._center.revoked)

    async def list_applications(self, consumer: str = "") -> ApplicationList:
        """Everybody's, or one consumer's."""
        query = select(statements).order_by(statements.c.consumer, statements.c.name)
        if consumer:
            query = query.where(statements.c.consumer == consumer)
        found = await self._center.database.read(lambda connection: connection.execute(query).all())
        now, entries = self._center.wall_clock(), []
        for row in found:
            statement = codec.decode(codec.decode(row.statement, Signed).payload, ApplicationStatement)
            state = "revoked" if row.revoked else "expired" if statement.not_after <= now else "active"
            entries.append(
                ApplicationEntry(row.name, row.consumer, state, statement.rights, statement.not_after, row.serial, statement.grants)
            )
        return ApplicationList(tuple(entries))

    def _check(self, signed: Signed, consumer: store.Consumer) -> ApplicationStatement:
        statement = read_numbered(signed, ApplicationStatement, consumer)
        now = self._center.wall_clock()
        if statement.revoked:
            return statement
        if statement.not_after <= now:
            raise StatementExpired("the statement's end is past")
        if statement.not_after > now + MAX_DAYS * 86400:
            raise PolicyRefused(f"an application is signed in for at most {MAX_DAYS - 1} days")
        if not (statement.rights or statement.grants) or len(set(statement.rights)) != len(statement.rights):
            raise Malformed("a statement names each right once, and one right or grant at least")
        check_grants(statement.grants)
        return statement

    async def _certify(self, statement: ApplicationStatement, csr: bytes) -> Issued:
        key = subject_key(csr, Role.APPLICATION)
        named = hashlib.sha256(public_key_der(key)).digest()
        if not hmac.compare_digest(named, statement.public_key_sha256):
            raise StatementForged("the request's key is not the one that the Ukey signed")
        identity = Identity(Role.APPLICATION, statement.name, statement.consumer)
        return await self._center.certification.issue(identity, key, not_after=float(statement.not_after))


def _put(connection: Connection, statement: ApplicationStatement, signed: Signed, issued: Issued | None) -> None:
    of_consumer = select(statements.c.name, statements.c.serial).where(statements.c.consumer == statement.consumer)
    serials = {row.name: row.serial for row in connection.execute(of_consumer)}
    if statement.name not in serials and statement.revoked:
        raise ApplicationUnknown(f"{statement.consumer} has no application {statement.name}")
    if statement.name not in serials and len(serials) >= MAX_APPLICATIONS:
        raise LimitReached(f"a consumer has at most {MAX_APPLICATIONS} applications")
    values = {
        "consumer": statement.consumer,
        "name": statement.name,
        "statement": codec.encode(signed),
        "serial": issued.serial if issued is not None else serials[statement.name],
        "revoked": statement.revoked,
    }
    connection.execute(upsert(statements).values(values).on_conflict_do_update(index_elements=["consumer", "name"], set_=values))
    newest = update(consumers).where(consumers.c.name == statement.consumer).values(statement_sequence=statement.sequence)
    connection.execute(newest)
