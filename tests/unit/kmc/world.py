"""A KMC with everybody who talks to it: operator, management, machines with cards, consumers with Ukeys, their VCMs."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import Credentials, identity_of, key_to_pem, make_request, new_key, public_key_der, split
from cipherfleet.channel.client import Caller
from cipherfleet.channel.frames import Frames
from cipherfleet.contract.audit import PLATFORM, AuditQuery
from cipherfleet.contract.errors import KmcUnavailable
from cipherfleet.contract.escrow import EscrowRow, KeyAttributes, KeyState, VersionAttributes, row_digest
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, ConsumerId, KeyId, MachineId, VcmId, new_card_id, new_key_id, new_vcm_id
from cipherfleet.contract.kmc_api import (
    ApplicationReply,
    ApplicationRequest,
    CardReady,
    CardReply,
    CardRequest,
    CertificatesRevoked,
    Challenge,
    ChallengeRequest,
    CmkDelivered,
    CmkLoaded,
    CmkReleased,
    DownloadSignal,
    EnrolConfirmation,
    EnrolReply,
    EnrolRequest,
    EscrowReceipt,
    EscrowWrite,
    IdentityReply,
    KmcToTerminal,
    KmcToVcm,
    LeaseGranted,
    LeaseRequested,
    LeaseSigned,
    LeaseWanted,
    VcmAuthorisation,
    VcmCertificateRequest,
)
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import ApplicationStatement, IdentityRequest, LeaseStatement, Purpose, Right, Signed
from cipherfleet.kmc import audit
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.embedded_hsm import EmbeddedHsm
from cipherfleet.kmc.enrolment import OPERATOR, Enrolment
from cipherfleet.kmc.escrow import Escrow
from cipherfleet.kmc.hsm import Hsm
from cipherfleet.kmc.process import own_credentials
from cipherfleet.kmc.schema import FILE, MIGRATIONS
from cipherfleet.kmc.server import KmcServer
from cipherfleet.state.database import Database

F = TypeVar("F")

FAST = Settings(argon2_memory_kib=8192, argon2_iterations=1)
PIN = "a PIN of the HSM"
PASSPHRASE = "correct horse battery staple"
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
MANAGEMENT = Identity(Role.MANAGEMENT, "management")
MACHINE = MachineId("m1")
SEALED = b"sealed to the card, not for the KMC"
SOON_S = 20.0


@cache
def transport_key() -> rsa.RSAPrivateKey:
    """A card's; making one takes a while, so all cards here have the same."""
    return rsa.generate_private_key(65537, 3072)


