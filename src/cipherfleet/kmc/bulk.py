"""Long reads of the database take turns, so that short ones, commits and revocations always find a thread."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cipherfleet.contract.errors import LimitReached

AT_ONCE = 2
"""Of all; the database has more threads than that."""
MOST_WAITING = 4
"""Of one caller; a consumer may have many VCMs, which all come at once after a restart."""


class BulkReads:
    """One at a time for each consumer (or the operator), ``AT_ONCE`` in all."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(AT_ONCE)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._asked: Counter[tuple[str, str]] = Counter()

    @asynccontextmanager
    async def turn(self, consumer: str, caller: str) -> AsyncIterator[None]:
        """Raises ``LimitReached``."""
        if self._asked[consumer, caller] > MOST_WAITING:
            raise LimitReached("too many long answers are asked for at once", "ask again when one has come")
        self._asked[consumer, caller] += 1
        try:
            async with self._turns[consumer], self._all:
                yield
        finally:
            self._asked[consumer, caller] -= 1
            if not self._asked[consumer, caller]:
                del self._asked[consumer, caller]
            if not any(name == consumer for name, _ in self._asked):
                self._turns.pop(consumer, None)
