"""A platform for the terminal's tests: KMC, management and one VCM speak the real interface over real mutual TLS.

They decide nothing: a test takes what the terminal sent from a queue and says what comes back.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, rsa, x25519
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from cipherfleet.channel import codec, signing
from cipherfleet.channel.certificates import new_key, public_key_der
from cipherfleet.channel.client import Caller
from cipherfleet.channel.frames import Frames
from cipherfleet.channel.server import Call, Server
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import CipherfleetError, Exists, KmcUnavailable, ManagementUnavailable, ServiceOff, StateConflict
from cipherfleet.contract.escrow import LogEntry, Seen, StatementEntry, genesis, policy_subject, replay, statement_digest
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, VcmId, new_card_id, new_vcm_id
from cipherfleet.contract.kmc_api import (
    ApplicationReply,
    ApplicationRequest,
    CmkReleased,
    ConsumerEntry,
    ConsumerList,
    DownloadSignal,
    EnrolConfirmation,
    EnrolReply,
    EnrolRequest,
    LeaseRequested,
    LeaseSigned,
    LogPage,
    PolicyReply,
    PolicyRequest,
    TerminalToKmc,
    UkeyStatements,
)
from cipherfleet.contract.lifecycle import Process, TraceEntry
from cipherfleet.contract.management_api import (
    DomainInfo,
    IdentityAnswered,
    IdentityWanted,
    Inserted,
    LoggedIn,
    LoginPermit,
    ServiceOn,
    TerminalToManagement,
)
from cipherfleet.contract.messages import Chain, Done
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import (
    ApplicationStatement,
    CheckpointStatement,
    IdentityRequest,
    LeaseStatement,
    LoginStatement,
    PolicyStatement,
    Purpose,
    SealedShare,
    Signed,
    Statement,
)
from cipherfleet.contract.vcm_api import LoginReply
from cipherfleet.terminal.enrol import EnrolResult, enrol
from cipherfleet.terminal.sealing import confirmation
from cipherfleet.terminal.ukey import PublicRecord, read_record
from tests.pki import Authority

ACME = ConsumerId("acme")
PIN = "2468-test"
SETTINGS = Settings(heartbeat_s=0.2, lease_s=1.0, step_s=2.0, argon2_memory_kib=8192, argon2_iterations=1)
EPOCH = 1
PATIENCE_S = 20.0

S = TypeVar("S", bound=Statement)
F = TypeVar("F")


class StandInCard:
    """A card's transport keys and what it does with the share; certified by whom the test likes."""

    def __init__(self, authority: Authority, *, id_: CardId | None = None, identity: Identity | None = None) -> None:
        self.id = id_ or new_card_id(MachineId("m1"))
        first, second = mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate()
        self._key = MLKEM768X25519PrivateKey(first, second)
        self.transport_key = first.public_key().public_bytes_raw() + second.public_key().public_bytes_raw()
        self.chain = authority.certify(identity or Identity(Role.CARD, self.id), new_key().public_key(), hpke_public_key=self.transport_key)

    def open(self, sealed: bytes, vcm: VcmId, *, card: CardId | None = None) -> SealedShare:
        info = f"cipherfleet sealed share v1|{card or self.id}|{vcm}".encode()
        plain = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM).decrypt(sealed, self._key, info)
        return codec.decode(plain, SealedShare)


class Line:
    """The server's end of a terminal's channel: everything it sent, in order, over all its connections."""

    def __init__(self, receives: Any) -> None:
        self._receives = receives
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.frames: Frames[Any, Any] | None = None
        self.queries: list[str] = []
        self.connections = 0
        self.arrived, self.closed = asyncio.Event(), asyncio.Event()

    async def serve(self, call: Call) -> object:
        frames = await call.frames(self._receives)
        self.frames = frames
        self.queries.append(call.request.query_string)
        self.connections += 1
        self.arrived.set()
        self.closed.clear()
        async for frame in frames:
            self.sent.put_nowait(frame)
        if self.frames is frames:
            self.frames = None
            self.closed.set()
        await frames.close()
        return frames.response

    async def say(self, frame: object) -> None:
        if self.frames is None:
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), PATIENCE_S)
        assert self.frames is not None
        await self.frames.send(frame)

    async def say_raw(self, raw: bytes) -> None:
        assert self.frames is not None
        await self.frames.socket.send_bytes(raw)

    async def hears(self, kind: type[F], *, within: float = PATIENCE_S) -> F:
        """The next frame, which must be a ``kind``."""
        frame = await asyncio.wait_for(self.sent.get(), within)
        assert isinstance(frame, kind), frame
        return frame

    async def hears_at_last(self, kind: type[F], *, within: float = PATIENCE_S) -> F:
        """The next frame of ``kind``; others are passed over."""
        async with asyncio.timeout(within):
            while True:
                frame = await self.sent.get()
                if isinstance(frame, kind):
                    return frame


