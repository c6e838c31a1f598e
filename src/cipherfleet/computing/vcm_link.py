"""A VCM's link to the KMC: the CMK comes in over it, leases are asked for and granted, and revocation arrives.

Event driven: every heartbeat a fresh nonce of the card goes out. The link is made anew when it breaks, for as long as the
lease lives; nothing but a lease keeps a VCM alive.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from cipherfleet.channel import codec
from cipherfleet.channel.frames import Frames
from cipherfleet.channel.server import Server
from cipherfleet.computing.vcm import Vcm
from cipherfleet.computing.vcm_kmc import KmcAccess
from cipherfleet.contract.errors import CipherfleetError, EscrowRolledBack, ServiceUnavailable, Tampered
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.kmc_api import (
    CardReady,
    CertificatesRevoked,
    CmkDelivered,
    CmkLoaded,
    CmkRefused,
    EscrowChanged,
    KmcToVcm,
    LastUses,
    LeaseGranted,
    LeaseWanted,
    Revoked,
    Serving,
)
from cipherfleet.contract.vcc import CardDescription, CmkDelivery, LeaseState, Operation

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
LOOK_AGAIN_S = 0.01

Channel = Frames[Any, Any]


class Link:
    """``on_serving`` is awaited once, when the VCM serves (step h)."""

    def __init__(self, vcm: Vcm, server: Server, kmc: KmcAccess, heartbeat_s: float, on_serving: Callable[[], Awaitable[None]]) -> None:
        self._vcm, self._server, self._kmc, self._heartbeat_s, self._on_serving = vcm, server, kmc, heartbeat_s, on_serving
        self._channel: Channel | None = None
        self._loaded = asyncio.Event()
        self._connected = asyncio.Event()
        self._expires_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._starting: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()  # a look at the escrow
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        vcm.remaining = self.remaining

    def remaining(self) -> float:
        return max(0.0, self._expires_at - time.clock_gettime(time.CLOCK_BOOTTIME))

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._stay_connected())
                group.create_task(self._keep_lease())
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def farewell(self, within_s: float) -> None:
        """What was done with data and not told yet goes out over the channel, if there is one. Raises nothing."""
        channel = self._channel
        if channel is None:
            return
        try:
            async with asyncio.timeout(within_s):
                for report in self._vcm.data_audit.last_words():
                    await channel.send(LastUses(report))
        except (OSError, TimeoutError):
            log.warning("the last uses of keys could not be told")

    # -- the connection ------------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                async with self._kmc.frames("/v1/vcm", KmcToVcm) as channel:
                    pause = FIRST_PAUSE_S
                    await self._greet(channel)
                    async for frame in channel:
                        await self._receive(channel, frame)
            except (CipherfleetError, OSError) as exc:
                log.info("the channel to the KMC: %s", getattr(exc, "code", type(exc).__name__))
            finally:
                self._channel = None
                self._connected.clear()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _greet(self, channel: Channel) -> None:
        """step e: the vCC is up. After a break: what was reached before."""
        await channel.send(CardReady(self._vcm.card_id))
        if self._loaded.is_set():
            await channel.send(CmkLoaded())
        if self._vcm.serving:
            await channel.send(Serving())
            self._refresh_soon()  # changes may have passed unheard
        self._channel = channel
        self._connected.set()

    async def _receive(self, channel: Channel, frame: KmcToVcm) -> None:
        match frame:
            case CmkDelivered(wrapped_hsm_share, sealed_ukey_share):
                await self._load_cmk(channel, CmkDelivery(wrapped_hsm_share, sealed_ukey_share))
            case LeaseGranted(lease):
                await self._take_lease(codec.encode(lease))
            case EscrowChanged(sequence):
                seen = self._vcm.escrow.seen
                if seen is not None and sequence > seen.sequence:
                    self._refresh_soon()
            case CertificatesRevoked(serials):
                self._server.revoke(serials)
            case Revoked(reason):
                self._vcm.end("service-off", reason)

    # -- CMK and lease -------------------------------------------------------------------------------------------------

    async def _load_cmk(self, channel: Channel, delivery: CmkDelivery) -> None:
        """step f: both shares go into the card."""
        try:
            await self._vcm.card.submit(Operation.LOAD_CMK, parameters=codec.encode(delivery))
        except CipherfleetError as exc:
            log.warning("the card refused the CMK: %s", exc.code)
            await channel.send(CmkRefused(exc.code, exc.message))
            return
        await channel.send(CmkLoaded())
        self._loaded.set()

    async def _keep_lease(self) -> None:
        await self._loaded.wait()
        while True:
            await self._connected.wait()
            asked = time.monotonic()
            try:
                nonce = (await self._vcm.card.submit(Operation.LEASE_NONCE)).data
                channel = self._channel
                if channel is not None:
                    await channel.send(LeaseWanted(self._vcm.card_id, nonce))
            except (CipherfleetError, OSError) as exc:
                log.info("a lease could not be asked for: %s", getattr(exc, "code", type(exc).__name__))
            await asyncio.sleep(max(0.0, asked + self._heartbeat_s - time.monotonic()))

    async def _take_lease(self, lease: bytes) -> None:
        try:
            done = await self._vcm.card.submit(Operation.LEASE, parameters=lease)
        except CipherfleetError as exc:
            log.warning("the card refused a lease: %s", exc.code)
            return
        state = codec.decode(done.parameters, LeaseState, what="the lease's state")
        self._expires_at = state.expires_at
        self._vcm.keys.policy = state.policy
        self._watch()
        try:
            self._vcm.escrow.pin(Seen(state.epoch, state.sequence, state.head))
        except EscrowRolledBack as exc:
            self._vcm.end(exc.code, exc.message)
            return
        if self._vcm.escrow.behind:
            self._refresh_soon()
        if self._starting is None:
            self._starting = self._spawn(self._start_serving())

    def _watch(self) -> None:
        """When this lease's time is over, ask the card whether it is."""
        if self._timer is not None:
            self._timer.cancel()
        wait = max(self.remaining(), LOOK_AGAIN_S)
        self._timer = asyncio.get_running_loop().call_later(wait, lambda: self._spawn(self._look()))

    async def _look(self) -> None:
        if not (await self._describe()).serving:
            self._vcm.end("lease-expired", "the Ukey was not seen within the lease")
        else:
            self._watch()

    async def _describe(self) -> CardDescription:
        done = await self._vcm.card.submit(Operation.DESCRIBE)
        return codec.decode(done.parameters, CardDescription, what="the card's description")

    # -- the escrow ----------------------------------------------------------------------------------------------------

    async def _start_serving(self) -> None:
        """step g: the consumer's keys; step h: the VCM serves."""
        try:
            card = await self._describe()
            while True:
                try:
                    await self._vcm.escrow.load(Seen(card.epoch, card.sequence, card.head), card.kmc_signing_key)
                    break
                except ServiceUnavailable as exc:
                    log.info("the escrow's view: %s", exc.code)
                    await asyncio.sleep(FIRST_PAUSE_S)
        except CipherfleetError as exc:
            if self._channel is not None:
                await self._channel.send(CmkRefused(exc.code, exc.message))
            self._vcm.end(exc.code, exc.message)
            return
        self._vcm.serving = not self._vcm.ended.done()
        if self._channel is not None:
            await self._channel.send(Serving())
        await self._on_serving()
        self._spawn(self._vcm.chores.run())
        self._spawn(self._vcm.data_audit.run())
        try:
            await self._vcm.keys.sweep()
        except Tampered as exc:
            self._vcm.end(exc.code, exc.message)

    def _refresh_soon(self) -> None:
        """See what is there now, and go on until it was seen."""
        self._wanted.set()
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = self._spawn(self._refresh())

    async def _refresh(self) -> None:
        pause = FIRST_PAUSE_S
        while self._wanted.is_set():
            self._wanted.clear()
            try:
                await self._vcm.keys.refresh()
            except EscrowRolledBack as exc:
                self._vcm.end(exc.code, exc.message)
                return
            except CipherfleetError as exc:
                log.warning("the escrow changed: %s: %s", exc.code, exc.message)
                self._wanted.set()
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                pause = FIRST_PAUSE_S

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except (CipherfleetError, OSError) as exc:
                log.warning("%s", getattr(exc, "code", type(exc).__name__))

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
