"""Service on and off: terminals and VCMs meet here. What is released stands in ``release``, what ends it in ``revocation``."""

from functools import partial

from sqlalchemy import Connection

from cipherfleet.contract.errors import Exists, LeaseExpired, OutOfOrder, ServiceOff, UkeyAbsent, UkeyRevoked, VcmUnknown
from cipherfleet.contract.identities import Peer, Role
from cipherfleet.contract.ids import ConsumerId, Serial, VcmId
from cipherfleet.contract.kmc_api import (
    CardReady,
    CertificatesRevoked,
    CmkLoaded,
    CmkRefused,
    CmkReleased,
    EscrowChanged,
    LeaseSigned,
    LeaseWanted,
    ReleaseRefused,
    Serving,
    TerminalToKmc,
    UkeyRemoved,
    VcmKmcState,
    VcmToKmc,
)
from cipherfleet.kmc import store
from cipherfleet.kmc.audit_seal import AuditSealer
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow import Escrow
from cipherfleet.kmc.pace import Pace
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.release import Release
from cipherfleet.kmc.revocation import UKEY_REMOVED, Revocation
from cipherfleet.kmc.sessions import ConsumerSession, Sessions, TerminalChannel, VcmChannel, VcmSession

JOINS_PER_SECOND, JOINS_BURST = 1, 30


