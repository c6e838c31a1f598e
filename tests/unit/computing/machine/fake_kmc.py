"""A KMC for tests: it speaks the real interface over real TLS, its keys are in memory, and it plays the terminal, too."""

import asyncio
import secrets
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, padding, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import (
    Credentials,
    fingerprint,
    key_to_pem,
    leaf,
    new_key,
    peer_of,
    public_key_der,
    serial_of,
)
from cipherfleet.channel.frames import Frames
from cipherfleet.channel.server import Call, Server
from cipherfleet.contract.audit import AuditEntry, AuditLog, UsageReport
from cipherfleet.contract.errors import ServiceOff, StateConflict, TokenStale
from cipherfleet.contract.escrow import (
    DelegationName,
    EscrowRow,
    KeyAttributes,
    LogEntry,
    Seen,
    StatementEntry,
    decode_attributes,
    extend,
    genesis,
    row_digest,
    statement_digest,
    was_destroyed,
)
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ApplicationName, CardId, ConsumerId, KeyId, Serial, VcmId
from cipherfleet.contract.key_life import terms_of
from cipherfleet.contract.kmc_api import (
    CardReady,
    CardReply,
    CardRequest,
    CertificatesRevoked,
    CmkDelivered,
    CmkLoaded,
    CmkRefused,
    DelegationRequest,
    DelegationsFound,
    DelegationsRequest,
    EscrowChanged,
    EscrowReceipt,
    EscrowWrite,
    KeySearch,
    KeysFound,
    LastUses,
    LeaseGranted,
    LeaseWanted,
    LogPage,
    Revoked,
    RowsReply,
    RowsRequest,
    Serving,
    StatementsReply,
    StatementsRequest,
    VcmCertificateRequest,
    VcmToKmc,
)
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.statements import (
    ApplicationStatement,
    CheckpointStatement,
    DelegationStatement,
    Destroyed,
    DestructionStatement,
    LeaseStatement,
    LoginStatement,
    Right,
    SealedShare,
    Signature,
    Signed,
    Statement,
    signing_input,
)
from tests.pki import Authority

T = TypeVar("T")
EPOCH = 1


def signed(statement: Statement, *keys: ec.EllipticCurvePrivateKey) -> Signed:
    payload = codec.encode(statement)
    data = signing_input(statement.KIND, payload)
    signatures = (Signature(fingerprint(public_key_der(k.public_key())), k.sign(data, ec.ECDSA(hashes.SHA256()))) for k in keys)
    return Signed(statement.KIND, payload, tuple(signatures))


