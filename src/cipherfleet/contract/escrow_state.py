"""What a VCM keeps of the escrow's log, and what it checks against it: small enough for a million keys, pure.

Of each row its newest digest (32 bytes), of each key its id (16 bytes) and where its rows stand (8 bytes and its share of a
hash table), of each entry the head after it (32 bytes). What a key's attributes were before is kept only of keys that changed.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from cipherfleet.contract.errors import EscrowRolledBack, EscrowRowForeign, EscrowRowTampered
from cipherfleet.contract.escrow import (
    APPLICATION,
    DELEGATION,
    EPOCH,
    NUMBERED,
    DelegationName,
    EscrowRow,
    LogEntry,
    Seen,
    StatementEntry,
    check_follows,
    delegation_of,
    epoch_of,
    extend,
    genesis,
    row_digest,
    statement_digest,
)
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId

DIGEST_BYTES = 32
ID_BYTES = 16
KEY = "key/"
MAX_DIGITS = 10
_COMMON = ("0", "1")


class Changes(msgspec.Struct):
    """What entries of the log brought: ``rows`` that were replaced (by number), ``keys`` they belong to, new statements."""

    rows: set[int] = msgspec.field(default_factory=set)
    keys: set[KeyId] = msgspec.field(default_factory=set)
    applications: set[ApplicationName] = msgspec.field(default_factory=set)


class EscrowState:
    """The log of one consumer, as far as it was applied. Rows are numbered in the order of their first entry.

    A new epoch is an entry of the log, so what was before it is chained to its beginning like all else.
    """

    def __init__(self, consumer: ConsumerId, epoch: int) -> None:
        self._consumer, self._epoch = consumer, epoch
        self._heads = bytearray(genesis(consumer, epoch))
        self._keys = _Ids()
        self._attributes, self._first = array("I"), array("I")  # of each key: row numbers + 1 of versions 0 and 1, 0 for none
        self._others: dict[int, dict[int, int]] = {}  # of each key with more versions: their row numbers
        self._digests = bytearray()
        self._before: dict[int, bytes] = {}  # of attributes that were replaced: the digest of what they replaced
        self._superseded: set[bytes] = set()
        self._statements: dict[ApplicationName, tuple[str, bytes]] = {}
        self._newest_statement = 0
        self._delegations: dict[DelegationName, tuple[int, bytes]] = {}
        self._newest_delegation: dict[ApplicationName, int] = {}
        self._delegated: dict[ApplicationName, dict[KeyId, list[DelegationName]]] = {}  # by who got it

    # -- the log -------------------------------------------------------------------------------------------------------

    @property
    def point(self) -> Seen:
        return Seen(self._epoch, self.sequence, bytes(self._heads[-DIGEST_BYTES:]))

    @property
    def sequence(self) -> int:
        return len(self._heads) // DIGEST_BYTES - 1

    def leads_through(self, point: Seen) -> bool:
        """Whether ``point`` is one of this log's."""
        at = point.sequence * DIGEST_BYTES
        return point.epoch == self._epoch and 0 <= point.sequence <= self.sequence and self._heads[at : at + DIGEST_BYTES] == point.head

    def apply(self, log: Iterable[LogEntry]) -> Changes:
        """Entries that continue the log. Raises ``EscrowRolledBack``; what was applied by then stays, so throw this away."""
        changes = Changes()
        sequence, head = self.sequence, bytes(self._heads[-DIGEST_BYTES:])
        for entry in log:
            sequence += 1
            if entry.sequence != sequence:
                raise EscrowRolledBack(f"the escrow's log lacks entry {sequence}")
            if len(entry.digest) != DIGEST_BYTES:
                raise EscrowRolledBack(f"entry {sequence} of the escrow's log has no digest")
            if entry.subject.startswith(KEY):
                self._write(entry, changes)
            elif entry.subject.startswith(NUMBERED):
                self._sign(entry, changes)
            elif entry.subject.startswith(DELEGATION):
                self._delegate(entry)
            else:
                raise EscrowRolledBack(f"entry {sequence} of the escrow's log is about {entry.subject[:80]}, which nobody wrote")
            head = extend(head, entry)
            self._heads += head
        return changes

    def _write(self, entry: LogEntry, changes: Changes) -> None:
        """A sealed row is made anew for each change, so none comes twice; and material is written once."""
        id_, version = _parse(entry)
        index = self._keys.add(id_)
        number = self._find(index, version)
        if number is None:
            self._place(index, version, len(self._digests) // DIGEST_BYTES)
            self._digests += entry.digest
            return
        if version != 0:
            # A sibling that was made and kept back is sealed just as well: the material of a version is the one written first.
            raise EscrowRolledBack(f"entry {entry.sequence} writes {entry.subject} a second time")
        newest = self._digest(number)
        if entry.digest == newest or entry.digest in self._superseded:
            raise EscrowRolledBack(f"entry {entry.sequence} sets {entry.subject} back to what it was before")
        self._superseded.add(newest)
        self._before[number] = newest
        self._digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] = entry.digest
        changes.rows.add(number)
        changes.keys.add(KeyId(id_.hex()))

    def _place(self, index: int, version: int, number: int) -> None:
        if index == len(self._attributes):
            self._attributes.append(0)
            self._first.append(0)
        if version == 0:
            self._attributes[index] = number + 1
        elif version == 1:
            self._first[index] = number + 1
        else:
            self._others.setdefault(index, {})[version] = number

    def _sign(self, entry: LogEntry, changes: Changes) -> None:
        """Statements are numbered, over all applications and Ukeys."""
        subject, _, number = entry.subject.rpartition("@")
        if not number.isdecimal() or f"{subject}@{int(number)}" != entry.subject or int(number) <= self._newest_statement:
            raise EscrowRolledBack(f"entry {entry.sequence} brings {entry.subject} after statement {self._newest_statement}")
        self._newest_statement = int(number)
        if subject.startswith(EPOCH):
            if epoch_of(entry.subject) <= self._epoch:
                raise EscrowRolledBack(f"entry {entry.sequence} begins {entry.subject} in epoch {self._epoch}")
            self._epoch = epoch_of(entry.subject)
        if not subject.startswith(APPLICATION):
            return  # for terminals: what a VCM needs of it came sealed to its card
        name = ApplicationName(subject.removeprefix(APPLICATION))
        self._statements[name] = entry.subject, entry.digest
        changes.applications.add(name)

    def _delegate(self, entry: LogEntry) -> None:
        """Each application numbers what it says of delegation, so nothing of it comes twice, or late."""
        found = delegation_of(entry.subject)
        if found is None:
            raise EscrowRolledBack(f"entry {entry.sequence} of the escrow's log is about {entry.subject[:80]}, which nobody wrote")
        name, number = found
        newest = self._newest_delegation.get(name.delegator, 0)
        if number <= newest:
            raise EscrowRolledBack(f"entry {entry.sequence} brings {entry.subject} after delegation {newest}")
        self._newest_delegation[name.delegator] = number
        if name not in self._delegations:
            self._delegated.setdefault(name.delegate, {}).setdefault(name.key, []).append(name)
        self._delegations[name] = number, entry.digest

    # -- what it names -------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._digests) // DIGEST_BYTES

    @property
    def keys(self) -> int:
        """How many keys there are, deleted ones included."""
        return len(self._keys)

    @property
    def applications(self) -> Sequence[ApplicationName]:
        return list(self._statements)

    def newest_delegation(self, delegator: ApplicationName) -> int:
        """The number of an application's newest statement on delegation, 0 if there is none."""
        return self._newest_delegation.get(delegator, 0)

    @property
    def delegations(self) -> Sequence[DelegationName]:
        return list(self._delegations)

    def delegated(self, delegate: ApplicationName, key: KeyId | None = None) -> Sequence[DelegationName]:
        """What an application was given, of one key or of any."""
        keys = self._delegated.get(delegate, {})
        return keys.get(key, []) if key is not None else [name for names in keys.values() for name in names]

    def delegation(self, name: DelegationName) -> tuple[int, bytes] | None:
        """The number of the newest statement, and its digest."""
        return self._delegations.get(name)

    def number(self, key: KeyId, version: int) -> int | None:
        """The number of a row, if it was ever written."""
        index = self._keys.find(bytes.fromhex(key))
        if index is None:
            return None
        return self._find(index, version)

    def _find(self, index: int, version: int) -> int | None:
        if index == len(self._attributes):  # just added
            return None
        if version > 1:
            return self._others.get(index, {}).get(version)
        number = (self._first if version == 1 else self._attributes)[index]
        return number - 1 if number else None

    def digest(self, key: KeyId, version: int) -> bytes:
        """The newest digest of a row, empty if there is none."""
        number = self.number(key, version)
        return b"" if number is None else self._digest(number)

    def versions(self, key: KeyId) -> tuple[int, ...]:
        """The versions of a key's material, oldest first; empty for a key that is not there."""
        index = self._keys.find(bytes.fromhex(key))
        if index is None:
            return ()
        first = (1,) if self._first[index] else ()
        return (*first, *sorted(self._others.get(index, ())))

    def keys_from(self, position: int, count: int) -> Iterator[KeyId]:
        """Keys in the order of their creation, from the ``position``-th (0: the first)."""
        for index in range(position, min(position + count, len(self._keys))):
            yield KeyId(self._keys[index].hex())

    # -- what is checked -----------------------------------------------------------------------------------------------

    def check_row(self, row: EscrowRow) -> int:
        """That a row is this consumer's, and the newest; its number.

        Raises ``EscrowRowForeign``, ``EscrowRowTampered`` or ``EscrowRolledBack``.
        """
        if row.consumer != self._consumer:
            raise EscrowRowForeign(f"row of key {row.key} belongs to another consumer")
        number = self.number(row.key, row.version)
        if number is None:
            raise EscrowRowForeign(f"row {row.subject} was never written by this consumer")
        digest = row_digest(row)
        if digest != self._digest(number):
            if digest in self._superseded:
                raise EscrowRolledBack(f"row {row.subject} was set back to what it was before")
            raise EscrowRowTampered(f"row {row.subject} is not the one that was written last")
        check_follows(row, self._before.get(number, b""))
        return number

    def check_statement(self, kept: StatementEntry) -> None:
        """That it is the newest statement of its application. Raises ``EscrowRowTampered``."""
        if self._statements.get(kept.name) != (kept.subject, statement_digest(kept.statement)):
            raise EscrowRowTampered(f"the statement for application {kept.name} is not the newest one")

    def _digest(self, number: int) -> bytes:
        return bytes(self._digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES])


