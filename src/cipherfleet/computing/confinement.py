"""A VCM's process gives up all that it does not need, before it meets anything of its consumer.

Namespaces come from bubblewrap or the zygote, else from here. Always: limits, no capabilities, no new privileges,
Landlock, seccomp. ``confine`` returns what is in force, found by looking and trying, not by what was asked for.
"""

import ctypes
import logging
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from cipherfleet.channel.process import protect
from cipherfleet.computing import confinement_landlock, confinement_root, confinement_seccomp
from cipherfleet.computing.confinement_root import CLONE
from cipherfleet.contract.errors import IsolationUnavailable
from cipherfleet.contract.machine_api import Isolation

log = logging.getLogger(__name__)

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
FILE_BYTES = 16 * 1024 * 1024  # the largest file (a log, a memfd) that a VCM may write
THREADS = 64

_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 24, 47, 4
_LAST_CAPABILITY = 63
_CAPABILITY_VERSION_3 = 0x20080522
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


class Confinement(msgspec.Struct, frozen=True):
    """What a VCM is confined to. ``readable``: all that it may read. ``folder``: where it works, when the launcher does not say."""

    mode: str  # process | domain
    launcher: str  # bubblewrap | zygote | unshare | none
    memory_mib: int
    files: int
    processors: tuple[int, ...] = ()
    readable: tuple[str, ...] = ()
    folder: str = ""


def confine(wanted: Confinement, *, listening: int = -1) -> Isolation:
    """Confine this process for good. Raises ``IsolationUnavailable`` when what can be had everywhere is not in force.

    ``listening``: the descriptor of the socket that it serves on, if any.
    """
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208
        raise IsolationUnavailable("a process with several threads cannot be confined")
    libc = ctypes.CDLL(None, use_errno=True)
    if wanted.launcher == "zygote":
        _own_root(wanted)
    elif wanted.folder:
        os.chdir(wanted.folder)
    if wanted.launcher == "unshare":
        leave_host(libc)
    protect(die_with_parent=True)
    _limit(wanted)
    _drop_capabilities(libc)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise IsolationUnavailable("no-new-privileges cannot be set")
    isolation = look(wanted, *_restrict(wanted.readable, listening))
    if not isolation.no_new_privileges or not set(isolation.capabilities) <= {"0"}:
        raise IsolationUnavailable("the process kept privileges that it should have dropped")
    return isolation


def _own_root(wanted: Confinement) -> None:
    """The root that bubblewrap would have made; the namespaces are there already."""
    folder = Path(wanted.folder)
    try:
        confinement_root.enter(wanted.readable, folder / "relay", folder.name)
    except OSError as exc:
        raise IsolationUnavailable(f"no root of its own can be had: {exc.strerror}") from exc


def leave_host(libc: ctypes.CDLL) -> None:
    """Into namespaces of its own, as far as the kernel lets us; the file system read-only there. What worked shows from outside."""
    user, group, mounts = os.geteuid(), os.getegid(), _namespace("thread-self", "mnt")
    rest = [CLONE[name] for name in ("net", "ipc", "uts", "mnt", "cgroup")]
    if libc.unshare(CLONE["user"] | sum(rest)) == 0:
        with suppress(OSError):
            confinement_root.map_user(user, group)
    else:
        for flag in rest:
            libc.unshare(flag)
    if _namespace("thread-self", "mnt") != mounts:
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        with suppress(OSError):
            confinement_root.read_only(libc, "/")


def _limit(wanted: Confinement) -> None:
    """Memory, files, threads and processors: the paper divides virtual CPUs and virtual memory among VCMs."""
    limits = {
        resource.RLIMIT_AS: wanted.memory_mib * 1024 * 1024,
        resource.RLIMIT_NOFILE: wanted.files,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if _in_user_namespace():
        limits[resource.RLIMIT_NPROC] = THREADS  # outside a user namespace it would count what others of this user run
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    processors = set(wanted.processors) & os.sched_getaffinity(0)
    if processors:
        os.sched_setaffinity(0, processors)


def _in_user_namespace() -> bool:
    try:
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]
    except OSError:
        return False


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    libc.capset(ctypes.byref(_CapabilityHeader(_CAPABILITY_VERSION_3, 0)), (ctypes.c_uint32 * 6)())


def _restrict(readable: Iterable[str], listening: int = -1) -> tuple[int, bool]:
    """Landlock, then seccomp; the ABI of Landlock that was asked for, and whether it keeps TCP in."""
    version = 0
    try:
        version = confinement_landlock.restrict((*readable, "/proc/self"))
    except OSError as exc:
        log.warning("landlock is not available: %s", exc.strerror)
    network_confined = _tcp_is_refused()  # tried here, as seccomp would hide who refuses
    try:
        confinement_seccomp.restrict(listening)
    except (OSError, ValueError, RuntimeError) as exc:
        log.warning("seccomp is not available: %s", exc)
    return version, network_confined


def _tcp_is_refused() -> bool:
    """Neither connect nor bind over TCP, with a socket that is there already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tcp.setblocking(False)
        return _refused(lambda: tcp.connect(("127.0.0.1", 9))) and _refused(lambda: tcp.bind(("127.0.0.1", 0)))


# -- looking -----------------------------------------------------------------------------------------------------------


def look(wanted: Confinement, landlock_abi: int, network_confined: bool) -> Isolation:
    """The isolation as it shows from inside. Namespaces show from outside alone."""
    status = process_status("self")
    return Isolation(
        mode=wanted.mode,
        launcher=wanted.launcher,
        no_new_privileges=status.get("NoNewPrivs") == "1",
        seccomp=status.get("Seccomp") == "2" and _refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()),
        landlock_abi=landlock_abi if _refused(lambda: os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))) else 0,
        capabilities=capabilities(status),
        read_only_root=bool(os.statvfs("/").f_flag & os.ST_RDONLY),
        limits=_limits(),
        network_confined=network_confined,
    )


def process_status(pid: int | str) -> dict[str, str]:
    """``/proc/PID/status``; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def capabilities(status: dict[str, str]) -> str:
    """Hex of the effective set; "?" when it is not known."""
    try:
        return f"{int(status['CapEff'], 16):x}"
    except (KeyError, ValueError):
        return "?"


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _limits() -> dict[str, int]:
    return {
        "memory_bytes": resource.getrlimit(resource.RLIMIT_AS)[0],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "file_bytes": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
        "core_bytes": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "threads": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "processors": len(os.sched_getaffinity(0)),
    }


# -- from outside ------------------------------------------------------------------------------------------------------


def own_namespaces(pid: int) -> tuple[str, ...]:
    """Those of a process that are not ours, as far as we may see them."""
    return tuple(name for name in NAMESPACES if _namespace(pid, name) not in ("", _namespace("self", name)))


def look_outside(pid: int, inside: Isolation, seen: tuple[str, ...] = ()) -> Isolation:
    """What a process says of its isolation, and what the host sees of it: only what both agree on counts.

    ``seen``: namespaces that the host saw before the process became one that it may not look at.
    """
    status = process_status(pid)
    return msgspec.structs.replace(
        inside,
        namespaces=own_namespaces(pid) or seen,
        no_new_privileges=inside.no_new_privileges and status.get("NoNewPrivs") == "1",
        seccomp=inside.seccomp and status.get("Seccomp") == "2",
        capabilities=inside.capabilities if inside.capabilities == capabilities(status) else "?",
    )


def _namespace(pid: int | str, name: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{name}").readlink())
    except OSError:
        return ""
