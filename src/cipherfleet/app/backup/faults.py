"""The seam for the file system under a backup."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cipherfleet.contract.errors import DiskFull, FileProblem


@contextmanager
def seam(path: Path) -> Iterator[None]:
    """What a failed read or write means. Raises ``DiskFull`` or ``FileProblem``."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left for {path}", "make room and try again; nothing was left behind") from exc
        raise FileProblem(f"{exc.filename or path}: {os.strerror(exc.errno or 0)}") from exc
