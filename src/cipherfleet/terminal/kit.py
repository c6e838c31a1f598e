"""A recovery kit: a spare Ukey under a key of its own, and that key in N shares for custodians, any M of which bring it back.

The spare (keys of its own, the same share of the CMK) is sealed under a fresh 256-bit key (AES-256-GCM). The key is split by
Shamir's scheme as SLIP-39 writes it down (checksums on every share, a digest in the secret). Fewer than M shares tell nothing
of the key; the platform holds none and learns only that the kit's Ukey exists, which the consumer may revoke like any other.
"""

import hashlib
import hmac
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Meta
from shamir_mnemonic import MnemonicError, combine_mnemonics, generate_mnemonics
from shamir_mnemonic.share import Share

from cipherfleet.channel import codec
from cipherfleet.contract.errors import CipherfleetError, Malformed, ShareForeign, ShareInvalid, ShareRepeated, SharesTooFew, StateNewer
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.state.files import flush_folder, write_private
from cipherfleet.terminal.files import fault
from cipherfleet.terminal.memory import Remembered
from cipherfleet.terminal.pin import SECRET_BYTES, wipe
from cipherfleet.terminal.spare import NewUkey, make_spare, revoke
from cipherfleet.terminal.ukey import DirectoryUkey, PublicRecord, UkeySecrets, check_vacant

VERSION = 1
KEY_BYTES, NONCE_BYTES = 32, 12
MOST_SHARES = 16
MAX_SHARE_BYTES = 1024 * 1024


class KitHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every share tells: whose kit, made when (unix seconds) and by which Ukey, and that ``threshold`` of ``shares`` are needed."""

    version: int
    kit: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    consumer: ConsumerId
    ukey: UkeyId
    made_by: UkeyId
    created_at: float
    shares: Annotated[int, Meta(ge=2, le=MOST_SHARES)]
    threshold: Annotated[int, Meta(ge=2, le=MOST_SHARES)]


class ShareFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One custodian's file. ``header`` is authenticated by the kit; ``words`` is a SLIP-39 mnemonic; ``kit`` is nonce || sealed Ukey.

    ``checksum`` is SHA-256 over all of it: no protection, only what tells a damaged file from another one.
    """

    header: msgspec.Raw
    index: Annotated[int, Meta(ge=1, le=MOST_SHARES)]
    words: str
    kit: bytes
    checksum: bytes


class _Content(msgspec.Struct, frozen=True):
    record: PublicRecord
    secrets: bytes
    ciphertext_cmk: bytes
    remembered: Remembered


class Kit(msgspec.Struct, frozen=True):
    """What was made. ``files``: one for each custodian."""

    header: KitHeader
    files: tuple[str, ...]


async def split(ukey: DirectoryUkey, folder: Path, *, shares: int, threshold: int) -> Kit:
    """A kit in the new folder ``folder``, one file a custodian. What fails leaves nothing, and the kit's Ukey is revoked.

    Raises ``Malformed`` for numbers that make no sense, ``Exists``, or as ``make_spare``, ``DiskFull``, ``FileProblem``.
    """
    if not 2 <= threshold <= shares <= MOST_SHARES:
        raise Malformed(f"a kit has 2 to {MOST_SHARES} shares, of which 2 to all are needed", "give --shares and --threshold")
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link that must not be there
    check_vacant(folder)
    kit = secrets.token_hex(8)
    with await make_spare(ukey, label=f"kit {kit}, {threshold} of {shares}") as spare:
        record = spare.record
        header = KitHeader(VERSION, kit, record.consumer, UkeyId(record.serial), UkeyId(ukey.record.serial), time.time(), shares, threshold)
        try:
            return Kit(header, _write(folder, seal(spare, header)))
        except BaseException as exc:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(CipherfleetError):
                await revoke(ukey, UkeyId(record.serial))
            if isinstance(exc, OSError):
                raise fault(exc, folder) from exc
            raise


def _write(folder: Path, shares: Sequence[ShareFile]) -> tuple[str, ...]:
    folder.mkdir(mode=0o700, exist_ok=True)
    paths = []
    for share in shares:
        header = read_header(share)
        path = folder / f"{header.consumer}-share-{share.index}-of-{header.shares}.json"
        write_private(path, codec.encode(share))
        paths.append(str(path))
    flush_folder(folder)
    return tuple(paths)