class Kmc:
    """CA and escrow: real signatures, a real log, consumers in memory."""

    def __init__(self, root: Authority) -> None:
        self.root, self.platform = root, root.subordinate("platform")
        self.domains: dict[ConsumerId, Authority] = {}
        self.consumers: dict[ConsumerId, str] = {}
        self.signer = LocalSigner(new_key())
        self.ciphertext_cmk = os.urandom(40)
        self.log: list[LogEntry] = []
        self.page = 1000
        """Entries in one answer."""
        self.line = Line(TerminalToKmc)
        self.requests: list[ApplicationRequest] = []
        self.fail: dict[str, list[CipherfleetError | None]] = {}
        self.forge_reply: Callable[[EnrolReply], EnrolReply] = lambda reply: reply
        self.identity_key = b""
        self.policy: Signed | None = None
        self.url = ""

    def domain(self, consumer: ConsumerId) -> Authority:
        return self.domains.setdefault(consumer, self.root.subordinate(f"domain {consumer}"))

    def routes(self, server: Server) -> None:
        operator, terminal = [Role.OPERATOR], [Role.TERMINAL]
        server.route("POST", "/v1/consumers", operator, self._enrol)
        server.route("GET", "/v1/consumers", operator, self._list)
        server.route("POST", "/v1/consumers/{consumer}/confirm", operator, self._confirm)
        server.route("DELETE", "/v1/consumers/{consumer}", operator, self._delete)
        server.route("POST", "/v1/applications", terminal, self._application)
        server.route("POST", "/v1/policies", terminal, self._policy)
        server.route("GET", "/v1/escrow", terminal, self._log)
        server.route("GET", "/v1/terminal", terminal, self.line.serve)
        server.route("GET", "/v1/ukeys/statements", terminal, self._ukey_statements)

    async def _log(self, call: Call) -> LogPage:
        after = int(call.query("after"))
        entries = tuple(self.log[after : after + self.page])
        return LogPage(entries, await self.checkpoint(call.peer.identity.consumer) if after + len(entries) >= len(self.log) else None)

    def _may_fail(self, what: str) -> None:
        planned = self.fail.get(what)
        if planned:
            error = planned.pop(0)
            if error is not None:
                raise error

    async def _enrol(self, call: Call) -> EnrolReply:
        request = await call.body(EnrolRequest)
        if request.consumer in self.consumers:
            raise Exists(f"{request.consumer} is enrolled")
        self.consumers[request.consumer] = "pending"
        self._may_fail("enrol")
        domain = self.domain(request.consumer)
        chains = []
        for csr, role in ((request.identity_csr, Role.UKEY), (request.channel_csr, Role.TERMINAL)):
            parsed = x509.load_der_x509_csr(csr)
            assert parsed.is_signature_valid
            key = parsed.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            serial = f"ukey-{request.consumer[:4]}0001"
            leaf = domain.certify(Identity(role, serial, request.consumer), key)
            chains.append(Chain(leaf, self.root.pem))
            if role is Role.UKEY:
                self.identity_key = public_key_der(key)
        checkpoint = await self.checkpoint(request.consumer, log=[])
        reply = EnrolReply(chains[0], chains[1], self.root.pem, domain.pem, self.signer.public_key, self.ciphertext_cmk, checkpoint)
        return self.forge_reply(reply)

    async def _list(self, call: Call) -> ConsumerList:
        self._may_fail("list")
        return ConsumerList(tuple(ConsumerEntry(name, state, 0.0, 0, 0) for name, state in self.consumers.items()))

    async def _confirm(self, call: Call) -> Done:
        consumer = call.path("consumer", ConsumerId)
        assert (await call.body(EnrolConfirmation)).ukey == f"ukey-{consumer[:4]}0001"
        error = (self.fail.get("confirm") or [None]).pop(0)
        if error is not None and error.hint != "after":
            raise error
        self.consumers[consumer] = "enrolled"
        if error is not None:
            raise error
        return Done()

    async def _delete(self, call: Call) -> Done:
        consumer = call.path("consumer", ConsumerId)
        if self.consumers.get(consumer) == "enrolled":
            raise StateConflict(f"{consumer} is enrolled")
        self.consumers.pop(consumer, None)
        return Done()

    async def _application(self, call: Call) -> ApplicationReply:
        request = await call.body(ApplicationRequest)
        self.requests.append(request)
        self._may_fail("application")
        statement = signing.verify(request.statement, ApplicationStatement, [self.identity_key])
        entry = StatementEntry(statement.name, request.statement, statement.sequence)
        self.log.append(LogEntry(len(self.log) + 1, entry.subject, statement_digest(request.statement)))
        chain, domain = b"", self.domain(statement.consumer)
        if not statement.revoked:
            key = x509.load_der_x509_csr(request.csr).public_key()
            assert isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey))
            chain = domain.certify(Identity(Role.APPLICATION, statement.name, statement.consumer), key)
        await self.application_written(entry.subject)
        checkpoint = await self.checkpoint(statement.consumer)
        return ApplicationReply(Chain(chain, domain.pem), checkpoint, tuple(self.log[request.since :]))

    async def _ukey_statements(self, call: Call) -> UkeyStatements:
        return UkeyStatements((), 0, self.policy)

    async def _policy(self, call: Call) -> PolicyReply:
        request = await call.body(PolicyRequest)
        self._may_fail("policy")
        await self.set_policy(request.statement)
        return PolicyReply(await self.checkpoint(call.peer.identity.consumer), tuple(self.log[request.since :]))

    async def set_policy(self, signed: Signed) -> None:
        """As one of the consumer's Ukeys signed it."""
        statement = codec.decode(signed.payload, PolicyStatement)
        self.policy = signed
        subject = policy_subject(statement.policy.name, statement.sequence)
        self.log.append(LogEntry(len(self.log) + 1, subject, statement_digest(signed)))

    async def application_written(self, subject: str) -> None:
        """What happens between the escrow's write and the reply: nothing, unless a test says otherwise."""

    # -- the escrow's log ----------------------------------------------------------------------------------------------

    def grow(self, entries: int = 1) -> None:
        for _ in range(entries):
            self.log.append(LogEntry(len(self.log) + 1, f"key/{os.urandom(16).hex()}/1", os.urandom(32)))

    def point(self, consumer: ConsumerId = ACME, *, log: list[LogEntry] | None = None, epoch: int = EPOCH) -> Seen:
        return replay(Seen(epoch, 0, genesis(consumer, epoch)), tuple(self.log if log is None else log))

    async def checkpoint(
        self, consumer: ConsumerId = ACME, *, log: list[LogEntry] | None = None, epoch: int = EPOCH, signer: LocalSigner | None = None
    ) -> Signed:
        point = self.point(consumer, log=log, epoch=epoch)
        return await signing.sign(CheckpointStatement(consumer, point.epoch, point.sequence, point.head), signer or self.signer)


