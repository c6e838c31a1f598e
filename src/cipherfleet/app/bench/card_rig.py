"""A card to measure: one real card process, VCMs that are nothing but load, and the same load without a VCM.

KMC and terminal are played here: a CA and keys that live as long as the measurement, product code for all that they send.
"""

import asyncio
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from cipherfleet.app import output
from cipherfleet.app.bench.bare_engine import CardGiven, CardShown, EngineWork
from cipherfleet.app.bench.task_queue import SATURATED_S, Counted, Slice
from cipherfleet.app.bench.workload import LeaseWanted, VcmWork
from cipherfleet.channel import codec, signing
from cipherfleet.channel.certificates import HPKE_KEY_OID, alternative_names, new_key, to_pem
from cipherfleet.channel.process import start_child
from cipherfleet.channel.sealing import check_card, share_info
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.computing.card_handle import CardHandle
from cipherfleet.computing.card_lease import MAX_DURATION_MS
from cipherfleet.computing.launcher import ENVIRONMENT, Child, Launcher
from cipherfleet.computing.vcm_boot import BootChannel
from cipherfleet.contract.errors import Internal
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, VcmId, new_vcm_id
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import LeaseStatement, SealedShare
from cipherfleet.contract.vcc import CmkDelivery, VccLimits

MACHINE = MachineId("m1")
ROLES = (sys.executable, "-I", "-B", "-m", "cipherfleet.app.roles")
WORKLOAD = (*ROLES, "bench-vcm")
NO_WEIGHTS: Mapping[int, float] = {}
START_S = 60.0
GRACE_S = 2.0
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class Worker:
    """A process that works off slices."""

    def __init__(self, boot: BootChannel) -> None:
        self._boot = boot

    async def work(self, wanted: Slice) -> Counted:
        await self._boot.send(wanted)
        counted = await self._boot.receive(Counted)
        if counted is None:
            raise Internal("a process of the measurement has ended")
        return counted


class Load(NamedTuple):
    """What one worker does during a measurement."""

    worker: Worker
    operation: str
    size: int
    mean_s: float = SATURATED_S
    direct: bool = False


class CardRig(NamedTuple):
    """Made by ``card_rig``. ``host``: a process that is no VCM, at the card's queue; ``engine``: a card's functions in one process, without
    a queue. ``launcher``: how the VCMs are confined."""

    vcms: tuple[Worker, ...]
    host: Worker
    engine: Worker
    launcher: str


async def measure(loads: Iterable[Load], seconds: float, lead: float) -> list[Counted]:
    """All loads at once; what each came to in the same ``seconds``, which begin when the load has run for ``lead`` seconds."""
    begins = time.monotonic() + lead
    ends = begins + seconds
    return await asyncio.gather(*(x.worker.work(Slice(x.operation, x.size, begins, ends, x.mean_s, direct=x.direct)) for x in loads))


@asynccontextmanager
async def card_rig(vcms: int, *, quiet: bool, weights: Mapping[int, float] = NO_WEIGHTS) -> AsyncIterator[CardRig]:
    """A card with ``vcms`` VCMs, all in service. ``weights``: of those that have another than 1, by number.

    A progress bar shows how they start, unless ``quiet``.
    """
    with tempfile.TemporaryDirectory(prefix="cipherfleet-bench-") as name:
        async with AsyncExitStack() as held:
            folder, platform = Path(name), _Platform()
            launcher = await Launcher.find(command=WORKLOAD)
            card = await CardHandle.start(MACHINE, folder, Settings())
            held.push_async_callback(card.stop)
            shown = CardShown(card.id, card.csr, card.hpke_public_key)
            certified = platform.certify(shown)
            await card.certify(certified)
            given = _Given(shown, certified)
            engine = await _start_engine(held, folder, platform)
            host = await _start_vcm(held, folder, platform, None, card, given, vcms)
            workers = []
            with output.steps("starting VCMs", vcms, quiet=quiet) as step:
                for number in range(vcms):
                    step(str(number + 1))
                    workers.append(await _start_vcm(held, folder, platform, launcher, card, given, number, weights.get(number, 1.0)))
            yield CardRig(tuple(workers), host, engine, launcher.kind)


class _Given(NamedTuple):
    shown: CardShown
    certified: CardReply


