"""A process that has loaded all that a VCM needs, and forks one for each order: a VCM starts fast, and shares its code's memory.

It has one thread, no event loop and no secret. Its standard input is a socket to its machine: an order comes with the child's
standard streams and inherited descriptors, and is answered with the child's pid and a pidfd; later the child's exit status follows.
Every child is in namespaces of its own from its first step on; the zygote's end ends them all.
"""

import ctypes
import fcntl
import gc
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Sequence
from typing import NoReturn

import msgspec

from cipherfleet.channel import codec
from cipherfleet.channel.process import protect, raise_file_limit
from cipherfleet.computing import confinement_root, confinement_seccomp
from cipherfleet.contract.errors import Malformed

MESSAGE_BYTES = 16384
MAX_DESCRIPTORS = 16
_STREAMS = 3
_PR_SET_CHILD_SUBREAPER = 36
_GO = b"g"


class ForkOrder(msgspec.Struct, frozen=True):
    """``descriptors``: under which numbers the child finds those after its streams. ``probe``: only enter the root with these, and end."""

    number: int
    descriptors: tuple[int, ...] = ()
    probe: tuple[str, ...] = ()


class ForkNotice(msgspec.Struct, frozen=True):
    """Of the order ``number``: the child's ``pid`` (comes with a pidfd), or its exit ``status``, or the ``error`` that hindered it."""

    number: int
    pid: int = 0
    status: int | None = None
    error: str = ""


def serve(work: Callable[[], int]) -> int:
    """A zygote's life, and in each child ``work``; the exit status of either. What is not an order ends the zygote."""
    return Zygote().run(work)


class Zygote:
    def __init__(self) -> None:
        self._control = socket.socket(fileno=os.dup(0))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        protect(die_with_parent=True)
        raise_file_limit()
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a child's parent goes at once: the child is ours then
        confinement_seccomp.preload()
        self._children: dict[int, int] = {}  # pid -> number of its order
        self._self = os.pidfd_open(os.getpid())
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # the collector would write to every object, and each child have a copy of its own

    def run(self, work: Callable[[], int]) -> int:
        poll = select.poll()
        for descriptor in (self._woken, self._control.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._woken:
                    os.read(self._woken, 4096)
                    self._reap()
                    continue
                raw, received, flags, _ = socket.recv_fds(self._control, MESSAGE_BYTES, MAX_DESCRIPTORS)
                if not raw:
                    return 0
                order = _checked(raw, received, flags)
                if self._fork(order, received):
                    if order.probe:
                        confinement_root.enter(order.probe, None, "probe")
                        return 0
                    return work()
                for inherited in received:
                    os.close(inherited)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (number := self._children.pop(pid, None)) is not None:
                self._control.send(codec.encode(ForkNotice(number, status=os.waitstatus_to_exitcode(status))))

    def _fork(self, order: ForkOrder, received: list[int]) -> bool:
        """Fork for an order and answer it. True in the child, once it is what it should be."""
        told, tell = os.pipe()
        wait, go = os.pipe()
        first = os.fork()
        if first == 0:
            self._child(order, received, tell, wait)
            return True
        os.close(tell)
        os.close(wait)
        with os.fdopen(told, "rb") as saying:
            said = saying.read(MESSAGE_BYTES) if _waited(first) else b""
        notice = codec.decode(said, ForkNotice) if said else ForkNotice(order.number, error="the process ended at once")
        if not notice.pid:
            self._control.send(said or codec.encode(notice))
        else:
            self._children[notice.pid] = order.number
            pidfd = os.pidfd_open(notice.pid)
            socket.send_fds(self._control, [said], [pidfd])
            os.close(pidfd)
            os.write(go, _GO)
        os.close(go)
        return False

    def _child(self, order: ForkOrder, received: list[int], tell: int, wait: int) -> None:
        """Returns in the child's child alone: in its namespaces, with its own descriptors, and tied to the zygote's life."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        tell, wait, zygote = _place(received, (0, 1, 2, *order.descriptors), (tell, wait, self._self))
        self._control.detach()
        try:
            confinement_root.leave()
            pid = os.fork()
        except OSError as exc:
            _say(tell, ForkNotice(order.number, error=str(exc)))
        if pid:
            _say(tell, ForkNotice(order.number, pid=pid))
        os.close(tell)
        os.setsid()
        if os.read(wait, 1) != _GO:
            os._exit(1)
        protect(dumpable=True, die_with_parent=True)
        if select.select([zygote], [], [], 0)[0]:  # it went before it could be noticed
            os._exit(1)
        os.close(wait)
        os.close(zygote)


def _say(tell: int, notice: ForkNotice) -> NoReturn:
    os.write(tell, codec.encode(notice))
    os._exit(0)


def _waited(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def _checked(raw: bytes, received: Sequence[int], flags: int) -> ForkOrder:
    """Raises ``Malformed``."""
    order = codec.decode(raw, ForkOrder, what="the order")
    numbers = order.descriptors
    if (
        flags & socket.MSG_CTRUNC
        or len(received) != _STREAMS + len(numbers)
        or len(set(numbers)) != len(numbers)
        or min(numbers, default=3) < 3
    ):
        raise Malformed("the order and its descriptors do not fit")
    return order


def _place(received: Sequence[int], numbers: Sequence[int], kept: Sequence[int]) -> list[int]:
    """``received`` at ``numbers``, ``kept`` somewhere above them (where: the answer), everything else closed."""
    above = max(numbers) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above) for descriptor in (*received, *kept)]
    for descriptor, number in zip(moved, numbers, strict=False):
        os.dup2(descriptor, number)
    kept = moved[len(numbers) :]
    edge = _STREAMS
    for descriptor in (*sorted((*numbers[_STREAMS:], *kept)), resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        os.closerange(edge, descriptor)
        edge = descriptor + 1
    return list(kept)