class FakeConsumer:
    """A consumer with its Ukey, its domain, and its part of the escrow."""

    def __init__(self, name: str, kmc_key: ec.EllipticCurvePrivateKey, root: Authority) -> None:
        self.name = ConsumerId(name)
        self.domain = root.subordinate(f"domain {name}")
        self.ukey = new_key()
        self.ukey_share, self.hsm_share = secrets.token_bytes(32), secrets.token_bytes(32)
        self.kmc_key = kmc_key
        self.rows: dict[tuple[KeyId, int], EscrowRow] = {}
        self.statements: dict[ApplicationName, StatementEntry] = {}
        self.delegations: dict[DelegationName, Signed] = {}
        self.log: list[LogEntry] = []
        self.calls: list[str] = []
        self.page = 100
        """Entries or rows in one answer."""
        self.found: tuple[KeyId, ...] | None = None
        """What a search finds, instead of what there is."""
        self.unasked: set[tuple[KeyId, int]] = set()
        """Rows that come whether they are asked for or not."""
        self.forged: Signed | None = None
        """A receipt that comes instead of a good one."""
        self.sequence = 0
        self.remembered: Seen | None = None

    # -- the escrow, as the port that ``Escrow`` calls ----------------------------------------------------------------

    async def call(self, method: str, path: str, body: object | None = None, *, reply: type[T]) -> T:
        path, _, query = path.partition("?")
        self.calls.append(f"{method} {path}")
        asked = query.partition("=")[2]
        answer: object
        match method, path:
            case "GET", "/v1/escrow":
                answer = self.log_page(int(asked or 0))
            case "POST", "/v1/escrow":
                assert isinstance(body, EscrowWrite)
                answer = self.write(body)
            case "POST", "/v1/escrow/rows":
                assert isinstance(body, RowsRequest)
                named = {(name.key, name.version) for name in body.rows} | self.unasked
                answer = RowsReply(tuple(row for name, row in self.rows.items() if name in named))
            case "GET", receipt if receipt.startswith("/v1/escrow/receipts/"):
                answer = self.receipt(KeyId(receipt.rpartition("/")[2]))
            case "GET", "/v1/escrow/rows":
                answer = self.rows_page(asked)
            case "POST", "/v1/escrow/search":
                assert isinstance(body, KeySearch)
                answer = KeysFound(self.found if self.found is not None else self.search(body))
            case "POST", "/v1/escrow/statements":
                assert isinstance(body, StatementsRequest)
                answer = StatementsReply(tuple(entry for entry in self.statements.values() if entry.name in body.names))
            case "POST", "/v1/escrow/delegations":
                assert isinstance(body, DelegationsRequest)
                answer = DelegationsFound(tuple(kept for name, kept in self.delegations.items() if name in body.names))
            case "POST", "/v1/delegations":
                assert isinstance(body, DelegationRequest)
                self.delegate(body.statement)
                answer = EscrowReceipt((self.log[-1],))
            case _:
                answer = AuditLog((AuditEntry(1, 0.0, self.name, "vcm", "key-create", "x", "done", "00"),))
        return codec.decode(codec.encode(answer), reply)

    def head(self, count: int | None = None) -> bytes:
        head = genesis(self.name, EPOCH)
        for entry in self.log[:count]:
            head = extend(head, entry)
        return head

    def log_page(self, after: int) -> LogPage:
        entries = tuple(self.log[after : after + self.page])
        checkpoint = signed(CheckpointStatement(self.name, EPOCH, len(self.log), self.head()), self.kmc_key)
        return LogPage(entries, checkpoint if after + len(entries) >= len(self.log) else None)

    def receipt(self, key: KeyId) -> Signed:
        entries = {entry.subject: entry for entry in self.log if entry.subject.startswith(f"key/{key}/")}
        gone = tuple(
            Destroyed(int(subject.rpartition("/")[2]), entry.digest)
            for subject, entry in entries.items()
            if (key, int(subject.rpartition("/")[2])) not in self.rows
        )
        if not gone:
            raise StateConflict("nothing was destroyed")
        made = entries[f"key/{key}/0"].sequence
        return self.forged or signed(DestructionStatement(self.name, key, EPOCH, made, 0.0, gone), self.kmc_key)

    def search(self, wanted: KeySearch) -> tuple[KeyId, ...]:
        of_key = {key: decode_attributes(row) for (key, version), row in self.rows.items() if version == 0}
        return tuple(
            key
            for key, made in of_key.items()
            if isinstance(made, KeyAttributes) and made.label.startswith(wanted.label) and set(wanted.terms) <= terms_of(made)
        )

    def rows_page(self, after: str) -> RowsReply:
        key, _, version = after.partition("/")
        following = sorted(name for name in self.rows if name > (key, int(version or -1)))
        return RowsReply(tuple(self.rows[name] for name in following[: self.page]), end=len(following) <= self.page)

    def write(self, request: EscrowWrite) -> EscrowReceipt:
        for write in request.writes:
            old = self.rows.get((write.row.key, write.row.version))
            if (b"" if old is None else row_digest(old)) != write.previous:
                raise StateConflict("somebody else was faster")
        before = len(self.log)
        for write in request.writes:
            self.rows[write.row.key, write.row.version] = write.row
            self.append(write.row.subject, row_digest(write.row))
            for key, version in list(self.rows):
                if key == write.row.key and version and write.row.version == 0 and was_destroyed(write.row, version):
                    del self.rows[key, version]
        return EscrowReceipt(tuple(self.log[before:]))

    def append(self, subject: str, digest: bytes) -> None:
        self.log.append(LogEntry(len(self.log) + 1, subject, digest))

    def keep(self, name: str, statement: Signed, *, sequence: int | None = None) -> None:
        """``sequence`` is the number in the log, when it is not the newest that the Ukey gave."""
        entry = StatementEntry(ApplicationName(name), statement, self.sequence if sequence is None else sequence)
        self.statements[entry.name] = entry
        self.append(entry.subject, statement_digest(statement))

    def delegate(self, statement: Signed, *, told: DelegationStatement | None = None) -> None:
        """Keep whatever is said to be a delegation; ``told``: as what the log names it."""
        made = told or codec.decode(statement.payload, DelegationStatement)
        name = DelegationName(made.delegator, made.delegate, made.key)
        self.delegations[name] = statement
        self.append(name.subject(made.sequence), statement_digest(statement))

    # -- the Ukey ------------------------------------------------------------------------------------------------------

    def statement(
        self,
        name: str,
        public_key_sha256: bytes,
        rights: tuple[Right, ...] = tuple(Right),
        *,
        lasts_s: float = 3600,
        revoked: bool = False,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> Signed:
        self.sequence += 1
        not_after = int(time.time() + lasts_s)
        made = ApplicationStatement(self.name, ApplicationName(name), public_key_sha256, rights, not_after, self.sequence, revoked)
        return signed(made, key or self.ukey)

    def application(self, name: str, rights: tuple[Right, ...] = tuple(Right)) -> Credentials:
        """An application, signed in."""
        credentials = self.domain.credentials(Identity(Role.APPLICATION, name, self.name), trust=self.domain.pem)
        self.keep(name, self.statement(name, peer(credentials).public_key_sha256, rights))
        return credentials

    def terminal(self) -> Credentials:
        return self.domain.credentials(Identity(Role.TERMINAL, "ukey-1a2b3c4d", self.name), trust=self.domain.pem)

    def login(self, vcm: VcmId, nonce: bytes | None = None) -> Signed:
        return signed(LoginStatement(self.name, vcm, secrets.token_bytes(32) if nonce is None else nonce), self.ukey)

    def lease(self, card: CardId, vcm: VcmId, nonce: bytes, duration_ms: int) -> Signed:
        """The Ukey has seen ``self.remembered``, or all of the log."""
        seen = self.remembered or Seen(EPOCH, len(self.log), self.head())
        statement = LeaseStatement(self.name, card, vcm, nonce, duration_ms, seen.epoch, seen.sequence, seen.head)
        return signed(statement, self.ukey, self.kmc_key)

    def delivery(self, card: CardId, vcm: VcmId, chain: bytes, hpke_public_key: bytes) -> CmkDelivered:
        """step f: both shares for one card. The Ukey has seen all of the log."""
        share = SealedShare(
            self.name,
            card,
            vcm,
            self.ukey_share,
            (public_key_der(self.ukey.public_key()),),
            public_key_der(self.kmc_key.public_key()),
            EPOCH,
            len(self.log),
            self.head(),
        )
        return self.deliver(share, chain, hpke_public_key)

    def deliver(self, share: SealedShare, chain: bytes, hpke_public_key: bytes) -> CmkDelivered:
        transport = leaf(chain).public_key()
        assert isinstance(transport, rsa.RSAPublicKey)
        wrapped = transport.encrypt(self.hsm_share, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))
        suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
        public_key = hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(hpke_public_key[:1184]),
            x25519.X25519PublicKey.from_public_bytes(hpke_public_key[1184:]),
        )
        info = f"cipherfleet sealed share v1|{share.card}|{share.vcm}".encode()
        return CmkDelivered(wrapped, suite.encrypt(codec.encode(share), public_key, info))


