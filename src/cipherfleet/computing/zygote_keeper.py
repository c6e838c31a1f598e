"""The machine's side of its zygote: starts it when it is needed, orders children from it, and hears how they end."""

import asyncio
import itertools
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress

from cipherfleet.channel import codec
from cipherfleet.computing.zygote import MESSAGE_BYTES, ForkNotice, ForkOrder
from cipherfleet.contract.errors import CipherfleetError, Internal, IsolationUnavailable

CLOSE_S = 2.0


class Forked:
    """A child of the zygote. ``descriptor``: its pidfd, open until it has ended."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid, self.descriptor = pid, descriptor
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        """Until it is gone; its exit status, -1 when nobody knows."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        if self.descriptor >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)

    def ended(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)
            os.close(self.descriptor)
            self.descriptor = -1

    def orphaned(self) -> None:
        """The zygote is gone, and it with it: this sees when."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(self.descriptor)
            self.ended(-1)

        self.kill()
        loop.add_reader(self.descriptor, gone)


class _Running:
    """One zygote's process."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self.alive = True
        self._process, self._control = process, control
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Forked]] = {}
        self._children: dict[int, Forked] = {}
        asyncio.get_running_loop().add_reader(control, self._hear)

    @classmethod
    async def start(cls, command: Sequence[str], environment: dict[str, str]) -> "_Running":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=theirs.fileno(), stdout=asyncio.subprocess.DEVNULL, env=environment
                )
            except BaseException:
                ours.close()
                raise
        return cls(process, ours)

    async def fork(self, streams: Sequence[int], descriptors: Sequence[int], probe: Sequence[str]) -> Forked:
        order = ForkOrder(next(self._numbers), tuple(descriptors), tuple(probe))
        asked: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        self._asked[order.number] = asked
        try:
            socket.send_fds(self._control, [codec.encode(order)], [*streams, *descriptors])
            return await asked
        except OSError as exc:
            raise Internal("the zygote does not take an order") from exc
        finally:
            del self._asked[order.number]

    async def close(self) -> None:
        self._lost()
        try:
            await asyncio.wait_for(self._process.wait(), CLOSE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.gather(*(child.wait() for child in list(self._children.values())))

    def _hear(self) -> None:
        try:
            raw, received, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 1)
            if not raw:
                return self._lost()
            notice = codec.decode(raw, ForkNotice, what="the zygote's notice")
        except BlockingIOError:
            return None
        except (OSError, CipherfleetError):
            return self._lost()
        if notice.status is not None:
            if (child := self._children.pop(notice.number, None)) is not None:
                child.ended(notice.status)
            return None
        asked = self._asked.get(notice.number)
        if received:
            child = self._children[notice.number] = Forked(notice.pid, received[0])
            if asked is None or asked.done():
                child.kill()  # nobody waits for it any more
            else:
                asked.set_result(child)
        elif asked is not None and not asked.done():
            asked.set_exception(IsolationUnavailable(f"the zygote cannot start a process: {notice.error}"))
        return None

    def _lost(self) -> None:
        """It ended, or shall: its end of the socket tells it."""
        if not self.alive:
            return
        self.alive = False
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(Internal("the zygote ended"))
        for child in self._children.values():
            child.orphaned()


class ZygoteKeeper:
    """At most one zygote; another one when that has ended."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._command, self._environment = tuple(command), environment
        self._running: _Running | None = None
        self._lock = asyncio.Lock()

    async def fork(self, streams: Sequence[int], descriptors: Sequence[int], *, probe: Sequence[str] = ()) -> Forked:
        """A child with these standard streams and descriptors, the latter under the same numbers. Raises ``IsolationUnavailable`` or
        ``Internal``; nothing is left then."""
        async with self._lock:
            if self._running is None or not self._running.alive:
                await self._close()
                self._running = await _Running.start(self._command, self._environment)
            return await self._running.fork(streams, descriptors, probe)

    async def close(self) -> None:
        """End the zygote, and with it its children."""
        async with self._lock:
            await self._close()

    async def _close(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.close()
