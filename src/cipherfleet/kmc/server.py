"""The KMC's routes, as ``contract.kmc_api`` documents them: who may call, for which consumer, and what is audited."""

import logging
from functools import partial

import msgspec

from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.server import Call, Handler, Server
from cipherfleet.contract.audit import AuditQuery, ManagementEvents, UsageReport
from cipherfleet.contract.errors import CipherfleetError, Forbidden, Malformed, Tampered, Unauthorised
from cipherfleet.contract.escrow import RowName
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId, TokenId, UkeyId, VcmId, is_slug
from cipherfleet.contract.kmc_api import (
    ApplicationRequest,
    CardRequest,
    ChallengeRequest,
    DelegationRequest,
    DelegationsRequest,
    EnrolConfirmation,
    EnrolRequest,
    EpochRequest,
    EscrowWrite,
    KeySearch,
    KmcToTerminal,
    KmcToVcm,
    LastUses,
    PolicyRequest,
    RowsRequest,
    StatementsRequest,
    TerminalRefused,
    TerminalToKmc,
    UkeyRequest,
    VcmAuthorisation,
    VcmCertificateRequest,
    VcmToKmc,
)
from cipherfleet.contract.messages import CertificateRequest, Done
from cipherfleet.contract.statements import Signed
from cipherfleet.kmc import audit
from cipherfleet.kmc.applications import Applications
from cipherfleet.kmc.audit_seal import AuditSealer
from cipherfleet.kmc.bulk import BulkReads
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.channels import Channel
from cipherfleet.kmc.delegations import Delegations
from cipherfleet.kmc.enrolment import Enrolment
from cipherfleet.kmc.epochs import Epochs
from cipherfleet.kmc.escrow import MAX_WRITE_BYTES, Escrow
from cipherfleet.kmc.identity import IdentityDesk
from cipherfleet.kmc.management_events import EventDesk
from cipherfleet.kmc.policies import Policies
from cipherfleet.kmc.service import Service
from cipherfleet.kmc.sessions import ConsumerSession
from cipherfleet.kmc.ukeys import Ukeys
from cipherfleet.kmc.usage import Usage

log = logging.getLogger(__name__)

MAX_SINCE = 2**31


