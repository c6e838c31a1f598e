"""The Ukeys of a consumer: the first comes with the enrolment, spare ones by the word of another, and each can go alone."""

import hashlib
import hmac
from functools import partial

from sqlalchemy import Connection, insert, select, update

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import public_key_der
from cipherfleet.contract.errors import (
    EscrowRowTampered,
    Exists,
    LimitReached,
    Malformed,
    StateConflict,
    StatementForged,
    UkeyUnknown,
)
from cipherfleet.contract.escrow import LogEntry, statement_digest, ukey_subject
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ConsumerId, Serial, UkeyId
from cipherfleet.contract.kmc_api import UkeyEntry, UkeyList, UkeyReply, UkeyRequest, UkeyStatements
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.statements import Signed, UkeyStatement
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.certification import UKEY_DAYS
from cipherfleet.kmc.escrow import Escrow, append_log
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.requests import subject_key
from cipherfleet.kmc.schema import consumers, policies, ukey_statements, ukeys
from cipherfleet.kmc.service import Service
from cipherfleet.kmc.statements import read_numbered
from cipherfleet.kmc.store import ACTIVE

MAX_ACTIVE, MAX_ALL = 8, 64
MAX_LABEL = 64
MAX_SINCE = 2**31
DAY_S = 86400


class Ukeys:
    """All Ukeys of all consumers."""

    def __init__(self, center: Center, escrow: Escrow, service: Service) -> None:
        self._center, self._escrow, self._service = center, escrow, service

    async def statements(self, consumer: ConsumerId) -> UkeyStatements:
        """What the consumer's Ukeys said of each other, and the newest policy. Raises ``ConsumerUnknown`` or ``EscrowRowTampered``."""

        def read(connection: Connection) -> UkeyStatements:
            newest = store.get_consumer(connection, consumer).statement_sequence
            query = select(ukey_statements.c.statement).where(ukey_statements.c.consumer == consumer).order_by(ukey_statements.c.sequence)
            said = tuple(codec.decode(raw, Signed) for raw in connection.scalars(query))
            policy = connection.scalar(select(policies.c.statement).where(policies.c.consumer == consumer))
            return UkeyStatements(said, newest, None if policy is None else codec.decode(policy, Signed))

        try:
            return await self._center.database.read(read)
        except Malformed as exc:
            raise EscrowRowTampered(f"a statement of the Ukeys of {consumer} cannot be read") from exc

    async def list_ukeys(self, consumer: str = "") -> UkeyList:
        """Everybody's, or one consumer's."""
        query = select(ukeys).order_by(ukeys.c.consumer, ukeys.c.added_at)
        if consumer:
            query = query.where(ukeys.c.consumer == consumer)
        found = await self._center.database.read(lambda connection: connection.execute(query).all())
        return UkeyList(tuple(UkeyEntry(r.id, r.consumer, r.state, r.added_at, r.label, r.revoked_by) for r in found))

    async def submit(self, request: UkeyRequest, peer: Peer) -> UkeyReply:
        """The consumer's word on one of its Ukeys; it counts with the commit.

        Raises ``StatementForged``, ``StatementReplayed``, ``ForeignConsumer``, ``Exists``, ``UkeyUnknown``, ``LimitReached``,
        ``StateConflict``, or what is wrong with the requests. With ``HsmUnavailable`` it may have taken effect.
        """
        center, consumer = self._center, peer.identity.consumer
        found = await center.database.read(partial(store.get_consumer, name=consumer))
        statement = self._check(request.statement, found)
        if statement.revoked:
            await self._revoke_signed(statement, request.statement)
            empty = Chain(b"", center.certification.domain_pem(consumer))
            chains = empty, empty
        else:
            identity, channel = await self._certify(statement, request)
            await self._add(statement, request.statement, identity, channel)
            chains = center.certification.chain(identity), center.certification.chain(channel)
        _, checkpoint, entries = await self._escrow.since(consumer, min(max(request.since, 0), MAX_SINCE))
        return UkeyReply(*chains, checkpoint, entries)

    async def revoke(self, consumer: ConsumerId, id_: UkeyId, *, actor: str) -> None:
        """The operator's revocation of one Ukey of several; the platform takes nothing of it any more. Idempotent.

        Raises ``UkeyUnknown``, or ``StateConflict`` for the last one.
        """
        at = self._center.wall_clock()
        await self._center.database.read(lambda connection: _check_revocable(connection, consumer, id_))

        def commit(connection: Connection) -> tuple[Serial, ...]:
            if _check_revocable(connection, consumer, id_):
                _mark_revoked(connection, consumer, id_, by="operator")
                audit.append(connection, consumer, at=at, actor=actor, event="ukey-revoked", subject=id_)
            return store.revoke_one_ukey(connection, consumer, id_)

        await self._service.revoke.one_ukey(consumer, id_, commit, actor=actor)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check(self, signed: Signed, consumer: store.Consumer) -> UkeyStatement:
        statement = read_numbered(signed, UkeyStatement, consumer)
        if len(statement.label) > MAX_LABEL or not statement.label.isprintable():
            raise Malformed(f"a Ukey's label is a printable text of at most {MAX_LABEL}")
        return statement

    async def _certify(self, statement: UkeyStatement, request: UkeyRequest) -> tuple[Issued, Issued]:
        center, consumer = self._center, statement.consumer
        identity_key, channel_key = subject_key(request.identity_csr, Role.UKEY), subject_key(request.channel_csr, Role.TERMINAL)
        ukey = public_key_der(identity_key)
        if not hmac.compare_digest(ukey, statement.public_key):
            raise StatementForged("the request's key is not the one that the Ukey signed")
        if statement.ukey != store.ukey_id(ukey) or ukey == public_key_der(channel_key):
            raise Malformed("a Ukey has a key for its identity, after which it is named, and another for its channel")
        until = center.wall_clock() + UKEY_DAYS * DAY_S
        identity = await center.certification.issue(Identity(Role.UKEY, statement.ukey, consumer), identity_key, not_after=until)
        channel = await center.certification.issue(Identity(Role.TERMINAL, statement.ukey, consumer), channel_key, not_after=until)
        return identity, channel

    async def _add(self, statement: UkeyStatement, signed: Signed, identity: Issued, channel: Issued) -> None:
        consumer, at = statement.consumer, self._center.wall_clock()

        def commit(connection: Connection) -> tuple[LogEntry, ...]:
            self._check(signed, store.get_consumer(connection, consumer))
            known = list(connection.execute(select(ukeys.c.id, ukeys.c.state).where(ukeys.c.consumer == consumer)))
            if any(row.id == statement.ukey for row in known):
                raise Exists(f"{consumer} has a Ukey {statement.ukey} already")
            if len(known) >= MAX_ALL or sum(row.state == ACTIVE for row in known) >= MAX_ACTIVE:
                raise LimitReached(f"a consumer has at most {MAX_ACTIVE} Ukeys, and {MAX_ALL} in its life")
            store.add_ukey(connection, consumer, statement.public_key, at=at, label=statement.label)
            for issued in (identity, channel):
                store.add_certificate(connection, issued)
            audit.append(connection, consumer, at=at, actor=f"Ukey of {consumer}", event="ukey-added", subject=statement.ukey)
            return _record(connection, statement, signed, self._center.settings.changes_per_consumer)

        def committed(entries: tuple[LogEntry, ...]) -> None:
            self._escrow.note(consumer, entries)
            self._center.recorded(identity)
            self._center.recorded(channel)
            self._service.escrow_changed(consumer, entries[-1].sequence)

        await self._center.database.write(commit, committed)

    async def _revoke_signed(self, statement: UkeyStatement, signed: Signed) -> None:
        consumer, at = statement.consumer, self._center.wall_clock()
        await self._center.database.read(lambda connection: _check_named(connection, statement))

        def commit(connection: Connection) -> tuple[Serial, ...]:
            self._check(signed, store.get_consumer(connection, consumer))
            _check_named(connection, statement)
            _mark_revoked(connection, consumer, statement.ukey, by="consumer")
            audit.append(connection, consumer, at=at, actor=f"Ukey of {consumer}", event="ukey-revoked", subject=statement.ukey)
            entries.extend(_record(connection, statement, signed, self._center.settings.changes_per_consumer))
            return store.revoke_one_ukey(connection, consumer, statement.ukey)

        entries: list[LogEntry] = []
        await self._service.revoke.one_ukey(consumer, statement.ukey, commit, actor=f"Ukey of {consumer}")
        self._escrow.note(consumer, tuple(entries))


