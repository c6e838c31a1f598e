"""Who of a consumer is connected and what holds meanwhile: terminal, ciphertext CMK, VCMs, their lease nonces.

A session lives from the first channel until service is revoked: by the terminal (Ukey removed), by the management platform,
or when the terminal is gone, or a lease stays unsigned, for as long as a lease lasts (monotonic clock).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine

from cipherfleet.contract.errors import CipherfleetError, HsmUnavailable
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.kmc_api import KmcToTerminal, KmcToVcm, Revoked, TerminalRefused
from cipherfleet.kmc import store
from cipherfleet.kmc.channels import Channel
from cipherfleet.kmc.leases import Nonces

log = logging.getLogger(__name__)

RETRY_S = 0.2
LAST_WORDS_S = 0.25
"""How long a VCM that was revoked may still say what was done with data: nothing else is heard from it."""
MAX_LEASES_WANTED = 16
"""How many leases a VCM may want within one heartbeat; what is more is not passed on to its terminal."""

TerminalChannel = Channel[KmcToTerminal]
VcmChannel = Channel[KmcToVcm]


class VcmSession:
    """One VCM as the KMC lives with it. Its card and mark were fixed when it was certified."""

    def __init__(self, vcm: store.Vcm, channel: VcmChannel, certified_until: float) -> None:
        self.id: VcmId = vcm.id
        self.card: CardId = vcm.card
        self.mark = vcm.token.mark
        self.channel: VcmChannel | None = channel
        self.certified_until = certified_until  # loop time: no lease after that
        self.ready = False  # its vCC waits for the CMK
        self.released = vcm.released
        self.loaded = vcm.loaded
        self.serving = vcm.serving
        self.signalled: TerminalChannel | None = None  # the terminal that got this VCM's download signal
        self.sealed_share = b""  # what only the card can open
        self.delivered: VcmChannel | None = None  # where the CMK went, or is going: once per channel
        self.granted = False
        self.nonces = Nonces()
        self._wanted_since, self._wanted = 0.0, 0

    def post(self, frame: KmcToVcm) -> None:
        if self.channel is not None:
            self.channel.post(frame)

    def may_want(self, now: float, heartbeat_s: float) -> bool:
        """Whether this VCM wants leases no faster than it should."""
        if now - self._wanted_since > heartbeat_s:
            self._wanted_since, self._wanted = now, 0
        self._wanted += 1
        return self._wanted <= MAX_LEASES_WANTED


class ConsumerSession:
    """All of one consumer. ``told``: up to where the terminal has been told of the escrow's log.

    ``ukey`` is the Ukey that signs the leases: the terminal's; empty while it is not known which of several that is.
    """

    def __init__(self, consumer: ConsumerId, ukey: bytes, now: float) -> None:
        self.consumer, self.ukey = consumer, ukey
        self.terminal: TerminalChannel | None = None
        self.told = 0
        self.audit_told = 0  # up to where this terminal has been told of the audit log's seals
        self.lost_at: float | None = now  # since when there has been no terminal
        self.wanted_at: float | None = None  # the oldest lease that was wanted since the Ukey last signed one
        self.timer: asyncio.TimerHandle | None = None
        self.vcms: dict[VcmId, VcmSession] = {}
        self.ciphertext_cmk = bytearray()
        self.closed = False

    @property
    def actor(self) -> str:
        return f"terminal of {self.consumer}"

    def deadline(self, lease_s: float) -> float | None:
        """When service is revoked unless the Ukey shows up (loop time)."""
        since = [moment for moment in (self.lost_at, self.wanted_at) if moment is not None]
        return min(since) + lease_s if since else None

    def lives(self, vcm: VcmSession) -> bool:
        """Whether neither the consumer's service nor this VCM was revoked: asked again after every wait."""
        return not self.closed and self.vcms.get(vcm.id) is vcm

    def tell_vcms(self, frame: KmcToVcm, *, but: VcmId | None = None) -> None:
        for vcm in self.vcms.values():
            if vcm.id != but:
                vcm.post(frame)

    def refuse_terminal(self, code: str, message: str) -> None:
        if self.terminal is not None:
            self.terminal.post(TerminalRefused(code, message))
            self.terminal.finish()

    def forget_cmk(self) -> None:
        self.ciphertext_cmk[:] = bytes(len(self.ciphertext_cmk))
        self.ciphertext_cmk.clear()

    def remove(self, vcm: VcmSession, reason: str) -> VcmChannel | None:
        """One VCM goes, and with the last one the ciphertext CMK; the channel that is closing."""
        self.vcms.pop(vcm.id, None)
        vcm.sealed_share = b""
        if not self.vcms:
            self.forget_cmk()
        if vcm.channel is not None:
            vcm.channel.post(Revoked(reason))
            vcm.channel.finish(LAST_WORDS_S)
        return vcm.channel

    def close(self, reason: str) -> "list[TerminalChannel | VcmChannel]":
        """Forget what the lease allowed to hold, say farewell to all; the channels that are closing."""
        self.closed = True
        if self.timer is not None:
            self.timer.cancel()
        self.forget_cmk()
        closing: list[TerminalChannel | VcmChannel] = []
        for vcm in list(self.vcms.values()):
            channel = self.remove(vcm, reason)
            if channel is not None:
                closing.append(channel)
        if self.terminal is not None:
            self.terminal.finish()
            closing.append(self.terminal)
            self.terminal = None
        return closing


