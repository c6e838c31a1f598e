"""A VCM for the tests: the real channel, the real card engine under a real lease, keys in memory, real certificates."""

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import aiohttp

from cipherfleet import Client
from cipherfleet.channel import codec, signing, tls
from cipherfleet.channel.certificates import Credentials, new_key, public_key_der
from cipherfleet.channel.sealing import TrustedCard, share_info
from cipherfleet.channel.server import Server
from cipherfleet.computing import engine_wrap
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.vcm_chores import Chores
from cipherfleet.computing.vcm_data_audit import DataAudit
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.computing.vcm_key_life import KeyLife
from cipherfleet.computing.vcm_keys import Keys
from cipherfleet.computing.vcm_process import KEEPALIVE_TIMEOUT_S, MAX_PER_CERTIFICATE
from cipherfleet.computing.vcm_transfer import Transfer
from cipherfleet.contract.audit import AuditEntry, AuditLog, AuditQuery, KeyUsage, UsageReport
from cipherfleet.contract.errors import (
    ApplicationRevoked,
    ApplicationUnknown,
    ForeignConsumer,
    KmcUnavailable,
    LoginRefused,
    NotPermitted,
)
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.grants import Grant, Rates, decide
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ApplicationName, CardId, ConsumerId, KeyId, VcmId
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.messages import Chain, Done
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import DelegationStatement, LeaseStatement, Right, SealedShare, Signed
from cipherfleet.contract.vcc import CmkDelivery, Completion, Operation
from cipherfleet.contract.vcm_api import Delegation, DelegationsReply, LoginReply
from cipherfleet.services.components import mount
from tests.pki import Authority
from tests.unit.computing.machine.fake_kmc import EPOCH, FakeConsumer

ACME, RIVAL = ConsumerId("acme"), ConsumerId("rival")
VCM, CARD = VcmId("vcm-0123456789ab"), CardId("card-m1-01234567")
ALL_RIGHTS = tuple(Right)
T = TypeVar("T")


@cache
def transport_keys() -> engine_wrap.TransportKeys:
    """Made once: an RSA key takes a while."""
    return engine_wrap.TransportKeys()


@cache
def cards_root() -> Authority:
    """The CA of the cards."""
    return Authority("cards")


def certified(kmc_key: bytes) -> CardReply:
    keys = transport_keys()
    chain = cards_root().certify(Identity(Role.CARD, CARD), keys.rsa.public_key(), hpke_public_key=keys.hpke_public_key)
    return CardReply(Chain(chain, cards_root().pem), kmc_key)


async def serving_function(consumer: ConsumerId = ACME, *, lease_s: float = 3600.0) -> VirtualFunction:
    """A virtual function of a card that holds its consumer's CMK and a lease."""
    transport, ukey, kmc = transport_keys(), signing.LocalSigner(new_key()), signing.LocalSigner(new_key())
    reply = certified(kmc.public_key)
    function = VirtualFunction(CARD, VCM, consumer, transport, lambda: reply)
    share = SealedShare(consumer, CARD, VCM, secrets.token_bytes(32), (ukey.public_key,), kmc.public_key, 1, 0, b"")
    card = TrustedCard(CARD, transport.hpke_public_key)
    delivery = CmkDelivery(
        transport.rsa.public_key().encrypt(secrets.token_bytes(32), engine_wrap.OAEP),
        card.seal(codec.encode(share), share_info(CARD, VCM)),
    )
    function.execute(Operation.LOAD_CMK, 0, codec.encode(delivery), b"")
    nonce = function.run(Operation.LEASE_NONCE, 0, b"", b"")
    lease = LeaseStatement(consumer, CARD, VCM, bytes(nonce.data), int(lease_s * 1000), 1, 0, b"")
    signed = await signing.countersign(await signing.sign(lease, ukey), kmc)
    function.execute(Operation.LEASE, 0, codec.encode(signed), b"")
    return function


