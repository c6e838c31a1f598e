"""The authentication module: agent of the CA towards the consumers' terminals.

It asks a terminal to prove its Ukey and lets the KMC judge the answer. It keeps one channel per consumer: a second terminal
replaces the first.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from cipherfleet.channel import codec
from cipherfleet.channel.frames import Frames
from cipherfleet.channel.server import Call
from cipherfleet.contract.errors import AlreadyRunning, ChallengeUnknown, CipherfleetError, ErrorBody, ForeignConsumer, UkeyAbsent
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.kmc_api import IdentityReply
from cipherfleet.contract.management_api import (
    FlowFailed,
    IdentityAnswered,
    IdentityWanted,
    Inserted,
    LoggedIn,
    LoginFailed,
    ManagementToTerminal,
    Removed,
    ServiceOffSeen,
    TerminalToManagement,
)
from cipherfleet.contract.statements import IdentityRequest, Purpose, Signed
from cipherfleet.management.authority import Authority
from cipherfleet.management.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

Answer = Callable[[TerminalToManagement], T | None]


class TerminalChannel:
    """One terminal's frames, both ways. Whoever waits for an answer gets ``UkeyAbsent`` when the terminal goes."""

    def __init__(self, consumer: ConsumerId, frames: Frames[TerminalToManagement, ManagementToTerminal]) -> None:
        self.consumer = consumer
        self.inserted = False
        self._frames = frames
        self._closed = False
        self._expected: dict[asyncio.Future[Any], Answer[Any]] = {}

    async def send(self, frame: ManagementToTerminal) -> None:
        """Raises ``UkeyAbsent`` when the terminal is gone."""
        try:
            if self._closed:
                raise ConnectionResetError
            await self._frames.send(frame)
        except (ConnectionError, RuntimeError) as exc:
            raise UkeyAbsent(f"the terminal of {self.consumer} is gone") from exc

    def expect(self, answer: Answer[T]) -> asyncio.Future[T]:
        """The first frame from now on of which ``answer`` makes something. Cancel it when it is no longer wanted."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        future.add_done_callback(self._settled)
        if self._closed:
            future.set_exception(UkeyAbsent(f"the terminal of {self.consumer} is gone"))
        else:
            self._expected[future] = answer
        return future

    def _settled(self, future: asyncio.Future[Any]) -> None:
        self._expected.pop(future, None)
        if not future.cancelled():
            future.exception()  # seen: nobody need wait for it

    def deliver(self, frame: TerminalToManagement) -> None:
        """A frame came. One that nobody waits for is late or out of turn, and has no effect."""
        for future, answer in list(self._expected.items()):
            if future.done():
                continue
            try:
                result = answer(frame)
            except CipherfleetError as exc:
                future.set_exception(exc)
                return
            if result is not None:
                future.set_result(result)
                return
        log.info("a %s of %s came when nobody waited for it", type(frame).__name__, self.consumer)

    def close(self) -> None:
        self._closed = True
        for future in list(self._expected):
            if not future.done():
                future.set_exception(UkeyAbsent(f"the terminal of {self.consumer} is gone"))

    async def end(self, error: CipherfleetError) -> None:
        """Tell the terminal why, and hang up."""
        with contextlib.suppress(CipherfleetError):
            await self.send(FlowFailed(error.code, error.message, error.hint))
        self.close()
        await self._frames.close()


class Presence(Protocol):
    """Who wants to know what becomes of the consumers' Ukeys."""

    def inserted(self, consumer: ConsumerId) -> None: ...

    def removed(self, consumer: ConsumerId) -> None: ...

    def lost(self, consumer: ConsumerId) -> None: ...


