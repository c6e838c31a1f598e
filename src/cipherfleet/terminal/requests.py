"""What the management platform asks of the terminal: creation steps 1, 7, 8 and 9, deletion steps 1, 7 and 8."""

import time

from cipherfleet.channel.signing import sign
from cipherfleet.contract.errors import CardUnconfirmed, CipherfleetError, ErrorBody, OutOfOrder, UkeyAbsent
from cipherfleet.contract.flow import MARK_BYTES, FlowStep, Mark, ServiceFlow
from cipherfleet.contract.management_api import (
    DeletePermit,
    FlowFailed,
    IdentityAnswered,
    IdentityWanted,
    LoggedIn,
    LoginPermit,
    ManagementToTerminal,
    ServiceOffSeen,
    ServiceOn,
)
from cipherfleet.contract.statements import IdentityRequest, Purpose
from cipherfleet.terminal.callers import vcm_caller
from cipherfleet.terminal.insertion import FINAL, TAKEN_OVER, Insertion, Service, ServiceInfo
from cipherfleet.terminal.login import log_in
from cipherfleet.terminal.release import KeyRelease

CHALLENGE_BYTES = 32


class Requests:
    """Answers the management platform."""

    def __init__(self, insertion: Insertion, release: KeyRelease) -> None:
        self._insertion, self._release = insertion, release

    async def receive(self, frame: ManagementToTerminal) -> None:
        """What comes out of turn has no effect; what ends the service for good does."""
        try:
            if isinstance(frame, IdentityWanted):
                await self._on_identity(frame)
            elif isinstance(frame, LoginPermit):
                await self._on_permit(frame)
            elif isinstance(frame, ServiceOn):
                self._on_service(frame)
            elif isinstance(frame, DeletePermit):
                await self._on_delete(frame)
            elif isinstance(frame, FlowFailed):
                self._on_failure(CipherfleetError.from_body(ErrorBody(frame.code, frame.message, frame.hint)))
        except UkeyAbsent:
            self._insertion.tell("ukey-absent")  # whoever watches the Ukey ends us
        except OutOfOrder as exc:
            self._insertion.tell("out-of-order", detail=exc.message)
        except CipherfleetError as exc:
            await self._insertion.end(exc)

    async def _on_identity(self, frame: IdentityWanted) -> None:
        """Creation and deletion step 1: the Ukey proves who it is, for exactly one purpose and one challenge."""
        state = self._insertion
        building = frame.purpose is Purpose.BUILD_VCM
        if len(frame.nonce) != CHALLENGE_BYTES or building != (frame.vcm is None):
            raise OutOfOrder(f"the identity request for {frame.purpose} is not one")
        request = IdentityRequest(state.consumer, frame.nonce, frame.purpose, frame.vcm)
        signed = await sign(request, state.ukey.signer)
        if building:
            flow = ServiceFlow()
            flow.reach(FlowStep.REQUESTED)  # step a
            state.wanted = True
            state.asked.append((flow, time.monotonic()))
        await state.management.send(IdentityAnswered(signed))
        state.tell("identity-proven", frame.vcm or "", frame.purpose)

    async def _on_permit(self, frame: LoginPermit) -> None:
        """Creation step 7: where the VCM is, and the mark for its download signal.

        Without a mark: a VCM that serves already, to be logged in to once more. Nothing is downloaded for such a one.
        """
        state = self._insertion
        state.tell("login-permit", frame.vcm, frame.endpoint)
        service = state.services.get(frame.vcm)
        if not frame.mark:
            if service is None:
                service = state.services[frame.vcm] = Service(frame.vcm, frame.endpoint, None)
        elif service is not None or not state.asked or len(frame.mark) != MARK_BYTES:
            raise OutOfOrder(f"a permit for {frame.vcm} came that nobody asked for")
        else:
            flow, _ = state.asked.popleft()
            flow.reach(FlowStep.IDENTIFIED)  # step b: no permit without the CA's word
            flow.mark(Mark(frame.vcm, frame.mark))  # step c
            service = state.services[frame.vcm] = Service(frame.vcm, frame.endpoint, flow)
        if service.login is None or service.login.done():
            state.start_login(service, self._log_in(service, frame.network_namespace))
        waiting = state.signals.pop(frame.vcm, None)
        if waiting is not None:
            await self._release.release(service, waiting[0])

    async def _log_in(self, service: Service, namespace: str) -> None:
        """Creation step 8. The VCM answers once it has CMK, lease and keys (step g)."""
        state = self._insertion
        try:
            async with vcm_caller(state.ukey, service.vcm, service.endpoint, namespace) as caller:
                card = await log_in(state.ukey, caller, service.vcm, patience=state.settings.step_s)
            if service.flow is None and service.card is None:
                service.card = card  # it holds our share, so it was ours before this agent started
            elif service.card != card:
                raise CardUnconfirmed(f"{card} answered for {service.vcm}, the share went to {service.card or 'none'}")
            if not service.logged_in:
                service.reach(FlowStep.KEYS_LOADED)  # step g
                service.logged_in = True
            state.tell("logged-in", service.vcm, card)
            await state.management.try_send(LoggedIn(service.vcm))
        except UkeyAbsent:
            state.tell("ukey-absent")
        except CipherfleetError as exc:
            await self._release.give_up(service, exc)

    def _on_service(self, frame: ServiceOn) -> None:
        """Creation step 9, flow step h."""
        state = self._insertion
        service = state.services.get(frame.vcm)
        if service is None or not service.logged_in:
            raise OutOfOrder(f"{frame.vcm} is said to serve before we logged in")
        if not service.on:
            service.reach(FlowStep.SERVING)  # step h
            service.on, service.heard = True, time.monotonic()
            state.is_on()
            state.tell("service-on", frame.vcm)
            state.service_on(ServiceInfo(state.consumer, frame.vcm, service.endpoint, frame.trace))

    async def _on_delete(self, frame: DeletePermit) -> None:
        """Deletion steps 7 and 8."""
        state = self._insertion
        service = state.services.get(frame.vcm)
        if service is not None:
            state.drop(service)
            state.wanted = state.wanted and bool(state.services)
        await state.management.send(ServiceOffSeen(frame.vcm))
        state.tell("service-off", frame.vcm, "no crypto-service offered")

    def _on_failure(self, error: CipherfleetError) -> None:
        """The management platform undid a creation, or hangs up."""
        state = self._insertion
        state.tell("flow-failed", detail=error.code)
        cause, state.cause = state.cause, None
        if cause is None and state.asked:
            state.asked.popleft()
        if not state.served or isinstance(error, FINAL):
            state.polite = not isinstance(error, TAKEN_OVER)
            raise cause[0] if cause is not None else error
        if state.wanted and not state.services:
            state.ask_later()
