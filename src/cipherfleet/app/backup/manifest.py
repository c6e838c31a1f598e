"""What a backup holds: its first part, sealed with the rest."""

import struct
from collections.abc import Iterator

import msgspec

from cipherfleet.app.record import CloudRecord
from cipherfleet.channel import codec
from cipherfleet.contract.errors import BackupInvalid, BackupTruncated, Malformed, StateNewer
from cipherfleet.contract.recovery import ConsumerPoint

VERSION = 1
MAX_BYTES = 16 * 1024 * 1024
CLOUD, KMC, MANAGEMENT, HSM, HSM_PASSPHRASE = (
    "cloud.json",
    "kmc/kmc.sqlite",
    "management/inventory.sqlite",
    "hsm/hsm.sealed",
    "hsm/passphrase",
)
REQUIRED = (MANAGEMENT, KMC, HSM)
NAMES = (*REQUIRED, HSM_PASSPHRASE)


class BackupFile(msgspec.Struct, frozen=True):
    """``name`` is its path in the state; ``size`` in bytes."""

    name: str
    size: int
    sha256: bytes


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``created_at``: unix seconds, before the first snapshot. ``consumers``: up to where each one's escrow goes."""

    version: int
    program: str
    created_at: float
    cloud: CloudRecord
    files: tuple[BackupFile, ...]
    consumers: tuple[ConsumerPoint, ...]


def pack(manifest: Manifest) -> bytes:
    raw = codec.encode(manifest)
    return struct.pack(">I", len(raw)) + raw


class Content:
    """The content of a backup in order: the manifest, then the files it names. Raises ``BackupInvalid`` or ``BackupTruncated``."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._waiting = chunks, bytearray()

    def manifest(self) -> Manifest:
        """Raises ``StateNewer`` for one of a later format."""
        (size,) = struct.unpack(">I", self._exactly(4))
        if size > MAX_BYTES:
            raise BackupInvalid("the backup's manifest has no possible size")
        raw = self._exactly(size)
        try:
            version = codec.decode(raw, dict[str, object]).get("version")
            if isinstance(version, int) and version > VERSION:
                raise StateNewer(f"this backup has manifest {version}, this program knows {VERSION}", "upgrade cipherfleet")
            manifest = codec.decode(raw, Manifest)
        except Malformed as exc:
            raise BackupInvalid("the backup's manifest cannot be read") from exc
        names = [file.name for file in manifest.files]
        if not set(REQUIRED) <= set(names) <= set(NAMES) or len(set(names)) != len(names):
            raise BackupInvalid("the backup does not hold the files of a cloud")
        return manifest

    def file(self, size: int) -> Iterator[bytes]:
        """The next ``size`` bytes, in pieces."""
        while size:
            if not self._waiting:
                self._fill()
            piece = bytes(self._waiting[:size])
            del self._waiting[: len(piece)]
            size -= len(piece)
            yield piece

    def end(self) -> None:
        """That nothing follows, and that the end is the real one."""
        if self._waiting or any(self._chunks):
            raise BackupInvalid("the backup holds more than its manifest says")

    def _exactly(self, size: int) -> bytes:
        return b"".join(self.file(size))

    def _fill(self) -> None:
        try:
            self._waiting += next(self._chunks)
        except StopIteration:
            raise BackupTruncated("the backup holds less than its manifest says") from None