class KmcServer:
    """The KMC without a process: its rooms behind one door. ``server`` is started by the caller."""

    def __init__(self, center: Center, credentials: Credentials) -> None:
        self.center = center
        self._bulk = BulkReads()
        self.escrow = Escrow(center)
        self.sealer = AuditSealer(center)
        self.service = Service(center, self.escrow, self.sealer)
        self.enrolment = Enrolment(center, self.escrow)
        self.usage = Usage(center)
        self.events = EventDesk(center)
        self.identity = IdentityDesk(center, self.service)
        self.delegations = Delegations(center, self.escrow)
        self.applications = Applications(center, self.escrow, self.service)
        self.ukeys = Ukeys(center, self.escrow, self.service)
        self.epochs = Epochs(center, self.escrow, self.service)
        self.policies = Policies(center, self.escrow, self.service)
        self.server = Server(credentials, check_peer=center.registry.check, wall_clock=center.wall_clock)
        center.on_revoked.append(self.server.revoke)
        self._mount()

    def _mount(self) -> None:
        operator, management, machine, vcm, terminal = (
            [role] for role in (Role.OPERATOR, Role.MANAGEMENT, Role.MACHINE, Role.VCM, Role.TERMINAL)
        )
        for method, path, roles, handler in (
            ("POST", "/v1/certificates/{role}/{id}", operator, self._certify_platform),
            ("POST", "/v1/consumers", operator, self._enrol),
            ("GET", "/v1/consumers", operator, self._list_consumers),
            ("POST", "/v1/consumers/{consumer}/confirm", operator, self._confirm),
            ("POST", "/v1/consumers/{consumer}/revoke-ukey", operator, self._revoke_ukey),
            ("DELETE", "/v1/consumers/{consumer}", operator, self._remove),
            ("GET", "/v1/applications", operator, self._list_applications),
            ("POST", "/v1/applications/{consumer}/{name}/revoke", operator, self._revoke_application),
            ("GET", "/v1/ukeys", [Role.OPERATOR, Role.TERMINAL], self._list_ukeys),
            ("POST", "/v1/ukeys/{consumer}/{ukey}/revoke", operator, self._revoke_one_ukey),
            ("GET", "/v1/audit/heads", operator, self._audit_heads),
            ("GET", "/v1/audit", [Role.OPERATOR, Role.VCM, Role.TERMINAL], self._audit),
            ("POST", "/v1/audit/events", management, self._report_events),
            ("POST", "/v1/usage", vcm, self._report_usage),
            ("GET", "/v1/usage/{key}", vcm, self._key_usage),
            ("POST", "/v1/identity/challenges", management, self._challenge),
            ("POST", "/v1/identity/verify", management, self._verify_identity),
            ("PUT", "/v1/vcms/{vcm}", management, self._authorise),
            ("DELETE", "/v1/vcms/{vcm}", management, self._revoke_vcm),
            ("GET", "/v1/vcms/{vcm}", management, self._vcm_state),
            ("DELETE", "/v1/tokens/{token}", management, self._revoke_token),
            ("POST", "/v1/consumers/{consumer}/revoke", management, self._revoke_service),
            ("POST", "/v1/cards", machine, self._certify_card),
            ("POST", "/v1/vcms/{vcm}/certificate", machine, self._certify_vcm),
            ("POST", "/v1/certificate", vcm, self._renew_vcm),
            ("GET", "/v1/escrow", [Role.VCM, Role.TERMINAL], self._read_escrow),
            ("POST", "/v1/escrow", vcm, self._write_escrow),
            ("POST", "/v1/escrow/rows", vcm, self._read_rows),
            ("GET", "/v1/escrow/rows", vcm, self._read_all_rows),
            ("POST", "/v1/escrow/search", vcm, self._search_keys),
            ("POST", "/v1/escrow/statements", vcm, self._read_statements),
            ("POST", "/v1/escrow/delegations", vcm, self._read_delegations),
            ("POST", "/v1/delegations", vcm, self._delegate),
            ("GET", "/v1/escrow/receipts/{key}", vcm, self._destruction_receipt),
            ("GET", "/v1/vcm", vcm, self._vcm),
            ("GET", "/v1/terminal", terminal, self._terminal),
            ("POST", "/v1/applications", terminal, self._sign_application),
            ("POST", "/v1/ukeys", terminal, self._submit_ukey),
            ("POST", "/v1/policies", terminal, self._set_policy),
            ("POST", "/v1/epochs", terminal, self._begin_epoch),
            ("GET", "/v1/epochs", terminal, self._epoch_statements),
            ("GET", "/v1/ukeys/statements", terminal, self._ukey_statements),
        ):
            self.server.route(method, path, roles, self._audited(f"{method} {path}", handler))

    def _audited(self, event: str, handler: Handler) -> Handler:
        """Attempts that were refused leave a line with the consumer they came from."""

        async def serve(call: Call) -> object:
            try:
                return await handler(call)
            except (Unauthorised, Forbidden, Tampered) as exc:
                peer = call.peer.identity
                await self.center.audit_refusal(peer.consumer, peer.uri, event, call.request.path, exc.code)
                raise

        return serve

    # -- operator ------------------------------------------------------------------------------------------------------

    async def _certify_platform(self, call: Call) -> object:
        role, id_ = call.request.match_info["role"], call.request.match_info["id"]
        return await self.enrolment.platform(role, id_, await call.body(CertificateRequest), actor=call.peer.identity.uri)

    async def _enrol(self, call: Call) -> object:
        return await self.enrolment.enrol(await call.body(EnrolRequest))

    async def _list_consumers(self, call: Call) -> object:
        return await self.enrolment.list_consumers()

    async def _confirm(self, call: Call) -> object:
        await self.enrolment.confirm(call.path("consumer", ConsumerId), (await call.body(EnrolConfirmation)).ukey)
        return Done()

    async def _remove(self, call: Call) -> object:
        await self.enrolment.remove(call.path("consumer", ConsumerId))
        return Done()

    async def _revoke_ukey(self, call: Call) -> object:
        await self.service.revoke.ukey(call.path("consumer", ConsumerId), actor=call.peer.identity.uri)
        return Done()

    async def _list_applications(self, call: Call) -> object:
        return await self.applications.list_applications(_consumer_asked(call) or "")

    async def _revoke_application(self, call: Call) -> object:
        consumer, name = call.path("consumer", ConsumerId), call.path("name", ApplicationName)
        await self.applications.revoke(consumer, name, actor=call.peer.identity.uri)
        return Done()

    async def _list_ukeys(self, call: Call) -> object:
        return await self.ukeys.list_ukeys(call.peer.identity.consumer or _consumer_asked(call) or "")

    async def _revoke_one_ukey(self, call: Call) -> object:
        await self.ukeys.revoke(call.path("consumer", ConsumerId), call.path("ukey", UkeyId), actor=call.peer.identity.uri)
        return Done()

    async def _audit(self, call: Call) -> object:
        """A consumer's VCM and terminal get its own log, whatever they ask for."""
        query = AuditQuery.parse(call.request.query)
        consumer = call.peer.identity.consumer
        if consumer:
            query = msgspec.structs.replace(query, consumer=consumer)
        async with self._bulk.turn(consumer, call.peer.identity.id):
            return await self.center.database.read(
                partial(audit.read_page, query=query, signing_key=self.center.signer.public_key, sealing=self.sealer.rule())
            )

    async def _audit_heads(self, call: Call) -> object:
        return await self.center.database.read(audit.read_heads)

    async def _report_usage(self, call: Call) -> object:
        await self.usage.report(await call.body(UsageReport), call.peer.identity)
        return Done()

    async def _key_usage(self, call: Call) -> object:
        return await self.usage.of(call.peer.identity.consumer, call.path("key", KeyId))

    # -- management ----------------------------------------------------------------------------------------------------

    async def _challenge(self, call: Call) -> object:
        return await self.identity.challenge((await call.body(ChallengeRequest)).consumer)

    async def _verify_identity(self, call: Call) -> object:
        return await self.identity.verify(await call.body(Signed), actor=call.peer.identity.uri)

    async def _authorise(self, call: Call) -> object:
        await self.identity.authorise(call.path("vcm", VcmId), await call.body(VcmAuthorisation), actor=call.peer.identity.uri)
        return Done()

    async def _revoke_vcm(self, call: Call) -> object:
        await self.service.revoke.vcm(call.path("vcm", VcmId), "vcm-deleted", actor=call.peer.identity.uri)
        return Done()

    async def _vcm_state(self, call: Call) -> object:
        return await self.service.state(call.path("vcm", VcmId))

    async def _revoke_token(self, call: Call) -> object:
        await self.service.revoke.token(call.path("token", TokenId), actor=call.peer.identity.uri)
        return Done()

    async def _revoke_service(self, call: Call) -> object:
        await self.service.revoke.service(call.path("consumer", ConsumerId), "service-off", actor=call.peer.identity.uri)
        return Done()

    async def _report_events(self, call: Call) -> object:
        await self.events.report(await call.body(ManagementEvents), actor=call.peer.identity.uri)
        return Done()

    # -- machine and VCM -----------------------------------------------------------------------------------------------

    async def _certify_card(self, call: Call) -> object:
        return await self.enrolment.card(await call.body(CardRequest), call.peer)

    async def _certify_vcm(self, call: Call) -> object:
        return await self.identity.certify(call.path("vcm", VcmId), await call.body(VcmCertificateRequest), call.peer)

    async def _renew_vcm(self, call: Call) -> object:
        return await self.identity.renew(await call.body(CertificateRequest), call.peer)

    async def _read_escrow(self, call: Call) -> object:
        if call.peer.identity.role is Role.VCM:
            await self.service.require_released(call.peer)
        after = _number(call, "after")
        async with self._bulk.turn(call.peer.identity.consumer, call.peer.identity.id):
            return await self.escrow.log_page(call.peer.identity.consumer, after)

    async def _read_rows(self, call: Call) -> object:
        request = await call.body(RowsRequest)
        await self.service.require_released(call.peer)
        return await self.escrow.rows(call.peer.identity.consumer, request.rows)

    async def _read_all_rows(self, call: Call) -> object:
        await self.service.require_released(call.peer)
        after = _row_name(call.query("after"))
        async with self._bulk.turn(call.peer.identity.consumer, call.peer.identity.id):
            return await self.escrow.rows_page(call.peer.identity.consumer, after)

    async def _search_keys(self, call: Call) -> object:
        request = await call.body(KeySearch)
        await self.service.require_released(call.peer)
        return await self.escrow.search(call.peer.identity.consumer, request)

    async def _read_statements(self, call: Call) -> object:
        request = await call.body(StatementsRequest)
        await self.service.require_released(call.peer)
        return await self.escrow.statements(call.peer.identity.consumer, request.names)

    async def _read_delegations(self, call: Call) -> object:
        request = await call.body(DelegationsRequest)
        await self.service.require_released(call.peer)
        return await self.delegations.statements(call.peer.identity.consumer, request.names)

    async def _delegate(self, call: Call) -> object:
        request = await call.body(DelegationRequest)
        await self.service.require_released(call.peer)
        receipt = await self.delegations.delegate(request, call.peer)
        self.service.escrow_changed(call.peer.identity.consumer, receipt.log[-1].sequence, but=VcmId(call.peer.identity.id))
        return receipt

    async def _destruction_receipt(self, call: Call) -> object:
        await self.service.require_released(call.peer)
        return await self.escrow.receipt(call.peer.identity.consumer, call.path("key", KeyId))

    async def _write_escrow(self, call: Call) -> object:
        request = await call.body(EscrowWrite, limit=MAX_WRITE_BYTES)
        await self.service.require_released(call.peer)
        consumer, id_ = call.peer.identity.consumer, VcmId(call.peer.identity.id)
        receipt = await self.escrow.write(consumer, request, via=id_)
        self.service.escrow_changed(consumer, receipt.log[-1].sequence, but=id_)
        return receipt

    async def _vcm(self, call: Call) -> object:
        frames = await call.frames(VcmToKmc)
        channel: Channel[KmcToVcm] = Channel(frames)
        try:
            session, vcm = await self.service.vcm_joined(call.peer, channel)
            try:
                async for frame in frames:
                    if isinstance(frame, LastUses):
                        await self.usage.report(frame.report, call.peer.identity)
                    elif not channel.finished:
                        await self.service.vcm_said(session, vcm, channel, frame)
            finally:
                channel.left()
                self.service.vcm_left(vcm, channel)
        except CipherfleetError as exc:
            await self._refused(call, "vcm-channel", exc)
        finally:
            channel.finish()
            await channel.closed()
        return frames.socket

    # -- terminal ------------------------------------------------------------------------------------------------------

    async def _sign_application(self, call: Call) -> object:
        return await self.applications.sign(await call.body(ApplicationRequest), call.peer)

    async def _submit_ukey(self, call: Call) -> object:
        return await self.ukeys.submit(await call.body(UkeyRequest), call.peer)

    async def _set_policy(self, call: Call) -> object:
        return await self.policies.submit(await call.body(PolicyRequest), call.peer)

    async def _begin_epoch(self, call: Call) -> object:
        return await self.epochs.begin(await call.body(EpochRequest), call.peer)

    async def _epoch_statements(self, call: Call) -> object:
        return await self.epochs.statements(call.peer.identity.consumer)

    async def _ukey_statements(self, call: Call) -> object:
        return await self.ukeys.statements(call.peer.identity.consumer)

    async def _terminal(self, call: Call) -> object:
        since = _number(call, "since")
        frames = await call.frames(TerminalToKmc)
        channel: Channel[KmcToTerminal] = Channel(frames)
        session: ConsumerSession | None = None
        try:
            session = await self.service.terminal_joined(call.peer, channel, since)
            async for frame in frames:
                await self.service.terminal_said(session, channel, frame)
        except CipherfleetError as exc:
            channel.post(TerminalRefused(exc.code, exc.message))
            await self._refused(call, "terminal-channel", exc)
        finally:
            if session is not None:
                self.service.terminal_left(session, channel)
            channel.finish()
            await channel.closed()
        return frames.socket

    async def _refused(self, call: Call, event: str, exc: CipherfleetError) -> None:
        peer = call.peer.identity
        log.warning("%s of %s was refused: %s", event, peer.uri, exc.code)
        await self.center.audit_refusal(peer.consumer, peer.uri, event, peer.id, exc.code)


def _number(call: Call, name: str) -> int:
    """A sequence number in the query, 0 by default. Raises ``Malformed``."""
    text = call.query(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > MAX_SINCE:
        raise Malformed(f"{name} is the number of a change of the escrow")
    return int(text)


def _row_name(text: str) -> RowName | None:
    """``KEY/VERSION``, or none. Raises ``Malformed``."""
    if not text:
        return None
    key, _, version = text.partition("/")
    try:
        named = msgspec.convert(key, KeyId)
    except msgspec.ValidationError as exc:
        raise Malformed("a row is named by key and version") from exc
    if not version.isascii() or not version.isdigit() or len(version) > 10:
        raise Malformed("a row is named by key and version")
    return RowName(named, int(version))


def _consumer_asked(call: Call) -> str | None:
    """The consumer of ``?consumer=``, ``None`` for all. Raises ``Malformed``."""
    consumer = call.query("consumer")
    if consumer and not is_slug(consumer):
        raise Malformed("no consumer can have this name")
    return consumer or None
