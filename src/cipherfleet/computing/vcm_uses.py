"""Uses of keys that have a limit: reserved in the escrow by blocks, so that all VCMs together never exceed it.

A block is reserved before the first use of it; a VCM that ends loses what is left of its blocks, and nobody gets more.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable

from cipherfleet.contract.ids import KeyId

BLOCKS = 64
"""A limit is reserved in about so many parts."""
MAX_BLOCK = 4096


def block_of(limit: int) -> int:
    """How many uses are reserved at once: 1 for small limits, which are exact then on every VCM."""
    return max(1, min(limit // BLOCKS, MAX_BLOCK))


class Uses:
    """What this VCM has reserved and not used. ``reserve`` gets a number of uses from the escrow, or raises."""

    def __init__(self, reserve: Callable[[KeyId, int], Awaitable[int]]) -> None:
        self._reserve = reserve
        self._left: defaultdict[KeyId, int] = defaultdict(int)
        self._locks: defaultdict[KeyId, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def spend(self, key: KeyId, count: int) -> None:
        """Raises what ``reserve`` raises; nothing is spent then."""
        async with self._locks[key]:
            if self._left[key] < count:
                self._left[key] += await self._reserve(key, count - self._left[key])
            self._left[key] -= count