class Clock:
    """The wall clock, which tests may set."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Conversation:
    """One side of a channel of frames."""

    def __init__(self, frames: Frames[Any, Any]) -> None:
        self.frames = frames
        self._incoming = frames.__aiter__()

    async def send(self, frame: object) -> None:
        await self.frames.send(frame)

    async def next(self, kind: type[F], *, timeout: float = SOON_S) -> F:
        """The next frame, which must be a ``kind``."""
        async with asyncio.timeout(timeout):
            frame = await anext(self._incoming)
        assert isinstance(frame, kind), frame
        return frame

    async def closed(self) -> list[object]:
        """The frames up to the end of the channel."""
        async with asyncio.timeout(SOON_S):
            return [frame async for frame in self._incoming]


class World:
    """``hsm`` may be anything that implements the port."""

    def __init__(self, folder: Path, hsm: Hsm, settings: Settings) -> None:
        self.folder, self.hsm, self.settings, self.clock = folder, hsm, settings, Clock()
        self.stack = AsyncExitStack()
        self.database: Database
        self.kmc: KmcServer
        self.url = ""

    async def start(self, port: int = 0) -> Self:
        self.database = await asyncio.to_thread(Database.open, self.folder, FILE, MIGRATIONS)
        self.center = await Center.open(self.database, self.hsm, self.settings, wall_clock=self.clock)
        enrolment = Enrolment(self.center, Escrow(self.center))
        self.kmc = KmcServer(self.center, await own_credentials(enrolment, self.center, "127.0.0.1"))
        await self.kmc.service.start()
        host, bound = await self.kmc.server.start(("127.0.0.1", port))
        self.url = f"https://{host}:{bound}"
        return self

    async def stop(self) -> None:
        await self.kmc.service.stop()
        await self.kmc.server.stop()
        await self.database.close()

    async def restart(self) -> None:
        """The KMC goes and comes back on the same address."""
        await self.stop()
        await self.start(int(self.url.rpartition(":")[2]))

    def call_as(self, credentials: Credentials) -> Caller:
        caller = Caller(self.url, Identity(Role.KMC, "kmc").dns_name, credentials, KmcUnavailable)
        self.stack.push_async_callback(caller.close)
        return caller

    async def platform(self, identity: Identity) -> Caller:
        key = new_key()
        request = CertificateRequest(make_request(key, identity), ("127.0.0.1",))
        issued = await self.kmc.enrolment.issue_platform(identity, request, actor="test")
        chain = self.center.certification.chain(issued)
        return self.call_as(Credentials(key_to_pem(key), chain.chain, chain.trust))

    async def operator(self) -> Caller:
        return await self.platform(OPERATOR)

    async def management(self) -> Caller:
        return await self.platform(MANAGEMENT)

    async def machine(self, id_: MachineId = MACHINE) -> Caller:
        return await self.platform(Identity(Role.MACHINE, id_))

    async def enrol(self, name: str = "alice", *, confirm: bool = True) -> "TestConsumer":
        consumer = TestConsumer(self, ConsumerId(name))
        operator = await self.operator()
        consumer.reply = await operator.call("POST", "/v1/consumers", consumer.request(), reply=EnrolReply)
        if confirm:
            await operator.call("POST", f"/v1/consumers/{name}/confirm", consumer.confirmation())
        return consumer

    async def audit_lines(self, consumer: str) -> list[tuple[str, str]]:
        lines = await self.database.read(partial(audit.read, query=AuditQuery(consumer or PLATFORM)))
        return [(line.event, line.outcome) for line in lines]


class TestConsumer:
    """A consumer and its Ukey."""

    __test__ = False

    def __init__(self, world: World, name: ConsumerId) -> None:
        self.world, self.name = world, name
        self.identity_key, self.channel_key = new_key(), new_key()
        self.signer = signing.LocalSigner(self.identity_key)
        self.reply: EnrolReply
        self.sequence = 0

    def request(self) -> EnrolRequest:
        ours = Identity(Role.UKEY, "ignored", self.name)
        return EnrolRequest(self.name, make_request(self.identity_key, ours), make_request(self.channel_key, ours))

    def confirmation(self) -> EnrolConfirmation:
        return EnrolConfirmation(identity_of(split(self.reply.identity.chain)[0]).id)

    def terminal(self) -> Caller:
        channel = self.reply.channel
        return self.world.call_as(Credentials(key_to_pem(self.channel_key), channel.chain, channel.trust))

    async def plug_in(self, since: int = 0) -> Conversation:
        frames = await self.world.stack.enter_async_context(self.terminal().frames(f"/v1/terminal?since={since}", KmcToTerminal))
        return Conversation(frames)

    async def identity_request(self, management: Caller, purpose: Purpose = Purpose.BUILD_VCM, vcm: VcmId | None = None) -> Signed:
        challenge = await management.call("POST", "/v1/identity/challenges", ChallengeRequest(self.name), reply=Challenge)
        return await signing.sign(IdentityRequest(self.name, challenge.nonce, purpose, vcm), self.signer)

    async def token(self, management: Caller) -> IdentityReply:
        return await management.call("POST", "/v1/identity/verify", await self.identity_request(management), reply=IdentityReply)

    async def statement(self, key: bytes, name: str = "shop", **changes: Any) -> Signed:
        self.sequence += 1
        values = {
            "consumer": self.name,
            "name": name,
            "public_key_sha256": hashlib.sha256(key).digest(),
            "rights": (Right.ENCRYPT, Right.DECRYPT),
            "not_after": int(self.world.clock()) + 86400,
            "sequence": self.sequence,
        }
        return await signing.sign(ApplicationStatement(**{**values, **changes}), self.signer)

    async def application(self, name: str = "shop", **changes: Any) -> Chain:
        return (await self.apply(name, **changes)).chain

    async def apply(
        self, name: str = "shop", *, since: int = 0, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any
    ) -> ApplicationReply:
        key = key or new_key()
        statement = await self.statement(public_key_der(key.public_key()), name, **changes)
        request = ApplicationRequest(statement, make_request(key, Identity(Role.APPLICATION, name, self.name)), since)
        return await self.terminal().call("POST", "/v1/applications", request, reply=ApplicationReply)

    async def lease(self, vcm: "TestVcm", nonce: bytes, /, **changes: Any) -> LeaseSigned:
        values = {
            "consumer": self.name,
            "card": vcm.card,
            "vcm": vcm.id,
            "nonce": nonce,
            "duration_ms": round(self.world.settings.lease_s * 1000),
            "epoch": 1,
            "sequence": 0,
            "head": bytes(32),
        }
        return LeaseSigned(await signing.sign(LeaseStatement(**{**values, **changes}), self.signer))


class TestVcm:
    """A VCM on a machine of its own, from its authorisation to its leases."""

    __test__ = False

    def __init__(self, world: World, consumer: TestConsumer) -> None:
        self.world, self.consumer = world, consumer
        self.id = new_vcm_id()
        self.card = CardId("")
        self.key = new_key()
        self.token: IdentityReply
        self.chain: Chain
        self.caller: Caller
        self.channel: Conversation

    async def authorise(self, management: Caller, *, machine: MachineId = MACHINE, address: str = "127.0.0.1:8443") -> None:
        self.token = await self.consumer.token(management)
        assert self.token.token_id is not None
        order = VcmAuthorisation(self.consumer.name, machine, self.token.token_id, address)
        await management.call("PUT", f"/v1/vcms/{self.id}", order)

    async def put_card(self, machine: Caller, id_: MachineId = MACHINE) -> CardReply:
        self.card = new_card_id(id_)
        return await machine.call("POST", "/v1/cards", card_request(self.card), reply=CardReply)

    def certificate_request(self, **changes: Any) -> VcmCertificateRequest:
        csr = make_request(self.key, Identity(Role.VCM, self.id, self.consumer.name))
        return VcmCertificateRequest(**{"csr": csr, "token": self.token.token, "card": self.card, **changes})

    async def certify(self, machine: Caller) -> None:
        self.chain = await machine.call("POST", f"/v1/vcms/{self.id}/certificate", self.certificate_request(), reply=Chain)
        self.caller = self.call_with(self.chain)

    def call_with(self, chain: Chain) -> Caller:
        return self.world.call_as(Credentials(key_to_pem(self.key), chain.chain, self.consumer.reply.root))

    async def join(self) -> CertificatesRevoked:
        self.channel = Conversation(await self.world.stack.enter_async_context(self.caller.frames("/v1/vcm", KmcToVcm)))
        return await self.channel.next(CertificatesRevoked)

    async def load(self, terminal: Conversation) -> CmkDelivered:
        """step f, from the card's readiness to the CMK in the card."""
        await self.channel.send(CardReady(self.card))
        await terminal.next(DownloadSignal)
        await terminal.send(CmkReleased(self.id, self.consumer.reply.ciphertext_cmk, SEALED))
        delivered = await self.channel.next(CmkDelivered)
        await self.channel.send(CmkLoaded())
        return delivered

    async def heartbeat(self, terminal: Conversation) -> LeaseGranted:
        nonce = secrets.token_bytes(16)
        await self.channel.send(LeaseWanted(self.card, nonce))
        asked = await terminal.next(LeaseRequested)
        assert (asked.vcm, asked.card, asked.nonce) == (self.id, self.card, nonce)
        await terminal.send(await self.consumer.lease(self, nonce))
        return await self.channel.next(LeaseGranted)

    async def write(self, *writes: Any, event: str = "key-created") -> EscrowReceipt:
        return await self.caller.call("POST", "/v1/escrow", EscrowWrite(tuple(writes), "application/shop", event), reply=EscrowReceipt)


