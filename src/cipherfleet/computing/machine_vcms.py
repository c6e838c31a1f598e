"""The VCMs of one machine: built whole or not at all, watched while they live, deleted without a trace."""

import asyncio
import hashlib
import itertools
import logging
import os
import shutil
import socket
import time
import weakref
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from cipherfleet.channel import codec
from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import ProcessEntry, register
from cipherfleet.computing.card_handle import CardStatus
from cipherfleet.computing.confinement import look_outside
from cipherfleet.computing.launcher import Child, Launcher
from cipherfleet.computing.listening import open_listening
from cipherfleet.computing.machine_card import CardKeeper
from cipherfleet.computing.relay import Relay
from cipherfleet.computing.vcm_boot import BootChannel, CertificateAnswer, CertificateWanted, News
from cipherfleet.computing.vcm_config import VcmConfig
from cipherfleet.contract.errors import CardUnavailable, CipherfleetError, DiskFull, Exists, Internal, NoCapacity
from cipherfleet.contract.ids import CardId, VcmId
from cipherfleet.contract.kmc_api import VcmCertificateRequest
from cipherfleet.contract.machine_api import BuildOrder, Isolation, VcmReport, VcmState
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcc import VccLimits, VccStatistics

log = logging.getLogger(__name__)

GRACE_S = 0.3
LOG_TAIL_BYTES = 2000


class Instance:
    """One VCM on this machine. ``digest`` is of its order: the token itself is not kept."""

    def __init__(self, id_: VcmId, order: BuildOrder, digest: bytes, folder: Path) -> None:
        self.id, self.consumer, self.digest, self.folder = id_, order.consumer, digest, folder
        self.state = VcmState.BUILDING
        self.error = ""
        self.pid = 0
        self.isolation: Isolation | None = None
        self.started_ms = 0.0
        self.processors: tuple[int, ...] = ()
        self.child: Child | None = None
        self.held = AsyncExitStack()  # all that goes with it
        self.tasks: list[asyncio.Task[None]] = []

    def report(self, card: CardStatus | None) -> VcmReport:
        numbers = next((v for v in card.vccs if v.vcm == self.id), None) if card is not None else None
        return VcmReport(
            id=self.id,
            consumer=self.consumer,
            state=self.state,
            pid=self.pid,
            isolation=self.isolation,
            started_ms=self.started_ms,
            operations=numbers.operations if numbers is not None else 0,
            bytes=numbers.bytes if numbers is not None else 0,
            keys=numbers.keys if numbers is not None else 0,
            limits=numbers.limits if numbers is not None else VccLimits(),
            statistics=numbers.statistics if numbers is not None else VccStatistics(),
            error=self.error,
        )