async def _start_vcm(
    held: AsyncExitStack,
    folder: Path,
    platform: "_Platform",
    launcher: Launcher | None,
    card: CardHandle,
    given: _Given,
    number: int,
    weight: float = 1.0,
) -> Worker:
    """As a machine starts a VCM, limits and processors included; without a launcher the same process on the host, in no confinement."""
    vcm, settings, processors = new_vcm_id(), Settings(), sorted(os.sched_getaffinity(0))
    consumer = _Consumer(platform, ConsumerId(f"bench-{number}"), vcm)
    own = folder / vcm
    (own / "relay").mkdir(parents=True)
    boot, theirs = await _boot(held)
    held.push_async_callback(card.detach, vcm)
    with theirs, await card.attach(vcm, consumer.name) as vcc:
        await card.limit(vcm, VccLimits(weight=weight))
        descriptors = vcc.fileno(), theirs.fileno()
        work = VcmWork(
            vcc.fileno(),
            theirs.fileno(),
            consumer.delivery(given.shown, given.certified),
            launcher.confinement("process", settings.vcm_memory_mib, settings.vcm_files, (processors[number % len(processors)],), own)
            if launcher is not None
            else None,
        )
        if launcher is not None:
            starting = launcher.start(
                work, relay=own / "relay", log_file=own / "log", descriptors=descriptors, hostname=vcm, timeout=START_S
            )
        else:
            starting = _on_the_host(work, own / "log", descriptors)
        child: Child = await _beside(starting, consumer.lease(boot, card.id))
    held.push_async_callback(child.end, GRACE_S)
    return Worker(boot)


async def _on_the_host(work: VcmWork, log_file: Path, descriptors: tuple[int, ...]) -> Child:
    process, info = await start_child(WORKLOAD, work, log_file=log_file, pass_fds=descriptors, timeout=START_S, environment=ENVIRONMENT)
    return Child(process, process.pid, info)


async def _start_engine(held: AsyncExitStack, folder: Path, platform: "_Platform") -> Worker:
    consumer = _Consumer(platform, ConsumerId("bench-engine"), new_vcm_id())
    boot, theirs = await _boot(held)

    async def serve() -> None:
        shown = await boot.receive(CardShown)
        if shown is not None:
            certified = platform.certify(shown)
            await boot.send(CardGiven(certified, consumer.delivery(shown, certified)))
            await consumer.lease(boot, shown.id)

    with theirs:
        starting = start_child(
            (*ROLES, "bench-engine"),
            EngineWork(theirs.fileno(), MACHINE, consumer.vcm, consumer.name),
            log_file=folder / "engine.log",
            pass_fds=(theirs.fileno(),),
            timeout=START_S,
        )
        process, info = await _beside(starting, serve())
    held.push_async_callback(Child(process, process.pid, info).end, GRACE_S)
    return Worker(boot)


async def _boot(held: AsyncExitStack) -> tuple[BootChannel, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    boot = await BootChannel.open(ours)
    held.callback(boot.close)
    return boot, theirs


async def _beside(work: Coroutine[Any, Any, Any], other: Coroutine[Any, Any, None]) -> Any:
    """What ``work`` gives, while ``other`` runs."""
    task = asyncio.create_task(other)
    try:
        return await work
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# -- KMC and terminal --------------------------------------------------------------------------------------------------


class _Platform:
    """A CA and the KMC's signing key."""

    def __init__(self) -> None:
        self.kmc = LocalSigner(new_key())
        self._key = new_key()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
        root = self._builder(self._name).public_key(self._key.public_key())
        self.root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(self._key, hashes.SHA256())

    def certify(self, card: CardShown) -> CardReply:
        request = x509.load_der_x509_csr(card.csr)
        builder = self._builder(request.subject).public_key(request.public_key())
        leaf = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(alternative_names(Identity(Role.CARD, card.id), ()), critical=False)
            .add_extension(x509.UnrecognizedExtension(HPKE_KEY_OID, card.hpke_public_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return CardReply(Chain(to_pem([leaf]), to_pem([self.root])), self.kmc.public_key)

    def _builder(self, subject: x509.Name) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=1))


class _Consumer:
    """A consumer with a Ukey, and the HSM's share of its CMK."""

    def __init__(self, platform: _Platform, name: ConsumerId, vcm: VcmId) -> None:
        self.name, self.vcm = name, vcm
        self._kmc, self._ukey = platform.kmc, LocalSigner(new_key())

    def delivery(self, card: CardShown, certified: CardReply) -> CmkDelivery:
        """step f: a share from the HSM, a share from the terminal."""
        key = x509.load_der_x509_csr(card.csr).public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise Internal("the card's transport key is no RSA key")
        trusted = check_card(certified.chain.chain, certified.chain.trust, card.id)
        share = SealedShare(
            self.name, card.id, self.vcm, secrets.token_bytes(32), (self._ukey.public_key,), self._kmc.public_key, 1, 0, bytes(32)
        )
        return CmkDelivery(key.encrypt(secrets.token_bytes(32), _OAEP), trusted.seal(codec.encode(share), share_info(card.id, self.vcm)))

    async def lease(self, boot: BootChannel, card: CardId) -> None:
        """As long as a lease may be."""
        wanted = await boot.receive(LeaseWanted)
        if wanted is not None:
            statement = LeaseStatement(self.name, card, self.vcm, wanted.nonce, MAX_DURATION_MS, 1, 0, bytes(32))
            await boot.send(await signing.countersign(await signing.sign(statement, self._ukey), self._kmc))
