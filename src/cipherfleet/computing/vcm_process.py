"""A VCM's process: confined first; then a key, its certificate (step e), its server, and the link to the KMC."""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from cipherfleet.channel.certificates import Credentials, key_to_pem, make_request, new_key
from cipherfleet.channel.server import Server
from cipherfleet.computing.card_lease import boottime
from cipherfleet.computing.confinement import confine
from cipherfleet.computing.listening import parse_address
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.computing.vcm import Ending, Vcm
from cipherfleet.computing.vcm_boot import BootChannel, News
from cipherfleet.computing.vcm_config import VcmConfig
from cipherfleet.computing.vcm_kmc import KmcAccess
from cipherfleet.computing.vcm_link import Link
from cipherfleet.contract.errors import CertificateExpired, CipherfleetError
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.machine_api import Isolation, VcmState
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.vcm import VcmHost

log = logging.getLogger(__name__)

RETRY_S = 1.0
LOOK_S = 1.0
JUMP_S = 5.0
"""How far the wall clock may move against ``CLOCK_BOOTTIME`` before the certificate is renewed: by less than it is backdated."""
FAREWELL_S = 0.03
LAST_WORDS_S = 0.15
"""Less than machine and KMC wait for a VCM that ends."""
KEEPALIVE_TIMEOUT_S = 330.0  # applications keep a connection for 300 s
MAX_PER_CERTIFICATE = 1024  # of one application, which may run in many processes

Mount = Callable[[Server, VcmHost], None]


class Confined(NamedTuple):
    """A VCM that has confined itself, and what is in force."""

    configuration: VcmConfig
    isolation: Isolation


def confined(configuration: VcmConfig) -> Confined:
    """First of all, before there is a loop: a loop's io_uring would be a way around seccomp."""
    return Confined(configuration, confine(configuration.confinement, listening=configuration.listening))


async def main(vcm: Confined, ready: Callable[[object], None], stop: asyncio.Event, *, mount: Mount) -> None:
    await run(vcm.configuration, vcm.isolation, ready, stop, mount=mount)


async def run(
    configuration: VcmConfig, isolation: Isolation, ready: Callable[[object], None], stop: asyncio.Event, *, mount: Mount
) -> Ending:
    """A VCM's life, and why it ended. Raises the KMC's refusal to certify it."""
    boot = await BootChannel.open(socket.socket(fileno=configuration.boot))
    card = RingCard(socket.socket(fileno=configuration.vcc))
    listening = socket.socket(fileno=configuration.listening)
    certificate = OwnCertificate(configuration)
    try:
        key, csr = certificate.request()
        certificate.take(key, await boot.certificate(csr))  # step e
        await card.start()
        async with certificate.kmc as kmc:
            vcm = Vcm(
                configuration.id,
                configuration.consumer,
                configuration.card,
                configuration.address,
                card,
                kmc,
                configuration.kmc_signing_key,
                configuration.settings,
            )
            server = certificate.server(vcm)
            mount(server, vcm)
            vcm.opened(server, listening)
            await server.start(listening)
            ready(isolation)

            async def serving() -> None:
                await boot.send(News(VcmState.SERVING))

            ending = await _live(vcm, Link(vcm, server, kmc, configuration.settings.heartbeat_s, serving), certificate, boot, stop, card)
            await boot.send(News(VcmState.FAILED if ending.code else VcmState.DELETED, f"{ending.code}: {ending.message}"))
            return ending
    finally:
        listening.close()
        await card.close()
        boot.close()


async def _live(vcm: Vcm, link: Link, certificate: "OwnCertificate", boot: BootChannel, stop: asyncio.Event, card: RingCard) -> Ending:
    """Until the first thing that ends a VCM; then its keys go, and it says its last words."""

    async def stopped() -> None:
        await stop.wait()
        vcm.end("", "it was told to")

    async def orphaned() -> None:
        await boot.until_closed()
        vcm.end("machine-unavailable", "its machine is gone")

    async def certified() -> None:
        await certificate.keep_fresh()
        vcm.end(CertificateExpired.code, "its certificate is not valid now, and buys no other")

    tasks = [asyncio.create_task(work) for work in (link.run(), certified(), stopped(), orphaned())]
    first: set[asyncio.Future[Any]] = {vcm.ended, *tasks[:2]}
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[:2]:
            if task.done() and task.exception() is not None:
                log.error("a VCM's task ended: %s", type(task.exception()).__name__)
        vcm.end("internal", "something went wrong in the VCM")
    finally:
        await card.close()
        if vcm.ended.done():
            await link.farewell(LAST_WORDS_S)
        for _ in range(2):  # the first time, a channel still says goodbye to the KMC
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=FAREWELL_S)
    return vcm.ended.result()


class OwnCertificate:
    """A VCM's certificate: who its server and its client towards the KMC are, renewed when half of its life is over.

    Half of its life by ``CLOCK_BOOTTIME``; and at once when the wall clock jumps, which the others judge its validity by.
    """

    def __init__(self, configuration: VcmConfig) -> None:
        self._configuration = configuration
        self._identity = Identity(Role.VCM, configuration.id, configuration.consumer)
        self._credentials: Credentials | None = None
        self._renew_at = 0.0
        self._wall_ahead = 0.0
        self._server: Server | None = None
        # The relay knows the way: the address in the URL is a name, nothing is resolved.
        self.kmc = KmcAccess(f"https://{urlsplit(configuration.kmc_url).netloc}", configuration.relay)

    def request(self) -> tuple[bytes, bytes]:
        """A new key (PEM), and the request for it (PKCS#10, DER)."""
        key = new_key()
        return key_to_pem(key), make_request(key, self._identity)

    def take(self, key: bytes, chain: Chain) -> None:
        """The server trusts the consumer's own CA alone, the client towards the KMC the root."""
        self._credentials = Credentials(key, chain.chain, chain.trust)
        wall, now = time.time(), boottime()
        self._renew_at = now + (self._credentials.not_after - wall) / 2
        self._wall_ahead = wall - now
        self.kmc.use(Credentials(key, chain.chain, self._configuration.root))
        if self._server is not None:
            self._server.renew(self._credentials)

    def server(self, vcm: Vcm) -> Server:
        assert self._credentials is not None  # noqa: S101 - take() came first
        self._server = Server(
            self._credentials,
            minimum=ssl.TLSVersion.TLSv1_2,
            check_peer=vcm.check_peer,
            keepalive_timeout=KEEPALIVE_TIMEOUT_S,
            max_per_certificate=MAX_PER_CERTIFICATE,
        )
        return self._server

    async def keep_fresh(self) -> None:
        """Renew, until the certificate is not valid now and none can be had with it: then a new VCM can, this one cannot."""
        while True:
            left = self._renew_at - boottime()
            jumped = abs(time.time() - boottime() - self._wall_ahead) > JUMP_S
            if left > 0 and not jumped:
                await asyncio.sleep(min(left, LOOK_S))
                continue
            try:
                await self.renew()
            except CipherfleetError as exc:
                log.warning("the certificate is not renewed yet: %s", exc.code)
                if self._credentials is not None and not self._credentials.left():
                    return
                await asyncio.sleep(RETRY_S)

    async def renew(self) -> None:
        """A new key, a new certificate. Raises what the KMC says."""
        key, csr = self.request()
        addresses = (parse_address(self._configuration.address)[0],)
        self.take(key, await self.kmc.call("POST", "/v1/certificate", CertificateRequest(csr, addresses), reply=Chain))
