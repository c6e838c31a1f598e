"""What the KMC asks of the terminal: the CMK for a new VCM (flow step f), and the heartbeats of its lease."""

import time

from cipherfleet.channel.sealing import check_card
from cipherfleet.channel.signing import sign
from cipherfleet.contract.errors import (
    AuditBroken,
    CheckpointForged,
    CipherfleetError,
    ErrorBody,
    EscrowRolledBack,
    KmcUnavailable,
    MarkMismatch,
    UkeyAbsent,
)
from cipherfleet.contract.escrow import LogEntry
from cipherfleet.contract.flow import FlowStep, Mark
from cipherfleet.contract.ids import VcmId
from cipherfleet.contract.kmc_api import (
    CmkReleased,
    DownloadSignal,
    KmcToTerminal,
    LeaseRequested,
    LeaseSigned,
    ReleaseRefused,
    TerminalRefused,
)
from cipherfleet.contract.management_api import LoginFailed
from cipherfleet.contract.statements import LeaseStatement, Signed
from cipherfleet.terminal.catch_up import FOLLOWED, catch_up
from cipherfleet.terminal.checkpoint import advance, advance_audit, read_checkpoint
from cipherfleet.terminal.insertion import FINAL, MAX_WAITING, TAKEN_OVER, Insertion, Service

LEASE_NONCE_BYTES = 16


