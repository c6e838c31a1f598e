"""The two processes of this room: the HSM, and the KMC that stands on it."""

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cipherfleet.channel.certificates import Credentials, key_to_pem, make_request, new_key
from cipherfleet.channel.process import protect
from cipherfleet.contract.errors import AlreadyRunning, CipherfleetError, HsmUnavailable, Malformed, StateNotWritable
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.settings import Settings
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.embedded_hsm import EmbeddedHsm, lock_all_memory
from cipherfleet.kmc.enrolment import OPERATOR, Enrolment
from cipherfleet.kmc.escrow import Escrow
from cipherfleet.kmc.hsm_client import HsmClient
from cipherfleet.kmc.hsm_server import HsmServer
from cipherfleet.kmc.schema import FILE, MIGRATIONS
from cipherfleet.kmc.server import KmcServer
from cipherfleet.state.database import Database

log = logging.getLogger(__name__)

KMC = Identity(Role.KMC, "kmc")
HSM_WAIT_S = 10.0
UPKEEP_S = 60.0
"""How often the KMC looks whether its certificate needs renewal."""


class HsmConfig(msgspec.Struct, frozen=True):
    """``socket``: path of the unix socket to serve on. ``pin``: what every connection to it must log in with."""

    state: str
    socket: str
    passphrase: str
    pin: str
    settings: Settings = Settings()

    def __repr__(self) -> str:
        return f"HsmConfig({self.state})"


class KmcConfig(msgspec.Struct, frozen=True):
    """``operator_csr``: who starts the KMC is the operator."""

    state: str
    address: str
    hsm_socket: str
    hsm_pin: str
    operator_csr: bytes
    settings: Settings = Settings()

    def __repr__(self) -> str:
        return f"KmcConfig({self.state})"


class KmcReady(msgspec.Struct, frozen=True):
    url: str
    operator: Chain
    root: bytes


async def hsm_main(configuration: HsmConfig, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    """The embedded HSM until ``stop``. Raises ``PassphraseWrong``, ``AlreadyRunning``, ``StateNewer``, ``StateNotWritable``."""
    protect()
    if not lock_all_memory():
        log.info("memory is not locked (no right to): only single pages of keys are")
    with only_one(Path(configuration.state), "an HSM"):
        hsm = EmbeddedHsm.open(Path(configuration.state), configuration.passphrase, configuration.settings)
        server = HsmServer(hsm, Path(configuration.socket), configuration.pin)
        try:
            await server.start()
            ready(None)
            await stop.wait()
        finally:
            await server.stop()
            hsm.close()


async def kmc_main(configuration: KmcConfig, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    """The KMC until ``stop``. Raises what hinders it: ``HsmUnavailable``, ``StateNewer``, ``StateNotWritable``, ``PortTaken``, ..."""
    protect()
    host, port = parse_address(configuration.address)
    with only_one(Path(configuration.state), "a KMC"):
        database = await asyncio.to_thread(Database.open, Path(configuration.state), FILE, MIGRATIONS)
        hsm = HsmClient(Path(configuration.hsm_socket), configuration.hsm_pin)
        try:
            await _wait_for(hsm)
            center = await Center.open(database, hsm, configuration.settings)
            await _serve(center, configuration.operator_csr, host, port, ready, stop)
        finally:
            await hsm.close()
            await database.close()


async def _serve(center: Center, operator_csr: bytes, host: str, port: int, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    enrolment = Enrolment(center, Escrow(center))
    kmc = KmcServer(center, await own_credentials(enrolment, center, host))
    await kmc.service.start()
    try:
        host, port = await kmc.server.start((host, port))
        operator = await enrolment.issue_platform(OPERATOR, CertificateRequest(operator_csr), actor=KMC.uri, alone=True)
        ready(KmcReady(f"https://{host}:{port}", center.certification.chain(operator), center.certification.root_pem))
        upkeep = asyncio.create_task(_upkeep(kmc, enrolment, host))
        await stop.wait()
        upkeep.cancel()
        await asyncio.gather(upkeep, return_exceptions=True)
    finally:
        await kmc.service.stop()
        await kmc.server.stop()


async def own_credentials(enrolment: Enrolment, center: Center, host: str) -> Credentials:
    """A new key, which stays in memory, and a certificate for it; older ones are revoked."""
    key = new_key()
    request = CertificateRequest(make_request(key, KMC), (host,))
    issued = await enrolment.issue_platform(KMC, request, actor=KMC.uri, alone=True)
    chain = center.certification.chain(issued)
    return Credentials(key_to_pem(key), chain.chain, chain.trust)


async def _upkeep(kmc: KmcServer, enrolment: Enrolment, host: str, *, every: float = UPKEEP_S) -> None:
    """The KMC's own certificate is renewed when a third of its life is left."""
    center = kmc.center
    while True:
        await asyncio.sleep(every)
        now = center.wall_clock()
        try:
            await center.forget_expired(now)
        except CipherfleetError as exc:
            log.warning("old certificates are kept: %s", exc.code)
        if any(own.not_after - now > center.settings.process_certificate_days * 86400 / 3 for own in center.registry.active(KMC)):
            continue
        try:
            kmc.server.renew(await own_credentials(enrolment, center, host))
        except CipherfleetError as exc:
            log.warning("the KMC's certificate could not be renewed yet: %s", exc.code)


async def _wait_for(hsm: HsmClient) -> None:
    """An HSM that is just starting is waited for, a moment. Raises ``HsmUnavailable``."""
    end = asyncio.get_running_loop().time() + HSM_WAIT_S
    while True:
        try:
            await hsm.mechanisms()
        except HsmUnavailable:
            if asyncio.get_running_loop().time() > end:
                raise
            await asyncio.sleep(0.1)
        else:
            return


def parse_address(address: str) -> tuple[str, int]:
    """``host:port``. Raises ``Malformed``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Malformed(f"{address[:100]!r} is not host:port")
    return host, int(port)


@contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Two processes on one state would undo each other's writes. Raises ``AlreadyRunning`` or ``StateNotWritable``."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StateNotWritable(f"cannot write {folder}: {exc.strerror}", "check the folder's owner and mode") from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise AlreadyRunning(f"{what} runs on {folder} already") from exc
        yield
    finally:
        os.close(descriptor)
