"""A file under a passphrase: Argon2id (RFC 9106) gives the key, AES-256-GCM (SP 800-38D) seals chunks of 1 MiB, the last one marked.

The key is new for every file, as its salt is, so the nonce of a chunk is its number and whether it is the last one (the
STREAM construction, Hoang et al. 2015). The header is authenticated with every chunk: what is cut off, moved, repeated or
changed does not open, and nothing of a chunk is used before it is authenticated. An empty message after the header tells a wrong
passphrase from a changed file.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from msgspec import Meta

from cipherfleet.channel import codec
from cipherfleet.contract.errors import BackupInvalid, BackupTruncated, Malformed, PassphraseWrong, StateNewer
from cipherfleet.contract.settings import Settings

MAGIC = b"cipherfleet backup\n"
VERSION = 1
CHUNK_BYTES = 1024 * 1024
MIN_PASSPHRASE = 8
_TAG_BYTES = 16
_MAX_HEADER_BYTES = 4096
_LANES = 4
_CHECK_NONCE = b"\xff" * 12  # no chunk has it: they end in 0 or 1


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What everybody may read: how the passphrase becomes a key, and when the file was made (unix seconds)."""

    version: int
    created_at: float
    size: Annotated[int, Meta(ge=0, le=2**50)]  # of the content, bytes
    salt: Annotated[bytes, Meta(min_length=16, max_length=16)]
    memory_kib: Annotated[int, Meta(ge=8 * _LANES, le=4 * 1024 * 1024)]
    iterations: Annotated[int, Meta(ge=1, le=64)]
    lanes: Annotated[int, Meta(ge=1, le=16)] = _LANES

    @property
    def sealed_size(self) -> int:
        """How many bytes follow the header."""
        return _TAG_BYTES + self.size + max(1, -(-self.size // CHUNK_BYTES)) * _TAG_BYTES


def new_header(settings: Settings, created_at: float, size: int) -> Header:
    return Header(VERSION, created_at, size, os.urandom(16), settings.argon2_memory_kib, settings.argon2_iterations)


def check_passphrase(passphrase: bytearray) -> None:
    """Raises ``PassphraseWrong`` for one that is too short to protect anything."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise PassphraseWrong(f"a backup's passphrase has {MIN_PASSPHRASE} bytes at least")


def seal(out: BinaryIO, header: Header, passphrase: bytearray, content: Iterable[bytes]) -> None:
    """Write header and sealed ``content`` to ``out``. Raises ``OSError``, for the caller's seam."""
    raw = codec.encode(header)
    key = _derive(passphrase, header)
    try:
        cipher = AESGCM(key)
        out.write(MAGIC + struct.pack(">I", len(raw)) + raw + cipher.encrypt(_CHECK_NONCE, b"", raw))
        number, waiting = 0, bytearray()
        for part in content:
            waiting += part
            while len(waiting) > CHUNK_BYTES:  # the last chunk is sealed below, so one is always left
                out.write(cipher.encrypt(_nonce(number, last=False), bytes(waiting[:CHUNK_BYTES]), raw))
                del waiting[:CHUNK_BYTES]
                number += 1
        out.write(cipher.encrypt(_nonce(number, last=True), bytes(waiting), raw))
    finally:
        key[:] = bytes(len(key))


def read_header(file: BinaryIO, path: Path) -> tuple[Header, bytes]:
    """The header and its bytes; ``file`` stands behind it then. Raises ``BackupInvalid``, ``BackupTruncated`` or ``StateNewer``."""
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        if magic and MAGIC.startswith(magic):
            raise BackupTruncated(f"{path} ends within its header")
        raise BackupInvalid(f"{path} is not a backup of a cloud")
    length = file.read(4)
    if len(length) < 4:
        raise BackupTruncated(f"{path} ends within its header")
    (size,) = struct.unpack(">I", length)
    if size > _MAX_HEADER_BYTES:
        raise BackupInvalid(f"the header of {path} has no possible size")
    raw = file.read(size)
    if len(raw) < size:
        raise BackupTruncated(f"{path} ends within its header")
    try:
        version = codec.decode(raw, dict[str, object]).get("version")
        if isinstance(version, int) and version > VERSION:
            raise StateNewer(f"{path} has format {version}, this program knows {VERSION}", "upgrade cipherfleet")
        return codec.decode(raw, Header), raw
    except Malformed as exc:
        raise BackupInvalid(f"the header of {path} cannot be read") from exc


def open_sealed(file: BinaryIO, path: Path, passphrase: bytearray) -> Iterator[bytes]:
    """The content, chunk by chunk, each authenticated; ends only after the marked last one.

    Raises ``PassphraseWrong``, ``BackupInvalid``, ``BackupTruncated`` or ``StateNewer``.
    """
    header, raw = read_header(file, path)
    there = os.fstat(file.fileno()).st_size - file.tell()
    if there < header.sealed_size:
        raise BackupTruncated(f"{path} lacks its last {header.sealed_size - there} bytes")
    if there > header.sealed_size:
        raise BackupInvalid(f"{path} has {there - header.sealed_size} bytes too many")
    key = _derive(passphrase, header)
    try:
        cipher = AESGCM(key)
        try:
            cipher.decrypt(_CHECK_NONCE, file.read(_TAG_BYTES), raw)
        except InvalidTag:
            raise PassphraseWrong(
                f"the passphrase does not open {path}, or its header was changed", "give the passphrase that the backup was made with"
            ) from None
        number, chunk = 0, file.read(CHUNK_BYTES + _TAG_BYTES)
        while True:
            following = file.read(CHUNK_BYTES + _TAG_BYTES)
            yield _open_chunk(cipher, number, chunk, raw, path, last=not following)
            if not following:
                return
            number, chunk = number + 1, following
    finally:
        key[:] = bytes(len(key))


def _open_chunk(cipher: AESGCM, number: int, chunk: bytes, raw: bytes, path: Path, *, last: bool) -> bytes:
    try:
        return cipher.decrypt(_nonce(number, last=last), chunk, raw)
    except (InvalidTag, ValueError):  # ValueError: shorter than a tag, as the file shrank meanwhile
        raise BackupInvalid(f"chunk {number} of {path} was changed", "use another copy of it") from None


def _nonce(number: int, *, last: bool) -> bytes:
    return struct.pack(">QI", number, int(last))


def _derive(passphrase: bytearray, header: Header) -> bytearray:
    key = bytearray(32)
    kdf = Argon2id(salt=header.salt, length=32, iterations=header.iterations, lanes=header.lanes, memory_cost=header.memory_kib)
    kdf.derive_into(passphrase, key)  # type: ignore[arg-type]  # it takes any buffer, which its stub does not say
    return key
