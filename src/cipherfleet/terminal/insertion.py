"""What one insertion of the Ukey knows: which VCMs there are, what was asked for, and how it goes."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import msgspec

from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import (
    AlreadyRunning,
    CertificateExpired,
    CertificateRevoked,
    CipherfleetError,
    ConsumerUnknown,
    Exists,
    Forbidden,
    StatementForged,
    Tampered,
)
from cipherfleet.contract.flow import FlowStep, ServiceFlow
from cipherfleet.contract.ids import CardId, VcmId
from cipherfleet.contract.kmc_api import DownloadSignal
from cipherfleet.contract.lifecycle import TraceEntry
from cipherfleet.contract.settings import Settings
from cipherfleet.terminal.link import Link
from cipherfleet.terminal.ukey import Ukey

MAX_WAITING = 64
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.5, 15.0

TAKEN_OVER = (AlreadyRunning, Exists)
"""Another terminal is there instead of us: our goodbye must not end its service."""

FINAL = (
    *TAKEN_OVER,
    CertificateExpired,
    CertificateRevoked,
    ConsumerUnknown,
    Forbidden,
    StatementForged,
    Tampered,
)
"""What asking again does not mend."""


class Event(msgspec.Struct, frozen=True):
    """One line of progress: ``step`` is what happened, ``at`` unix seconds. Never holds a secret."""

    step: str
    at: float
    vcm: str = ""
    detail: str = ""


class ServiceInfo(msgspec.Struct, frozen=True):
    """The service as it is on."""

    consumer: str
    vcm: VcmId
    endpoint: str
    trace: tuple[TraceEntry, ...]


class Service:
    """One VCM at the terminal. ``flow`` is ``None`` for one that served before this agent came: nothing is released to it."""

    def __init__(self, vcm: VcmId, endpoint: str, flow: ServiceFlow | None) -> None:
        self.vcm, self.endpoint, self.flow = vcm, endpoint, flow
        self.card: CardId | None = None  # whose leases are signed
        self.logged_in = self.on = False
        self.heard = time.monotonic()
        self.login: asyncio.Task[None] | None = None

    def reach(self, step: FlowStep) -> None:
        if self.flow is not None:
            self.flow.reach(step)


class Insertion:
    """The state that both channels' handlers share. ``served``: whether the service was on since the terminal started."""

    calls: Caller  # to the KMC
    kmc: Link
    management: Link

    def __init__(
        self,
        ukey: Ukey,
        settings: Settings,
        *,
        progress: Callable[[Event], None],
        service_on: Callable[[ServiceInfo], None],
        served: bool,
    ) -> None:
        self.ukey, self.settings, self.service_on, self.served = ukey, settings, service_on, served
        self.consumer = ukey.record.consumer
        self.services: dict[VcmId, Service] = {}
        self.asked: deque[tuple[ServiceFlow, float]] = deque(maxlen=MAX_WAITING)  # identified, no permit yet
        self.signals: dict[VcmId, tuple[DownloadSignal, float]] = {}  # came before their permit
        self.wanted = True  # a VCM is to be there
        self.polite = True  # say goodbye: not when another terminal took over
        self.cause: tuple[CipherfleetError, float] | None = None  # why this side gave a VCM up
        self.ask_at: float | None = None
        self.logins: set[asyncio.Task[None]] = set()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._retry_s = _FIRST_RETRY_S
        self._progress = progress

    def tell(self, step: str, vcm: str = "", detail: str = "") -> None:
        self._progress(Event(step, time.time(), vcm, detail))

    async def end(self, error: CipherfleetError) -> NoReturn:
        """The service is over, because of ``error``. Never returns: whoever came here does nothing more for the platform."""
        if not self.failure.done():
            self.failure.set_exception(error)
        await asyncio.get_running_loop().create_future()
        raise RuntimeError("nobody wakes this up")

    def start_login(self, service: Service, work: Coroutine[Any, Any, None]) -> None:
        service.login = asyncio.create_task(work)
        self.logins.add(service.login)
        service.login.add_done_callback(self.logins.discard)

    def drop(self, service: Service) -> None:
        """Nothing is signed for this VCM from now on."""
        self.services.pop(service.vcm, None)
        if service.login is not None and service.login is not asyncio.current_task():
            service.login.cancel()

    def ask_later(self, delay: float | None = None) -> None:
        """Ask for service again in ``delay`` seconds; without it, a little later every time."""
        if delay is None:
            delay, self._retry_s = self._retry_s, min(2 * self._retry_s, _LONGEST_RETRY_S)
        self.ask_at = time.monotonic() + delay

    def is_on(self) -> None:
        """The service is on: forget what went wrong on the way."""
        self.served, self.cause, self.ask_at, self._retry_s = True, None, None, _FIRST_RETRY_S