class Management:
    def __init__(self) -> None:
        self.domains: set[ConsumerId] = set()
        self.line = Line(TerminalToManagement)
        self.fail: dict[str, CipherfleetError] = {}
        self.endpoints: tuple[str, ...] = ("https://127.0.0.1:8443", "https://127.0.0.1:8444")
        self.url = ""

    def routes(self, server: Server) -> None:
        server.route("PUT", "/v1/consumers/{consumer}", [Role.OPERATOR], self._allot)
        server.route("DELETE", "/v1/consumers/{consumer}", [Role.OPERATOR], self._release)
        server.route("GET", "/v1/domain", [Role.TERMINAL, Role.APPLICATION], self._domain)
        server.route("GET", "/v1/terminal", [Role.TERMINAL], self.line.serve)

    async def _allot(self, call: Call) -> DomainInfo:
        consumer = call.path("consumer", ConsumerId)
        self.domains.add(consumer)
        if "allot" in self.fail:
            raise self.fail["allot"]
        return DomainInfo(consumer, "127.16.2.0/24", ())

    async def _release(self, call: Call) -> Done:
        self.domains.discard(call.path("consumer", ConsumerId))
        return Done()

    async def _domain(self, call: Call) -> DomainInfo:
        if "domain" in self.fail:
            raise self.fail["domain"]
        return DomainInfo(call.peer.identity.consumer, "127.16.2.0/24", self.endpoints)