class KeyRelease:
    """Decides what of the Ukey the KMC gets."""

    def __init__(self, insertion: Insertion) -> None:
        self._insertion = insertion
        self._shown = insertion.ukey.memory.seen  # what the KMC has shown us last

    async def receive(self, frame: KmcToTerminal) -> None:
        """A checkpoint that is forged or rolled back ends the service: with such an escrow there is none at all."""
        try:
            if isinstance(frame, DownloadSignal):
                await self._on_signal(frame)
            elif isinstance(frame, LeaseRequested):
                await self._on_lease(frame)
            elif isinstance(frame, TerminalRefused):
                self._on_refused(CipherfleetError.from_body(ErrorBody(frame.code, frame.message)))
        except UkeyAbsent:
            self._insertion.tell("ukey-absent")  # whoever watches the Ukey ends us
        except CipherfleetError as exc:
            await self._insertion.end(exc)

    async def _on_signal(self, frame: DownloadSignal) -> None:
        state = self._insertion
        state.tell("download-signal", frame.vcm)
        try:
            await self._look_at(frame.checkpoint, frame.log)  # at once: while it waits, newer ones may come
        except (CheckpointForged, EscrowRolledBack) as exc:
            await self.refuse(frame.vcm, exc)
            raise
        service = state.services.get(frame.vcm)
        if service is not None:
            await self.release(service, frame)
        elif len(state.signals) < MAX_WAITING:
            state.signals[frame.vcm] = (frame, time.monotonic())
        else:
            await self.refuse(frame.vcm, MarkMismatch("too many download signals wait for a permit"))

    async def release(self, service: Service, frame: DownloadSignal) -> None:
        """step f: the ciphertext CMK leaves the Ukey, if signal and mark match and the card is to be trusted."""
        ukey = self._insertion.ukey
        if service.card is not None or service.flow is None:
            await self.refuse(frame.vcm, MarkMismatch(f"the mark for {frame.vcm} is used up"))
            return
        try:
            service.flow.reach(FlowStep.PLACED)  # step d: the permit said where
            service.flow.reach(FlowStep.AUTHORISED)  # step e: the escrow signals for a VCM that the CA knows
            service.flow.release(Mark(frame.vcm, frame.mark))
            card = check_card(frame.card_chain, ukey.record.root.encode(), frame.card)
            sealed = await ukey.share.seal(card, frame.vcm)
            released = CmkReleased(frame.vcm, await ukey.ciphertext_cmk(), sealed)
            service.card = card.id
            if not await self._insertion.kmc.try_send(released):
                raise KmcUnavailable("the KMC went before it got the CMK")
            self._insertion.tell("cmk-released", frame.vcm)
        except UkeyAbsent:
            raise
        except CipherfleetError as exc:
            await self.refuse(frame.vcm, exc)
            await self.give_up(service, exc)

    async def refuse(self, vcm: VcmId, error: CipherfleetError) -> None:
        self._insertion.tell("release-refused", vcm, error.code)
        await self._insertion.kmc.try_send(ReleaseRefused(vcm, error.code, error.message))

    async def give_up(self, service: Service, error: CipherfleetError) -> None:
        """This VCM is not to serve: the management platform undoes it."""
        state = self._insertion
        state.drop(service)
        state.cause = (error, time.monotonic())
        if state.served and state.wanted and not state.services:
            state.ask_later()
        state.tell("login-failed", service.vcm, error.code)
        await state.management.try_send(LoginFailed(service.vcm, error.code, error.message))

    async def expire(self) -> None:
        """Signals whose permit never came."""
        state, now = self._insertion, time.monotonic()
        for vcm, (_, came) in list(state.signals.items()):
            if now - came > state.settings.step_s:
                del state.signals[vcm]
                await self.refuse(vcm, MarkMismatch(f"no permit came for {vcm}, so its download signal matches no mark"))

    async def _on_lease(self, frame: LeaseRequested) -> None:
        """The heartbeat: the Ukey is seen, so its signature prolongs the lease of a card that we know."""
        state = self._insertion
        if frame.checkpoint is not None:
            await self._look_at(frame.checkpoint, frame.log)
        if frame.audit is not None:
            await self._note_audit(frame.audit)
        service = state.services.get(frame.vcm)
        if service is None or service.card != frame.card or len(frame.nonce) != LEASE_NONCE_BYTES:
            state.tell("lease-refused", frame.vcm)
            return
        duration_ms = round(state.settings.lease_s * 1000)
        seen = await state.ukey.memory.look()
        known = state.ukey.memory.known
        lease = LeaseStatement(
            state.consumer,
            frame.card,
            frame.vcm,
            frame.nonce,
            duration_ms,
            seen.epoch,
            seen.sequence,
            seen.head,
            known.policy,
            *known.policy_point,
        )
        await state.kmc.send(LeaseSigned(await sign(lease, state.ukey.signer)))
        service.heard = time.monotonic()

    async def _look_at(self, checkpoint: Signed, log: tuple[LogEntry, ...]) -> None:
        """The escrow must have moved on from what the Ukey saw. Raises ``CheckpointForged`` or ``EscrowRolledBack``."""
        state = self._insertion
        memory = state.ukey.memory
        point = read_checkpoint(state.consumer, checkpoint, state.ukey.record.kmc_signing_key)
        # While an application is signed in or out the Ukey may learn more than this, which was on its way: what comes next
        # must continue that.
        start = memory.seen if point.sequence >= memory.seen.sequence else self._shown
        advance(state.consumer, start, checkpoint, log, state.ukey.record.kmc_signing_key)
        if any(entry.sequence > memory.seen.sequence and entry.subject.startswith(FOLLOWED) for entry in log):
            await catch_up(state.ukey, state.calls)
        self._shown = point
        try:
            await memory.remember(point)
        except EscrowRolledBack:
            if memory.seen.epoch != point.epoch or memory.seen.sequence <= point.sequence:
                raise

    async def _note_audit(self, checkpoint: Signed) -> None:
        """The Ukey keeps the newest seal on the audit log. One that contradicts it is told and not kept; the service goes on."""
        state = self._insertion
        memory = state.ukey.memory
        try:
            point = advance_audit(state.consumer, memory.audit, memory.seen.epoch, checkpoint, state.ukey.record.kmc_signing_key)
        except AuditBroken as exc:
            state.tell("audit-broken", detail=exc.message)
            return
        await memory.remember_audit(point)

    def _on_refused(self, error: CipherfleetError) -> None:
        state = self._insertion
        state.tell("terminal-refused", detail=error.code)
        if not state.served or isinstance(error, FINAL):
            state.polite = not isinstance(error, TAKEN_OVER)
            raise error
