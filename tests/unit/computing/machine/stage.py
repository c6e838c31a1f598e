"""A VCM in this very process: a real card behind a real vCC, a real relay, a KMC over TLS; only the sandbox is missing."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cipherfleet.channel import codec
from cipherfleet.channel.client import Caller
from cipherfleet.channel.server import Call, Server
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_server import CardServer
from cipherfleet.computing.confinement import Confinement
from cipherfleet.computing.relay import Relay
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.computing.vcm import Ending
from cipherfleet.computing.vcm_boot import BootChannel, CertificateAnswer, CertificateWanted, News
from cipherfleet.computing.vcm_config import VcmConfig
from cipherfleet.computing.vcm_process import run
from cipherfleet.contract.errors import ErrorBody, ServiceUnavailable
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId, new_vcm_id
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.machine_api import Isolation
from cipherfleet.contract.messages import Chain, Done
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import Right, Signed
from cipherfleet.contract.vcc import LeaseState, Operation, VccLimits
from cipherfleet.contract.vcm import VcmHost
from tests.unit.computing.machine.fake_kmc import FakeConsumer, FakeKmc


class Clock:
    """The card's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CardOfTests:
    """A card in this process, certified by the fake KMC, with its server."""

    def __init__(self, kmc: FakeKmc, clock: Callable[[], float] | None = None) -> None:
        self.card = Card(MachineId("m1")) if clock is None else Card(MachineId("m1"), clock)
        transport = self.card.transport
        key = transport.rsa.public_key()
        chain = kmc.platform.certify(Identity(Role.CARD, self.card.id), key, addresses=(), hpke_public_key=transport.hpke_public_key)
        self.card.certify(CardReply(Chain(chain, kmc.root.pem), kmc.signing_key))
        kmc.cards[self.card.id] = chain, transport.hpke_public_key
        self.server = CardServer(self.card)

    async def attach(self, vcm: VcmId, consumer: ConsumerId) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        await self.server.attach(vcm, consumer, theirs)
        return ours

    async def vcc(self, vcm: VcmId, consumer: FakeConsumer, kmc: FakeKmc) -> RingCard:
        """A vCC that serves: CMK and lease are there."""
        card = RingCard(await self.attach(vcm, consumer.name))
        await card.start()
        delivered = consumer.delivery(self.card.id, vcm, *kmc.cards[self.card.id])
        await card.submit(Operation.LOAD_CMK, parameters=codec.encode(delivered))
        await self.renew(card, vcm, consumer)
        return card

    def limit_keys(self, most: int) -> None:
        """Of each vCC, from now on."""
        for vcm in list(self.server._vccs):
            self.server.limit(vcm, VccLimits(keys=most))

    async def renew(self, card: RingCard, vcm: VcmId, consumer: FakeConsumer, duration_ms: int = 6000) -> LeaseState:
        nonce = (await card.submit(Operation.LEASE_NONCE)).data
        lease = consumer.lease(self.card.id, vcm, nonce, duration_ms)
        return codec.decode((await card.submit(Operation.LEASE, parameters=codec.encode(lease))).parameters, LeaseState)


@dataclass
class RunningVcm:
    id: VcmId
    consumer: FakeConsumer
    address: tuple[str, int]
    task: "asyncio.Task[Ending]"
    stop: asyncio.Event
    boot: BootChannel
    relay: Relay
    card: CardOfTests
    hosts: list[VcmHost] = field(default_factory=list)

    @property
    def host(self) -> VcmHost:
        return self.hosts[0]

    async def news(self) -> News | None:
        async with asyncio.timeout(10):
            return await self.boot.receive(News)

    async def ending(self) -> Ending:
        async with asyncio.timeout(10):
            return await asyncio.shield(self.task)

    def caller(self, name: str = "billing", rights: tuple[Right, ...] = tuple(Right)) -> Caller:
        return self.caller_of(self.consumer.application(name, rights))

    def caller_of(self, credentials: object) -> Caller:
        name = Identity(Role.VCM, self.id, self.consumer.name).dns_name
        url = f"https://{self.address[0]}:{self.address[1]}"
        return Caller(url, name, credentials, ServiceUnavailable, timeout=10)  # type: ignore[arg-type]


def mount(server: Server, host: VcmHost) -> None:
    """Enough of components to knock at."""

    async def authorise(call: Call) -> object:
        await host.authorise(call.peer, Right(call.query("right", "show")))
        return Done()

    async def login(call: Call) -> object:
        return await host.login(call.peer, await call.body(Signed))

    async def hang(call: Call) -> object:
        await asyncio.Event().wait()
        return Done()

    server.route("GET", "/v1/authorise", {Role.APPLICATION, Role.TERMINAL}, authorise)
    server.route("GET", "/v1/hang", {Role.APPLICATION}, hang)
    server.route("POST", "/v1/login", {Role.TERMINAL}, login)


@asynccontextmanager
async def vcm_of(
    kmc: FakeKmc, folder: Path, consumer: str = "acme", *, refuse: ErrorBody | None = None, **settings: object
) -> AsyncIterator[RunningVcm]:
    """A VCM that has started; it is stopped at the end."""
    id_, owner, card = new_vcm_id(), kmc.consumer(consumer), CardOfTests(kmc)
    async with AsyncExitStack() as stack:
        relay = Relay(folder / f"relay-{id_}", kmc.address)
        await relay.start()
        stack.push_async_callback(relay.close)
        stack.callback(card.server.close)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        address = listening.getsockname()
        ours, theirs = socket.socketpair()
        boot = await BootChannel.open(ours)
        stack.callback(boot.close)
        vcc = await card.attach(id_, owner.name)
        configuration = VcmConfig(
            id=id_,
            consumer=owner.name,
            card=card.card.id,
            address=f"{address[0]}:{address[1]}",
            kmc_url=kmc.url,
            kmc_signing_key=kmc.signing_key,
            root=kmc.root.pem,
            relay=str(folder / f"relay-{id_}" / "kmc.sock"),
            listening=listening.detach(),
            vcc=vcc.detach(),
            boot=theirs.detach(),
            confinement=Confinement("process", "none", 1024, 512),
            settings=Settings(**settings),  # type: ignore[arg-type]
        )
        stop, ready = asyncio.Event(), asyncio.Event()
        hosts: list[VcmHost] = []

        def mount_and_note(server: Server, host: VcmHost) -> None:
            hosts.append(host)
            mount(server, host)

        task = asyncio.create_task(run(configuration, Isolation("process", "none"), lambda _: ready.set(), stop, mount=mount_and_note))
        wanted = await boot.receive(CertificateWanted)
        assert wanted is not None
        if refuse is not None:
            await boot.send(CertificateAnswer(error=refuse))
            await task
        chain = kmc._chain(Identity(Role.VCM, id_, owner.name), wanted.csr)
        await boot.send(CertificateAnswer(chain=chain))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait((waiting, task), timeout=10, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        try:
            yield RunningVcm(id_, owner, address, task, stop, boot, relay, card, hosts)
        finally:
            stop.set()
            await asyncio.wait((task,), timeout=10)
