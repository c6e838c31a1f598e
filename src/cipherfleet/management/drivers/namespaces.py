"""Named network namespaces, made and deleted as `ip netns` does."""

import asyncio
import ctypes
import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from cipherfleet.channel.namespaces import CLONE_NEWNET, FOLDER, in_thread, run_inside
from cipherfleet.contract.errors import IsolationUnavailable

T = TypeVar("T")

_MS_REC, _MS_BIND, _MS_SHARED, _MNT_DETACH = 16384, 4096, 1 << 20, 2

_making = threading.Lock()


def names() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []


def exists(name: str) -> bool:
    return (FOLDER / name).exists()


def create(name: str) -> None:
    """Blocking. A new, empty namespace; one that is there already stays. Raises ``IsolationUnavailable``."""
    with _making:
        if name in names():
            if _bound(name):
                return
            (FOLDER / name).unlink()  # a file whose mount is gone: the leftover of a crash between two calls

        def make() -> None:
            _share_folder()
            _check("unshare", _libc().unshare(CLONE_NEWNET))
            path = FOLDER / name
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o444))
            source = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
            try:
                _check("mount", _libc().mount(source.encode(), bytes(path), b"none", _MS_BIND, None))
            except BaseException:
                path.unlink()
                raise

        in_thread(make)


def delete(name: str) -> None:
    """Blocking. Its interfaces go with it unless somebody still holds it open; deleting what is gone succeeds."""
    path = FOLDER / name
    libc = _libc()
    with _making:
        while libc.umount2(bytes(path), _MNT_DETACH) == 0:
            pass
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
            _check("umount", -1)
        with suppress(FileNotFoundError):
            path.unlink()


async def inside(name: str, work: Callable[[], T]) -> T:
    """What ``work`` returns, run inside the namespace ``name``. Raises ``IsolationUnavailable`` when that is not there."""
    return await asyncio.to_thread(run_inside, name, work)


def _bound(name: str) -> bool:
    """Whether the name still has its namespace mounted on it."""
    with Path("/proc/self/mountinfo").open() as file:
        return any(line.split()[4] == str(FOLDER / name) for line in file)


def _share_folder() -> None:
    """As `ip netns add` does: a mount point of its own that other mount namespaces see."""
    FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
    libc = _libc()
    if libc.mount(b"", bytes(FOLDER), b"none", _MS_SHARED | _MS_REC, None) != 0:
        _check("mount", libc.mount(bytes(FOLDER), bytes(FOLDER), b"none", _MS_BIND | _MS_REC, None))
        _check("mount", libc.mount(b"", bytes(FOLDER), b"none", _MS_SHARED | _MS_REC, None))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(what: str, result: int) -> None:
    if result != 0:
        reason = os.strerror(ctypes.get_errno())
        raise IsolationUnavailable(
            f"{what} of a network namespace failed: {reason}", "domain isolation needs root; use --isolation process"
        )