def _parse(entry: LogEntry) -> tuple[bytes, int]:
    """Id and version of a row's entry, written in the one way there is. Raises ``EscrowRolledBack``."""
    key, _, version = entry.subject[len(KEY) :].partition("/")
    if version in _COMMON or (version.isascii() and version.isdigit() and len(version) <= MAX_DIGITS and version[0] != "0"):
        try:
            id_ = bytes.fromhex(key)
        except ValueError:
            id_ = b""
        if len(id_) == ID_BYTES and id_.hex() == key:
            return id_, int(version)
    raise EscrowRolledBack(f"entry {entry.sequence} of the escrow's log is about {entry.subject[:80]}, which nobody wrote")


class _Ids:
    """Ids of 16 bytes in order, and a table (open addressing, at most half full) that finds them: some 28 bytes for each."""

    def __init__(self) -> None:
        self._ids = bytearray()
        self._slots = array("I", bytes(4 * 64))

    def __len__(self) -> int:
        return len(self._ids) // ID_BYTES

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._ids[index * ID_BYTES : (index + 1) * ID_BYTES])

    def find(self, id_: bytes) -> int | None:
        found = self._slots[self._slot(id_)]
        return found - 1 if found else None

    def add(self, id_: bytes) -> int:
        """Where it stands now, or stood already."""
        slot = self._slot(id_)
        if self._slots[slot]:
            return self._slots[slot] - 1
        self._ids += id_
        count = len(self)
        self._slots[slot] = count
        if 2 * count > len(self._slots):
            self._slots = array("I", bytes(8 * len(self._slots)))
            for index in range(count):
                self._slots[self._slot(self[index])] = index + 1
        return count - 1

    def _slot(self, id_: bytes) -> int:
        """The slot that has it, or the free one that it would take. ``hash`` is keyed, so nobody chooses ids that collide."""
        slots, ids, mask = self._slots, self._ids, len(self._slots) - 1
        slot = hash(id_) & mask
        while (found := slots[slot]) and ids[(found - 1) * ID_BYTES : found * ID_BYTES] != id_:
            slot = (slot + 1) & mask
        return slot
