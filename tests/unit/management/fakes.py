"""A KMC, cipher machines and terminals that speak the real interfaces over real mutual TLS, and hold nothing but their state."""

import asyncio
import hashlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.client import Caller
from cipherfleet.channel.frames import Frames
from cipherfleet.channel.server import Call, Server
from cipherfleet.channel.signing import LocalSigner, sign, verify
from cipherfleet.contract.audit import ManagementEvent, ManagementEvents
from cipherfleet.contract.errors import (
    ChallengeReplayed,
    ChallengeUnknown,
    CipherfleetError,
    KmcUnavailable,
    MachineUnavailable,
    ManagementUnavailable,
    NotPermitted,
    TokenStale,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, TokenId, VcmId, token_id_of
from cipherfleet.contract.kmc_api import Challenge, ChallengeRequest, IdentityReply, VcmAuthorisation, VcmKmcState
from cipherfleet.contract.machine_api import BuildOrder, CardReport, Isolation, MachineReport, VcmReport, VcmState
from cipherfleet.contract.management_api import (
    DeletePermit,
    FlowFailed,
    IdentityAnswered,
    IdentityWanted,
    Inserted,
    LoggedIn,
    LoginPermit,
    ManagementToTerminal,
    Removed,
    ServiceOffSeen,
    ServiceOn,
    TerminalToManagement,
)
from cipherfleet.contract.messages import Done
from cipherfleet.contract.statements import IdentityRequest, Purpose, Signed
from cipherfleet.contract.vcc import VccLimits
from tests.pki import Authority

Fault = Callable[[], Awaitable[None]]


async def error() -> None:
    raise NotPermitted("the fake refuses")


class Peer:
    """A server that can be told to fail: ``before`` or ``after`` it has done what a route asks for."""

    def __init__(self, name: Role, id_: str, platform: Authority) -> None:
        self.identity = Identity(name, id_)
        self._credentials = platform.credentials(self.identity)
        self._port = 0
        self._server: Server | None = None
        self.before: dict[str, Fault] = {}
        self.after: dict[str, Fault] = {}
        self.calls: Counter[str] = Counter()
        self.url = ""
        self.hanging = asyncio.Event()
        self._released = asyncio.Event()

    def routes(self, server: Server) -> None:
        raise NotImplementedError

    def serve(self, server: Server, method: str, path: str, name: str, work: Callable[[Call], Awaitable[object]]) -> None:
        async def handle(call: Call) -> object:
            self.calls[name] += 1
            if name in self.before:
                await self.before[name]()
            answer = await work(call)
            if name in self.after:
                await self.after[name]()
            return answer

        server.route(method, path, (Role.MANAGEMENT,), handle)

    async def start(self) -> None:
        self._released.clear()
        self._server = Server(self._credentials)
        self.routes(self._server)
        host, self._port = await self._server.start(("127.0.0.1", self._port))
        self.url = f"https://{host}:{self._port}"

    @property
    def alive(self) -> bool:
        return self._server is not None

    async def stop(self) -> None:
        self._released.set()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop()

    async def die(self) -> None:
        """As by SIGKILL, in the middle of a request: connections break, nobody answers any more."""
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self.stop()))
        if self._server is not None:
            self._server.close_connections()
        await asyncio.sleep(3600)

    async def hang(self) -> None:
        """No answer, until the test is over with it."""
        self.hanging.set()
        await self._released.wait()
        raise ConnectionResetError

    def well(self) -> None:
        self._released.set()
        self._released = asyncio.Event()
        self.hanging.clear()
        self.before.clear()
        self.after.clear()


