"""What a directory Ukey remembers: ``checkpoint.json``, with a MAC so that nobody without the PIN writes into it.

The agent and ``cipherfleet app add`` may use one Ukey at the same time, so every change reads, changes and replaces the file
under a lock on the folder. The lock's descriptor also pins the folder: what is written goes to this Ukey, even while somebody
renames it.
"""

import asyncio
import fcntl
import hashlib
import hmac
import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from cipherfleet.channel import codec
from cipherfleet.contract.errors import CipherfleetError, EscrowRolledBack, Malformed, UkeyAbsent, UkeyInvalid
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.policy import INTERNATIONAL, Policy
from cipherfleet.state.files import write_private
from cipherfleet.terminal.files import fault, read_file
from cipherfleet.terminal.pin import wipe

CHECKPOINT = "checkpoint.json"


class Remembered(msgspec.Struct, frozen=True):
    """``statement_sequence``: the last number a statement of this Ukey was given."""

    seen: Seen
    statement_sequence: int = 0
    policy: Policy = INTERNATIONAL
    version: int = 1


class _Sealed(msgspec.Struct, frozen=True):
    remembered: msgspec.Raw
    mac: bytes


class DirectoryMemory:
    """Implements ``UkeyMemory`` in a folder."""

    def __init__(self, folder: Path, consumer: ConsumerId, key: bytearray, present: Callable[[], bool]) -> None:
        """Raises ``UkeyInvalid`` when the file is damaged or missing."""
        self._folder, self._consumer, self._key, self._present = folder, consumer, key, present
        self._known = _read(folder, key)
        self._lock = threading.Lock()  # the key is not wiped under a write that uses it

    @staticmethod
    def write_first(folder: Path, key: bytearray, seen: Seen) -> None:
        """The memory of a new Ukey."""
        _write(folder, key, Remembered(seen))

    @property
    def seen(self) -> Seen:
        return self._known.seen

    @property
    def policy(self) -> Policy:
        return self._known.policy

    async def set_policy(self, policy: Policy) -> None:
        await asyncio.to_thread(self._change, lambda known: msgspec.structs.replace(known, policy=policy))

    async def look(self) -> Seen:
        def again() -> None:
            with self._lock:
                if not self._key:
                    raise UkeyAbsent("the Ukey was closed")
                try:
                    self._known = _read(self._folder, self._key)
                except CipherfleetError:
                    self._check_present()  # a stick that was pulled is not a damaged one
                    raise

        await asyncio.to_thread(again)
        return self._known.seen

    async def remember(self, seen: Seen) -> None:
        if seen != self._known.seen:
            await asyncio.to_thread(self._change, lambda known: msgspec.structs.replace(known, seen=_newer(known.seen, seen)))

    async def next_sequence(self) -> int:
        def count(known: Remembered) -> Remembered:
            return msgspec.structs.replace(known, statement_sequence=known.statement_sequence + 1)

        return (await asyncio.to_thread(self._change, count)).statement_sequence

    def close(self) -> None:
        with self._lock:
            wipe(self._key)
            self._key = bytearray()

    def _change(self, change: Callable[[Remembered], Remembered]) -> Remembered:
        with self._lock:
            if not self._key:
                raise UkeyAbsent("the Ukey was closed")
            return self._change_locked(change)

    def _change_locked(self, change: Callable[[Remembered], Remembered]) -> Remembered:
        """Raises ``UkeyAbsent``, ``UkeyInvalid``, ``DiskFull`` or ``FileProblem``; the old file is whole then."""
        try:
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            raise UkeyAbsent(f"the Ukey at {self._folder} is gone") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._check_present()
            pinned = Path(f"/proc/self/fd/{descriptor}")
            self._known = _read(pinned, self._key)  # also when the change is refused
            changed = change(self._known)
            _write(pinned, self._key, changed)
            os.fsync(descriptor)
        except (OSError, UkeyInvalid) as exc:
            self._check_present()  # a stick that was pulled is not a damaged one
            if isinstance(exc, OSError):
                raise fault(exc, self._folder) from exc
            raise
        finally:
            os.close(descriptor)
        self._known = changed
        return changed

    def _check_present(self) -> None:
        if not self._present():
            raise UkeyAbsent(f"the Ukey at {self._folder} is gone")


def _newer(old: Seen, new: Seen) -> Seen:
    if new.epoch != old.epoch or (new.sequence == old.sequence and new.head != old.head):
        raise EscrowRolledBack("the escrow's history is another than the Ukey saw")
    if new.sequence < old.sequence:
        raise EscrowRolledBack(f"the escrow shows {new.sequence} changes, the Ukey saw {old.sequence}")
    return new


def _read(folder: Path, key: bytearray) -> Remembered:
    try:
        sealed = codec.decode(read_file(folder / CHECKPOINT), _Sealed)
        if not hmac.compare_digest(sealed.mac, _mac(key, bytes(sealed.remembered))):
            raise UkeyInvalid(f"the Ukey's {CHECKPOINT} was changed by somebody else")
        return codec.decode(sealed.remembered, Remembered)
    except Malformed as exc:
        raise UkeyInvalid(f"the Ukey's {CHECKPOINT} is damaged") from exc


def _write(folder: Path, key: bytearray, remembered: Remembered) -> None:
    raw = codec.encode(remembered)
    write_private(folder / CHECKPOINT, codec.encode(_Sealed(msgspec.Raw(raw), _mac(key, raw))))


def _mac(key: bytearray, raw: bytes) -> bytes:
    return hmac.new(key, b"cipherfleet ukey checkpoint v1" + raw, hashlib.sha256).digest()