class Service:
    """All that is on. ``revoke`` turns it off."""

    def __init__(self, center: Center, escrow: Escrow, sealer: AuditSealer) -> None:
        self._center, self._sealer = center, sealer
        self._sessions = Sessions(center.settings.lease_s)
        self._sessions.on_expired = self._expired
        self._joins = Pace(JOINS_PER_SECOND, JOINS_BURST, "plugs its Ukey in")
        self._release = Release(center, escrow, sealer, self._sessions)
        self.revoke = Revocation(center, self._sessions)
        center.on_revoked.append(self._tell_revoked)

    async def start(self) -> None:
        """After a restart: consumers with VCMs have one lease's time for their terminal to come back."""

        def read(connection: Connection) -> list[store.Consumer]:
            return [store.get_consumer(connection, name) for name in store.consumers_with_vcms(connection)]

        for consumer in await self._center.database.read(read):
            self._sessions.open(consumer)
        await self._sealer.start()

    async def stop(self) -> None:
        """The KMC goes, the certificates stay: whoever is connected comes again."""
        await self._sessions.stop()
        await self._sealer.stop()

    # -- the terminal --------------------------------------------------------------------------------------------------

    async def terminal_joined(self, peer: Peer, channel: TerminalChannel, since: int) -> ConsumerSession:
        """The Ukey is in: the newest terminal counts, one that was there before is told to go.

        Raises ``ConsumerUnknown`` or ``UkeyRevoked``.
        """
        consumer = peer.identity.consumer
        found = await self._center.database.read(partial(store.get_consumer, name=consumer))
        self._joins.take(consumer, 1)  # each of them writes a line to disk
        await self._center.audit(consumer, peer.identity.uri, "terminal-joined", peer.identity.id)
        self._center.registry.check(peer)
        mine = found.ukeys.get(peer.identity.id)
        if mine is None:
            raise UkeyRevoked(f"{peer.identity.id} was revoked")
        session = self._sessions.open(found)
        if session.ukey != mine and session.vcms:
            # Their cards got the CMK from another Ukey, and may not know this one: they are built anew.
            await self.revoke.service(consumer, Exists.code, actor=peer.identity.uri)
            session = self._sessions.open(found)
        session.ukey = mine
        session.refuse_terminal(Exists.code, "another terminal of this consumer has taken over")
        session.terminal, session.told, session.lost_at = channel, since, None
        session.audit_told = 0
        self._sessions.watch(session)
        for vcm in session.vcms.values():
            self._release.signal(session, vcm)
            if vcm.nonces.newest is not None:
                self._sessions.spawn(self._release.request_lease(session, vcm, vcm.nonces.newest))
        return session

    def terminal_left(self, session: ConsumerSession, channel: TerminalChannel) -> None:
        """Without a word: the lease runs out, or the terminal comes back before it does."""
        if session.terminal is channel:
            session.terminal, session.lost_at = None, self._sessions.loop.time()
            self._sessions.watch(session)

    async def terminal_said(self, session: ConsumerSession, channel: TerminalChannel, frame: TerminalToKmc) -> None:
        """Raises what the terminal is to be refused with."""
        if session.terminal is not channel:
            raise OutOfOrder("this terminal's session has ended")
        match frame:
            case CmkReleased():
                self._release.released(session, channel, frame)
            case ReleaseRefused(vcm, code, _):
                await self._center.audit_refusal(session.consumer, session.actor, "cmk-release-refused", vcm, code)
            case LeaseSigned(lease):
                await self._release.lease_signed(session, lease)
            case UkeyRemoved():
                await self.revoke.service(session.consumer, UKEY_REMOVED, actor=session.actor)

    # -- the VCM -------------------------------------------------------------------------------------------------------

    async def vcm_joined(self, peer: Peer, channel: VcmChannel) -> tuple[ConsumerSession, VcmSession]:
        """A certified VCM is here: its token is used up. Raises ``VcmUnknown``."""
        id_, consumer = VcmId(peer.identity.id), peer.identity.consumer

        def join(connection: Connection) -> tuple[store.Consumer, store.Vcm]:
            vcm = store.find_vcm(connection, id_)
            if vcm is None or vcm.consumer != consumer:
                raise VcmUnknown(f"{id_} is not authorised")
            store.change_vcm(connection, id_, joined=True)
            return store.get_consumer(connection, consumer), vcm

        found, kept = await self._center.database.write(join)
        self._center.registry.check(peer)
        session = self._sessions.open(found)
        until = self._sessions.loop.time() + peer.not_after - self._center.wall_clock()
        vcm = session.vcms.get(id_)
        if vcm is None:
            vcm = session.vcms[id_] = VcmSession(kept, channel, until)
        else:
            if vcm.channel is not None:
                vcm.channel.finish()
            vcm.channel, vcm.certified_until = channel, max(until, vcm.certified_until)
        vcm.post(CertificatesRevoked(self._center.registry.revoked_of(consumer)))
        return session, vcm

    def vcm_left(self, vcm: VcmSession, channel: VcmChannel) -> None:
        if vcm.channel is channel:
            vcm.channel = None

    async def vcm_said(self, session: ConsumerSession, vcm: VcmSession, channel: VcmChannel, frame: VcmToKmc) -> None:
        """Raises what closes the VCM's channel."""
        if not session.lives(vcm) or vcm.channel is not channel:
            raise ServiceOff(f"service of {vcm.id} is off")
        match frame:
            case CardReady(card):
                self._release.card_ready(session, vcm, card)
            case CmkLoaded():
                if not vcm.released:
                    raise OutOfOrder("no CMK was delivered")
                if not vcm.loaded:
                    await self._center.progress(session.consumer, vcm.id, "cmk-loaded", vcm.card, loaded=True)
                    vcm.loaded, vcm.sealed_share = True, b""
            case Serving():
                if not vcm.loaded:
                    raise OutOfOrder("a VCM without a CMK does not serve")
                if not vcm.serving:
                    await self._center.progress(session.consumer, vcm.id, "serving", vcm.card, serving=True)
                    vcm.serving = True
            case CmkRefused(code, _):
                vcm.sealed_share = b""
                await self._center.audit_refusal(session.consumer, vcm.id, "cmk-loaded", vcm.card, code)
            case LeaseWanted(card, nonce):
                await self._release.lease_wanted(session, vcm, card, nonce)

    # -- asked by others -----------------------------------------------------------------------------------------------

    async def state(self, id_: VcmId) -> VcmKmcState:
        """Raises ``VcmUnknown``."""
        found = await self._center.database.read(partial(store.find_vcm, id_=id_))
        if found is None:
            raise VcmUnknown(f"{id_} is not authorised")
        certified = bool(self._center.registry.serials(Role.VCM, found.consumer, id_=id_))
        session = self._sessions.get(found.consumer)
        vcm = session.vcms.get(id_) if session is not None else None
        if vcm is None:
            return VcmKmcState(certified, connected=False, released=False, serving=False)
        connected = vcm.channel is not None
        return VcmKmcState(certified, connected, vcm.released, connected and vcm.serving)

    async def require_released(self, peer: Peer) -> None:
        """That wrapped keys may go to, and come from, this VCM (flow step g). Raises ``ServiceOff``."""
        consumer, id_ = peer.identity.consumer, VcmId(peer.identity.id)
        session = self._sessions.get(consumer)
        vcm = session.vcms.get(id_) if session is not None else None
        released = vcm is not None and vcm.released
        if session is not None and vcm is None:  # the KMC was restarted and the VCM's channel is not back yet
            found = await self._center.database.read(partial(store.find_vcm, id_=id_))
            released = found is not None and found.consumer == consumer and found.released and not session.closed
        if not released:
            raise ServiceOff(f"the CMK was not released to {id_}")

    def escrow_changed(self, consumer: ConsumerId, sequence: int, *, but: VcmId | None = None) -> None:
        """Tell the consumer's (other) VCMs."""
        session = self._sessions.get(consumer)
        if session is not None:
            session.tell_vcms(EscrowChanged(sequence), but=but)

    def vcm_renewed(self, issued: Issued) -> None:
        """A VCM has a newer certificate: its channel may go on getting leases."""
        session = self._sessions.get(issued.identity.consumer)
        vcm = session.vcms.get(VcmId(issued.identity.id)) if session is not None else None
        if vcm is not None:
            vcm.certified_until = self._sessions.loop.time() + issued.not_after - self._center.wall_clock()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _expired(self, session: ConsumerSession) -> None:
        if self._sessions.get(session.consumer) is session:
            reason = UkeyAbsent.code if session.terminal is None else LeaseExpired.code
            self._sessions.spawn(self.revoke.service(session.consumer, reason, actor="kmc"))

    def _tell_revoked(self, serials: tuple[Serial, ...]) -> None:
        for consumer, theirs in self._center.registry.by_consumer(serials).items():
            session = self._sessions.get(consumer)
            if session is not None:
                session.tell_vcms(CertificatesRevoked(theirs))
