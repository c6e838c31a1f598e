"""A whole crypto cloud on this machine: what is started, in which order, with whose certificates.

This module alone names concrete classes. ``Cloud.up`` is idempotent: it starts what is missing and leaves alone what runs,
so it is also the way back after any process was killed.
"""

import asyncio
import errno
import fcntl
import os
import secrets
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cipherfleet.app.record import PORT, STATE_VERSION, CloudRecord, free_network, read_record_of
from cipherfleet.channel import codec
from cipherfleet.channel.certificates import Credentials, key_to_pem, make_request, new_key
from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import ProcessEntry, register, running, start_daemon
from cipherfleet.computing.machine import MachineConfig
from cipherfleet.contract.errors import (
    AlreadyRunning,
    CipherfleetError,
    Conflict,
    DiskFull,
    Exists,
    FileProblem,
    IsolationUnavailable,
    KmcUnavailable,
    ManagementUnavailable,
    NotRunning,
    PassphraseWrong,
    StateNotWritable,
    TimedOut,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import MachineRegistration, PlatformStatus
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.settings import LauncherChoice, Settings
from cipherfleet.kmc.process import HsmConfig, KmcConfig, KmcReady
from cipherfleet.management.drivers.local_domain import sweep_network
from cipherfleet.management.process import ManagementConfig
from cipherfleet.state.files import write_private
from cipherfleet.terminal.process import TerminalConfig
from cipherfleet.terminal.ukey import read_record

STARTUP_S = 40.0
SHUTDOWN_S = 5.0
_ORDER = ("terminal", "vcm", "management", "machine", "card", "kmc", "hsm")

Progress = Callable[[str], None]


class CloudStatus(msgspec.Struct, frozen=True):
    state: str
    ready: bool
    processes: tuple[ProcessEntry, ...]
    platform: PlatformStatus | None


class Cloud:
    """The cloud whose state is the folder ``state``."""

    def __init__(self, state: Path) -> None:
        self.state = state.absolute()
        self.run_folder = self.state / "run"

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def record(self) -> CloudRecord:
        """Raises ``NotRunning`` when there is no cloud here, ``StateNewer`` when it is not ours to read."""
        return read_record_of(self.state)

    @property
    def kmc_url(self) -> str:
        return f"https://127.{self.record.network}.0.1:{PORT}"

    @property
    def management_url(self) -> str:
        return f"https://127.{self.record.network}.0.2:{PORT}"

    def kmc(self) -> Caller:
        """The operator's way to the KMC."""
        return Caller(self.kmc_url, Identity(Role.KMC, "kmc").dns_name, self._operator(), KmcUnavailable)

    def management(self) -> Caller:
        """The operator's way to the management platform."""
        name = Identity(Role.MANAGEMENT, "management").dns_name
        return Caller(self.management_url, name, self._operator(), ManagementUnavailable, timeout=120)

    def processes(self) -> list[ProcessEntry]:
        return running(self.run_folder) if self.run_folder.is_dir() else []

    async def status(self) -> CloudStatus:
        """Who runs and what the platform says. ``ready`` when every process of the platform is there and answers."""
        record, processes = self.record, tuple(self.processes())
        roles = [p.role for p in processes]
        complete = {"hsm", "kmc", "management"} <= set(roles) and roles.count("machine") == record.machines == roles.count("card")
        platform = None
        if "management" in roles:
            with suppress(CipherfleetError):
                async with self.management() as management:
                    platform = await management.call("GET", "/v1/status", reply=PlatformStatus, timeout=5)
        reporting = {m.id for m in platform.machines if m.state == "up" and m.card is not None} if platform else set()
        return CloudStatus(str(self.state), complete and reporting >= set(self._machines(record)), processes, platform)

    # -- up and down ---------------------------------------------------------------------------------------------------

    async def up(
        self,
        *,
        machines: int | None = None,
        isolation: str | None = None,
        launcher: LauncherChoice | None = None,
        passphrase_file: Path | None = None,
        passphrase: str = "",
        settings: Settings | None = None,
        progress: Progress = lambda _: None,
    ) -> None:
        """Start what does not run. Raises what hindered it; processes that already ran stay.

        ``launcher``: how VCMs start, on machines that are started from now on.
        ``passphrase``: the HSM's, typed; from then on it must be given whenever the HSM has to be started.
        """
        with self._writable(), self._lock():
            record = self._settle(machines, isolation, launcher, passphrase_file, settings, asked=bool(passphrase))
            async for _ in _until(STARTUP_S, "the cloud to be ready"):
                await self._start_missing(record, passphrase, progress)
                if (await self.status()).ready:  # what was just being killed shows only now
                    return

    async def down(self) -> int:
        """Stop every process of this cloud; how many were stopped. Stopping what is stopped succeeds."""
        if not self.run_folder.is_dir():
            return 0
        with self._lock():
            running_now = self.processes()
            network = self.record.network
            for role in _ORDER:
                await _end([p for p in running_now if p.role == role])
            for path in self.run_folder.glob("*.json"):
                path.unlink(missing_ok=True)
            if self.record.isolation == "domain":
                await sweep_network(network)
            return len(running_now)

    def terminal_config(self, ukey: Path, pin: str) -> TerminalConfig:
        return TerminalConfig(str(ukey.absolute()), pin, str(self.run_folder), self.record.settings)

    async def start_terminal(self, ukey: Path, pin: str, *, timeout: float = 60.0) -> bytes:
        """A consumer's terminal agent in the background; the JSON it reports once the service is on.

        When its agent runs already (it stays when a Ukey is pulled and put back), this waits for the service just the same.
        """
        config = self.terminal_config(ukey, pin)
        log = self._folder("logs") / f"terminal-{ukey.name}.log"
        try:
            return await asyncio.to_thread(start_daemon, _command("terminal"), config, log_file=log, timeout=timeout)
        except AlreadyRunning:
            return await self._service_on(read_record(ukey).consumer, timeout)

    async def _service_on(self, consumer: ConsumerId, timeout: float) -> bytes:
        async with self.management() as management:
            async for _ in _until(timeout, f"the service of {consumer}"):
                platform = await management.call("GET", "/v1/status", reply=PlatformStatus)
                for vcm in platform.vcms:
                    if vcm.consumer == consumer and vcm.state is VcmState.SERVING:
                        return codec.encode({"consumer": consumer, "vcm": vcm.id, "endpoint": vcm.endpoint})
        raise RuntimeError("unreachable: _until raises")

    # -- starting ------------------------------------------------------------------------------------------------------

    def _settle(
        self,
        machines: int | None,
        isolation: str | None,
        launcher: LauncherChoice | None,
        passphrase_file: Path | None,
        settings: Settings | None,
        *,
        asked: bool,
    ) -> CloudRecord:
        """The record of this cloud: made at the first ``up``; later the number of machines may grow, and the launcher be another one."""
        path = self.state / "cloud.json"
        if not path.exists():
            if isolation == "domain" and os.geteuid() != 0:
                raise IsolationUnavailable("--isolation domain needs root", "use --isolation process, which needs none")
            record = CloudRecord(
                STATE_VERSION,
                free_network(),
                isolation or "process",
                machines or 2,
                settings or Settings(),
                str(passphrase_file.absolute()) if passphrase_file else "",
                asked,
            )
        else:
            record = self.record
            if isolation is not None and isolation != record.isolation:
                raise Exists(f"this cloud was made with --isolation {record.isolation}", "use another --state")
            if machines is not None and machines < record.machines:
                raise Conflict(f"this cloud has {record.machines} machines", "machines can be added, not removed")
            record = msgspec.structs.replace(
                record, machines=machines or record.machines, passphrase_asked=record.passphrase_asked or asked
            )
            if passphrase_file is not None:
                record = msgspec.structs.replace(record, passphrase_file=str(passphrase_file.absolute()))
        if launcher is not None:
            record = msgspec.structs.replace(record, settings=msgspec.structs.replace(record.settings, launcher=launcher))
        write_private(path, codec.encode(record))
        return record

    def _passphrase(self, record: CloudRecord) -> str:
        """The operator's file, or one made here: good for trying out, the docs say what to do for real."""
        if record.passphrase_asked:
            raise PassphraseWrong("the HSM has to be started, and its passphrase is on no disk", "cipherfleet up --ask-passphrase")
        if record.passphrase_file:
            return _read_secret(Path(record.passphrase_file), "the HSM's passphrase")
        return self._hsm_secret("passphrase")

    def _hsm_secret(self, name: str) -> str:
        """``passphrase``, or ``pin``: what the KMC logs in to the HSM with. Made here, once."""
        path = self._folder("hsm") / name
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32).encode())
        return _read_secret(path, f"the HSM's {name}")

    async def _start_missing(self, record: CloudRecord, passphrase: str, progress: Progress) -> None:
        """One look at what runs, in the order in which each needs the one before."""
        alive = {(p.role, p.id) for p in self.processes()}
        if ("hsm", "hsm") not in alive:
            progress("HSM")
            secret = passphrase or self._passphrase(record)
            config = HsmConfig(str(self._folder("hsm")), str(self._hsm_socket), secret, self._hsm_secret("pin"), record.settings)
            await self._start("hsm", "hsm", config)
        if ("kmc", "kmc") not in alive or not self._operates():
            progress("key management center")
            await self._start_kmc(record)
        if ("management", "management") not in alive:
            progress("management platform")
            await self._start_management(record)
        missing = [name for name in self._machines(record) if ("machine", name) not in alive]
        if missing:
            progress(f"{len(missing)} cipher machine{'s' if len(missing) > 1 else ''} with crypto cards")
            await asyncio.gather(*(self._start_machine(record, name) for name in missing))

    @staticmethod
    def _machines(record: CloudRecord) -> list[MachineId]:
        return [MachineId(f"m{n}") for n in range(1, record.machines + 1)]

    async def _start(self, role: str, name: str, config: object) -> bytes:
        log = self._folder("logs") / f"{role}-{name}.log"
        spawned = partial(register, self.run_folder, role, name)
        return await asyncio.to_thread(start_daemon, _command(role), config, log_file=log, spawned=spawned)

    async def _start_kmc(self, record: CloudRecord) -> None:
        # One whose start was interrupted told nobody who the operator is; one that outlived a clock set back has to say it again.
        await _end([p for p in self.processes() if p.role == "kmc"])
        folder = self._credentials("operator")
        try:
            key_pem = (folder / "key.pem").read_bytes()
        except FileNotFoundError:
            key_pem = key_to_pem(new_key())
        csr = make_request(_load_key(key_pem), Identity(Role.OPERATOR, "operator"))
        address = f"127.{record.network}.0.1:{PORT}"
        config = KmcConfig(str(self._folder("kmc")), address, str(self._hsm_socket), self._hsm_secret("pin"), csr, record.settings)
        ready = codec.decode(await self._start("kmc", "kmc", config), KmcReady)
        Credentials(key_pem, ready.operator.chain, ready.operator.trust).save(folder)

    async def _start_management(self, record: CloudRecord) -> None:
        credentials = await self._certify(Role.MANAGEMENT, "management", f"127.{record.network}.0.2")
        await self._start(
            "management",
            "management",
            ManagementConfig(
                str(self._folder("management")),
                f"127.{record.network}.0.2:{PORT}",
                credentials,
                self.kmc_url,
                record.isolation,
                record.network,
                record.settings,
            ),
        )

    async def _start_machine(self, record: CloudRecord, name: MachineId) -> None:
        address = f"127.{record.network}.1.{name[1:]}"
        credentials = await self._certify(Role.MACHINE, name, address)
        config = MachineConfig(
            id=name,
            state=str(self._folder("machines") / name),
            address=f"{address}:{PORT}",
            credentials=credentials,
            kmc_url=self.kmc_url,
            run_folder=str(self.run_folder),
            isolation=record.isolation,
            settings=record.settings,
        )
        await self._start("machine", name, config)
        async with self.management() as management:
            await management.call("PUT", f"/v1/machines/{name}", MachineRegistration(f"https://{address}:{PORT}"))

    async def _certify(self, role: Role, name: str, address: str) -> Credentials:
        """The certificate of a platform process, renewed here when a third of its life or less is left, or it is not valid yet."""
        folder = self._credentials(name)
        with suppress(FileNotFoundError, CipherfleetError):
            credentials = Credentials.load(folder)
            if credentials.left() > self.record.settings.process_certificate_days * 86400 / 3:
                return credentials
        key = new_key()
        request = CertificateRequest(make_request(key, Identity(role, name)), (address,))
        async with self.kmc() as kmc:
            chain = await kmc.call("POST", f"/v1/certificates/{role}/{name}", request, reply=Chain)
        credentials = Credentials(key_to_pem(key), chain.chain, chain.trust)
        credentials.save(folder)
        return credentials

    # -- folders -------------------------------------------------------------------------------------------------------

    @property
    def _hsm_socket(self) -> Path:
        return self._folder("hsm") / "hsm.sock"

    def _folder(self, name: str) -> Path:
        path = self.state / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def _credentials(self, name: str) -> Path:
        return self._folder("credentials") / name

    def _operates(self) -> bool:
        """Whether the operator has a certificate that is valid now."""
        with suppress(FileNotFoundError, CipherfleetError):
            return Credentials.load(self._credentials("operator")).left() > 0
        return False

    def _operator(self) -> Credentials:
        try:
            return Credentials.load(self._credentials("operator"))
        except FileNotFoundError as exc:
            raise NotRunning(f"there is no operator of a cloud in {self.state}") from exc

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """The seam for the file system's own faults."""
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.run_folder.mkdir(mode=0o700, exist_ok=True)
            if not os.access(self.state, os.W_OK):
                raise StateNotWritable(f"{self.state} is not writable", "choose another folder with --state")
            yield
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                raise DiskFull(f"no space left for {self.state}") from exc
            raise StateNotWritable(f"cannot write {self.state}: {exc.strerror}", "choose another folder with --state") from exc

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One ``up`` or ``down`` at a time."""
        with (self.state / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _command(role: str) -> list[str]:
    return [sys.executable, "-m", "cipherfleet.app.roles", role]


def _read_secret(path: Path, what: str) -> str:
    """Raises ``FileProblem``, also for a file that others than its owner may read; a descriptor (``/dev/fd/N``) was opened by its owner."""
    try:
        with path.open() as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise FileProblem(f"{what} in {path} is open to others than its owner (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}")
            return file.read().strip()
    except OSError as exc:
        raise FileProblem(f"cannot read {what} from {path}: {exc.strerror}") from exc


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FileProblem("the operator's key is not an EC key")
    return key


async def _until(seconds: float, what: str) -> AsyncIterator[None]:
    """Ticks of 50 ms until ``seconds`` have passed. Raises ``TimedOut``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        await asyncio.sleep(0.05)
    raise TimedOut(f"waited {seconds:.0f} s for {what}")


async def _end(entries: list[ProcessEntry]) -> None:
    """SIGTERM, then SIGKILL, for exactly these processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for entry in entries:
            if entry.alive:
                with suppress(ProcessLookupError):
                    os.kill(entry.pid, number)
        end = time.monotonic() + SHUTDOWN_S
        while time.monotonic() < end and any(e.alive for e in entries):
            await asyncio.sleep(0.02)
    for entry in entries:
        with suppress(ChildProcessError):
            os.waitpid(entry.pid, os.WNOHANG)


@asynccontextmanager
async def temporary_cloud(folder: Path, **options: object) -> AsyncIterator[Cloud]:
    """A cloud that is gone when the block ends, whatever happens."""
    cloud = Cloud(folder)
    try:
        await cloud.up(**options)  # type: ignore[arg-type]
        yield cloud
    finally:
        await cloud.down()