class Vcms:
    """All instances of a machine."""

    def __init__(
        self, folder: Path, run_folder: Path, kmc: Caller, kmc_address: tuple[str, int], root: bytes, launcher: Launcher, settings: Settings
    ) -> None:
        self._folder, self._run_folder, self._kmc, self._kmc_address = folder, run_folder, kmc, kmc_address
        self._root, self._launcher, self._settings = root, launcher, settings
        self._instances: dict[VcmId, Instance] = {}
        self._locks: weakref.WeakValueDictionary[VcmId, asyncio.Lock] = weakref.WeakValueDictionary()
        self.cards: CardKeeper | None = None

    def sweep(self) -> None:
        """Remove what an earlier life of this machine left: folders, run files, and processes that should have died with it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._folder.iterdir():
            entry_file = self._run_file(VcmId(left.name))
            with suppress(OSError, CipherfleetError):
                entry = codec.decode(entry_file.read_bytes(), ProcessEntry)
                if entry.alive:
                    os.kill(entry.pid, 9)
            entry_file.unlink(missing_ok=True)
            shutil.rmtree(left, ignore_errors=True)

    def reports(self, card: CardStatus | None) -> tuple[VcmReport, ...]:
        return tuple(instance.report(card) for instance in self._instances.values())

    async def build(self, id_: VcmId, order: BuildOrder) -> VcmReport:
        """Creation step 6; the same order again is answered with what is there.

        Raises ``Exists``, ``NoCapacity``, ``CardUnavailable``, ``PortTaken``, ``IsolationUnavailable``, ``TimedOut`` or what the
        KMC says (``TokenStale``); nothing is left then.
        """
        digest = hashlib.sha256(codec.encode(order)).digest()
        async with self._lock(id_):
            instance = self._instances.get(id_)
            if instance is not None:
                if instance.digest != digest:
                    raise Exists(f"{id_} is there already, built by another order")
                return instance.report(None)
            if sum(i.state is not VcmState.FAILED for i in self._instances.values()) >= self._settings.vcms_per_machine:
                raise NoCapacity(f"this machine has {self._settings.vcms_per_machine} VCMs, no more fit")
            instance = self._instances[id_] = Instance(id_, order, digest, self._folder / id_)
            began = time.monotonic()
            try:
                await self._start(instance, order)
            except BaseException as exc:
                del self._instances[id_]
                log.warning("%s was not built: %s", id_, getattr(exc, "code", type(exc).__name__))
                await asyncio.shield(self._release(instance))
                if isinstance(exc, OSError):
                    raise DiskFull(f"{id_} cannot be stored: {exc.strerror}") from exc
                raise
            instance.started_ms = (time.monotonic() - began) * 1000
            return instance.report(None)

    async def delete(self, id_: VcmId) -> None:
        """Deletion step 6: keys zeroised, process, socket, relay and folder gone. Deleting what is gone succeeds."""
        async with self._lock(id_):
            instance = self._instances.get(id_)
            if instance is None:
                return
            instance.state = VcmState.DELETING
            await asyncio.shield(self._release(instance))
            self._instances.pop(id_, None)

    async def fail_all(self, error: CipherfleetError) -> None:
        """Every VCM is ended and reported failed."""
        await asyncio.gather(*(self._fail(instance, f"{error.code}: {error.message}") for instance in list(self._instances.values())))

    async def close(self) -> None:
        """End all of them."""
        await asyncio.gather(*(self.delete(id_) for id_ in list(self._instances)))

    # -- building ------------------------------------------------------------------------------------------------------

    async def _start(self, instance: Instance, order: BuildOrder) -> None:
        if self.cards is None:
            raise CardUnavailable("this machine has no crypto card")
        card, kmc_signing_key = self.cards.card
        held = instance.held
        held.callback(shutil.rmtree, instance.folder, ignore_errors=True)
        instance.folder.mkdir(mode=0o700)
        instance.processors = self._processors(order.size.cpus)
        relay = Relay(instance.folder / "relay", self._kmc_address)
        held.push_async_callback(relay.close)
        await relay.start()
        with await open_listening(order.address, order.network_namespace) as listening:
            held.push_async_callback(card.detach, instance.id)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            boot = await BootChannel.open(ours)
            held.callback(boot.close)
            with theirs, await card.attach(instance.id, instance.consumer, order.limits) as vcc:
                configuration = VcmConfig(
                    id=instance.id,
                    consumer=instance.consumer,
                    card=card.id,
                    address=order.address,
                    kmc_url=self._kmc.url,
                    kmc_signing_key=kmc_signing_key,
                    root=self._root,
                    relay=self._launcher.relay_path(instance.folder / "relay"),
                    listening=listening.fileno(),
                    vcc=vcc.fileno(),
                    boot=theirs.fileno(),
                    confinement=self._launcher.confinement(
                        order.isolation, order.size.memory_mib, order.size.files, instance.processors, instance.folder
                    ),
                    settings=self._settings,
                )
                certifying = asyncio.create_task(self._certify(instance.id, card.id, order.token, boot))
                try:
                    child = await self._launch(instance, configuration, (listening.fileno(), vcc.fileno(), theirs.fileno()))
                finally:
                    certifying.cancel()
                    await asyncio.gather(certifying, return_exceptions=True)
        await self._settle(instance, child, boot)

    async def _launch(self, instance: Instance, configuration: VcmConfig, descriptors: tuple[int, ...]) -> Child:
        try:
            return await self._launcher.start(
                configuration,
                relay=instance.folder / "relay",
                log_file=instance.folder / "log",
                descriptors=descriptors,
                hostname=instance.id,
                timeout=self._settings.step_s,
            )
        except CipherfleetError as exc:
            self._log_tail(instance)
            if isinstance(exc, Internal):
                raise Internal(f"{instance.id} ended before it was ready", "see the machine's log") from exc
            raise

    async def _certify(self, id_: VcmId, card: CardId, token: bytes, boot: BootChannel) -> None:
        """step e: the VCM's request goes to the KMC with token and card; the VCM never sees the token."""
        wanted = await boot.receive(CertificateWanted)
        if wanted is None:
            return
        try:
            request = VcmCertificateRequest(wanted.csr, token, card)
            chain = await self._kmc.call("POST", f"/v1/vcms/{id_}/certificate", request, reply=Chain)
        except CipherfleetError as exc:
            await boot.send(CertificateAnswer(error=exc.to_reply().error))
        else:
            await boot.send(CertificateAnswer(chain=chain))

    async def _settle(self, instance: Instance, child: Child, boot: BootChannel) -> None:
        """It runs: note who and how, and watch it."""
        instance.child, instance.pid = child, child.pid
        instance.held.push_async_callback(child.end, GRACE_S)
        isolation = codec.decode(child.info, Isolation, what="the VCM's isolation")
        instance.isolation = look_outside(child.pid, isolation, child.namespaces)
        instance.held.callback(self._run_file(instance.id).unlink, missing_ok=True)
        try:
            register(self._run_folder, "vcm", instance.id, child.pid, instance.consumer)
        except OSError:
            raise
        except Exception as exc:  # psutil: it is gone already
            raise Internal(f"{instance.id} ended as soon as it was ready") from exc
        instance.state = VcmState.PREPARING
        instance.tasks = [asyncio.create_task(self._hear(instance, boot)), asyncio.create_task(self._watch(instance, child))]

    def _processors(self, count: int) -> tuple[int, ...]:
        """The processors that fewest other VCMs of this machine run on."""
        available = sorted(os.sched_getaffinity(0))
        used = list(itertools.chain.from_iterable(i.processors for i in self._instances.values()))
        return tuple(sorted(sorted(available, key=used.count)[:count]))

    # -- living and dying ----------------------------------------------------------------------------------------------

    async def _hear(self, instance: Instance, boot: BootChannel) -> None:
        """What the VCM says of itself."""
        with suppress(CipherfleetError):
            while (news := await boot.receive(News)) is not None:
                if news.state is VcmState.SERVING and instance.state is VcmState.PREPARING:
                    instance.state = VcmState.SERVING
                elif news.state is VcmState.FAILED:
                    instance.error = news.error[:500]

    async def _watch(self, instance: Instance, child: Child) -> None:
        status = await child.wait()
        await asyncio.wait(instance.tasks[:1], timeout=GRACE_S)  # its last words
        log.warning("%s has ended with status %d: %s", instance.id, status, instance.error)
        self._log_tail(instance)
        error = instance.error or f"internal: the VCM's process ended with status {status}"
        failing = asyncio.create_task(self._fail(instance, error))
        instance.tasks = []
        await asyncio.shield(failing)

    async def _fail(self, instance: Instance, error: str) -> None:
        """Nothing of it is left but the report."""
        async with self._lock(instance.id):
            if self._instances.get(instance.id) is not instance or instance.state is VcmState.DELETING:
                return
            instance.state, instance.error, instance.pid = VcmState.FAILED, error, 0
            await self._release(instance)

    async def _release(self, instance: Instance) -> None:
        """Let go of all that it holds, the last thing first. Idempotent."""
        tasks, instance.tasks = instance.tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        instance.child = None
        held, instance.held = instance.held, AsyncExitStack()
        try:
            await held.aclose()
        except CipherfleetError as exc:
            log.warning("%s was not let go cleanly: %s: %s", instance.id, exc.code, exc.message)

    def _log_tail(self, instance: Instance) -> None:
        """The last words of a VCM that failed, before its folder goes; what cannot be printed is not."""
        with suppress(OSError):
            raw = (instance.folder / "log").read_bytes()[-LOG_TAIL_BYTES:]
            for line in raw.decode(errors="replace").splitlines()[-10:]:
                log.warning("%s said: %s", instance.id, "".join(c for c in line if c.isprintable()))

    def _run_file(self, id_: VcmId) -> Path:
        return self._run_folder / f"vcm-{id_}.json"

    def _lock(self, id_: VcmId) -> asyncio.Lock:
        lock = self._locks.get(id_)
        if lock is None:
            lock = self._locks[id_] = asyncio.Lock()
        return lock
