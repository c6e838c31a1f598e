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
from cipherfleet.contract.audit import AuditPoint
from cipherfleet.contract.errors import CipherfleetError, EscrowRolledBack, Malformed, UkeyAbsent, UkeyInvalid
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.contract.policy import INTERNATIONAL, Policy
from cipherfleet.state.files import write_private
from cipherfleet.terminal.files import fault, read_file
from cipherfleet.terminal.pin import wipe

CHECKPOINT = "checkpoint.json"
MAX_AHEAD = 2**32
"""By how much the KMC's word may raise the number of the next statement."""


class KnownUkey(msgspec.Struct, frozen=True):
    """A Ukey of the same consumer; ``until``: the number of the statement that revoked it, 0 while it counts."""

    ukey: UkeyId
    public_key: bytes  # SubjectPublicKeyInfo of its identity key, DER
    until: int = 0


class Remembered(msgspec.Struct, frozen=True):
    """``statement_sequence``: the last number that a statement was given, here or by another Ukey of the consumer that is known of.

    ``ukeys``: all of the consumer, after the statements up to number ``ukey_sequence``; empty before there ever was a second one.
    ``audit``: the newest seal on the audit log. ``policy_point``: epoch and number of the policy's statement, ``policy_digest`` of it,
    ``policy_by`` the Ukey that signed it; none, before a policy was ever set.
    """

    seen: Seen
    statement_sequence: int = 0
    policy: Policy = INTERNATIONAL
    version: int = 1
    ukeys: tuple[KnownUkey, ...] = ()
    ukey_sequence: int = 0
    audit: AuditPoint | None = None
    policy_point: tuple[int, int] = (0, 0)
    policy_digest: bytes = b""
    policy_by: str = ""


class NewPolicy(msgspec.Struct, frozen=True):
    """A policy that a Ukey of the consumer signed, verified. ``recorded``: the log that was read names it."""

    policy: Policy
    point: tuple[int, int]  # epoch and number of its statement
    digest: bytes
    by: str  # the signing Ukey's serial
    recorded: bool


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
    def write_first(folder: Path, key: bytearray, remembered: Remembered) -> None:
        """The memory of a new Ukey."""
        _write(folder, key, remembered)

    @property
    def seen(self) -> Seen:
        return self._known.seen

    @property
    def policy(self) -> Policy:
        return self._known.policy

    async def set_policy(self, policy: NewPolicy) -> None:
        await asyncio.to_thread(self._change, lambda known: _with_policy(known, policy))

    @property
    def known(self) -> Remembered:
        """All of it, as of the last look."""
        return self._known

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

    async def learn(
        self,
        point: Seen,
        ukeys: tuple[KnownUkey, ...],
        ukey_sequence: int,
        statement_sequence: int,
        policy: NewPolicy | None = None,
    ) -> None:
        """What the escrow showed, once it was verified: where its log stands, whose signatures count, which numbers are used, the policy.

        Newer things that were learned meanwhile stay. ``statement_sequence`` is only the KMC's word, so it is believed up to a bound.
        Raises ``EscrowRolledBack``.
        """

        def change(known: Remembered) -> Remembered:
            ahead = point.epoch != known.seen.epoch or point.sequence >= known.seen.sequence
            number = max(known.statement_sequence, min(statement_sequence, known.statement_sequence + MAX_AHEAD))
            changed = msgspec.structs.replace(
                known, seen=_newer(known.seen, point) if ahead else known.seen, statement_sequence=max(number, ukey_sequence)
            )
            if ukey_sequence > known.ukey_sequence:
                changed = msgspec.structs.replace(changed, ukeys=ukeys, ukey_sequence=ukey_sequence)
            return changed if policy is None else _with_policy(changed, policy)

        if change(self._known) != self._known:
            await asyncio.to_thread(self._change, change)

    async def begin_epoch(self, point: Seen) -> None:
        """The one way back: the consumer accepted a restored escrow, which goes on at ``point`` in a later epoch.

        Raises ``EscrowRolledBack`` for an epoch that is not later.
        """

        def change(known: Remembered) -> Remembered:
            if point.epoch <= known.seen.epoch:
                raise EscrowRolledBack(f"epoch {point.epoch} is not later than {known.seen.epoch}")
            return msgspec.structs.replace(known, seen=point)

        await asyncio.to_thread(self._change, change)

    @property
    def audit(self) -> AuditPoint | None:
        return self._known.audit

    async def remember_audit(self, point: AuditPoint) -> None:
        def newer(known: Remembered) -> Remembered:
            old = known.audit
            if old is not None and (old.epoch, old.sequence) >= (point.epoch, point.sequence):
                return known
            return msgspec.structs.replace(known, audit=point)

        if point != self._known.audit:
            await asyncio.to_thread(self._change, newer)

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


def _with_policy(known: Remembered, new: NewPolicy) -> Remembered:
    """With the newer policy, which is never one from before. Of two with one number the log keeps one: that counts."""
    if new.point < known.policy_point or (new.point == known.policy_point and not new.recorded):
        return known
    number = max(known.statement_sequence, min(new.point[1], known.statement_sequence + MAX_AHEAD))
    return msgspec.structs.replace(
        known, policy=new.policy, policy_point=new.point, policy_digest=new.digest, policy_by=new.by, statement_sequence=number
    )


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
