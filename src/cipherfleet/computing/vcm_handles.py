"""Key versions that are loaded into the vCC, which holds a number of them: who was idle longest goes when there is no room.

What a request was given stays loaded until the request is over (``hold``), however long it reads its body in between.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

from cipherfleet.contract.errors import CipherfleetError, LimitReached
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.vcc import Completion, Operation, VirtualCryptoCard

ROOM = 32
"""So many are unloaded at once, so that not every load has to wait for it."""


class Name(NamedTuple):
    key: KeyId
    version: int


_held: ContextVar[list[Name] | None] = ContextVar("held", default=None)


class Handles:
    """Handles by key and version, least recently used first."""

    def __init__(self, card: VirtualCryptoCard) -> None:
        self._card = card
        self._handles: OrderedDict[Name, int] = OrderedDict()
        self._in_use: Counter[Name] = Counter()
        self._loading = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._handles)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """What is taken within stays loaded until the end."""
        taken: list[Name] = []
        token = _held.set(taken)
        try:
            yield
        finally:
            _held.reset(token)
            for name in taken:
                self._in_use[name] -= 1
                if not self._in_use[name]:
                    del self._in_use[name]

    def take(self, name: Name) -> int | None:
        """The handle, if it is loaded: used from now on."""
        handle = self._handles.get(name)
        if handle is not None:
            self._handles.move_to_end(name)
            taken = _held.get()
            if taken is not None and name not in taken:
                taken.append(name)
                self._in_use[name] += 1
        return handle

    def of(self, keys: Iterable[KeyId]) -> set[KeyId]:
        """Those of the keys that have a version loaded."""
        wanted = set(keys)
        return {name.key for name in self._handles if name.key in wanted} if wanted else set()

    def adopt(self, name: Name, handle: int) -> None:
        """The card has just made it."""
        self._handles[name] = handle

    async def load(self, name: Name, row: bytes) -> int:
        """The handle, loaded if it is not. Raises what the card says."""
        async with self._loading:
            handle = self.take(name)
            if handle is None:
                self._handles[name] = (await self.submit(Operation.LOAD, row)).value
                handle = self.take(name)
        assert handle is not None  # noqa: S101 - nobody ran since
        return handle

    async def submit(self, operation: Operation, parameters: bytes) -> Completion:
        """An operation that takes room in the vCC. Raises ``LimitReached`` when all of it is in use, or what the card says."""
        while True:
            try:
                return await self._card.submit(operation, parameters=parameters)
            except LimitReached:
                idle = [name for name in self._handles if name not in self._in_use][:ROOM]
                if not idle:
                    raise
                await self._unload(idle)

    async def unload(self, keys: Iterable[KeyId]) -> None:
        """All versions of these keys, in use or not."""
        async with self._loading:
            wanted = set(keys)
            await self._unload([name for name in self._handles if name.key in wanted])

    async def drop(self, handle: int) -> None:
        """One that nobody else knows of."""
        with suppress(CipherfleetError):
            await asyncio.shield(self._card.submit(Operation.UNLOAD, handle=handle))

    def forget(self) -> None:
        """The card has none of them any more."""
        self._handles.clear()

    async def _unload(self, names: list[Name]) -> None:
        await asyncio.gather(*(self.drop(self._handles.pop(name)) for name in names))
