"""Off, at once and everywhere: a consumer's service, one VCM, one token.

Memory first, so that nothing is handed out any more while the disk is written; then the database; then the connections.
What the disk did not take is written again in the background until it does.
"""

import asyncio
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from cipherfleet.contract.errors import (
    CipherfleetError,
    ConsumerRevoked,
    EnvironmentFault,
    ForeignConsumer,
    ServiceOff,
    TokenStale,
    UkeyRevoked,
)
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import ConsumerId, Serial, TokenId, UkeyId, VcmId
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.sessions import Sessions, TerminalChannel, VcmChannel

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_VOID = 4096
"""Tokens that are remembered as revoked, the newest: an identity that is being verified has its turn long before."""

FAREWELL_S = 0.3
"""How long a channel may take to say why it closes; requests are refused meanwhile."""
UKEY_REMOVED = "ukey-removed"
RETRY_S, RETRY_MAX_S = 0.2, 30.0
"""The pause before a failed commit is tried again; it doubles up to the longest."""


class Revocation:
    """Everything in here is idempotent: revoking what is gone succeeds."""

    def __init__(self, center: Center, sessions: Sessions) -> None:
        self._center, self._sessions = center, sessions
        self._unsettled: defaultdict[ConsumerId, set[str]] = defaultdict(set)
        self._void: OrderedDict[TokenId, None] = OrderedDict()

    def check_settled(self, consumer: ConsumerId) -> None:
        """Raises ``ServiceOff`` while a revocation of this consumer waits for the disk: nothing is built on what it revokes."""
        if self._unsettled.get(consumer):
            raise ServiceOff(f"a revocation of {consumer} is not on the KMC's disk yet", "the operator frees some space; then try again")

    async def service(self, consumer: ConsumerId, reason: str, *, actor: str) -> None:
        """All of a consumer: VCMs, tokens, leases, ciphertext CMK; the terminal is told unless it said so itself."""
        await self._all(consumer, reason, (Role.VCM,), lambda _: (), actor=actor)

    async def ukey(self, consumer: ConsumerId, *, actor: str) -> None:
        """A stolen Ukey: the service, both certificates of the Ukey, and the consumer's state, for good.

        Raises ``ConsumerUnknown``, or ``StateConflict`` for a pending consumer.
        """
        at = self._center.wall_clock()
        if self._sessions.get(consumer) is None:  # who has a session is enrolled, and must not be served on while the disk is asked
            await self._center.database.read(partial(store.find_revocable, name=consumer))

        def commit(connection: Connection) -> tuple[Serial, ...]:
            if store.revoke_consumer(connection, consumer):
                audit.append(connection, consumer, at=at, actor=actor, event="ukey-revoked", subject=consumer)
            return store.revoke_ukey(connection, consumer)

        await self._all(consumer, ConsumerRevoked.code, (Role.TERMINAL, Role.UKEY, Role.VCM), commit, actor=actor)

    async def one_ukey(self, consumer: ConsumerId, id_: UkeyId, commit: Callable[[Connection], tuple[Serial, ...]], *, actor: str) -> None:
        """One of several Ukeys: both its certificates at once, and the service, as cards still know it; ``commit`` writes it down."""
        registry = self._center.registry
        serials = tuple(serial for role in (Role.UKEY, Role.TERMINAL) for serial in registry.serials(role, consumer, id_=id_))
        registry.revoke(serials)
        session = self._sessions.get(consumer)
        serves = session is not None and store.ukey_id(session.ukey) != id_  # another Ukey, which may ask again
        reason = ServiceOff.code if serves else UkeyRevoked.code
        await self._all(consumer, reason, (Role.VCM,), commit, actor=actor, also=serials)

    async def _all(
        self,
        consumer: ConsumerId,
        reason: str,
        roles: tuple[Role, ...],
        more: Callable[[Connection], tuple[Serial, ...]],
        *,
        actor: str,
        also: tuple[Serial, ...] = (),
    ) -> None:
        """The service and the certificates of ``roles``; ``more`` is committed with it."""
        session = self._sessions.pop(consumer)
        serials = also + tuple(serial for role in roles for serial in self._center.registry.serials(role, consumer))
        self._center.registry.revoke(serials)
        served: list[VcmId] = []
        closing: list[TerminalChannel | VcmChannel] = []
        if session is not None:
            served = [vcm.id for vcm in session.vcms.values() if vcm.granted]
            if reason != UKEY_REMOVED:
                session.refuse_terminal(_code(reason), f"service was revoked: {reason}")
            closing = session.close(reason)
        at = self._center.wall_clock()

        def commit(connection: Connection) -> tuple[Serial, ...]:
            gone = store.revoke_holders(connection, Role.VCM, consumer)
            tokens = store.remove_service(connection, consumer)
            for vcm in served:
                audit.append(connection, consumer, at=at, actor=actor, event="lease-stopped", subject=vcm)
            if session is not None or gone or tokens:
                audit.append(connection, consumer, at=at, actor=actor, event="service-revoked", subject=reason)
            return gone + more(connection)

        await self._finish(consumer, reason, closing, commit, serials)

    async def vcm(self, id_: VcmId, reason: str, *, actor: str, consumer: ConsumerId | None = None) -> None:
        """One VCM: token, certificates, leases, connections. Raises ``ForeignConsumer`` when it is not ``consumer``'s."""
        owner = self._sessions.owner_of(id_)  # memory first, where there is something to stop
        if owner is None:
            found = await self._center.database.read(partial(store.find_vcm, id_=id_))
            if found is None:
                return
            owner = found.consumer
        if consumer is not None and owner != consumer:
            raise ForeignConsumer(f"{id_} is another consumer's")
        serials = self._center.registry.serials(Role.VCM, owner, id_=id_)
        self._center.registry.revoke(serials)
        session = self._sessions.get(owner)
        vcm = session.vcms.get(id_) if session is not None else None
        channel = session.remove(vcm, reason) if session is not None and vcm is not None else None
        at = self._center.wall_clock()

        def commit(connection: Connection) -> tuple[Serial, ...]:
            gone = store.revoke_holders(connection, Role.VCM, owner, id_=id_)
            if store.remove_vcm(connection, id_):
                if vcm is not None and vcm.granted:
                    audit.append(connection, owner, at=at, actor=actor, event="lease-stopped", subject=id_)
                audit.append(connection, owner, at=at, actor=actor, event="vcm-revoked", subject=f"{id_}: {reason}")
            return gone

        await self._finish(owner, id_, [channel] if channel is not None else [], commit, serials)

    async def _finish(
        self,
        consumer: ConsumerId,
        what: str,
        closing: Sequence[TerminalChannel | VcmChannel],
        commit: Callable[[Connection], tuple[Serial, ...]],
        serials: tuple[Serial, ...],
    ) -> None:
        """The farewells and the disk side by side; connections are cut after the farewells, whatever the disk does."""
        written = asyncio.ensure_future(self._write(consumer, what, commit, self._beyond(serials)))
        try:
            await asyncio.gather(*(channel.closed(FAREWELL_S) for channel in closing))
        finally:
            self._center.revoked(serials)
            await written

    async def _write(self, consumer: ConsumerId, what: str, commit: Callable[[Connection], T], committed: Callable[[T], object]) -> T:
        """Commit; what the disk refuses is raised, and tried again in the background until it is there (once for each ``what``)."""
        try:
            return await self._center.database.write(commit, committed)
        except EnvironmentFault as exc:
            log.critical("a revocation of %s is not on disk, trying again: %s: %s", consumer, exc.code, exc.message)
            if what not in self._unsettled[consumer]:
                self._unsettled[consumer].add(what)
                self._sessions.spawn(self._settle(consumer, what, commit, committed))
            raise

    async def _settle(self, consumer: ConsumerId, what: str, commit: Callable[[Connection], T], committed: Callable[[T], object]) -> None:
        pause_s = RETRY_S
        while True:
            try:
                await asyncio.sleep(pause_s)
            except asyncio.CancelledError:
                log.critical("the KMC stops and a revocation of %s is not on disk: ask for it again", consumer)
                raise
            pause_s = min(2 * pause_s, RETRY_MAX_S)
            try:
                await self._center.database.write(commit, committed)
            except EnvironmentFault as exc:
                log.critical("a revocation of %s is still not on disk: %s", consumer, exc.code)
            else:
                break
        self._unsettled[consumer].discard(what)
        log.warning("a revocation of %s is on disk now", consumer)

    def _beyond(self, serials: tuple[Serial, ...]) -> Callable[[tuple[Serial, ...]], None]:
        """What the database revoked beyond ``serials``: issued while the revocation was on its way."""

        def committed(found: tuple[Serial, ...]) -> None:
            self._center.revoked(s for s in found if s not in serials)

        return committed

    def check_token(self, id_: TokenId) -> None:
        """Raises ``TokenStale`` for a token that was revoked before it was made."""
        if id_ in self._void:
            raise TokenStale("this token was revoked before it was made")

    async def token(self, id_: TokenId, *, actor: str) -> None:
        """A token, and the VCM that is bound to it. One whose making is still under way (who wanted it gave up) is never made."""
        self._void[id_] = None
        while len(self._void) > MOST_VOID:
            self._void.popitem(last=False)
        # In turn with whoever makes it, so that it is there by now, or will not be.
        token = await self._center.database.write(partial(store.find_token, id_=id_))
        if token is None:
            return
        at, consumer = self._center.wall_clock(), token.consumer

        def commit(connection: Connection) -> VcmId | None:
            bound = store.vcm_of_token(connection, id_)
            if bound is None and store.remove_token(connection, id_):
                audit.append(connection, consumer, at=at, actor=actor, event="token-revoked", subject=id_)
            return bound

        bound = await self._write(consumer, id_, commit, lambda _: None)
        if bound is not None:
            await self.vcm(bound, "token-revoked", actor=actor)


def _code(reason: str) -> str:
    return reason if reason in CipherfleetError.codes() else ServiceOff.code
