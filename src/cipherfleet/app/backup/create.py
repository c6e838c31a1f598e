"""A backup of a cloud that runs, or does not: what is copied, in which order, and why it fits together.

The management platform's database comes first and the KMC's after it, so that the inventory never knows more than the KMC.
The HSM makes a key before the KMC's database names it and destroys it after, so a copy of that database fits every state of
the HSM's file that was the same before and after the copy.
"""

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from cipherfleet.app.backup import sealed_file
from cipherfleet.app.backup.faults import seam
from cipherfleet.app.backup.manifest import HSM, HSM_PASSPHRASE, KMC, MANAGEMENT, VERSION, BackupFile, Manifest, pack
from cipherfleet.app.record import read_record_of
from cipherfleet.contract.errors import AlreadyRunning, Exists, FileProblem, StateConflict
from cipherfleet.contract.recovery import ConsumerPoint
from cipherfleet.kmc import recovery as kmc_recovery
from cipherfleet.kmc import schema as kmc_schema
from cipherfleet.management import recovery as management_recovery
from cipherfleet.management import schema as management_schema
from cipherfleet.state.database import Database
from cipherfleet.state.files import flush_folder
from cipherfleet.state.snapshot import check_integrity, settle, snapshot

ATTEMPTS = 5
PIECE_BYTES = 1024 * 1024

Progress = Callable[[str], None]


async def create(state: Path, out: Path, passphrase: bytearray, *, progress: Progress = lambda _: None) -> Manifest:
    """Write a backup of the cloud in ``state`` to the new file ``out`` (mode 0600), whole or not at all.

    Raises ``NotRunning`` when there is no cloud, ``Exists``, ``PassphraseWrong`` for a weak passphrase, ``AlreadyRunning`` beside
    another backup, ``StateConflict``, ``DiskFull`` or ``FileProblem``.
    """
    sealed_file.check_passphrase(passphrase)
    record = read_record_of(state)
    if out.exists() or out.is_symlink():
        raise Exists(f"{out} exists", "choose another file for the backup")
    with seam(out), _staging(state) as staging:
        created_at = time.time()
        secret = _own_passphrase(state)
        await asyncio.to_thread(_copy, state, staging, MANAGEMENT, progress)
        sealed_keys = await asyncio.to_thread(_copy_kmc, state, staging, progress)
        consumers = await _prepare(staging)
        parts: list[tuple[str, Path | bytes]] = [(MANAGEMENT, staging / MANAGEMENT), (KMC, staging / KMC), (HSM, sealed_keys)]
        parts += [(HSM_PASSPHRASE, secret)] if secret else []
        files = [await asyncio.to_thread(_describe, name, part) for name, part in parts]
        manifest = Manifest(VERSION, version("cipherfleet"), created_at, record, tuple(files), consumers)
        progress("sealing")
        header = sealed_file.new_header(record.settings, created_at, len(pack(manifest)) + sum(file.size for file in files))
        await asyncio.to_thread(_seal, out, header, passphrase, manifest, [part for _, part in parts])
    return manifest


def _copy(state: Path, staging: Path, name: str, progress: Progress) -> None:
    (staging / name).parent.mkdir(mode=0o700, exist_ok=True)
    snapshot((state / name).absolute(), staging / name, lambda done, total: progress(f"{name}: {done} of {total} pages"))


def _copy_kmc(state: Path, staging: Path, progress: Progress) -> bytes:
    """The KMC's database, and the HSM's file that belongs to it."""
    for _ in range(ATTEMPTS):
        before = (state / HSM).read_bytes()
        (staging / KMC).unlink(missing_ok=True)
        _copy(state, staging, KMC, progress)
        if (state / HSM).read_bytes() == before:
            return before
    raise StateConflict("the HSM's keys changed with every attempt", "try again when no consumer is being enrolled")


async def _prepare(staging: Path) -> tuple[ConsumerPoint, ...]:
    """The copies without what has no business in a backup, checked; what they say of the consumers."""
    management = await asyncio.to_thread(Database.open, (staging / MANAGEMENT).parent, management_schema.FILE, management_schema.MIGRATIONS)
    try:
        await management.write(management_recovery.strip)
    finally:
        await management.close()
    kmc = await asyncio.to_thread(Database.open, (staging / KMC).parent, kmc_schema.FILE, kmc_schema.MIGRATIONS)
    try:
        await kmc.write(kmc_recovery.strip)
        consumers = await kmc.read(kmc_recovery.describe)
    finally:
        await kmc.close()
    for name in (MANAGEMENT, KMC):
        await asyncio.to_thread(settle, staging / name)
        await asyncio.to_thread(check_integrity, staging / name)
    return consumers


def _own_passphrase(state: Path) -> bytes:
    """The HSM's passphrase, when it is one that ``up`` made inside the state; without it the HSM's file could not be opened."""
    try:
        return (state / HSM_PASSPHRASE).read_bytes()
    except FileNotFoundError:
        return b""


def _describe(name: str, part: Path | bytes) -> BackupFile:
    digest, size = hashlib.sha256(), 0
    for piece in _pieces(part):
        digest.update(piece)
        size += len(piece)
    return BackupFile(name, size, digest.digest())


def _pieces(part: Path | bytes) -> Iterator[bytes]:
    if isinstance(part, bytes):
        yield part
        return
    with part.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _seal(out: Path, header: sealed_file.Header, passphrase: bytearray, manifest: Manifest, parts: list[Path | bytes]) -> None:
    def content() -> Iterator[bytes]:
        yield pack(manifest)
        for part in parts:
            yield from _pieces(part)

    descriptor, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            sealed_file.seal(file, header, passphrase, content())
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, out)  # unlike a rename it replaces nothing
        flush_folder(out.parent)
    except FileExistsError as exc:
        raise Exists(f"{out} exists", "choose another file for the backup") from exc
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def _staging(state: Path) -> Iterator[Path]:
    """A folder for the copies, gone at the end; what a backup that was killed left is removed. Raises ``AlreadyRunning``."""
    folder = state / "backup"
    with (state / "backup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise AlreadyRunning(f"another backup of {state} is being made") from exc
        if folder.is_symlink():
            raise FileProblem(f"{folder} is a link")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            yield folder.absolute()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
