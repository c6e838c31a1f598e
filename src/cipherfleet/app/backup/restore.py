"""A cloud's state from a backup, on a machine that has none: everything is checked before the folder gets its name.

What lived when the backup was made is not believed: VCMs, tokens, cards and the certificates of the platform's processes end
with the restore. What consumers sealed and signed is carried over; each Ukey decides whether it goes on from there.
"""

import asyncio
import fcntl
import hashlib
import hmac
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cipherfleet.app import record as cloud_record
from cipherfleet.app.backup.faults import seam
from cipherfleet.app.backup.manifest import KMC, MANAGEMENT, BackupFile, Content, Manifest
from cipherfleet.app.backup.sealed_file import Header, open_sealed, read_header
from cipherfleet.channel import codec
from cipherfleet.contract.errors import AlreadyRunning, BackupInvalid, Exists, FileProblem
from cipherfleet.kmc import recovery as kmc_recovery
from cipherfleet.kmc import schema as kmc_schema
from cipherfleet.management import recovery as management_recovery
from cipherfleet.management import schema as management_schema
from cipherfleet.state.database import Database
from cipherfleet.state.files import flush_folder, write_private
from cipherfleet.state.snapshot import check_integrity, settle

Progress = Callable[[str], None]


def head_of(file: Path) -> Header:
    """What a backup tells without its passphrase. Raises ``BackupInvalid``, ``BackupTruncated``, ``StateNewer`` or ``FileProblem``."""
    with seam(file), file.open("rb") as source:
        return read_header(source, file)[0]


def read_manifest(file: Path, passphrase: bytearray) -> Manifest:
    """What is in a backup, authenticated up to there. Raises as ``verify``."""
    with seam(file), file.open("rb") as source:
        return Content(open_sealed(source, file, passphrase)).manifest()


def verify(file: Path, passphrase: bytearray, *, progress: Progress = lambda _: None) -> Manifest:
    """All of a backup, to its end.

    Raises ``PassphraseWrong``, ``BackupInvalid``, ``BackupTruncated``, ``StateNewer`` or ``FileProblem``.
    """
    with seam(file):
        return _read(file, passphrase, lambda described, pieces: _check(described, pieces), progress)


async def restore(file: Path, target: Path, passphrase: bytearray, *, progress: Progress = lambda _: None) -> Manifest:
    """The state that ``file`` holds, in the folder ``target``, which must not exist yet, or be empty.

    Raises ``Exists``, or as ``verify``, and ``DiskFull``; ``target`` is as it was then, also when this is killed.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link that must not be there
    with seam(target):
        _check_vacant(target)
        with _staging(target) as staging:

            def keep(described: BackupFile, pieces: Iterator[bytes]) -> None:
                path = staging / described.name
                path.parent.mkdir(mode=0o700, exist_ok=True)
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                    _check(described, pieces, out.write)
                    out.flush()
                    os.fsync(out.fileno())

            manifest = await asyncio.to_thread(_read, file, passphrase, keep, progress)
            progress("checking the databases")
            await _void(staging, manifest)
            write_private(staging / cloud_record.FILE, codec.encode(manifest.cloud))
            for folder in (*(p for p in staging.iterdir() if p.is_dir()), staging):
                flush_folder(folder)
            _check_vacant(target)
            staging.rename(target)
            flush_folder(target.parent)
    return manifest


async def _void(staging: Path, manifest: Manifest) -> None:
    """What lived then does not live now."""
    for name in (MANAGEMENT, KMC):
        try:
            await asyncio.to_thread(check_integrity, staging / name)
        except FileProblem as exc:
            raise BackupInvalid(f"{name} in the backup is damaged") from exc
    at = time.time()
    management = await asyncio.to_thread(Database.open, (staging / MANAGEMENT).parent, management_schema.FILE, management_schema.MIGRATIONS)
    try:
        await management.write(lambda connection: management_recovery.void_past(connection, at=at))
    finally:
        await management.close()
    kmc = await asyncio.to_thread(Database.open, (staging / KMC).parent, kmc_schema.FILE, kmc_schema.MIGRATIONS)
    try:
        await kmc.write(lambda connection: kmc_recovery.void_past(connection, at=at, made_at=manifest.created_at))
    finally:
        await kmc.close()
    for name in (MANAGEMENT, KMC):
        await asyncio.to_thread(settle, staging / name)


def _read(file: Path, passphrase: bytearray, take: Callable[[BackupFile, Iterator[bytes]], None], progress: Progress) -> Manifest:
    with file.open("rb") as source:
        content = Content(open_sealed(source, file, passphrase))
        manifest = content.manifest()
        for described in manifest.files:
            progress(described.name)
            take(described, content.file(described.size))
        content.end()
    return manifest


def _check(described: BackupFile, pieces: Iterator[bytes], keep: Callable[[bytes], object] = lambda _: None) -> None:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        keep(piece)
    if not hmac.compare_digest(digest.digest(), described.sha256):
        raise BackupInvalid(f"{described.name} in the backup is not the one that its manifest names")


def _check_vacant(target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise Exists(f"{target} exists and is not empty", "restore into another --state")
    if not target.parent.is_dir():
        raise FileProblem(f"there is no folder {target.parent}")


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that may get its name; what a restore that was killed left is removed. Raises ``AlreadyRunning``."""
    folder, lock = target.parent / f".{target.name}.restoring", target.parent / f".{target.name}.restoring.lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise AlreadyRunning(f"another restore to {target} is under way") from exc
        try:
            if folder.is_symlink():
                raise FileProblem(f"{folder} is a link")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
