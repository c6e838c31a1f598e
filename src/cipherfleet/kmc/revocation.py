"""Off, at once and everywhere: a consumer's service, one VCM, one token.

Memory first, so that nothing is handed out any more while the disk is written; then the database; then the connections.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from sqlalchemy import Connection

from cipherfleet.contract.errors import CipherfleetError, ForeignConsumer, ServiceOff
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import ConsumerId, Serial, TokenId, VcmId
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.sessions import Sessions, TerminalChannel, VcmChannel

FAREWELL_S = 0.3
"""How long a channel may take to say why it closes; requests are refused meanwhile."""
UKEY_REMOVED = "ukey-removed"


class Revocation:
    """Everything in here is idempotent: revoking what is gone succeeds."""

    def __init__(self, center: Center, sessions: Sessions) -> None:
        self._center, self._sessions = center, sessions

    async def service(self, consumer: ConsumerId, reason: str, *, actor: str) -> None:
        """All of a consumer: VCMs, tokens, leases, ciphertext CMK; the terminal is told unless it said so itself."""
        session = self._sessions.pop(consumer)
        serials = self._center.registry.serials(Role.VCM, consumer)
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
            return gone

        await self._finish(closing, commit, serials)

    async def vcm(self, id_: VcmId, reason: str, *, actor: str, consumer: ConsumerId | None = None) -> None:
        """One VCM: token, certificates, leases, connections. Raises ``ForeignConsumer`` when it is not ``consumer``'s."""
        found = await self._center.database.read(partial(store.find_vcm, id_=id_))
        if found is None:
            return
        if consumer is not None and found.consumer != consumer:
            raise ForeignConsumer(f"{id_} is another consumer's")
        serials = self._center.registry.serials(Role.VCM, found.consumer, id_=id_)
        self._center.registry.revoke(serials)
        session = self._sessions.get(found.consumer)
        vcm = session.vcms.get(id_) if session is not None else None
        channel = session.remove(vcm, reason) if session is not None and vcm is not None else None
        at = self._center.wall_clock()

        def commit(connection: Connection) -> tuple[Serial, ...]:
            gone = store.revoke_holders(connection, Role.VCM, found.consumer, id_=id_)
            if store.remove_vcm(connection, id_):
                if vcm is not None and vcm.granted:
                    audit.append(connection, found.consumer, at=at, actor=actor, event="lease-stopped", subject=id_)
                audit.append(connection, found.consumer, at=at, actor=actor, event="vcm-revoked", subject=f"{id_}: {reason}")
            return gone

        await self._finish([channel] if channel is not None else [], commit, serials)

    async def _finish(
        self,
        closing: Sequence[TerminalChannel | VcmChannel],
        commit: Callable[[Connection], tuple[Serial, ...]],
        serials: tuple[Serial, ...],
    ) -> None:
        """The farewells and the disk side by side; connections are cut after the farewells, whatever the disk does."""
        written = asyncio.ensure_future(self._center.database.write(commit, self._beyond(serials)))
        try:
            await asyncio.gather(*(channel.closed(FAREWELL_S) for channel in closing))
        finally:
            self._center.revoked(serials)
            await written

    def _beyond(self, serials: tuple[Serial, ...]) -> Callable[[tuple[Serial, ...]], None]:
        """What the database revoked beyond ``serials``: issued while the revocation was on its way."""

        def committed(found: tuple[Serial, ...]) -> None:
            self._center.revoked(s for s in found if s not in serials)

        return committed

    async def token(self, id_: TokenId, *, actor: str) -> None:
        """A token, and the VCM that is bound to it."""

        def commit(connection: Connection) -> VcmId | None:
            token = store.find_token(connection, id_)
            bound = store.vcm_of_token(connection, id_)
            if token is not None and bound is None:
                store.remove_token(connection, id_)
                audit.append(connection, token.consumer, at=at, actor=actor, event="token-revoked", subject=id_)
            return bound

        at = self._center.wall_clock()
        bound = await self._center.database.write(commit)
        if bound is not None:
            await self.vcm(bound, "token-revoked", actor=actor)


def _code(reason: str) -> str:
    return reason if reason in CipherfleetError.codes() else ServiceOff.code
