"""Who may do what in a VCM: what the consumer's Ukey has signed, as the card checked it. The operator's word counts nothing here."""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from cipherfleet.channel import codec
from cipherfleet.channel.delegations import is_signed_by, read_delegation
from cipherfleet.computing.vcm_delegations import Delegated
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.contract.errors import (
    ApplicationRevoked,
    ApplicationUnknown,
    EscrowRolledBack,
    Forbidden,
    ForeignConsumer,
    GrantExpired,
    KeyUnknown,
    LoginRefused,
    Malformed,
    NotPermitted,
    ServiceOff,
    StatementExpired,
    StatementForged,
    StatementReplayed,
)
from cipherfleet.contract.escrow import DelegationName, StatementEntry
from cipherfleet.contract.grants import Grant, Rates, administrator, decide
from cipherfleet.contract.identities import Peer, Role
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId, VcmId
from cipherfleet.contract.statements import ApplicationStatement, DelegationStatement, LoginStatement, Right, Signed
from cipherfleet.contract.vcc import Operation, VirtualCryptoCard
from cipherfleet.contract.vcm_api import Delegation, DelegationsReply

NONCE_BYTES = 32
MAX_LOGINS = 65536


class Grants:
    """What the applications' newest statements grant, and what those delegate that the Ukey lets delegate."""

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
        self._delegated = Delegated(consumer, escrow)
        self._rates: dict[ApplicationName | DelegationName, tuple[int, Rates]] = {}
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
        if not any(right in grant.operations for grant in statement.grants) and not self._delegated.any_to(statement.name):
            raise NotPermitted(f"{peer.identity.id} may not {right}")
        return False

    async def authorise_key(self, peer: Peer, right: Right, key: KeyId, context: bytes) -> None:
        """See ``VcmHost.authorise_key``."""
        statement = await self._of(peer)
        if right in statement.rights:
            return
        rates = self._rates_of(statement.name, statement.sequence)
        label = await self._label([grant for grant in statement.grants if right in grant.operations], key)

        def take(number: int) -> float:
            return rates.take(number, statement.grants[number].rate)

        try:
            decide(statement.grants, right, key, label, context, self._wall_clock(), take)
        except Forbidden as exc:
            refused: Forbidden = exc
        else:
            return
        for given in await self._delegated.to(statement.name, key):
            try:
                await self._decide_delegated(given, right, context)
            except Forbidden as exc:
                refused = exc if isinstance(refused, NotPermitted) else refused
            else:
                return
        if isinstance(refused, NotPermitted):
            raise NotPermitted(f"{statement.name} may not {right} with key {key}", refused.hint) from refused
        raise refused

    # -- delegation ----------------------------------------------------------------------------------------------------

    async def delegate(self, peer: Peer, key: KeyId, signed: Signed) -> Delegation:
        """See ``VcmHost.delegate``."""
        own = await self._of(peer)
        statement = read_delegation(signed)
        if statement.consumer != self._consumer:
            raise ForeignConsumer("the delegation is another consumer's")
        if statement.delegator != own.name or not is_signed_by(statement, own):
            raise StatementForged(f"the delegation is not signed by the key that the Ukey signed {own.name} in with")
        if statement.key != key:
            raise Malformed("the delegation is of another key than the request")
        if not statement.revoked:
            await self._require_within(own, statement)
            if any(grant.not_after and grant.not_after <= self._wall_clock() for grant in statement.grants):
                raise GrantExpired("what is delegated would have expired already", "say a later time")
            delegate = await self._statement(statement.delegate)
            if delegate.revoked:
                raise ApplicationRevoked(f"the consumer signed {statement.delegate} out")
        name = DelegationName(statement.delegator, statement.delegate, statement.key)
        newest = self._escrow.state.newest_delegation(own.name)
        if statement.sequence <= newest:
            raise StatementReplayed(f"delegation {statement.sequence} of {own.name} came after number {newest}")
        await self._escrow.delegate(name, statement.sequence, signed)
        return _described(name, statement, "revoked" if statement.revoked else "active")

    async def delegations(self, peer: Peer, key: KeyId) -> DelegationsReply:
        """See ``VcmHost.delegations``."""
        own = await self._of(peer)
        found = await self._delegated.of_key(key)
        everything = Right.SHOW in own.rights
        shown = [
            _described(name, statement, await self._state_of(statement))
            for name, statement in found.items()
            if statement is not None and (everything or own.name in (name.delegator, name.delegate))
        ]
        return DelegationsReply(key, tuple(shown), self._escrow.state.newest_delegation(own.name) + 1)

    async def _state_of(self, statement: DelegationStatement) -> str:
        if statement.revoked:
            return "revoked"
        try:
            await self._require_within(await self._delegator(statement), statement)
        except (Forbidden, KeyUnknown):
            return "void"
        return "expired" if all(0 < grant.not_after <= self._wall_clock() for grant in statement.grants) else "active"

    async def _require_within(self, own: ApplicationStatement, statement: DelegationStatement) -> None:
        """That the delegator may delegate all of it. Raises ``DelegationTooWide``."""
        label = await self._label(own.grants, statement.key)
        for grant in statement.grants:
            administrator(own.grants, grant, statement.key, label)

    async def _decide_delegated(self, given: DelegationStatement, right: Right, context: bytes) -> None:
        """As ``decide``: one of the grants permits it, and so does the delegator's own that it is within, as it stands now.

        An operation counts for both.
        """
        own, key, now = await self._delegator(given), given.key, self._wall_clock()
        label = await self._label(own.grants, key)
        name = DelegationName(given.delegator, given.delegate, key)
        rates, own_rates = self._rates_of(name, given.sequence), self._rates_of(own.name, own.sequence)

        def permits(grants: Sequence[Grant], number: int, rates: Rates) -> None:
            rate = grants[number].rate
            decide((grants[number],), right, key, label, context, now, lambda _: rates.take(number, rate))

        refused: Forbidden = NotPermitted(f"{given.delegator} did not delegate to {right} with key {key}")
        for number, grant in enumerate(given.grants):
            if right not in grant.operations:
                continue
            try:
                within = administrator(own.grants, grant, key, label)
                permits(given.grants, number, rates)
                permits(own.grants, within, own_rates)
            except Forbidden as exc:
                refused = exc
            else:
                return
        raise refused

    async def _delegator(self, given: DelegationStatement) -> ApplicationStatement:
        """The statement in force on who delegated, if it is the one who signed. Raises ``NotPermitted``."""
        own = await self._verified(given.delegator)
        if own is None or own.revoked:
            raise NotPermitted(f"{given.delegator}, who delegated it, is not signed in")
        if not is_signed_by(given, own):
            raise NotPermitted(f"{given.delegator} is signed in with another key than the one that signed the delegation")
        if own.not_after <= self._wall_clock():
            raise NotPermitted(f"the consumer's statement on {given.delegator}, who delegated it, has expired")
        return own

    async def _label(self, grants: Sequence[Grant], key: KeyId) -> str:
        """A key's label, if one of ``grants`` goes by labels."""
        label = ""
        if any(grant.labels for grant in grants):
            with suppress(KeyUnknown):
                label = await self._label_of(key)
        return label

    def _rates_of(self, name: ApplicationName | DelegationName, sequence: int) -> Rates:
        """Of one statement; ``sequence`` is its number."""
        known = self._rates.get(name)
        if known is None or known[0] != sequence:
            known = self._rates[name] = sequence, Rates(time.monotonic)
        return known[1]

    # -- statements ----------------------------------------------------------------------------------------------------

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

    async def _statement(self, name: ApplicationName, public_key_sha256: bytes | None = None) -> ApplicationStatement:
        """The newest statement on ``name``, by that key if one is named.

        Looked for once more when it does not fit, as it may have been signed a moment ago. Raises ``ApplicationUnknown``.
        """
        statement = await self._verified(name)
        if statement is None or public_key_sha256 not in (None, statement.public_key_sha256):
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


def _described(name: DelegationName, statement: DelegationStatement, state: str) -> Delegation:
    return Delegation(name.delegator, name.delegate, name.key, statement.grants, state, statement.sequence)


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