def _record(connection: Connection, statement: UkeyStatement, signed: Signed, most: int) -> tuple[LogEntry, ...]:
    """The statement, its number and its entry in the log."""
    consumer = statement.consumer
    values = {"consumer": consumer, "sequence": statement.sequence, "statement": codec.encode(signed)}
    connection.execute(insert(ukey_statements).values(values))
    connection.execute(update(consumers).where(consumers.c.name == consumer).values(statement_sequence=statement.sequence))
    return append_log(connection, consumer, [(ukey_subject(statement.ukey, statement.sequence), statement_digest(signed))], most)


def _mark_revoked(connection: Connection, consumer: ConsumerId, id_: UkeyId, *, by: str) -> None:
    here = (ukeys.c.consumer == consumer) & (ukeys.c.id == id_)
    connection.execute(update(ukeys).where(here).values(state=store.REVOKED, revoked_by=by))


def _check_named(connection: Connection, statement: UkeyStatement) -> None:
    """That the Ukey is the one named. One that the operator revoked may be revoked by the consumer, too."""
    _check_revocable(connection, statement.consumer, statement.ukey)
    here = (ukeys.c.consumer == statement.consumer) & (ukeys.c.id == statement.ukey)
    row = connection.execute(select(ukeys.c.public_key, ukeys.c.revoked_by).where(here)).one()
    if hashlib.sha256(row.public_key).digest() != hashlib.sha256(statement.public_key).digest():
        raise StatementForged(f"{statement.ukey} has another key than the statement says")
    if row.revoked_by == "consumer":
        raise StateConflict(f"{statement.ukey} was revoked before")


def _check_revocable(connection: Connection, consumer: ConsumerId, id_: UkeyId) -> bool:
    """Whether there is something to revoke. Raises ``UkeyUnknown``, or ``StateConflict`` for the last one."""
    states = {row.id: row.state for row in connection.execute(select(ukeys.c.id, ukeys.c.state).where(ukeys.c.consumer == consumer))}
    if id_ not in states:
        raise UkeyUnknown(f"{consumer} has no Ukey {id_}")
    if states[id_] != ACTIVE:
        return False
    if list(states.values()).count(ACTIVE) == 1:
        raise StateConflict(
            f"{id_} is the only Ukey of {consumer}", "the operator ends a consumer for good with: cipherfleet consumer revoke"
        )
    return True
