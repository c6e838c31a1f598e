"""The agent: it lives the service flow with the platform while the Ukey is in, and ends it when the Ukey goes.

One ``Agent`` is one insertion. It signs with the Ukey only what it can account for: its own consumer's identity requests,
logins, and leases for a card that it released the CMK to, or that proved to hold the Ukey's share.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import Any

from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import ServiceUnavailable, StatementForged, Tampered, UkeyRevoked
from cipherfleet.contract.kmc_api import KmcToTerminal, UkeyRemoved
from cipherfleet.contract.management_api import Inserted, ManagementToTerminal, Removed
from cipherfleet.contract.settings import Settings
from cipherfleet.terminal.callers import kmc_caller, management_caller
from cipherfleet.terminal.catch_up import catch_up
from cipherfleet.terminal.insertion import Event, Insertion, ServiceInfo
from cipherfleet.terminal.link import Link
from cipherfleet.terminal.release import KeyRelease
from cipherfleet.terminal.requests import Requests
from cipherfleet.terminal.ukey import Ukey

GOODBYE_S = 0.5
PATROL_S = 0.25
REASK_S = 5.0
"""How long a request for service may go unanswered before it is made again."""


class Ended(StrEnum):
    REMOVED = "removed"
    STOPPED = "stopped"


class Agent:
    """One insertion of ``ukey``, which the caller opened and will close."""

    def __init__(
        self,
        ukey: Ukey,
        settings: Settings,
        *,
        progress: Callable[[Event], None],
        service_on: Callable[[ServiceInfo], None],
        served_before: bool = False,
    ) -> None:
        self._state = Insertion(ukey, settings, progress=progress, service_on=service_on, served=served_before)
        self._release = KeyRelease(self._state)
        self._requests = Requests(self._state, self._release)

    async def run(self, stop: asyncio.Event) -> Ended:
        """Until the Ukey is removed or ``stop`` is set; either way the service is off then. Raises what ended it otherwise."""
        state = self._state
        async with kmc_caller(state.ukey) as kmc, management_caller(state.ukey) as management:
            state.calls = kmc
            state.kmc = Link(
                kmc,
                lambda: f"/v1/terminal?since={state.ukey.memory.seen.sequence}",
                KmcToTerminal,
                hello=self._hello_kmc,
                receive=self._release.receive,
                lost=lambda why: state.tell("kmc-lost", detail=why),
                prepare=lambda: self._catch_up(kmc),
            )
            state.management = Link(
                management,
                lambda: "/v1/terminal",
                ManagementToTerminal,
                hello=self._hello_management,
                receive=self._requests.receive,
                lost=lambda why: state.tell("management-lost", detail=why),
            )
            waits: list[asyncio.Future[Any]] = [
                state.failure,
                *map(asyncio.ensure_future, (state.kmc.keep(), self._keep_management(), self._patrol())),
                *map(asyncio.ensure_future, (state.ukey.removed(), stop.wait())),
            ]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set():
                    return Ended.STOPPED
                if not state.ukey.present:  # what failed because the Ukey went is no error of its own
                    return Ended.REMOVED
                for ended in [w for w in waits if w.done()]:
                    ended.result()
                return Ended.REMOVED  # and is back already: it was out for less than a watch
            finally:
                await self._say_goodbye()
                waits += state.logins
                for ending in waits:
                    ending.cancel()
                await asyncio.gather(*waits, return_exceptions=True)

    async def _say_goodbye(self) -> None:
        """The Ukey is out: KMC and management revoke everything at once, each on its own."""
        state = self._state
        kmc, management = ((UkeyRemoved(),), (Removed(),)) if state.polite else ((), ())
        await asyncio.gather(state.kmc.say_goodbye(*kmc, within=GOODBYE_S), state.management.say_goodbye(*management, within=GOODBYE_S))
        state.tell("removed")

    async def _keep_management(self) -> None:
        await self._state.kmc.opened.wait()  # the download signal must find us
        await self._state.management.keep()

    async def _catch_up(self, kmc: Caller) -> None:
        """Before the channel; whether the KMC is there at all, the channel finds out."""
        try:
            with suppress(ServiceUnavailable):  # also of a Ukey that went: whoever watches it ends us
                await catch_up(self._state.ukey, kmc)
        except (Tampered, UkeyRevoked, StatementForged) as exc:
            await self._state.end(exc)

    async def _hello_kmc(self) -> None:
        self._state.tell("kmc-connected")

    async def _hello_management(self) -> None:
        state = self._state
        state.tell("management-connected")
        state.cause = None
        state.asked.clear()  # what the other end began on a connection that was lost, it undoes
        for service in [s for s in state.services.values() if not s.logged_in]:
            state.drop(service)
        if state.wanted:
            await self._ask()
        else:
            await state.management.send(Inserted(wanted=False))

    async def _ask(self) -> None:
        """step a: the Ukey is in, service is wanted. The answer is a creation, or the VCM that serves already."""
        await self._state.management.send(Inserted())
        self._state.tell("inserted")
        self._state.ask_later(REASK_S)

    async def _patrol(self) -> None:
        """What no message would wake us for."""
        state, settings = self._state, self._state.settings
        while True:
            await asyncio.sleep(min(PATROL_S, settings.heartbeat_s))
            now = time.monotonic()
            if not state.served and state.cause is not None and now - state.cause[1] > settings.step_s:
                await state.end(state.cause[0])
            await self._release.expire()
            while state.asked and now - state.asked[0][1] > 4 * settings.step_s:
                state.asked.popleft()
            for service in [s for s in state.services.values() if s.on]:
                if now - service.heard > settings.lease_s + 2 * settings.heartbeat_s:
                    state.drop(service)
                    state.tell("service-lost", service.vcm)
                    state.ask_later(0.0)
            if state.wanted and not state.services and not state.asked and state.ask_at is not None and now >= state.ask_at:
                state.ask_later()
                if await state.management.try_send(Inserted()):
                    state.tell("inserted")
