"""Who may hold a connection: the first thing a server does with one, after its handshake and before HTTP.

A connection that says nothing costs a descriptor, so it has a time to say something, and there is a number of all of them,
and of those that show one certificate.
"""

import asyncio
import logging
import resource
import ssl
from collections.abc import Callable
from functools import partial
from socket import socket

from aiohttp import web

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
HEADER_TIMEOUT_S = 10.0
KEEPALIVE_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 4096
MAX_PER_CERTIFICATE = 64


class Gate:
    """Lets connections through to ``server``, as many as ``max_connections``; who sends no whole header in time is cut off.

    ``admit`` may refuse one by its certificate.
    """

    def __init__(
        self, server: web.Server, admit: Callable[[asyncio.Transport], bool], *, header_timeout: float, max_connections: int
    ) -> None:
        self._server, self._admit, self._header_timeout = server, admit, header_timeout
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # A quarter of the descriptors is left to handshakes and to all else that the process does.
        self._max_connections = max_connections if files == resource.RLIM_INFINITY else min(max_connections, files * 3 // 4)
        self._full = False
        self._silent: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}

    async def listen(self, address: tuple[str, int] | socket, context: ssl.SSLContext, *, handshake_timeout: float) -> asyncio.Server:
        """Raises ``OSError``. Who does not finish the handshake, or the goodbye, in ``handshake_timeout`` seconds is cut off."""
        create_server = partial(
            asyncio.get_running_loop().create_server,
            lambda: _Entrance(self),
            ssl=context,
            ssl_handshake_timeout=handshake_timeout,
            ssl_shutdown_timeout=handshake_timeout,
            backlog=128,
        )
        if isinstance(address, socket):
            return await create_server(sock=address)
        return await create_server(*address, reuse_address=True)

    def enter(self, transport: asyncio.Transport) -> None:
        """A new connection, its handshake done."""
        was_full, self._full = self._full, len(self._server.connections) >= self._max_connections
        if self._full:
            if not was_full:  # once, as a log can be filled, too
                log.warning("connections are refused: there are %d", self._max_connections)
            transport.abort()
            return
        if not self._admit(transport):
            transport.abort()
            return
        handler = self._server()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        self._silent[transport] = asyncio.get_running_loop().call_later(self._header_timeout, self._cut_off, transport)

    def heard(self, transport: asyncio.BaseTransport | None) -> None:
        """A whole header came over this connection."""
        if transport is not None and (timer := self._silent.pop(transport, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Cut off who has said nothing yet."""
        for transport, timer in list(self._silent.items()):
            timer.cancel()
            self._cut_off(transport)

    def _cut_off(self, transport: asyncio.BaseTransport) -> None:
        self._silent.pop(transport, None)
        transport.abort()  # type: ignore[attr-defined]


class _Entrance(asyncio.Protocol):
    """Stands for a connection during its handshake."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._gate.enter(transport)  # type: ignore[arg-type]


__all__ = ["HANDSHAKE_TIMEOUT_S", "HEADER_TIMEOUT_S", "KEEPALIVE_TIMEOUT_S", "MAX_CONNECTIONS", "MAX_PER_CERTIFICATE", "Gate"]