def card_request(card: CardId, **changes: Any) -> CardRequest:
    csr = make_request(transport_key(), Identity(Role.CARD, card))
    return CardRequest(**{"card": card, "csr": csr, "hpke_public_key": bytes(1216), **changes})


async def start_vcm(
    world: World, consumer: TestConsumer, terminal: Conversation | None = None, *, machine: MachineId = MACHINE, beat: bool = True
) -> TestVcm:
    """A certified VCM that has joined; with a ``terminal``, one whose card has CMK and lease."""
    vcm = TestVcm(world, consumer)
    its_machine = await world.machine(machine)
    await vcm.put_card(its_machine, machine)
    await vcm.authorise(await world.management(), machine=machine)
    await vcm.certify(its_machine)
    await vcm.join()
    if terminal is not None:
        await vcm.load(terminal)
        if beat:
            await vcm.heartbeat(terminal)
    return vcm


def key_row(
    consumer: str, key: KeyId | None = None, version: int = 1, *, mark: bytes = b"w", replaces: EscrowRow | None = None
) -> EscrowRow:
    """A row as a card makes them, but wrapped in nothing."""
    of_key = KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 0.0, previous=b"" if replaces is None else row_digest(replaces))
    attributes = of_key if version == 0 else VersionAttributes("AES-256-GCM", 0.0)
    return EscrowRow(ConsumerId(consumer), key or new_key_id(), version, msgspec.json.encode(attributes), mark * 60)


@asynccontextmanager
async def world_in(folder: Path, settings: Settings = FAST, hsm: Hsm | None = None) -> AsyncIterator[World]:
    ours = EmbeddedHsm.open(folder / "hsm", PASSPHRASE, settings) if hsm is None else None
    world = World(folder / "kmc", hsm if hsm is not None else ours, settings)  # type: ignore[arg-type]
    await world.start()
    try:
        yield world
    finally:
        await world.stack.aclose()
        await world.stop()
        if ours is not None:
            ours.close()