class StageCard:
    """A vCC without a wire. ``before`` may look at an operation, delay it or make it fail; ``open_streams`` are not ended yet."""

    def __init__(self, function: VirtualFunction) -> None:
        self.function = function
        self.before: Callable[[Operation], Awaitable[None]] | None = None
        self.open_streams: set[int] = set()
        self.operations: list[Operation] = []

    async def submit(
        self, operation: Operation, *, handle: int = 0, parameters: bytes = b"", data: bytes | bytearray | memoryview = b""
    ) -> Completion:
        if self.before is not None:
            await self.before(operation)
        self.operations.append(operation)
        if operation in (Operation.FINISH, Operation.ABORT):
            self.open_streams.discard(handle)
        answer = self.function.run(operation, handle, parameters, data)
        if operation is Operation.BEGIN:
            self.open_streams.add(answer.value)
        return Completion(answer.value, answer.parameters, bytes(answer.data))


class Ledger:
    """The KMC as ``DataAudit`` sees it: ``told`` are the reports, unless it is ``gone``."""

    def __init__(self) -> None:
        self.told: list[UsageReport] = []
        self.gone = False

    async def call(self, method: str, path: str, body: object | None = None, *, reply: type[T]) -> T:
        assert (method, path) == ("POST", "/v1/usage")
        assert isinstance(body, UsageReport)
        if self.gone:
            raise KmcUnavailable("the KMC is gone")
        self.told.append(codec.decode(codec.encode(body), UsageReport))
        return codec.decode(codec.encode(Done()), reply)


class StageHost:
    """The VCM around the components. ``rights``: what each application may. Its keys are real, over an escrow in memory."""

    def __init__(self, card: StageCard, consumer: ConsumerId, escrow: Escrow) -> None:
        self.id, self.consumer, self.card, self.escrow = VCM, consumer, card, escrow
        self.ahead_s = 0.0  # of the VCM's clock, before the card's
        self.keys = Keys(escrow, card, self.now)
        self.key_life = KeyLife(self.keys, escrow, Settings(), self.now)
        self.transfer = Transfer(self.keys, card, Settings(), self.now)
        self.chores = Chores(self.keys, 1.0, self.now)
        self.rights: dict[str, tuple[Right, ...]] = {"shop": ALL_RIGHTS}
        self.revoked: set[str] = set()
        self.grants: dict[str, tuple[Grant, ...]] = {}
        self.rates: dict[str, Rates] = {}
        self.serves_on: list[str] = []
        self.ledger = Ledger()
        self.data_audit = DataAudit(self.ledger, Settings())
        self.used: KeyUsage | None = None
        self.delegated: list[DelegationStatement] = []

    def now(self) -> float:
        return time.time() + self.ahead_s

    async def authorise(self, peer: Peer, right: Right) -> None:
        name = peer.identity.id
        if peer.identity.consumer != self.consumer:
            raise ForeignConsumer("this VCM serves somebody else")
        if name in self.revoked:
            raise ApplicationRevoked(f"{name} is revoked")
        if name not in self.rights:
            raise ApplicationUnknown(f"{name} was never signed in")
        if right not in self.rights[name]:
            raise NotPermitted(f"{name} lacks the right {right}")

    async def may_some(self, peer: Peer, right: Right) -> bool:
        try:
            await self.authorise(peer, right)
        except NotPermitted:
            if not any(right in grant.operations for grant in self.grants.get(peer.identity.id, ())):
                raise
            return False
        return True

    async def authorise_key(self, peer: Peer, right: Right, key: KeyId, context: bytes) -> None:
        if not await self.may_some(peer, right):
            grants = self.grants[peer.identity.id]
            rates = self.rates.setdefault(peer.identity.id, Rates(lambda: 0.0))
            label = await self.keys.label_of(key)
            decide(grants, right, key, label, context, 0.0, lambda number: rates.take(number, grants[number].rate))

    def note_use(self, peer: Peer, operation: str, key: str, version: int, outcome: str) -> None:
        self.data_audit.note(peer.identity.id, operation, key, version, outcome)

    async def ask_use(self, peer: Peer, *uses: tuple[str, str, int]) -> None:
        await self.data_audit.ask(peer.identity.id, *uses)

    async def usage(self, key: KeyId) -> KeyUsage:
        if self.used is None:
            raise KmcUnavailable("nobody knows")
        return self.used

    async def delegate(self, peer: Peer, key: KeyId, statement: Signed) -> Delegation:
        made = codec.decode(statement.payload, DelegationStatement)
        self.delegated.append(made)
        return Delegation(made.delegator, made.delegate, key, made.grants, "revoked" if made.revoked else "active", made.sequence)

    async def delegations(self, peer: Peer, key: KeyId) -> DelegationsReply:
        given = [one for one in self.delegated if one.key == key]
        shown = tuple(Delegation(one.delegator, one.delegate, key, one.grants, "active", one.sequence) for one in given)
        return DelegationsReply(key, shown, len(self.delegated) + 1)

    async def login(self, peer: Peer, statement: Signed) -> LoginReply:
        if statement.kind != "right":
            raise LoginRefused("this is not the statement we wanted")
        return LoginReply(self.id, CARD, b"confirmed", 6.0)

    async def endpoints(self) -> Sequence[str]:
        return self.serves_on

    async def audit(self, query: AuditQuery) -> AuditLog:
        return AuditLog((AuditEntry(1, 0.0, self.consumer, "kmc", "enrolled", self.consumer, "done", "00"),))


