"""The consumer's rows and statements as one VCM sees them: nothing of the escrow is believed before it is checked.

A view counts only with the HSM's signature over its log, when the log passes through what the Ukey and this VCM have seen
before. If one does not, nothing is served from the escrow until a good one came: fail closed.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeVar

from cipherfleet.channel import signing
from cipherfleet.contract.errors import (
    CheckpointForged,
    CipherfleetError,
    EscrowRolledBack,
    EscrowRowTampered,
    KmcUnavailable,
    StateConflict,
    StatementForged,
    Tampered,
)
from cipherfleet.contract.escrow import (
    EscrowRow,
    EscrowView,
    LogEntry,
    RowWrite,
    Seen,
    StatementEntry,
    check_follows,
    check_view,
    genesis,
    heads,
    replay,
    row_digest,
)
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.kmc_api import EscrowReceipt, EscrowWrite
from cipherfleet.contract.statements import CheckpointStatement

T = TypeVar("T")

Rows = dict[int, EscrowRow]

REFRESH_S = 0.05
"""Looks at the escrow are at least this far apart, however many callers name what is not there."""


class Kmc(Protocol):
    """The part of a ``Caller`` that the escrow needs."""

    async def call(self, method: str, path: str, body: object | None = None, *, reply: type[T]) -> T: ...


class Escrow:
    """``rows`` and ``statements``, and the point of the log (``seen``) at which they stand."""

    def __init__(self, consumer: ConsumerId, kmc: Kmc, kmc_signing_key: bytes) -> None:
        self._consumer, self._kmc, self._key = consumer, kmc, kmc_signing_key
        self._lock = asyncio.Lock()
        self._asked = float("-inf")
        self._fault: CipherfleetError | None = None
        self._outcome: CipherfleetError | None = None  # of the newest look, for those who shared it
        self._pinned: Seen | None = None
        self._heads: list[bytes] = []  # of the log, by sequence
        self.seen: Seen | None = None
        self.rows: dict[KeyId, Rows] = {}
        self.statements: dict[ApplicationName, StatementEntry] = {}

    async def load(self, seen: Seen, kmc_signing_key: bytes = b"") -> None:
        """step g: the first view. ``seen`` and whose checkpoints count is what the Ukey knew. Raises what ``refresh`` raises."""
        self.seen, self._key = seen, kmc_signing_key or self._key
        await self.refresh()

    def pin(self, point: Seen) -> None:
        """The Ukey has seen ``point``: nothing is served from the escrow until its log leads through it.

        Raises ``EscrowRolledBack`` when the log, as far as it is known, leads elsewhere.
        """
        if self._pinned is None or point.sequence >= self._pinned.sequence:
            self._pinned = point
        if self.seen is not None and self._heads and not self.behind:
            self._check_point(self.seen.epoch, self._heads, point)

    @property
    def behind(self) -> bool:
        """Whether the Ukey has seen more than this view shows."""
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
        """That the newest view was a good one that shows what the Ukey has seen; looks again if not. Raises what ``refresh`` does."""
        while self._fault is not None or self.behind:
            await self.refresh()

    async def write(self, rows: Sequence[EscrowRow], *, replaces: Sequence[EscrowRow | None], actor: str, event: str) -> None:
        """Store rows, all or none; on return the escrow has committed them.

        Raises ``StateConflict`` when one was changed meanwhile (``refresh`` then), or ``KmcUnavailable``.
        """
        writes = tuple(RowWrite(row, b"" if old is None else row_digest(old)) for row, old in zip(rows, replaces, strict=True))
        async with self._lock:
            for row, old in zip(rows, replaces, strict=True):
                if self.rows.get(row.key, {}).get(row.version) != old:
                    raise StateConflict(f"row {row.subject} was changed meanwhile")
                check_follows(row, b"" if old is None else row_digest(old))
            receipt = await self._kmc.call("POST", "/v1/escrow", EscrowWrite(writes, actor, event), reply=EscrowReceipt)
            for row, entry in zip(rows, receipt.log, strict=False):
                if entry.subject != row.subject or entry.digest != row_digest(row):
                    raise EscrowRowTampered(f"the escrow wrote something else than row {row.subject}")
            if len(receipt.log) != len(rows) or self.seen is None:
                raise EscrowRowTampered("the escrow's receipt does not name what was written")
            if receipt.log[0].sequence != self.seen.sequence + 1:  # somebody else wrote in between
                await self._refresh()
                return
            self._extend(self.seen, receipt.log)
            for row in rows:
                self.rows.setdefault(row.key, {})[row.version] = row

    async def _refresh(self) -> None:
        self._asked = time.monotonic()
        self._outcome = KmcUnavailable("the look at the escrow was given up")
        pinned = self._pinned  # what is pinned later may be newer than the answer
        try:
            view = await self._kmc.call("GET", "/v1/escrow", reply=EscrowView)
            point = self._check(view)
            known = heads(Seen(point.epoch, 0, genesis(self._consumer, point.epoch)), view.log)
            if pinned is not None:
                self._check_point(point.epoch, known, pinned)
            self.seen, self._heads = point, known
        except CipherfleetError as exc:
            self._outcome = exc
            if isinstance(exc, Tampered):
                self._fault = exc
            raise
        self._fault = self._outcome = None
        rows: defaultdict[KeyId, Rows] = defaultdict(dict)
        for row in view.rows:
            rows[row.key][row.version] = row
        self.rows = dict(rows)
        self.statements = {kept.name: kept for kept in view.statements}

    def _extend(self, seen: Seen, log: tuple[LogEntry, ...]) -> None:
        """The log went on with our own entries."""
        after = replay(seen, log)
        known = [*self._heads[:-1], *heads(seen, log)]
        try:
            if self._pinned is not None and seen.sequence < self._pinned.sequence <= after.sequence:
                self._check_point(seen.epoch, known, self._pinned)
        except EscrowRolledBack as exc:
            self._fault = exc
            raise
        self.seen, self._heads = after, known

    def _check_point(self, epoch: int, known: list[bytes], point: Seen) -> None:
        if epoch != point.epoch or len(known) <= point.sequence or known[point.sequence] != point.head:
            raise EscrowRolledBack(f"the escrow's log does not lead through change {point.sequence}, which the Ukey has seen")

    def _check(self, view: EscrowView) -> Seen:
        try:
            statement = signing.verify(view.checkpoint, CheckpointStatement, (self._key,))
        except StatementForged as exc:
            raise CheckpointForged("the escrow's checkpoint is not signed by the HSM") from exc
        if statement.consumer != self._consumer:
            raise CheckpointForged("the escrow's checkpoint is another consumer's")
        checkpoint = Seen(statement.epoch, statement.sequence, statement.head)
        check_view(self._consumer, view, checkpoint, self.seen)
        return checkpoint