class Authentication:
    def __init__(self, authority: Authority, store: Store) -> None:
        self._authority = authority
        self._store = store
        self._channels: dict[ConsumerId, TerminalChannel] = {}
        self._arrived = asyncio.Condition()
        self._farewells: list[asyncio.Task[None]] = []

    def terminal(self, consumer: ConsumerId) -> TerminalChannel | None:
        """The consumer's terminal, if it is connected and its Ukey in."""
        channel = self._channels.get(consumer)
        return channel if channel is not None and channel.inserted else None

    async def wait_terminal(self, consumer: ConsumerId, patience_s: float) -> TerminalChannel:
        """The consumer's terminal; one that just reconnects is waited for. Raises ``UkeyAbsent``."""
        try:
            async with asyncio.timeout(patience_s), self._arrived:
                await self._arrived.wait_for(lambda: self.terminal(consumer) is not None)
        except TimeoutError as exc:
            raise UkeyAbsent(f"the Ukey of {consumer} is not plugged in") from exc
        channel = self.terminal(consumer)
        if channel is None:  # it came and went
            raise UkeyAbsent(f"the Ukey of {consumer} is not plugged in")
        return channel

    async def tell(self, consumer: ConsumerId, frame: ManagementToTerminal) -> None:
        """A frame for the terminal, if there is one to hear it."""
        channel = self.terminal(consumer)
        if channel is not None:
            with contextlib.suppress(UkeyAbsent):
                await channel.send(frame)

    # -- identity ------------------------------------------------------------------------------------------------------

    async def challenge(self, consumer: ConsumerId) -> bytes:
        """A nonce of the CA."""
        return (await self._authority.challenge(consumer)).nonce

    async def prove(self, channel: TerminalChannel, nonce: bytes, purpose: Purpose, vcm: VcmId | None = None) -> Signed:
        """Creation and deletion step 1: the Ukey's signature over the nonce, not judged yet. Raises ``UkeyAbsent``."""
        answered = channel.expect(lambda frame: frame.request if isinstance(frame, IdentityAnswered) else None)
        try:
            await channel.send(IdentityWanted(nonce, purpose, vcm))
            request = await answered
        finally:
            answered.cancel()
        # A look at what was signed keeps an answer to another question from the CA; whether it is signed is the CA's to say.
        statement = codec.decode(request.payload, IdentityRequest, what="the identity request")
        if (statement.nonce, statement.purpose, statement.vcm) != (nonce, purpose, vcm):
            raise ChallengeUnknown("the terminal answered another challenge than the one it was given")
        if statement.consumer != channel.consumer:
            raise ForeignConsumer("the terminal answered for another consumer")
        return request

    async def verify(self, consumer: ConsumerId, request: Signed, purpose: Purpose, vcm: VcmId | None = None) -> IdentityReply:
        """Flow step b, creation and deletion step 2: the CA's word on the answer. Raises what the CA says."""
        reply = await self._authority.verify(request)
        if (reply.consumer, reply.purpose, reply.vcm) != (consumer, purpose, vcm):
            raise ForeignConsumer("the KMC verified another identity than the one that was asked for")
        return reply

    @staticmethod
    def expect_login(channel: TerminalChannel, vcm: VcmId) -> asyncio.Future[bool]:
        """Creation step 8."""

        def answer(frame: TerminalToManagement) -> bool | None:
            if isinstance(frame, LoginFailed) and frame.vcm == vcm:
                raise _reported(frame)
            return True if isinstance(frame, LoggedIn) and frame.vcm == vcm else None

        return channel.expect(answer)

    @staticmethod
    def expect_service_off(channel: TerminalChannel, vcm: VcmId) -> asyncio.Future[bool]:
        """Deletion step 8."""
        return channel.expect(lambda frame: True if isinstance(frame, ServiceOffSeen) and frame.vcm == vcm else None)

    # -- terminals come and go -----------------------------------------------------------------------------------------

    async def serve(self, call: Call, presence: Presence) -> object:
        """A terminal's channel, from its connection to its end. Raises ``ConsumerUnknown``."""
        consumer = call.peer.identity.consumer
        await self._store.domain(consumer)
        frames = await call.frames(TerminalToManagement)
        channel = TerminalChannel(consumer, frames)
        before, self._channels[consumer] = self._channels.get(consumer), channel
        if before is not None:
            # Not waited for: a terminal that hangs must not hinder the one that took over.
            self._farewells.append(asyncio.create_task(before.end(AlreadyRunning(f"another terminal of {consumer} took over"))))
            self._farewells = [task for task in self._farewells if not task.done()]
        gone = False
        try:
            async for frame in frames:
                if isinstance(frame, Removed):
                    gone = True
                    break
                if isinstance(frame, Inserted):
                    await self._insert(channel, presence, wanted=frame.wanted)
                else:
                    channel.deliver(frame)
        except CipherfleetError as exc:
            await channel.end(exc)
        finally:
            channel.close()
            if self._channels.get(consumer) is channel:
                del self._channels[consumer]
                (presence.removed if gone else presence.lost)(consumer)
        await frames.close()
        return frames.response

    async def _insert(self, channel: TerminalChannel, presence: Presence, *, wanted: bool) -> None:
        channel.inserted = True
        if self._channels.get(channel.consumer) is channel:
            if wanted:
                presence.inserted(channel.consumer)
            async with self._arrived:
                self._arrived.notify_all()

    async def close(self) -> None:
        """The platform stops: terminals reconnect when it is back."""
        for channel in list(self._channels.values()):
            channel.close()
        for task in self._farewells:
            task.cancel()
        await asyncio.gather(*self._farewells, return_exceptions=True)


def _reported(frame: LoginFailed) -> CipherfleetError:
    """The error a terminal reports, as the class of its code; its text is bounded, it is the consumer's."""
    return CipherfleetError.from_body(ErrorBody(frame.code, f"the terminal could not log in to {frame.vcm}: {frame.message[:200]}"))
