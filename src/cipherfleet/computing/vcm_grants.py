"""Who may do what in a VCM: what the consumer's Ukey has signed, as the card checked it. The operator's word counts nothing here."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from cipherfleet.channel import codec
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.contract.errors import (
    ApplicationRevoked,
    ApplicationUnknown,
    EscrowRolledBack,
    ForeignConsumer,
    KeyUnknown,
    LoginRefused,
    Malformed,
    NotPermitted,
    ServiceOff,
    StatementExpired,
    StatementReplayed,
)
from cipherfleet.contract.escrow import StatementEntry
from cipherfleet.contract.grants import Rates, decide
from cipherfleet.contract.identities import Peer, Role
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId, VcmId
from cipherfleet.contract.statements import ApplicationStatement, LoginStatement, Right, Signed
from cipherfleet.contract.vcc import Operation, VirtualCryptoCard

NONCE_BYTES = 32
MAX_LOGINS = 65536


class Grants:
    """What the applications' newest statements grant."""

    def __init__(
        self,
        consumer: ConsumerId,
        escrow: Escrow,
        card: VirtualCryptoCard,
        wall_clock: Callable[[], float] = time.time,
        *,
        label_of: Callable[[KeyId], Awaitable[str]],
    ) -> None:
        self._label_of = label_of
        self._rates: dict[ApplicationName, tuple[int, Rates]] = {}
        self._consumer, self._escrow, self._card, self._wall_clock = consumer, escrow, card, wall_clock
        self._checked: dict[ApplicationName, tuple[StatementEntry, ApplicationStatement]] = {}

    async def authorise(self, peer: Peer, right: Right) -> None:
        """See ``VcmHost.authorise``. Raises ``ServiceOff`` while nothing is loaded."""
        statement = await self._of(peer)
        if right not in statement.rights:
            raise NotPermitted(f"{peer.identity.id} may not {right}")

    async def may_some(self, peer: Peer, right: Right) -> bool:
        """See ``VcmHost.may_some``."""
        statement = await self._of(peer)
        if right in statement.rights:
            return True
        if not any(right in grant.operations for grant in statement.grants):
            raise NotPermitted(f"{peer.identity.id} may not {right}")
        return False

    async def authorise_key(self, peer: Peer, right: Right, key: KeyId, context: bytes) -> None:
        """See ``VcmHost.authorise_key``."""
        statement = await self._of(peer)
        if right in statement.rights:
            return
        rates = self._rates_of(statement)
        label = ""
        if any(grant.labels and right in grant.operations for grant in statement.grants):
            with suppress(KeyUnknown):
                label = await self._label_of(key)

        def take(number: int) -> float:
            return rates.take(number, statement.grants[number].rate)

        try:
            decide(statement.grants, right, key, label, context, self._wall_clock(), take)
        except NotPermitted as exc:
            raise NotPermitted(f"{statement.name} may not {right} with key {key}", exc.hint) from exc

    def _rates_of(self, statement: ApplicationStatement) -> Rates:
        known = self._rates.get(statement.name)
        if known is None or known[0] != statement.sequence:
            known = self._rates[statement.name] = statement.sequence, Rates(time.monotonic)
        return known[1]

    async def _of(self, peer: Peer) -> ApplicationStatement:
        """The statement in force on a peer."""
        identity = peer.identity
        if identity.consumer != self._consumer:
            raise ForeignConsumer(f"{identity.uri} is of another consumer")
        if identity.role is not Role.APPLICATION:
            raise NotPermitted(f"a {identity.role} may only log in")
        if self._escrow.seen is None:
            raise ServiceOff("the statements are not loaded yet")
        await self._escrow.require()
        statement = await self._statement(ApplicationName(identity.id), peer.public_key_sha256)
        if statement.revoked:  # first: a signing out names no key
            raise ApplicationRevoked(f"the consumer signed {identity.id} out")
        if statement.public_key_sha256 != peer.public_key_sha256:
            raise ApplicationUnknown(f"the consumer signed {identity.id} in with another key")
        if statement.not_after <= self._wall_clock():
            raise StatementExpired(f"the consumer's statement on {identity.id} has expired")
        return statement

    async def _statement(self, name: ApplicationName, public_key_sha256: bytes) -> ApplicationStatement:
        """The newest statement on ``name``; looked for once more when it does not fit, as it may have been signed a moment ago."""
        statement = await self._verified(name)
        if statement is None or statement.public_key_sha256 != public_key_sha256:
            await self._escrow.refresh()
            statement = await self._verified(name)
        if statement is None:
            raise ApplicationUnknown(f"the consumer has not signed {name} in")
        return statement

    async def _verified(self, name: ApplicationName) -> ApplicationStatement | None:
        kept, known = self._escrow.statements.get(name), self._checked.get(name)
        if kept is None:
            return None
        if known is not None and known[0] == kept:
            return known[1]
        done = await self._card.submit(Operation.VERIFY_STATEMENT, parameters=codec.encode(kept.statement))
        statement = codec.decode(done.data, ApplicationStatement, what="an application's statement")
        if kept.statement.kind != ApplicationStatement.KIND or statement.name != name or statement.consumer != self._consumer:
            raise ApplicationUnknown(f"the escrow keeps another statement under the name of {name}")
        if statement.sequence != kept.sequence:
            raise EscrowRolledBack(f"the escrow keeps statement {statement.sequence} on {name} under number {kept.sequence}")
        if known is not None and statement.sequence < known[1].sequence:
            raise StatementReplayed(f"the statement on {name} is older than one seen before")
        self._checked[name] = kept, statement
        return statement


class Logins:
    """Creation step 8, at the VCM: who logs in, and the card's answer to it."""

    def __init__(self, vcm: VcmId, consumer: ConsumerId, card: VirtualCryptoCard) -> None:
        self._vcm, self._consumer, self._card = vcm, consumer, card
        self._nonces: set[bytes] = set()

    async def login(self, peer: Peer, signed: Signed) -> bytes:
        """The card's confirmation of the statement's nonce.

        Raises ``LoginRefused``, ``StatementForged``, ``StatementReplayed``, ``ForeignConsumer`` or ``ServiceOff``.
        """
        if peer.identity.role is not Role.TERMINAL or peer.identity.consumer != self._consumer:
            raise LoginRefused("only a terminal of this consumer may log in")
        if signed.kind != LoginStatement.KIND:
            raise LoginRefused("this is not a login")
        done = await self._card.submit(Operation.VERIFY_STATEMENT, parameters=codec.encode(signed))
        try:
            statement = codec.decode(done.data, LoginStatement, what="the login")
        except Malformed as exc:
            raise LoginRefused("this is not a login") from exc
        if statement.vcm != self._vcm or statement.consumer != self._consumer or len(statement.nonce) != NONCE_BYTES:
            raise LoginRefused("the login is for another VCM, or has no nonce")
        if statement.nonce in self._nonces:
            raise StatementReplayed("this login was used before")
        if len(self._nonces) >= MAX_LOGINS:
            raise LoginRefused(f"a VCM takes at most {MAX_LOGINS} logins")
        self._nonces.add(statement.nonce)
        return (await self._card.submit(Operation.CONFIRM, data=statement.nonce)).data