class Vcm:
    """One VCM and its card. ``share`` is what the card got; until ``serving`` it answers ``service-off``."""

    def __init__(self, card: StandInCard) -> None:
        self.id, self.card = new_vcm_id(), card
        self.mark = os.urandom(32)
        self.share: bytes = b""
        self.serving = False
        self.logins: list[LoginStatement] = []
        self.reply: Callable[[LoginReply], LoginReply] = lambda reply: reply
        self.endpoint = ""
        self.server: Server | None = None
        self.identity_key = b""

    async def start(self, domain: Authority, consumer: ConsumerId) -> None:
        self.server = Server(domain.credentials(Identity(Role.VCM, self.id, consumer), trust=domain.pem))
        self.server.route("POST", "/v1/login", [Role.TERMINAL], self._login)
        host, port = await self.server.start(("127.0.0.1", 0))
        self.endpoint = f"https://{host}:{port}"

    async def _login(self, call: Call) -> LoginReply:
        statement = signing.verify(await call.body(Signed), LoginStatement, [self.identity_key])
        assert statement.vcm == self.id
        assert statement.nonce not in {s.nonce for s in self.logins}
        self.logins.append(statement)
        if not self.serving:
            raise ServiceOff(f"{self.id} has no lease yet")
        mac = confirmation(self.share, self.card.id, self.id, statement.nonce)
        return self.reply(LoginReply(self.id, self.card.id, mac, 1.0))