def peer(credentials: Credentials) -> Peer:
    """What a server makes of a client with these credentials."""
    return peer_of(leaf(credentials.chain).public_bytes(Encoding.DER))


@dataclass
class FakeKmc:
    """``await start()``, then ``url``. Set ``plugged_in`` to False, and no lease is signed any more."""

    lease_ms: int = 6000
    vcm_certificate_s: float = 3600.0
    plugged_in: bool = True
    root: Authority = field(default_factory=lambda: Authority("root"))
    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    consumers: dict[ConsumerId, FakeConsumer] = field(default_factory=dict)
    tokens: dict[bytes, ConsumerId] = field(default_factory=dict)
    refuse_cards: Exception | None = None
    refused: list[str] = field(default_factory=list)
    last_uses: list[UsageReport] = field(default_factory=list)
    seen: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        self.platform = self.root.subordinate("platform")
        self.channels: dict[VcmId, Frames[Any, Any]] = {}
        self.cards: dict[CardId, tuple[bytes, bytes]] = {}
        self.first_revoked: tuple[Serial, ...] = ()
        self.changed = asyncio.Condition()
        self.address = ("127.0.0.1", 0)
        self._make_server()

    def _make_server(self) -> None:
        self.server = Server(self.platform.credentials(Identity(Role.KMC, "kmc")))
        self.server.route("POST", "/v1/cards", {Role.MACHINE}, self._certify_card)
        self.server.route("POST", "/v1/vcms/{vcm}/certificate", {Role.MACHINE}, self._certify_vcm)
        self.server.route("POST", "/v1/certificate", {Role.VCM}, self._renew)
        self.server.route("GET", "/v1/escrow", {Role.VCM}, self._escrow)
        self.server.route("POST", "/v1/escrow", {Role.VCM}, self._escrow)
        self.server.route("POST", "/v1/escrow/rows", {Role.VCM}, self._escrow)
        self.server.route("GET", "/v1/escrow/rows", {Role.VCM}, self._escrow)
        self.server.route("POST", "/v1/escrow/search", {Role.VCM}, self._escrow)
        self.server.route("POST", "/v1/escrow/statements", {Role.VCM}, self._escrow)
        self.server.route("GET", "/v1/audit", {Role.VCM}, self._escrow)
        self.server.route("GET", "/v1/vcm", {Role.VCM}, self._vcm)

    async def start(self) -> None:
        self.address = await self.server.start(self.address)

    async def stop(self) -> None:
        await self.server.stop()

    async def restart(self) -> None:
        self._make_server()
        await self.start()

    @property
    def url(self) -> str:
        return f"https://{self.address[0]}:{self.address[1]}"

    @property
    def signing_key(self) -> bytes:
        return public_key_der(self.key.public_key())

    def consumer(self, name: str) -> FakeConsumer:
        if ConsumerId(name) not in self.consumers:
            self.consumers[ConsumerId(name)] = FakeConsumer(name, self.key, self.root)
        return self.consumers[ConsumerId(name)]

    def token(self, name: str) -> bytes:
        """creation step 2."""
        token = secrets.token_bytes(32)
        self.tokens[token] = self.consumer(name).name
        return token

    def credentials(self, role: Role, id_: str) -> Credentials:
        return self.platform.credentials(Identity(role, id_))

    async def until(self, event: str, count: int = 1, within: float = 10.0) -> None:
        """Until ``event`` (the name of a frame or route) was seen ``count`` times."""
        async with asyncio.timeout(within), self.changed:
            await self.changed.wait_for(lambda: self.seen[event] >= count)

    async def tell(self, vcm: VcmId, frame: object) -> None:
        await self.channels[vcm].send(frame)

    async def revoke(self, vcm: VcmId) -> None:
        await self.tell(vcm, Revoked("ukey-removed"))

    async def _saw(self, event: str) -> None:
        async with self.changed:
            self.seen[event] += 1
            self.changed.notify_all()

    # -- routes --------------------------------------------------------------------------------------------------------

    async def _certify_card(self, call: Call) -> CardReply:
        request = await call.body(CardRequest)
        await self._saw("card")
        if self.refuse_cards is not None:
            raise self.refuse_cards
        key = x509.load_der_x509_csr(request.csr).public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        identity = Identity(Role.CARD, request.card)
        chain = self.platform.certify(identity, key, addresses=(), hpke_public_key=request.hpke_public_key)
        self.cards[request.card] = chain, request.hpke_public_key
        return CardReply(Chain(chain, self.root.pem), self.signing_key)

    async def _certify_vcm(self, call: Call) -> Chain:
        request = await call.body(VcmCertificateRequest)
        await self._saw("certificate")
        consumer = self.tokens.pop(request.token, None)
        if consumer is None or request.card not in self.cards:
            raise TokenStale("this token is not (any more) good for a VCM")
        return self._chain(Identity(Role.VCM, call.path("vcm", VcmId), consumer), request.csr)

    async def _renew(self, call: Call) -> Chain:
        request = await call.body(CertificateRequest)
        chain = self._chain(call.peer.identity, request.csr)
        await self._saw("renewal")
        return chain

    def _chain(self, identity: Identity, csr: bytes) -> Chain:
        domain = self.consumers[identity.consumer].domain
        key = x509.load_der_x509_csr(csr).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return Chain(domain.certify(identity, key, lifetime=timedelta(seconds=self.vcm_certificate_s)), domain.pem)

    async def _escrow(self, call: Call) -> object:
        consumer = self.consumers[call.peer.identity.consumer]
        if VcmId(call.peer.identity.id) not in self.channels:
            raise ServiceOff("this VCM has no channel")
        request = call.request
        route = f"{request.method} {request.path}"
        asks: dict[str, Any] = {
            "POST /v1/escrow": EscrowWrite,
            "POST /v1/escrow/rows": RowsRequest,
            "POST /v1/escrow/search": KeySearch,
            "POST /v1/escrow/statements": StatementsRequest,
        }
        reply: Any = {
            "GET /v1/escrow": LogPage,
            "POST /v1/escrow": EscrowReceipt,
            "POST /v1/escrow/rows": RowsReply,
            "GET /v1/escrow/rows": RowsReply,
            "POST /v1/escrow/search": KeysFound,
            "POST /v1/escrow/statements": StatementsReply,
            "GET /v1/audit": AuditLog,
        }[route]
        body = await call.body(asks[route]) if route in asks else None
        answer = await consumer.call(request.method, str(request.rel_url), body, reply=reply)
        await self._saw(route)
        if isinstance(body, EscrowWrite):
            await self.tell_change(consumer, but=VcmId(call.peer.identity.id))
        return answer

    async def tell_change(self, consumer: FakeConsumer, *, but: VcmId | None = None) -> None:
        for vcm, channel in list(self.channels.items()):
            if vcm != but:
                await channel.send(EscrowChanged(len(consumer.log)))

    async def _vcm(self, call: Call) -> object:
        vcm, consumer = VcmId(call.peer.identity.id), self.consumers[call.peer.identity.consumer]
        channel = await call.frames(VcmToKmc)
        self.channels[vcm] = channel
        await channel.send(CertificatesRevoked(self.first_revoked))
        await self._saw("vcm")
        async for frame in channel:
            match frame:
                case CardReady(card):
                    await channel.send(consumer.delivery(card, vcm, *self.cards[card]))
                case LeaseWanted(card, nonce):
                    if self.plugged_in:
                        await channel.send(LeaseGranted(consumer.lease(card, vcm, nonce, self.lease_ms)))
                case CmkRefused(code, _):
                    self.refused.append(code)
                case LastUses(report):
                    self.last_uses.append(report)
                case CmkLoaded() | Serving():
                    pass
            await self._saw(type(frame).__name__)
        if self.channels.get(vcm) is channel:
            del self.channels[vcm]
        return channel.response


def serial(credentials: Credentials) -> Serial:
    return serial_of(leaf(credentials.chain))


def other_key(credentials: Credentials, authority: Authority) -> Credentials:
    """The same name, another key."""
    key = new_key()
    chain = authority.certify(credentials.identity, key.public_key())
    return Credentials(key_to_pem(key), chain, credentials.trust)