class Stage:
    """One VCM that serves, its domain's CA, and clients of it."""

    def __init__(self, host: StageHost, domain: Authority) -> None:
        self.host, self.domain = host, domain
        self.server_credentials = domain.credentials(Identity(Role.VCM, VCM, host.consumer), trust=domain.pem)
        self.server = Server(  # as a VCM's
            self.server_credentials, keepalive_timeout=KEEPALIVE_TIMEOUT_S, max_per_certificate=MAX_PER_CERTIFICATE
        )
        self.url = ""
        self.store: FakeConsumer

    @staticmethod
    async def start(consumer: ConsumerId = ACME, *, domain: Authority | None = None, stall_s: float = 30.0) -> "Stage":
        card = StageCard(await serving_function(consumer))
        root, kmc_key = Authority("root"), new_key()
        store = FakeConsumer(consumer, kmc_key, root)
        escrow = Escrow(consumer, store, public_key_der(kmc_key.public_key()))
        await escrow.load(Seen(EPOCH, 0, store.head()))
        stage = Stage(StageHost(card, consumer, escrow), domain or root.subordinate(consumer))
        stage.store = store
        mount(stage.server, stage.host, stall_s=stall_s)
        await stage.listen()
        return stage

    async def listen(self) -> None:
        host, port = await self.server.start(("127.0.0.1", 0))
        self.url = f"https://{host}:{port}"
        self.host.serves_on = [self.url]

    async def stop(self) -> None:
        await self.server.stop()

    def credentials(self, name: str = "shop", role: Role = Role.APPLICATION, **how: Any) -> Credentials:
        return self.domain.credentials(Identity(role, name, self.host.consumer), trust=self.domain.pem, **how)

    def profile(self, name: str = "shop", *, credentials: Credentials | None = None, endpoints: tuple[str, ...] | None = None) -> Profile:
        shown = credentials or self.credentials(name)
        return Profile(
            self.host.consumer,
            ApplicationName(name),
            endpoints if endpoints is not None else (self.url,),
            shown.trust.decode(),
            shown.chain.decode(),
            shown.key.decode(),
            ALL_RIGHTS,
            int(shown.not_after),
            root=cards_root().pem.decode(),
        )

    def client(self, name: str = "shop", **how: Any) -> Client:
        return Client(self.profile(name), **how)

    def raw(self, credentials: Credentials | None = None) -> aiohttp.ClientSession:
        """A plain HTTP session, for what our own client would never send."""
        context = tls.client_context(credentials or self.credentials())
        context.check_hostname = False
        connector = aiohttp.TCPConnector(ssl=context)
        return aiohttp.ClientSession(self.url, connector=connector, auto_decompress=False)
