"""What a Ukey that is plugged in allows: the release of the CMK to a card (the paper, flow step f), and leases.

What changes a session is done without waiting in between; whoever did wait (for the database, the HSM) looks again whether
the session still lives. So nothing that was revoked meanwhile gets a CMK or a lease.
"""

import logging

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import leaf, public_key_der
from cipherfleet.contract.errors import CardUntrusted, CmkInvalid, HsmUnavailable, LeaseStale, Malformed, OutOfOrder, ServiceOff
from cipherfleet.contract.escrow import LogEntry
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId
from cipherfleet.contract.kmc_api import CmkDelivered, CmkReleased, DownloadSignal, LeaseGranted, LeaseRequested
from cipherfleet.contract.statements import Signed
from cipherfleet.kmc import leases
from cipherfleet.kmc.audit_seal import AuditSealer
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.escrow import Escrow
from cipherfleet.kmc.hsm import WRAPPED_SECRET_BYTES
from cipherfleet.kmc.registry import Issued
from cipherfleet.kmc.sessions import ConsumerSession, Sessions, TerminalChannel, VcmSession

log = logging.getLogger(__name__)

MAX_SEALED_BYTES = 16 * 1024


class Release:
    """Signals, CMK and leases, each from terminal to card."""

    def __init__(self, center: Center, escrow: Escrow, sealer: AuditSealer, sessions: Sessions) -> None:
        self._center, self._escrow, self._sealer, self._sessions = center, escrow, sealer, sessions

    # -- the CMK -------------------------------------------------------------------------------------------------------

    def signal(self, session: ConsumerSession, vcm: VcmSession) -> None:
        """step f: the download signal for a VCM whose card waits, once per terminal."""
        waits = vcm.ready and not vcm.loaded and not vcm.sealed_share
        if waits and session.terminal is not None and vcm.signalled is not session.terminal:
            vcm.signalled = session.terminal
            self._sessions.persist(session, lambda: self._send_signal(session, vcm))

    def card_ready(self, session: ConsumerSession, vcm: VcmSession, card: CardId) -> None:
        """step e: the vCC is up. What the terminal has already released is delivered again."""
        check_card(vcm, card)
        vcm.ready = True
        if vcm.sealed_share and not vcm.loaded:
            self._start_delivery(session, vcm)
        else:
            self.signal(session, vcm)

    async def _send_signal(self, session: ConsumerSession, vcm: VcmSession) -> None:
        terminal, card = vcm.signalled, self._card(vcm)
        while True:  # from what the terminal was told last: of a long log all of it would fit no frame
            point, checkpoint, entries = await self._escrow.since(session.consumer, session.told)
            if terminal is None or session.terminal is not terminal or not session.lives(vcm):
                return
            if session.told <= point.sequence:
                break  # else a heartbeat has shown more meanwhile
        session.told = max(session.told, point.sequence)
        chain = self._center.certification.chain(card).chain
        terminal.post(DownloadSignal(vcm.id, vcm.mark, vcm.card, chain, checkpoint, entries))

    def released(self, session: ConsumerSession, channel: TerminalChannel, frame: CmkReleased) -> None:
        """step f: the terminal found that signal and mark match. Raises ``OutOfOrder``, ``CmkInvalid`` or ``Malformed``."""
        vcm = session.vcms.get(frame.vcm)
        if vcm is None:
            return  # deleted while the terminal was looking at the signal
        if vcm.signalled is not channel or vcm.loaded or vcm.sealed_share:
            raise OutOfOrder(f"no download signal for {frame.vcm} is open")
        if len(frame.ciphertext_cmk) != WRAPPED_SECRET_BYTES:
            raise CmkInvalid(f"a ciphertext CMK has {WRAPPED_SECRET_BYTES} bytes")
        if not 0 < len(frame.sealed_ukey_share) <= MAX_SEALED_BYTES:
            raise Malformed("the sealed Ukey share has no possible size")
        session.ciphertext_cmk[:] = frame.ciphertext_cmk
        vcm.sealed_share = frame.sealed_ukey_share
        self._start_delivery(session, vcm)

    def _start_delivery(self, session: ConsumerSession, vcm: VcmSession) -> None:
        """Once for each of a VCM's channels: all others wait while the HSM re-wraps."""
        if vcm.delivered is not vcm.channel:
            vcm.delivered = vcm.channel
            self._sessions.persist(session, lambda: self._deliver(session, vcm))

    async def _deliver(self, session: ConsumerSession, vcm: VcmSession) -> None:
        """step f: unwrap and re-wrap in the HSM, for the one card that will use it."""
        recipient = public_key_der(leaf(self._card(vcm).pem).public_key())
        try:
            wrapped = await self._center.hsm.rewrap(self._center.root_key, bytes(session.ciphertext_cmk), recipient)
        except CmkInvalid as exc:
            if session.lives(vcm):
                vcm.sealed_share, vcm.delivered = b"", None
                session.forget_cmk()
                await self._center.audit_refusal(session.consumer, session.actor, "cmk-released", vcm.id, exc.code)
                session.refuse_terminal(exc.code, exc.message)
            return
        if not session.lives(vcm):
            return
        if not vcm.released:  # on disk before it is out, so that a restarted KMC knows that this VCM has it
            await self._center.progress(session.consumer, vcm.id, "cmk-released", vcm.card, actor=session.actor, released=True)
            vcm.released = True
        if session.lives(vcm):
            vcm.post(CmkDelivered(wrapped, vcm.sealed_share))

    # -- leases --------------------------------------------------------------------------------------------------------

    async def lease_wanted(self, session: ConsumerSession, vcm: VcmSession, card: CardId, nonce: bytes) -> None:
        """A card's fresh nonce, on its way to the Ukey. Raises ``CardUntrusted``, ``ServiceOff``, ``Malformed`` or ``LeaseReplayed``."""
        check_card(vcm, card)
        self._card(vcm)
        now = self._sessions.loop.time()
        if now > vcm.certified_until:
            raise ServiceOff(f"the certificate of {vcm.id} has expired")
        if not vcm.may_want(now, self._center.settings.heartbeat_s):
            return
        vcm.nonces.offer(nonce, now)
        if session.wanted_at is None:
            session.wanted_at = now
            self._sessions.watch(session)
        await self.request_lease(session, vcm, nonce)

    async def request_lease(self, session: ConsumerSession, vcm: VcmSession, nonce: bytes) -> None:
        """The newest checkpoint rides along, for the terminal and from the point as they were before the wait.

        The request goes without when the HSM is away, or when terminal or point are others by then: the next one brings it.
        """
        checkpoint: Signed | None = None
        entries: tuple[LogEntry, ...] = ()
        try:
            if await self._escrow.sequence(session.consumer) > session.told:
                terminal, told = session.terminal, session.told
                point, newest, new = await self._escrow.since(session.consumer, told)
                if terminal is not None and (session.terminal, session.told) == (terminal, told) and point.sequence > told:
                    session.told, checkpoint, entries = point.sequence, newest, new
        except HsmUnavailable:
            log.warning("a checkpoint for %s waits for the HSM", session.consumer)
        if session.terminal is not None and session.lives(vcm):
            audit: Signed | None = None
            sealed = self._sealer.newest(session.consumer)
            if sealed is not None and sealed[0] > session.audit_told:
                session.audit_told, audit = sealed
            session.terminal.post(LeaseRequested(vcm.id, vcm.card, nonce, checkpoint, entries, audit))

    async def lease_signed(self, session: ConsumerSession, signed: Signed) -> None:
        """The Ukey's signature was given; the HSM's comes now, unless something was revoked.

        Raises ``LeaseForged``, ``LeaseForeign`` or ``LeaseReplayed``. A lease that no one waits for any more is dropped.
        """
        limit_ms = round(self._center.settings.lease_s * 1000)
        statement = leases.read_lease(signed, session.consumer, session.ukey, limit_ms=limit_ms)
        vcm = session.vcms.get(statement.vcm)
        if vcm is None:
            return  # deleted since its card asked
        leases.check_card(statement, vcm.card)
        try:
            offered = vcm.nonces.redeem(statement.nonce)
        except LeaseStale:
            return  # so many nonces came after it that it was dropped
        session.wanted_at = None
        self._sessions.watch(session)
        try:
            lease = await signing.countersign(signed, self._center.signer)
        except HsmUnavailable:
            vcm.nonces.give_back(statement.nonce, offered)
            log.warning("a lease for %s waits for the HSM", vcm.id)
            return
        if not session.lives(vcm) or not self._center.registry.active(Identity(Role.CARD, vcm.card)):
            return
        vcm.post(LeaseGranted(lease))
        if not vcm.granted:
            vcm.granted = True
            await self._center.audit(session.consumer, session.actor, "lease-started", f"{vcm.id} on {vcm.card}")

    def _card(self, vcm: VcmSession) -> Issued:
        """The certificate of the VCM's card. Raises ``CardUntrusted`` when the card was superseded."""
        active = self._center.registry.active(Identity(Role.CARD, vcm.card))
        if not active:
            raise CardUntrusted(f"{vcm.card} is not in service any more")
        return active[0]


def check_card(vcm: VcmSession, card: CardId) -> None:
    """Raises ``CardUntrusted`` when a VCM speaks of another card than the one it was certified with."""
    if card != vcm.card:
        raise CardUntrusted(f"{vcm.id} was certified with {vcm.card}, not {card}")
