"""Long reads of the database take turns, so that short ones, commits and revocations always find a thread."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cipherfleet.contract.errors import LimitReached

AT_ONCE = 2
"""Of all; the database has more threads than that."""
MOST_WAITING = 4
"""Of one consumer."""


class BulkReads:
    """One at a time for each consumer (or operator), ``AT_ONCE`` in all."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(AT_ONCE)
        self._own: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._asked: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self, whose: str) -> AsyncIterator[None]:
        """Raises ``LimitReached``."""
        if self._asked[whose] > MOST_WAITING:
            raise LimitReached("too many long answers are asked for at once", "ask again when one has come")
        self._asked[whose] += 1
        try:
            async with self._own[whose], self._all:
                yield
        finally:
            self._asked[whose] -= 1
            if not self._asked[whose]:
                del self._asked[whose], self._own[whose]
