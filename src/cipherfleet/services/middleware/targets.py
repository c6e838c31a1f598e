"""Files that appear only when they are whole."""

import asyncio
import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from cipherfleet.contract.errors import DiskFull, EnvironmentFault, FileProblem

WRITE_BYTES = 1024 * 1024


def file_error(exc: OSError, doing: str, path: Path) -> EnvironmentFault:
    """An error of the file system, in our tree."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"cannot {doing} {path}: no space is left")
    return FileProblem(f"cannot {doing} {path}: {exc.strerror or exc}")


def open_source(path: Path) -> BinaryIO:
    """Raises ``FileProblem``."""
    try:
        return path.open("rb")
    except OSError as exc:
        raise file_error(exc, "read", path) from exc


class WholeFile:
    """``path`` is replaced when the block ends well; when it does not, nothing is left of what was written.

    ``private``: mode 0600, else what the umask says.
    """

    def __init__(self, path: Path, *, private: bool) -> None:
        self._path, self._private = path, private
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        self._file: BinaryIO | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self.written = 0

    async def __aenter__(self) -> Self:
        self._open()  # not in a thread: a cancellation would leave the file behind
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                await self._write_out()
                await asyncio.to_thread(self._keep)
            except OSError as problem:
                self._discard()
                raise file_error(problem, "write", self._path) from problem
            except BaseException:
                self._discard()
                raise
        else:
            self._discard()

    async def write(self, data: bytes) -> None:
        """Raises ``DiskFull`` or ``FileProblem``."""
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self.written += len(data)
        if self._waiting_bytes >= WRITE_BYTES:
            await self._write_out()

    async def _write_out(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        try:
            await asyncio.to_thread(self._opened.writelines, waiting)
        except OSError as exc:
            raise file_error(exc, "write", self._path) from exc

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError("the file is not open")
        return self._file

    def _open(self) -> None:
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(self._path.stat().st_mode):
                    raise FileProblem(f"{self._path} is not a regular file, it would be replaced", "stream to it instead")
            mode = 0o600 if self._private else 0o666
            descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as exc:
            raise file_error(exc, "write", self._path) from exc
        self._file = os.fdopen(descriptor, "wb")

    def _keep(self) -> None:
        file = self._opened
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._partial.replace(self._path)

    def _discard(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        with suppress(OSError):
            self._partial.unlink()
