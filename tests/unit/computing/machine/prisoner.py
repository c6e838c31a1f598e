"""What a launched process runs in tests: confined like a VCM, it tries what it must not be able to do, and says how that ended.

Run as ``python -c SOURCE``, or ``python -c SOURCE zygote`` for a zygote of such: it stands for a VCM whose code an attacker has taken over.
"""

import asyncio
import ctypes
import errno
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from cipherfleet.channel.process import run
from cipherfleet.computing.confinement import Confinement, confine
from cipherfleet.computing.zygote import serve
from cipherfleet.contract.machine_api import Isolation

_LIBC = ctypes.CDLL(None, use_errno=True)


class Orders(msgspec.Struct):
    """``forbidden``: paths to try to read. ``target``: a port of the host. ``abstract``: name of a socket of the host."""

    confinement: Confinement
    relay: str
    listening: int
    forbidden: list[str]
    target: int
    abstract: str
    host_pid: int


class Findings(msgspec.Struct):
    """``attempts``: name of what was tried -> name of the error, or "" when it worked."""

    isolation: Isolation
    attempts: dict[str, str]
    environment: list[str]
    descriptors: list[int]
    pid: int
    folders: list[str]


class Prepared(msgspec.Struct):
    orders: Orders
    isolation: Isolation


def prepare(orders: Orders) -> Prepared:
    return Prepared(orders, confine(orders.confinement, listening=orders.listening))


def attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, type(exc).__name__)
    except (MemoryError, ValueError, RuntimeError) as exc:
        return type(exc).__name__
    return ""


def call(name: int, *arguments: int) -> Callable[[], None]:
    """A system call by its number on x86-64."""

    def work() -> None:
        if _LIBC.syscall(ctypes.c_long(name), *(ctypes.c_long(a) for a in arguments)) < 0:
            raise OSError(ctypes.get_errno(), "")

    return work


def connect_listening(orders: Orders, *, fast_open: bool) -> None:
    """An inherited socket belongs to the network that it came from: turned around, it would be a way out."""
    with socket.socket(fileno=os.dup(orders.listening)) as inherited:
        inherited.setblocking(True)
        unspecified = b"\0" * 16
        if _LIBC.connect(inherited.fileno(), unspecified, 16) < 0:  # AF_UNSPEC: no longer a listener
            raise OSError(ctypes.get_errno(), "")
        if fast_open:
            inherited.sendto(b"out", socket.MSG_FASTOPEN, ("127.0.0.1", orders.target))
        else:
            inherited.connect(("127.0.0.1", orders.target))


def connect_abstract(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.connect(b"\0" + name.encode())


def relay(orders: Orders) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.connect(orders.relay)
        unix.sendall(b"hello")
        if unix.recv(5) != b"hello":
            raise ValueError


def accept(orders: Orders) -> None:
    with socket.socket(fileno=os.dup(orders.listening)) as listening:
        listening.setblocking(True)
        listening.accept()[0].close()


def in_thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def read(path: str) -> None:
    if Path(path).is_dir():
        os.listdir(path)  # noqa: PTH208
    else:
        Path(path).read_bytes()


def write(path: str) -> None:
    Path(path).write_bytes(b"x")


def attempts(orders: Orders) -> dict[str, str]:
    tries: dict[str, Callable[[], object]] = {
        # what a VCM lives on
        "relay": lambda: relay(orders),
        "accept": lambda: accept(orders),
        "thread": in_thread,
        "read its code": lambda: Path(msgspec.__file__).read_bytes(),
        "memfd": lambda: os.write(os.memfd_create("x"), b"x"),
        # the file system
        **{f"read {path}": partial(read, path) for path in orders.forbidden},
        "list the root": lambda: os.listdir("/"),  # noqa: PTH208
        "write to /tmp": lambda: write("/tmp/x"),
        "write to /dev/shm": lambda: write("/dev/shm/x"),
        "write where it works": lambda: write("x"),
        "write to the relay's folder": lambda: write(f"{Path(orders.relay).parent}/x"),
        "write its code": lambda: write(msgspec.__file__ + "x"),
        "open /proc of the host": lambda: Path(f"/proc/{orders.host_pid}/environ").read_bytes(),
        "mkdir": lambda: Path("/tmp/y").mkdir(),
        # the network
        "socket inet": lambda: socket.socket(socket.AF_INET).close(),
        "socket inet6": lambda: socket.socket(socket.AF_INET6).close(),
        "socket netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "socket packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
        "abstract socket of the host": lambda: connect_abstract(orders.abstract),
        "fast open": lambda: connect_listening(orders, fast_open=True),
        "connect the inherited socket": lambda: connect_listening(orders, fast_open=False),
        # other programs and processes
        "execve": lambda: os.execv("/usr/bin/true", ["true"]),
        "subprocess": lambda: subprocess.run(["/usr/bin/true"], check=True),
        "fork": os.fork,
        "kill": lambda: os.kill(orders.host_pid, 0),
        "tgkill": call(234, orders.host_pid, orders.host_pid, 0),
        "limits of another": lambda: resource.prlimit(orders.host_pid, resource.RLIMIT_NOFILE),
        "pidfd_open": lambda: os.pidfd_open(orders.host_pid),
        "ptrace": call(101, 16, orders.host_pid, 0, 0),
        "process_vm_readv": call(310, orders.host_pid, 0, 0, 0, 0, 0),
        # the kernel's other doors
        "unshare": call(272, 0x10000000),
        "clone into namespaces": call(56, 0x10000000 | 17, 0, 0, 0, 0),
        "setns": call(308, 0, 0),
        "mount": call(165, 0, 0, 0, 0, 0),
        "umount": call(166, 0, 0),
        "pivot_root": call(155, 0, 0),
        "bpf": call(321, 0, 0, 0),
        "perf_event_open": call(298, 0, 0, -1, -1, 0),
        "userfaultfd": call(323, 0),
        "keyctl": call(250, 0, 0),
        "add_key": call(248, 0, 0, 0, 0, 0),
        "init_module": call(175, 0, 0, 0),
        "kexec_load": call(246, 0, 0, 0, 0),
        "open_by_handle_at": call(304, 0, 0, 0),
        "io_uring_setup": call(425, 1, 0),
        "seccomp": call(317, 0, 0, 0),
        "ioctl TIOCSTI": call(16, 0, 0x5412, 0),
        # limits
        "memory": lambda: bytearray(orders.confinement.memory_mib * 1024 * 1024),
        "more memory": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        "more processors": lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1)),
        "many files": lambda: [os.dup(0) for _ in range(orders.confinement.files + 1)],
    }
    return {name: attempt(work) for name, work in tries.items()}


async def main(prepared: Prepared, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    found = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208
    folders = sorted(p for p in ("/home", "/root", "/work", "/etc", "/var", "/tmp", "/run") if Path(p).exists())
    ready(Findings(prepared.isolation, attempts(prepared.orders), sorted(os.environ), found, os.getpid(), folders))
    await stop.wait()


if __name__ == "__main__":
    live = partial(run, main, Orders, prepare=prepare)
    sys.exit(serve(live) if sys.argv[1:] == ["zygote"] else live())
