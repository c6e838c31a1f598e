"""The seam for the file system under a Ukey."""

import errno
import os
from pathlib import Path

from cipherfleet.contract.errors import CipherfleetError, DiskFull, FileProblem, UkeyInvalid

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MAX_FILE_BYTES = 1024 * 1024


def fault(exc: OSError | None, path: Path) -> CipherfleetError:
    """What a failed write means."""
    if exc is not None and exc.errno in _FULL:
        return DiskFull(f"no space left for the Ukey at {path}", "make room and try again; nothing was written")
    why = os.strerror(exc.errno) if exc is not None and exc.errno else "it is not a writable folder"
    return FileProblem(f"cannot write the Ukey at {path}: {why}", "the folder's parent must exist and be writable")


def read_file(path: Path) -> bytes:
    """A small file of a Ukey. Raises ``UkeyInvalid`` when it is missing or huge, ``FileProblem`` when it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as exc:
        raise UkeyInvalid(f"the Ukey lacks {path.name}") from exc
    except OSError as exc:
        raise FileProblem(f"cannot read {path}: {os.strerror(exc.errno or 0)}") from exc
    if len(content) > MAX_FILE_BYTES:
        raise UkeyInvalid(f"the Ukey's {path.name} is too large")
    return content