class FakeKmc(Peer):
    """``tokens``: id -> consumer; ``vcms``: what is authorised. ``serving`` is told by whoever plays the VCM."""

    def __init__(self, platform: Authority) -> None:
        super().__init__(Role.KMC, "kmc", platform)
        self.ukeys: dict[ConsumerId, bytes] = {}
        self.challenges: dict[bytes, ConsumerId] = {}
        self.answered: set[bytes] = set()
        self.tokens: dict[TokenId, ConsumerId] = {}
        self.vcms: dict[VcmId, VcmAuthorisation] = {}
        self.serving: set[VcmId] = set()
        self.batches: list[ManagementEvents] = []
        self.log: list[ManagementEvent] = []

    def routes(self, server: Server) -> None:
        self.serve(server, "POST", "/v1/identity/challenges", "challenge", self._challenge)
        self.serve(server, "POST", "/v1/identity/verify", "verify", self._verify)
        self.serve(server, "PUT", "/v1/vcms/{vcm}", "authorise", self._authorise)
        self.serve(server, "DELETE", "/v1/vcms/{vcm}", "revoke_vcm", self._revoke)
        self.serve(server, "DELETE", "/v1/tokens/{token}", "revoke_token", self._revoke_token)
        self.serve(server, "GET", "/v1/vcms/{vcm}", "state", self._state)
        self.serve(server, "POST", "/v1/audit/events", "events", self._events)

    async def _events(self, call: Call) -> Done:
        batch = await call.body(ManagementEvents)
        self.batches.append(batch)
        newest = self.log[-1].number if self.log else 0
        self.log += [event for event in batch.events if event.number > newest]
        return Done()

    async def _challenge(self, call: Call) -> Challenge:
        nonce = secrets.token_bytes(32)
        self.challenges[nonce] = (await call.body(ChallengeRequest)).consumer
        return Challenge(nonce, 30.0)

    async def _verify(self, call: Call) -> IdentityReply:
        signed = await call.body(Signed)
        request = verify(signed, IdentityRequest, self.ukeys.values())
        if request.nonce in self.answered:
            raise ChallengeReplayed("answered before")
        if self.challenges.pop(request.nonce, None) != request.consumer:
            raise ChallengeUnknown("no such challenge")
        self.answered.add(request.nonce)
        verify(signed, IdentityRequest, [self.ukeys[request.consumer]])
        if request.purpose is Purpose.DELETE_VCM:
            authorised = self.vcms.get(request.vcm or VcmId(""))
            if authorised is not None:
                self.tokens.pop(authorised.token_id, None)
            return IdentityReply(request.consumer, request.purpose, request.vcm)
        token = secrets.token_bytes(32)
        token_id = token_id_of(request.nonce)
        self.tokens[token_id] = request.consumer
        mark = hashlib.sha256(b"cipherfleet download mark v1" + token).digest()
        return IdentityReply(request.consumer, request.purpose, None, token_id, token, mark)

    async def _authorise(self, call: Call) -> Done:
        authorisation = await call.body(VcmAuthorisation)
        if self.tokens.get(authorisation.token_id) != authorisation.consumer:
            raise TokenStale("no such token")
        self.vcms[call.path("vcm", VcmId)] = authorisation
        return Done()

    async def _revoke(self, call: Call) -> Done:
        vcm = call.path("vcm", VcmId)
        self.serving.discard(vcm)
        authorisation = self.vcms.pop(vcm, None)
        if authorisation is not None:
            self.tokens.pop(authorisation.token_id, None)
        return Done()

    async def _revoke_token(self, call: Call) -> Done:
        self.tokens.pop(call.path("token", TokenId), None)
        return Done()

    async def _state(self, call: Call) -> VcmKmcState:
        vcm = call.path("vcm", VcmId)
        return VcmKmcState(vcm in self.vcms, vcm in self.serving, vcm in self.serving, vcm in self.serving)


class FakeMachine(Peer):
    def __init__(self, id_: MachineId, platform: Authority, *, capacity: int = 8) -> None:
        super().__init__(Role.MACHINE, id_, platform)
        self.id = id_
        self.capacity = capacity
        self.vcms: dict[VcmId, VcmReport] = {}
        self.orders: dict[VcmId, BuildOrder] = {}
        self.limits: dict[VcmId, VccLimits] = {}
        self.card = True

    def routes(self, server: Server) -> None:
        self.serve(server, "GET", "/v1/status", "status", self._status)
        self.serve(server, "PUT", "/v1/vcms/{vcm}", "build", self._build)
        self.serve(server, "DELETE", "/v1/vcms/{vcm}", "delete", self._delete)
        self.serve(server, "PUT", "/v1/vcms/{vcm}/limits", "limit", self._limit)

    async def _limit(self, call: Call) -> Done:
        self.limits[call.path("vcm", VcmId)] = await call.body(VccLimits)
        return Done()

    async def _status(self, call: Call) -> MachineReport:
        card = CardReport(CardId(f"card-{self.id}-00000000"), os.getpid(), len(self.vcms), 0, 0, True) if self.card else None
        return MachineReport(self.id, self.url, "up", os.getpid(), self.capacity, card, tuple(self.vcms.values()), time.time())

    async def _build(self, call: Call) -> VcmReport:
        order, vcm = await call.body(BuildOrder), call.path("vcm", VcmId)
        self.orders[vcm], self.limits[vcm] = order, order.limits
        self.vcms[vcm] = VcmReport(vcm, order.consumer, VcmState.PREPARING, 4242, Isolation("process", "none"), operations=7, bytes=70)
        return self.vcms[vcm]

    async def _delete(self, call: Call) -> Done:
        self.vcms.pop(call.path("vcm", VcmId), None)
        return Done()

    def set_state(self, vcm: VcmId, state: VcmState, message: str = "") -> None:
        old = self.vcms[vcm]
        self.vcms[vcm] = VcmReport(old.id, old.consumer, state, old.pid, old.isolation, operations=7, bytes=70, error=message)