def seal(spare: NewUkey, header: KitHeader) -> list[ShareFile]:
    """The spare under a fresh key, and the key in shares."""
    raw, key = codec.encode(header), bytearray(os.urandom(KEY_BYTES))
    content = bytearray(codec.encode(_Content(spare.record, bytes(spare.secrets.buffer), spare.ciphertext_cmk, spare.remembered)))
    try:
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + AESGCM(key).encrypt(nonce, content, raw)
        words = generate_mnemonics(1, [(header.threshold, header.shares)], bytes(key), iteration_exponent=0)[0]
    finally:
        wipe(key, content)
    files = [ShareFile(msgspec.Raw(raw), index, text, sealed, b"") for index, text in enumerate(words, 1)]
    return [msgspec.structs.replace(file, checksum=_checksum(file)) for file in files]


def read_share(raw: bytes, name: str) -> ShareFile:
    """One custodian's file, as far as it can be checked alone. Raises ``ShareInvalid`` or ``StateNewer``."""
    try:
        share = codec.decode(raw, ShareFile, limit=MAX_SHARE_BYTES)
    except CipherfleetError as exc:
        raise ShareInvalid(f"{name} is no share of a recovery kit, or was cut off") from exc
    if not hmac.compare_digest(share.checksum, _checksum(share)):
        raise ShareInvalid(f"{name} was changed")
    header = read_header(share, name)
    try:
        words = Share.from_mnemonic(share.words)
    except (MnemonicError, ValueError) as exc:
        raise ShareInvalid(f"the words in {name} were changed") from exc
    if (words.index + 1, words.member_threshold, words.group_count) != (share.index, header.threshold, 1):
        raise ShareInvalid(f"the words in {name} belong to another share")
    return share


def read_header(share: ShareFile, name: str = "the share") -> KitHeader:
    """Raises ``ShareInvalid`` or ``StateNewer``."""
    try:
        header = codec.decode(share.header, KitHeader)
    except Malformed as exc:
        raise ShareInvalid(f"what {name} says of its kit cannot be read") from exc
    if header.version > VERSION:
        raise StateNewer(f"{name} has format {header.version}, this program knows {VERSION}", "upgrade cipherfleet")
    return header


def recover(shares: Sequence[tuple[str, bytes]]) -> tuple[KitHeader, NewUkey]:
    """The kit's Ukey, from the files (name, content) of enough custodians; to be written under a new PIN.

    Raises ``ShareInvalid``, ``ShareForeign``, ``ShareRepeated``, ``SharesTooFew`` or ``StateNewer``.
    """
    read = [(name, read_share(raw, name)) for name, raw in shares]
    if not read:
        raise SharesTooFew("no share was given")
    first_name, first = read[0]
    header, seen = read_header(first), dict[int, str]()
    for name, share in read:
        if read_header(share).kit != header.kit:
            raise ShareForeign(f"{name} is of another kit than {first_name}")
        if bytes(share.header) != bytes(first.header) or share.kit != first.kit:
            raise ShareInvalid(f"{name} and {first_name} hold different kits under one name")
        if share.index in seen:
            raise ShareRepeated(f"{name} and {seen[share.index]} are the same share")
        seen[share.index] = name
    if len(read) < header.threshold:
        raise SharesTooFew(f"{header.threshold} of {header.shares} shares are needed, {len(read)} were given")
    key = _combine([share.words for _, share in read[: header.threshold]])
    content = bytearray(max(0, len(first.kit) - NONCE_BYTES - 16))
    try:
        AESGCM(key).decrypt_into(first.kit[:NONCE_BYTES], first.kit[NONCE_BYTES:], bytes(first.header), content)
        opened = codec.decode(content, _Content)
    except (InvalidTag, ValueError, Malformed) as exc:
        raise ShareInvalid("the shares do not open their kit: what they say of it, or the kit, was changed") from exc
    finally:
        wipe(key, content)
    if len(opened.secrets) != SECRET_BYTES or (opened.record.consumer, opened.record.serial) != (header.consumer, header.ukey):
        raise ShareInvalid("the kit holds something else than its shares say")
    return header, NewUkey(opened.record, UkeySecrets(bytearray(opened.secrets)), opened.ciphertext_cmk, opened.remembered)


def _combine(words: list[str]) -> bytearray:
    """Raises ``ShareInvalid`` when the shares do not fit each other."""
    try:
        key = bytearray(combine_mnemonics(words))
    except (MnemonicError, ValueError) as exc:
        raise ShareInvalid("the shares do not fit each other: one was changed, or is of another kit") from exc
    if len(key) != KEY_BYTES:
        raise ShareInvalid("the shares hold no key of a kit")
    return key


def _checksum(share: ShareFile) -> bytes:
    return hashlib.sha256(codec.encode([bytes(share.header), share.index, share.words, share.kit])).digest()
