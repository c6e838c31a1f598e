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
from cipherfleet.contract.errors import CheckpointForged, CipherfleetError, EscrowRolledBack, EscrowRowTampered, StatementForged, Tampered
from cipherfleet.contract.escrow import (
    EscrowRow,
    EscrowView,
    LogEntry,
    RowWrite,
    Seen,
    check_view,
    replay,
    row_digest,
)
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.kmc_api import EscrowReceipt, EscrowWrite
from cipherfleet.contract.statements import CheckpointStatement, Signed

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
        self.seen: Seen | None = None
        self.rows: dict[KeyId, Rows] = {}
        self.statements: dict[ApplicationName, Signed] = {}

    async def load(self, seen: Seen) -> None:
        """step g: the first view. ``seen`` is what the Ukey knew. Raises what ``refresh`` raises."""
        self.seen = seen
        await self.refresh()

    async def refresh(self) -> None:
        """See what is there now; callers that wait at the same time share one look.

        Raises ``CheckpointForged``, ``EscrowRolledBack``, ``EscrowRowForeign``, ``EscrowRowTampered``, ``KmcUnavailable``.
        """
        came = time.monotonic()
        async with self._lock:
            if self._asked > came:
                return
            await asyncio.sleep(self._asked + REFRESH_S - time.monotonic())
            await self._refresh()

    async def require(self) -> None:
        """That the newest view was a good one; looks again if it was not. Raises what was wrong with it."""
        if self._fault is not None:
            await self.refresh()

    async def write(self, rows: Sequence[EscrowRow], *, replaces: Sequence[EscrowRow | None], actor: str, event: str) -> None:
        """Store rows, all or none; on return the escrow has committed them.

        Raises ``StateConflict`` when one was changed meanwhile (``refresh`` then), or ``KmcUnavailable``.
        """
        writes = tuple(RowWrite(row, b"" if old is None else row_digest(old)) for row, old in zip(rows, replaces, strict=True))
        async with self._lock:
            receipt = await self._kmc.call("POST", "/v1/escrow", EscrowWrite(writes, actor, event), reply=EscrowReceipt)
            for row, entry in zip(rows, receipt.log, strict=False):
                if entry.subject != row.subject or entry.digest != row_digest(row):
                    raise EscrowRowTampered(f"the escrow wrote something else than row {row.subject}")
            if len(receipt.log) != len(rows) or self.seen is None:
                raise EscrowRowTampered("the escrow's receipt does not name what was written")
            if receipt.log[0].sequence != self.seen.sequence + 1:  # somebody else wrote in between
                await self._refresh()
                return
            self.seen = replay(self.seen, receipt.log)
            for row in rows:
                self.rows.setdefault(row.key, {})[row.version] = row

    async def _refresh(self) -> None:
        self._asked = time.monotonic()
        view = await self._kmc.call("GET", "/v1/escrow", reply=EscrowView)
        try:
            self.seen = self._check(view)
        except Tampered as exc:
            self._fault = exc
            raise
        self._fault = None
        rows: defaultdict[KeyId, Rows] = defaultdict(dict)
        for row in view.rows:
            rows[row.key][row.version] = row
        self.rows = dict(rows)
        self.statements = {kept.name: kept.statement for kept in view.statements}

    def _check(self, view: EscrowView) -> Seen:
        try:
            statement = signing.verify(view.checkpoint, CheckpointStatement, (self._key,))
        except StatementForged as exc:
            raise CheckpointForged("the escrow's checkpoint is not signed by the HSM") from exc
        if statement.consumer != self._consumer:
            raise CheckpointForged("the escrow's checkpoint is another consumer's")
        checkpoint = Seen(statement.epoch, statement.sequence, statement.head)
        check_view(self._consumer, view, checkpoint, self.seen)
        check_never_set_back(view.log)
        return checkpoint


def check_never_set_back(log: Sequence[LogEntry]) -> None:
    """That no entry brings back what another one had replaced: rows are sealed anew for each change, statements signed anew.

    So whoever can append to the log still cannot undo a revocation by writing the old row again. Raises ``EscrowRolledBack``.
    """
    newest: dict[str, bytes] = {}
    written: set[tuple[str, bytes]] = set()
    for entry in log:
        key = (entry.subject, entry.digest)
        if key in written and newest[entry.subject] != entry.digest:
            raise EscrowRolledBack(f"entry {entry.sequence} sets {entry.subject} back to what was replaced before")
        written.add(key)
        newest[entry.subject] = entry.digest
