"""Which of a domain's addresses a VCM serves on: found by trying, remembered while it is good."""

import asyncio
from collections.abc import Collection, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from cipherfleet.contract.errors import Malformed

CONNECT_S = 1.0
_STAGGER_S = 0.05
_HTTPS = 443


def normal(endpoint: str) -> str:
    """``host:port`` or a URL as ``https://host:port``. Raises ``Malformed``."""
    text = endpoint if "://" in endpoint else f"https://{endpoint}"
    try:
        parts = urlsplit(text)
        port = parts.port or _HTTPS
    except ValueError as exc:
        raise Malformed(f"{endpoint[:100]!r} is not an endpoint") from exc
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.path.strip("/") or parts.query:
        raise Malformed(f"{endpoint[:100]!r} is not an endpoint")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"https://{host}:{port}"


class Endpoints:
    """The addresses of a profile, and those that the VCM told since."""

    def __init__(self, known: Iterable[str]) -> None:
        self._profile = tuple(dict.fromkeys(normal(e) for e in known))
        self._told: tuple[str, ...] = ()
        self.good: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._told, *self._profile)))

    def learn(self, told: Iterable[str]) -> None:
        """What ``GET /v1/endpoints`` answered, likely ones first; what cannot be an endpoint is left out."""
        understood = []
        for endpoint in told:
            with suppress(Malformed):
                understood.append(normal(endpoint))
        self._told = tuple(understood)

    def forget(self, endpoint: str) -> None:
        if self.good == endpoint:
            self.good = None

    async def choose(self, but: Collection[str]) -> str | None:
        """The good endpoint, else the first that takes a connection; ``None`` when no other than those in ``but`` does.

        The very first is given even when nobody takes connections, so that there is a reason to tell.
        """
        if self.good is not None and self.good not in but:
            return self.good
        left = [e for e in self.all if e not in but]
        if len(left) <= 1:
            return left[0] if left else None
        return await _first_open(left) or (None if but else left[0])


async def _first_open(endpoints: list[str]) -> str | None:
    """The first to take a TCP connection; the next is tried when one is refused, or has not answered for a little while."""
    waiting, pending = list(endpoints), set[asyncio.Task[str | None]]()
    try:
        while waiting or pending:
            if waiting:
                pending.add(asyncio.create_task(_open(waiting.pop(0))))
            patience = _STAGGER_S if waiting else None
            done, pending = await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if found := task.result():
                    return found
        return None
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _open(endpoint: str) -> str | None:
    parts = urlsplit(endpoint)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except (OSError, TimeoutError):
        return None
    writer.close()
    return endpoint