class Sessions:
    """All sessions, their timers, and the work that goes on behind them. ``on_expired`` is called when a deadline passes."""

    def __init__(self, lease_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.on_expired: Callable[[ConsumerSession], None] = lambda session: None
        self._lease_s = lease_s
        self._sessions: dict[ConsumerId, ConsumerSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def get(self, consumer: ConsumerId) -> ConsumerSession | None:
        return self._sessions.get(consumer)

    def open(self, consumer: store.Consumer) -> ConsumerSession:
        """The consumer's session, begun if there is none."""
        session = self._sessions.get(consumer.name)
        if session is None:
            session = self._sessions[consumer.name] = ConsumerSession(
                consumer.name, consumer.ukey_keys[0] if len(consumer.ukeys) == 1 else b"", self.loop.time()
            )
            self.watch(session)
        return session

    def pop(self, consumer: ConsumerId) -> ConsumerSession | None:
        return self._sessions.pop(consumer, None)

    def owner_of(self, vcm: VcmId) -> ConsumerId | None:
        """Whose session holds this VCM, if any does."""
        return next((consumer for consumer, session in self._sessions.items() if vcm in session.vcms), None)

    def watch(self, session: ConsumerSession) -> None:
        """Set the timer to the session's deadline."""
        if session.timer is not None:
            session.timer.cancel()
            session.timer = None
        deadline = session.deadline(self._lease_s)
        if deadline is not None and not session.closed and not self._stopped:
            session.timer = self.loop.call_at(deadline, self.on_expired, session)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """In the background; an error of ours is logged, and another's would be a defect."""

        async def guarded() -> None:
            try:
                await work
            except CipherfleetError as exc:
                log.warning("%s: %s", exc.code, exc.message)

        task = self.loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def persist(self, session: ConsumerSession, act: Callable[[], Coroutine[None, None, None]]) -> None:
        """In the background; again and again while the HSM is away, as long as the session lives."""

        async def persistently() -> None:
            while not session.closed:
                try:
                    await act()
                except HsmUnavailable:
                    await asyncio.sleep(RETRY_S)
                else:
                    break

        self.spawn(persistently())

    async def stop(self) -> None:
        """No deadline passes and nothing is sent any more; who is connected finds out from the connection."""
        self._stopped = True
        for session in self._sessions.values():
            if session.timer is not None:
                session.timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
