"""Namespaces and a root of its own for a process that is forked and not executed: what bubblewrap gives to others.

The root is a small tmpfs, read-only, with what may be read bound into it, the folder of the relay, and a ``/proc``; there is no ``/dev``.
"""

import ctypes
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

UID = 1000  # inside a user namespace
INSIDE_RELAY = "/run/cipherfleet"

CLONE = {
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PR_SET_DUMPABLE = 4
_PLACE = "/tmp"  # noqa: S108 - only where the new root is put together, in a mount namespace of its own


def leave() -> None:
    """Into namespaces of its own; the next child will be the first process of a pid namespace. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    wanted = sum(flag for name, flag in CLONE.items() if name != "cgroup")
    _succeeded(libc.unshare(wanted), "namespaces")
    libc.unshare(CLONE["cgroup"])  # not every kernel has it
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else the maps are not ours to write; ``confine`` takes it back
    map_user(user, group)


def map_user(user: int, group: int) -> None:
    """In a new user namespace: ``user`` and ``group`` of the outside are ``UID`` inside. Raises ``OSError``."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{UID} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{UID} {group} 1")


def enter(readable: Iterable[str], relay: Path | None, hostname: str) -> None:
    """Into the new root, and nothing of the old one stays reachable. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    socket.sethostname(hostname)
    _mount(libc, "none", "/", None, _MS_REC | _MS_PRIVATE)
    paths = [Path(path) for path in readable]
    links = {path: path.readlink() for path in paths if path.is_symlink() and _lies_in(path.resolve(), paths)}
    sources = {path: path for path in paths if path not in links}
    if relay is not None:
        sources[Path(INSIDE_RELAY)] = relay
    opened = {target: os.open(source, os.O_PATH | os.O_CLOEXEC) for target, source in sources.items()}  # the tmpfs may cover them
    _mount(libc, "tmpfs", _PLACE, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for target, descriptor in opened.items():
        _bind(libc, descriptor, _in_place(target))
        os.close(descriptor)
    for target, link in links.items():
        _in_place(target).symlink_to(link)
    _in_place(Path("/proc")).mkdir()
    _mount(libc, "proc", f"{_PLACE}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    read_only(libc, _PLACE, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    os.chdir(_PLACE)
    _succeeded(libc.pivot_root(b".", b"."), "pivot_root")
    _succeeded(libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def read_only(libc: ctypes.CDLL, path: str, attributes: int = _ATTR_RDONLY) -> None:
    """A mount and all below it. Raises ``OSError``."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    arguments = (ctypes.c_int(_AT_FDCWD), path.encode(), ctypes.c_uint(_AT_RECURSIVE), ctypes.byref(wanted), ctypes.c_size_t(32))
    _succeeded(libc.syscall(ctypes.c_long(_SYS_MOUNT_SETATTR), *arguments), "mount_setattr")


def _lies_in(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _in_place(target: Path) -> Path:
    path = Path(_PLACE) / target.relative_to("/")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    return path


def _bind(libc: ctypes.CDLL, source: int, place: Path) -> None:
    if stat.S_ISDIR(os.fstat(source).st_mode):
        place.mkdir(exist_ok=True)
    else:
        place.touch()
    _mount(libc, f"/proc/self/fd/{source}", str(place), None, _MS_BIND | _MS_REC)


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    _succeeded(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _succeeded(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
