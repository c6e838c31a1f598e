"""The consumer's rows and statements as one VCM sees them: nothing of the escrow is believed before it is checked.

The log comes in pages and only what is new of it; rows come when they are needed, and in the background all of them once, each
checked against the log. The log counts only with the HSM's signature, when it passes through what the Ukey and this VCM have
seen before. If it does not, or a row does not fit, nothing is served from the escrow until a good one came: fail closed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from cipherfleet.channel import signing
from cipherfleet.computing.vcm_rows import RowCache
from cipherfleet.computing.vcm_sweep import Sweep
from cipherfleet.contract.errors import (
    CheckpointForged,
    CipherfleetError,
    EscrowRolledBack,
    EscrowRowForeign,
    EscrowRowTampered,
    KeyUnknown,
    KeyVersionTrimmed,
    KmcUnavailable,
    StateConflict,
    StatementForged,
    Tampered,
)
from cipherfleet.contract.escrow import (
    FIRST_EPOCH,
    DelegationName,
    EscrowRow,
    LogEntry,
    RowName,
    RowWrite,
    Seen,
    StatementEntry,
    check_follows,
    replay,
    row_digest,
    statement_digest,
    was_destroyed,
)
from cipherfleet.contract.escrow_state import Changes, EscrowState
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.kmc_api import (
    MAX_ROW_NAMES,
    MAX_STATEMENT_NAMES,
    DelegationRequest,
    DelegationsFound,
    DelegationsRequest,
    EscrowReceipt,
    EscrowWrite,
    KeySearch,
    KeysFound,
    LogPage,
    RowsReply,
    RowsRequest,
    StatementsReply,
    StatementsRequest,
)
from cipherfleet.contract.statements import CheckpointStatement, DestructionStatement, Signed
from cipherfleet.contract.vcm_api import ReceiptReply

T = TypeVar("T")

REFRESH_S = 0.05
"""Looks at the escrow are at least this far apart, however many callers name what is not there."""
ATTEMPTS = 8
"""How often rows are asked for again because the log went on meanwhile."""


class Kmc(Protocol):
    """The part of a ``Caller`` that the escrow needs."""

    async def call(self, method: str, path: str, body: object | None = None, *, reply: type[T]) -> T: ...


class Escrow:
    """Rows on demand, ``statements``, and the point of the log (``seen``) at which they stand."""

    def __init__(self, consumer: ConsumerId, kmc: Kmc, kmc_signing_key: bytes) -> None:
        self._consumer, self._kmc, self._key = consumer, kmc, kmc_signing_key
        self._lock = asyncio.Lock()
        self._asked = float("-inf")
        self._fault: CipherfleetError | None = None
        self._suspects: dict[RowName, None] = {}  # rows to look at before anything is served
        self._outcome: CipherfleetError | None = None  # of the newest look, for those who shared it
        self._pinned: Seen | None = None
        self._state: EscrowState | None = None
        self._cache = RowCache()
        self._news: set[KeyId] = set()
        self._sweep: Sweep | None = None
        self.seen: Seen | None = None
        self.statements: dict[ApplicationName, StatementEntry] = {}

    async def load(self, seen: Seen, kmc_signing_key: bytes = b"") -> None:
        """step g: the whole log, and the first rows; ``sweep_page`` brings the others.

        ``seen`` and whose checkpoints count is what the Ukey knew. Raises what ``refresh`` raises.
        """
        self.seen, self._key = seen, kmc_signing_key or self._key
        await self.refresh()
        self._sweep = Sweep(0 if self._state is None else self._state.rows)
        await self.sweep_page()

    def pin(self, point: Seen) -> None:
        """The Ukey has seen ``point``: nothing is served from the escrow until its log leads through it.

        Raises ``EscrowRolledBack`` when the log, as far as it is known, leads elsewhere.
        """
        if self._pinned is None or point.sequence >= self._pinned.sequence:
            self._pinned = point
        if self._state is not None and not self.behind:
            _check_point(self._state, point)

    @property
    def behind(self) -> bool:
        """Whether the Ukey has seen more than this VCM."""
        return self.seen is not None and self._pinned is not None and self.seen.sequence < self._pinned.sequence

    async def refresh(self) -> None:
        """See what is there now; callers that wait at the same time share one look.

        Raises ``CheckpointForged``, ``EscrowRolledBack``, ``EscrowRowForeign``, ``EscrowRowTampered``, ``KmcUnavailable``.
        """
        came = time.monotonic()
        async with self._lock:
            if self._asked > came:
                if self._outcome is not None:
                    raise self._outcome
                return
            await asyncio.sleep(self._asked + REFRESH_S - time.monotonic())
            await self._refresh()

    async def require(self) -> None:
        """That the newest look was a good one that shows what the Ukey has seen; looks again if not. Raises what ``refresh`` does."""
        while self._fault is not None or self.behind:
            await self.refresh()

    # -- what there is -------------------------------------------------------------------------------------------------

    def versions(self, key: KeyId) -> tuple[int, ...]:
        """The versions of a key's material; empty for a key that the log does not name."""
        return () if self._state is None else self._state.versions(key)

    def has(self, key: KeyId, version: int) -> bool:
        return self._state is not None and self._state.number(key, version) is not None

    @property
    def keys(self) -> int:
        """How many keys there are, deleted ones included."""
        return 0 if self._state is None else self._state.keys

    def sealed(self, key: KeyId, version: int) -> bool:
        """Whether the card has found that the newest row is sealed by the consumer's CMK, attributes and all."""
        number = None if self._state is None else self._state.number(key, version)
        return number is not None and self._cache.sealed(number)

    def note_sealed(self, row: EscrowRow) -> None:
        """The card has checked ``row``, or made it."""
        if self._state is not None and self._state.digest(row.key, row.version) == row_digest(row):
            number = self._state.number(row.key, row.version)
            if number is not None:
                self._cache.note_sealed(number)

    async def search(self, wanted: KeySearch) -> KeysFound:
        """What the KMC's index finds: a hint. Raises ``KmcUnavailable``."""
        return await self._kmc.call("POST", "/v1/escrow/search", wanted, reply=KeysFound)

    def keys_from(self, position: int, count: int) -> Iterator[KeyId]:
        """Keys in the order of their creation: the log has all of them, whatever the KMC shows."""
        return iter(()) if self._state is None else self._state.keys_from(position, count)

    def take_news(self) -> set[KeyId]:
        """Keys whose attributes somebody changed since the last call."""
        news, self._news = self._news, set()
        return news

    async def row(self, key: KeyId, version: int) -> EscrowRow:
        """One row, checked. Raises as ``rows``, or ``KeyVersionTrimmed``."""
        for row in await self.rows((RowName(key, version),)):
            return row
        raise KeyVersionTrimmed(f"the material of version {version} of key {key} is destroyed")

    async def rows(self, names: Sequence[RowName]) -> list[EscrowRow]:
        """These rows, each checked against the log; from the cache, or from the KMC. Those of destroyed material are left out.

        Raises ``KeyUnknown`` for one that the log does not name, ``EscrowRowTampered``, ``EscrowRowForeign`` or ``EscrowRolledBack``
        for one that is not what the log names, ``KmcUnavailable``.
        """
        found = {name: row for name in names if (row := self.kept(name)) is not None}
        missing = list(dict.fromkeys(name for name in names if name not in found))
        for name in missing:
            if not self.has(name.key, name.version):
                raise KeyUnknown(f"there is no key {name.key}" if name.version == 0 else f"key {name.key} has no version {name.version}")
        for start in range(0, len(missing), MAX_ROW_NAMES):
            found |= await self._fetch(missing[start : start + MAX_ROW_NAMES], self.refresh)
        return [found[name] for name in names if name in found]

    async def receipt(self, key: KeyId) -> ReceiptReply:
        """The HSM's word that material of a key was destroyed, checked against the log.

        Raises ``StateConflict`` when none was, ``CheckpointForged`` or ``EscrowRowTampered``.
        """
        signed = await self._kmc.call("GET", f"/v1/escrow/receipts/{key}", reply=Signed)
        try:
            statement = signing.verify(signed, DestructionStatement, (self._key,))
        except StatementForged as exc:
            raise CheckpointForged("the receipt is not signed by the HSM") from exc
        if (statement.consumer, statement.key) != (self._consumer, key):
            raise CheckpointForged("the receipt is of another key")
        for one in statement.material:
            if self._state is None or self._state.digest(key, one.version) != one.digest:
                raise EscrowRowTampered(f"the receipt names material that key {key} never had")
        return ReceiptReply(signed, self._key)

    @property
    def swept(self) -> bool:
        """Whether every row there was at the beginning has been checked."""
        return self._sweep is not None and self._sweep.ended

    async def sweep_page(self) -> list[EscrowRow]:
        """Check the next rows; with the last ones, that none is missing. One call at a time. Raises as ``rows``."""
        sweep = self._sweep
        if sweep is None:
            raise RuntimeError("there is nothing to sweep before load()")
        before = self.seen
        reply = await self._kmc.call("GET", sweep.path, reply=RowsReply)
        try:
            names = sweep.names(reply.rows)
            rows = await self._fetch(names, self.refresh, (before, reply.rows))
            there = [*names, *(gone for row in rows.values() if row.version == 0 for gone in self._destroyed_with(row))]
            sweep.passed(names, [self._state.number(name.key, name.version) for name in there] if self._state is not None else ())
            if reply.end or not names:
                sweep.end()
        except Tampered as exc:
            self._fault = exc
            raise
        return list(rows.values())

    def _destroyed_with(self, row: EscrowRow) -> list[RowName]:
        return [RowName(row.key, version) for version in self.versions(row.key) if was_destroyed(row, version)]

    @property
    def state(self) -> EscrowState:
        """What the log says. Raises ``KmcUnavailable`` while it is read again."""
        if self._state is None:
            raise KmcUnavailable("the escrow is being read again")
        return self._state

    async def delegations(self, names: Sequence[DelegationName]) -> Sequence[Signed]:
        """What the KMC keeps of these, unchecked. Raises ``KmcUnavailable``."""
        found: list[Signed] = []
        for start in range(0, len(names), MAX_STATEMENT_NAMES):
            asked = DelegationsRequest(tuple(names[start : start + MAX_STATEMENT_NAMES]))
            found += (await self._kmc.call("POST", "/v1/escrow/delegations", asked, reply=DelegationsFound)).statements
        return found

    async def delegate(self, name: DelegationName, number: int, signed: Signed) -> None:
        """Store an application's delegation; on return the escrow has committed it. Raises as ``write``, and what the KMC refuses."""
        await self._kmc.call("POST", "/v1/delegations", DelegationRequest(signed), reply=EscrowReceipt)
        await self.refresh()
        kept = self.state.delegation(name)
        if kept is None or kept[0] < number or (kept[0] == number and kept[1] != statement_digest(signed)):
            raise EscrowRowTampered(f"the escrow wrote something else than {name.subject(number)}")

    # -- changes -------------------------------------------------------------------------------------------------------

    async def write(self, rows: Sequence[EscrowRow], *, replaces: Sequence[EscrowRow | None], actor: str, event: str) -> None:
        """Store rows, all or none; on return the escrow has committed them.

        Raises ``StateConflict`` when one was changed meanwhile (``refresh`` then), or ``KmcUnavailable``.
        """
        digests = [b"" if old is None else row_digest(old) for old in replaces]
        writes = tuple(RowWrite(row, previous) for row, previous in zip(rows, digests, strict=True))
        async with self._lock:
            for row, previous in zip(rows, digests, strict=True):
                if self._state is None or self._state.digest(row.key, row.version) != previous:
                    raise StateConflict(f"row {row.subject} was changed meanwhile")
                check_follows(row, previous)
            receipt = await self._kmc.call("POST", "/v1/escrow", EscrowWrite(writes, actor, event), reply=EscrowReceipt)
            for row, entry in zip(rows, receipt.log, strict=False):
                if entry.subject != row.subject or entry.digest != row_digest(row):
                    raise EscrowRowTampered(f"the escrow wrote something else than row {row.subject}")
            if len(receipt.log) != len(rows) or self.seen is None:
                raise EscrowRowTampered("the escrow's receipt does not name what was written")
            if receipt.log[0].sequence != self.seen.sequence + 1:  # somebody else wrote in between
                await self._refresh()
            else:
                self._extend(receipt.log)
            for row in rows:
                self._keep(row)

    def _extend(self, log: tuple[LogEntry, ...]) -> None:
        """The log went on with our own entries."""
        pinned, was = self._pinned, self.seen
        assert self._state is not None  # noqa: S101 - what is written continues it
        assert was is not None  # noqa: S101
        try:
            self._apply(self._state, log)
            if pinned is not None and was.sequence < pinned.sequence <= self._state.sequence:
                _check_point(self._state, pinned)
        except EscrowRolledBack as exc:
            self._fault, self._state = exc, None
            raise
        self.seen = self._state.point

    # -- the log -------------------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        """The lock is held."""
        self._asked = time.monotonic()
        self._outcome = KmcUnavailable("the look at the escrow was given up")
        try:
            await self._read_log()
            while names := [name for name in self._suspects if self.has(name.key, name.version)][:MAX_ROW_NAMES]:
                await self._fetch(names, self._read_log)
                for name in names:
                    self._suspects.pop(name, None)
        except CipherfleetError as exc:
            self._outcome = exc
            if isinstance(exc, Tampered):
                self._fault = exc
            raise
        self._suspects.clear()
        self._fault = self._outcome = None

    async def _read_log(self) -> None:
        """What is new of it, up to a checkpoint that fits; all of it when there is none that was good."""
        pinned, seen = self._pinned, self.seen  # what is pinned later may be newer than the answer
        assert seen is not None  # noqa: S101 - load() came first
        state = self._state
        if state is None:
            state = fresh = EscrowState(self._consumer, FIRST_EPOCH)

            def take(log: Sequence[LogEntry]) -> None:
                changes = fresh.apply(log)
                if fresh.sequence > seen.sequence:
                    self._suspects |= {RowName(key, 0): None for key in changes.keys}

            checkpoint = await self._pages(state.point, take)
            self._check(checkpoint, state.point, seen)
            if not state.leads_through(seen):
                raise EscrowRolledBack("the escrow's history differs from the one seen before")
            if pinned is not None:
                _check_point(state, pinned)
            await self._read_statements(state, set(state.applications))
            self._cache.clear()
            self._state = state
        else:
            new: list[LogEntry] = []
            checkpoint = await self._pages(state.point, new.extend)
            self._check(checkpoint, replay(state.point, tuple(new)), seen)
            try:
                changes = self._apply(state, new)
                self._suspects |= {RowName(key, 0): None for key in changes.keys}  # what others changed is looked at
                if pinned is not None:
                    _check_point(state, pinned)
                await self._read_statements(state, changes.applications)
            except CipherfleetError:
                self._state = None  # it is read again from its beginning
                raise
        self.seen = state.point

    async def _pages(self, point: Seen, take: Callable[[tuple[LogEntry, ...]], object]) -> Signed:
        """All entries after ``point``, to ``take`` page by page; the checkpoint behind them."""
        sequence = point.sequence
        while True:
            page = await self._kmc.call("GET", f"/v1/escrow?after={sequence}", reply=LogPage)
            take(page.log)
            sequence += len(page.log)
            if page.checkpoint is not None:
                return page.checkpoint
            if not page.log:
                raise EscrowRolledBack("the escrow's log ends without a checkpoint")

    def _check(self, signed: Signed, reached: Seen, seen: Seen) -> None:
        """That the log up to ``reached`` is the one that the HSM signed, and no older than what was ``seen``."""
        try:
            statement = signing.verify(signed, CheckpointStatement, (self._key,))
        except StatementForged as exc:
            raise CheckpointForged("the escrow's checkpoint is not signed by the HSM") from exc
        if statement.consumer != self._consumer:
            raise CheckpointForged("the escrow's checkpoint is another consumer's")
        if statement.epoch != seen.epoch:
            raise EscrowRolledBack(f"the escrow is in epoch {statement.epoch}, {seen.epoch} was seen before")
        if statement.sequence < seen.sequence:
            raise EscrowRolledBack(f"the escrow shows {statement.sequence} changes, {seen.sequence} were seen before")
        if Seen(statement.epoch, statement.sequence, statement.head) != reached:
            raise EscrowRolledBack("the escrow's log does not lead to its checkpoint")

    def _apply(self, state: EscrowState, log: Sequence[LogEntry]) -> Changes:
        changes = state.apply(log)
        for number in changes.rows:
            self._cache.drop(number)
        self._news |= changes.keys
        return changes

    async def _read_statements(self, state: EscrowState, names: set[ApplicationName]) -> None:
        """The newest statements of these applications. Raises ``EscrowRowTampered`` or ``EscrowRolledBack``."""
        for _ in range(ATTEMPTS):
            try:
                await self._check_statements(state, sorted(names))
            except Tampered:
                new: list[LogEntry] = []  # one may have been signed since the log was read
                checkpoint = await self._pages(state.point, new.extend)
                self._check(checkpoint, replay(state.point, tuple(new)), state.point)
                if not new:
                    raise
                names |= self._apply(state, new).applications
            else:
                return
        raise KmcUnavailable("the escrow's statements change faster than they can be read")

    async def _check_statements(self, state: EscrowState, names: Sequence[ApplicationName]) -> None:
        found: dict[ApplicationName, StatementEntry] = {}
        for start in range(0, len(names), MAX_STATEMENT_NAMES):
            asked = tuple(names[start : start + MAX_STATEMENT_NAMES])
            reply = await self._kmc.call("POST", "/v1/escrow/statements", StatementsRequest(asked), reply=StatementsReply)
            kept = {entry.name: entry for entry in reply.statements}
            for name in asked:
                if name not in kept:
                    raise EscrowRolledBack(f"the statement for application {name} is missing")
                state.check_statement(kept[name])
                found[name] = kept[name]
        self.statements |= found

    # -- rows ----------------------------------------------------------------------------------------------------------

    def kept(self, name: RowName) -> EscrowRow | None:
        """A row that was checked and is here still."""
        number = None if self._state is None else self._state.number(name.key, name.version)
        parts = None if number is None else self._cache.get(number)
        return None if parts is None else EscrowRow(self._consumer, name.key, name.version, *parts)

    def _keep(self, row: EscrowRow) -> None:
        """``row`` has just been written."""
        if self._state is not None:
            number = self._state.number(row.key, row.version)
            if number is not None and self._state.digest(row.key, row.version) == row_digest(row):
                self._cache.put(number, row)

    async def _fetch(
        self,
        names: Sequence[RowName],
        read_log: Callable[[], Awaitable[None]],
        shown: tuple[Seen | None, Sequence[EscrowRow]] | None = None,
    ) -> dict[RowName, EscrowRow]:
        """Rows from the KMC, checked. Those that do not fit are asked for again, as long as the log goes on meanwhile.

        ``shown``: rows that the KMC has shown already, and where the log stood before.
        """
        good: dict[RowName, EscrowRow] = {}
        wanted, swept = list(names), shown is not None
        error: CipherfleetError = KmcUnavailable("the escrow changes faster than it can be read")
        for _ in range(ATTEMPTS):
            if shown is None:
                before = self.seen
                reply = await self._kmc.call("POST", "/v1/escrow/rows", RowsRequest(tuple(wanted)), reply=RowsReply)
                shown = before, reply.rows
            before, rows = shown
            wrong = self._take(rows, wanted, good, swept=swept)
            if wrong is None:
                return good
            shown, wanted, error = None, [name for name in wanted if name not in good], wrong
            whole = dict.fromkeys(RowName(name.key, 0) for name in wanted if self._whole(name.key, good) is None)
            wanted = list(dict.fromkeys((*whole, *wanted)))  # what is missing may be destroyed meanwhile
            if self.seen == before:
                await read_log()
            if self.seen == before:
                break
        if isinstance(error, Tampered):
            self._fault = error
            self._suspects |= dict.fromkeys(names)
        raise error

    def _take(
        self, rows: Sequence[EscrowRow], wanted: list[RowName], good: dict[RowName, EscrowRow], *, swept: bool
    ) -> CipherfleetError | None:
        """Keep the rows that are what the log names; what is wrong with the others, or with there not being one."""
        if self._state is None:
            return KmcUnavailable("the escrow is being read again")
        error: CipherfleetError | None = None
        asked = set(wanted)
        for row in rows:
            name = RowName(row.key, row.version)
            try:
                if name not in asked:
                    raise EscrowRowForeign(f"row {row.subject} came without being asked for")
                number = self._state.check_row(row)
            except Tampered as exc:
                error = error or exc
            else:
                good[name] = row
                if not (swept and self._cache.full):
                    self._cache.put(number, row)
        missing = next((name for name in wanted if name not in good and not self._was_destroyed(name, good)), None)
        if error is None and missing is not None:
            error = EscrowRolledBack(f"row {missing.subject} is missing")
        return error

    def _whole(self, key: KeyId, good: dict[RowName, EscrowRow]) -> EscrowRow | None:
        return good.get(RowName(key, 0)) or self.kept(RowName(key, 0))

    def _was_destroyed(self, name: RowName, good: dict[RowName, EscrowRow]) -> bool:
        """Whether the key's own newest attributes say why the row is not there."""
        row = self._whole(name.key, good) if name.version else None
        return row is not None and was_destroyed(row, name.version)


def _check_point(state: EscrowState, point: Seen) -> None:
    if not state.leads_through(point):
        raise EscrowRolledBack(f"the escrow's log does not lead through change {point.sequence}, which the Ukey has seen")


__all__ = ["Escrow", "Kmc"]
