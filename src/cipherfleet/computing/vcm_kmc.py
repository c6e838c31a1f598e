"""A VCM's way to the KMC: through the relay, always with its newest certificate."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.client import Caller
from cipherfleet.channel.frames import Frames
from cipherfleet.contract.errors import KmcUnavailable
from cipherfleet.contract.identities import Identity, Role

TIMEOUT_S = 10.0

T = TypeVar("T")


class KmcAccess:
    """``use`` comes first. A connection goes on being its certificate's, so each certificate has connections of its own."""

    def __init__(self, url: str, relay: str) -> None:
        self._url, self._relay = url, relay
        self._caller: Caller | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    def use(self, credentials: Credentials) -> None:
        """What is under way ends with the old certificate; its channel is closed when that is over, and made anew."""
        old = self._caller
        name = Identity(Role.KMC, "kmc").dns_name
        self._caller = Caller(self._url, name, credentials, KmcUnavailable, relay=self._relay, timeout=TIMEOUT_S)
        if old is not None:
            task = asyncio.create_task(_retire(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def call(self, method: str, path: str, body: object | None = None, *, reply: type[T]) -> T:
        """As ``Caller.call``."""
        return await self._newest().call(method, path, body, reply=reply)

    @asynccontextmanager
    async def frames(self, path: str, receives: Any) -> AsyncIterator[Frames[Any, Any]]:
        """As ``Caller.frames``."""
        async with self._newest().frames(path, receives) as frames:
            yield frames

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self._newest().close()

    def _newest(self) -> Caller:
        if self._caller is None:
            raise RuntimeError("there is no certificate yet")
        return self._caller


async def _retire(caller: Caller) -> None:
    try:
        await asyncio.sleep(TIMEOUT_S)
    finally:
        await caller.close()