class Platform:
    """All of it. ``async with platform_in(tmp_path) as platform``."""

    def __init__(self, folder: Path) -> None:
        self.root = Authority("root")
        self.kmc, self.management = Kmc(self.root), Management()
        self.ukey = folder / "ukey"
        self.operator = self.kmc.platform.credentials(Identity(Role.OPERATOR, "operator"))
        self.credentials = {
            "kmc": self.kmc.platform.credentials(Identity(Role.KMC, "kmc")),
            "management": self.kmc.platform.credentials(Identity(Role.MANAGEMENT, "management")),
        }
        self.servers: dict[str, Server] = {}
        self.ports: dict[str, int] = {"kmc": 0, "management": 0}
        self.vcms: list[Vcm] = []

    async def start(self, *names: str) -> None:
        """Start servers; one that ran before comes back on its old port."""
        for name in names or ("kmc", "management"):
            server = self.servers[name] = Server(self.credentials[name])
            part: Kmc | Management = self.kmc if name == "kmc" else self.management
            part.routes(server)
            host, self.ports[name] = await server.start(("127.0.0.1", self.ports[name]))
            part.url = f"https://{host}:{self.ports[name]}"

    async def stop(self, *names: str) -> None:
        for name in names:
            await self.servers.pop(name).stop()

    async def close(self) -> None:
        await self.stop(*list(self.servers))
        for vcm in self.vcms:
            if vcm.server is not None:
                await vcm.server.stop()

    def callers(self) -> tuple[Caller, Caller]:
        """The operator's."""
        return (
            Caller(self.kmc.url, Identity(Role.KMC, "kmc").dns_name, self.operator, KmcUnavailable),
            Caller(self.management.url, Identity(Role.MANAGEMENT, "management").dns_name, self.operator, ManagementUnavailable),
        )

    async def enrol(self, *, consumer: ConsumerId = ACME, folder: Path | None = None, pin: str = PIN) -> EnrolResult:
        kmc, management = self.callers()
        async with kmc, management:
            return await enrol(
                kmc,
                management,
                consumer,
                folder or self.ukey,
                pin,
                kmc_url=self.kmc.url,
                management_url=self.management.url,
                settings=SETTINGS,
            )

    @property
    def record(self) -> PublicRecord:
        return read_record(self.ukey)

    def verify(self, signed: Signed, kind: type[S]) -> S:
        """A statement, signed by the Ukey."""
        return signing.verify(signed, kind, [self.kmc.identity_key])

    async def vcm(self, card: StandInCard | None = None) -> Vcm:
        """A new VCM that listens."""
        vcm = Vcm(card or StandInCard(self.kmc.platform))
        vcm.identity_key = self.kmc.identity_key
        await vcm.start(self.kmc.domain(ACME), ACME)
        self.vcms.append(vcm)
        return vcm

    # -- the steps of a creation, as the platform takes them -----------------------------------------------------------

    async def identify(self, purpose: Purpose = Purpose.BUILD_VCM, vcm: VcmId | None = None) -> IdentityRequest:
        nonce = os.urandom(32)
        await self.management.line.say(IdentityWanted(nonce, purpose, vcm))
        answer = await self.management.line.hears(IdentityAnswered)
        request = self.verify(answer.request, IdentityRequest)
        assert request == IdentityRequest(ACME, nonce, purpose, vcm)
        return request

    async def permit(self, vcm: Vcm) -> None:
        await self.management.line.say(LoginPermit(vcm.id, vcm.endpoint, vcm.mark))

    async def permitted(self, card: StandInCard | None = None) -> Vcm:
        """The Ukey was just inserted: a VCM that the terminal has a permit for."""
        await self.management.line.hears(Inserted)
        await self.identify()
        vcm = await self.vcm(card)
        await self.permit(vcm)
        return vcm

    async def signal(self, vcm: Vcm, *, since: int = 0, **changes: Any) -> None:
        log = tuple(self.kmc.log[since:])
        frame = DownloadSignal(vcm.id, vcm.mark, vcm.card.id, vcm.card.chain, await self.kmc.checkpoint(), log)
        await self.kmc.line.say(msgspec.structs.replace(frame, **changes))

    async def released(self, vcm: Vcm) -> SealedShare:
        """The terminal released the CMK: the card opens its share."""
        frame = await self.kmc.line.hears(CmkReleased)
        assert frame.vcm == vcm.id
        assert frame.ciphertext_cmk == self.kmc.ciphertext_cmk
        share = vcm.card.open(frame.sealed_ukey_share, vcm.id)
        vcm.share = share.ukey_share
        return share

    async def lease(self, vcm: Vcm, **changes: Any) -> LeaseStatement:
        """One heartbeat: nonce to the terminal, the Ukey's signature back."""
        nonce = os.urandom(16)
        await self.kmc.line.say(msgspec.structs.replace(LeaseRequested(vcm.id, vcm.card.id, nonce), **changes))
        lease = self.verify((await self.kmc.line.hears_at_last(LeaseSigned)).lease, LeaseStatement)
        duration_ms, seen = round(SETTINGS.lease_s * 1000), self.kmc.point(log=self.kmc.log[: lease.sequence])
        assert lease == LeaseStatement(ACME, vcm.card.id, vcm.id, nonce, duration_ms, seen.epoch, seen.sequence, seen.head)
        return lease

    async def serve(self, vcm: Vcm) -> tuple[TraceEntry, ...]:
        """Creation steps 8 and 9."""
        vcm.serving = True
        assert (await self.management.line.hears(LoggedIn)).vcm == vcm.id
        trace = (TraceEntry(Process.CREATE, 9, "vcm", "service_on", 1.0, 2.0),)
        await self.management.line.say(ServiceOn(vcm.id, trace, vcm.endpoint))
        return trace

    async def create(self, vcm: Vcm | None = None, *, inserted: bool = True) -> Vcm:
        """A whole creation, from the Ukey's insertion to service on."""
        if inserted:
            await self.management.line.hears_at_last(Inserted)
        await self.identify()
        vcm = vcm or await self.vcm()
        await self.permit(vcm)
        await self.signal(vcm)
        await self.released(vcm)
        await self.lease(vcm)
        await self.serve(vcm)
        return vcm


@contextlib.asynccontextmanager
async def platform_in(folder: Path) -> AsyncIterator[Platform]:
    platform = Platform(folder)
    await platform.start()
    try:
        yield platform
    finally:
        await platform.close()