class FakeTerminal:
    """A terminal with its Ukey in. ``mute``: frames it does not answer; ``answers``: what it says instead, by frame."""

    def __init__(self, consumer: ConsumerId, signer: LocalSigner, caller: Caller, bring_up: Callable[[VcmId], None]) -> None:
        self.consumer, self.signer = consumer, signer
        self._caller, self._bring_up = caller, bring_up
        self.mute: set[type[ManagementToTerminal]] = set()
        self.answers: dict[type[ManagementToTerminal], Callable[[Any], Awaitable[TerminalToManagement]]] = {}
        self.heard: list[ManagementToTerminal] = []
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.frames: Frames[ManagementToTerminal, TerminalToManagement] | None = None
        self.connected = asyncio.Event()
        self.ended = asyncio.Event()

    async def plug_in(self, *, insert: bool = True) -> None:
        self._task = asyncio.create_task(self._live(insert))
        await asyncio.wait({self._task, asyncio.create_task(self.connected.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()

    async def _live(self, insert: bool) -> None:
        try:
            async with self._caller.frames("/v1/terminal", ManagementToTerminal) as frames:
                self.frames = frames
                if insert:
                    await frames.send(Inserted())
                self.connected.set()
                async for frame in frames:
                    await self._hear(frame)
        except ConnectionError:
            pass
        finally:
            self.ended.set()
            async with self._changed:
                self._changed.notify_all()

    async def _hear(self, frame: ManagementToTerminal) -> None:
        async with self._changed:
            self.heard.append(frame)
            self._changed.notify_all()
        if type(frame) in self.mute:
            return
        assert self.frames is not None
        if type(frame) in self.answers:
            await self.frames.send(await self.answers[type(frame)](frame))
        elif isinstance(frame, IdentityWanted):
            await self.frames.send(await self.prove(frame))
        elif isinstance(frame, LoginPermit):
            self._bring_up(frame.vcm)
            await self.frames.send(LoggedIn(frame.vcm))
        elif isinstance(frame, DeletePermit):
            await self.frames.send(ServiceOffSeen(frame.vcm))

    async def prove(self, frame: IdentityWanted) -> IdentityAnswered:
        return IdentityAnswered(await sign(IdentityRequest(self.consumer, frame.nonce, frame.purpose, frame.vcm), self.signer))

    async def wait_for(self, kind: type[Any], count: int = 1, timeout: float = 10.0) -> Any:
        """The ``count``-th frame of a kind. Raises what the platform says instead, if it is a ``FlowFailed``."""

        def enough() -> bool:
            return len([f for f in self.heard if isinstance(f, kind)]) >= count or self.ended.is_set()

        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(enough)
        found = [f for f in self.heard if isinstance(f, kind)]
        if len(found) < count:
            raise ManagementUnavailable(f"the channel ended before {kind.__name__}")
        return found[count - 1]

    async def service(self, count: int = 1) -> ServiceOn:
        answer = await self.wait_for((ServiceOn, FlowFailed), count)  # type: ignore[arg-type]
        if isinstance(answer, FlowFailed):
            raise CipherfleetError.codes()[answer.code](answer.message, answer.hint)
        assert isinstance(answer, ServiceOn)
        return answer

    async def pull(self) -> None:
        """The Ukey is removed."""
        if self.frames is not None:
            with suppress(ConnectionError):
                await self.frames.send(Removed())
        await self.end()

    async def end(self) -> None:
        """Without a word, as when it is killed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._caller.close()


def new_ukey() -> LocalSigner:
    return LocalSigner(new_key())


UNAVAILABLE = {Role.KMC: KmcUnavailable, Role.MACHINE: MachineUnavailable}
