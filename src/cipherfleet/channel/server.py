"""A mutual-TLS server whose every route names the roles that may call it.

The handler gets a ``Call``: who called, the decoded body, the path's parts. It returns a message. Errors of ours become
JSON with their status; anything else is logged by its type and becomes ``internal``. Connections are known by the peer's
certificate, so that revoking one closes them.
"""

import asyncio
import logging
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from cipherfleet.channel import codec, tls
from cipherfleet.channel.certificates import Credentials, peer_of
from cipherfleet.channel.frames import Frames
from cipherfleet.channel.gate import (
    HANDSHAKE_TIMEOUT_S,
    HEADER_TIMEOUT_S,
    KEEPALIVE_TIMEOUT_S,
    MAX_CONNECTIONS,
    MAX_PER_CERTIFICATE,
    Gate,
)
from cipherfleet.contract.errors import (
    CertificateExpired,
    CertificateInvalid,
    CertificateRevoked,
    CipherfleetError,
    Internal,
    Malformed,
    NotPermitted,
    PortTaken,
    RateLimited,
    RouteUnknown,
    TimedOut,
    TooLarge,
    Unsupported,
)
from cipherfleet.contract.identities import Peer, Role
from cipherfleet.contract.ids import Serial

log = logging.getLogger(__name__)
_http_log = logging.getLogger(f"{__name__}.http")

BODY_TIMEOUT_S = 10.0

T = TypeVar("T")
F = TypeVar("F")
G = TypeVar("G")


def _without_content(record: logging.LogRecord) -> bool:
    """What could not be parsed is quoted in the parser's error, and could be anything: a body that was announced too short."""
    if record.exc_info and record.exc_info[0] is not None:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[0].__name__}", ()
        record.exc_info = record.exc_text = None
    return True


_http_log.addFilter(_without_content)


class Call:
    """One request: the authenticated ``peer`` and what it sent."""

    def __init__(self, request: web.Request, peer: Peer) -> None:
        self.request = request
        self.peer = peer

    async def body(self, kind: type[T], *, limit: int = codec.MAX_CALL_BYTES) -> T:
        """The body of at most ``limit`` bytes as a ``kind``. Raises ``Malformed``, ``TooLarge`` or ``TimedOut``."""
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                raw = await self.request.clone(client_max_size=limit).read()
        except web.HTTPRequestEntityTooLarge as exc:
            raise TooLarge(f"the request's body has more than {limit} bytes") from exc
        except TimeoutError as exc:
            raise TimedOut(f"the request's body was not here in {BODY_TIMEOUT_S:g} s") from exc
        return codec.decode(raw, kind, what="the request's body")

    def path(self, name: str, kind: Callable[[str], T]) -> T:
        """A part of the path as an id. Raises ``Malformed`` when it is not one."""
        try:
            return msgspec.convert(self.request.match_info[name], kind)  # type: ignore[no-any-return]
        except msgspec.ValidationError as exc:
            raise Malformed(f"{name} in the path is not valid: {exc}") from exc

    def query(self, name: str, default: str = "") -> str:
        return self.request.query.get(name, default)

    async def frames(self, receives: Any) -> Frames[Any, Any]:
        """Turn the connection into a channel of frames; ``receives`` is the base class (a tagged union) of what comes in."""
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            raise Unsupported("this route is a channel, connect with a WebSocket")
        socket_ = web.WebSocketResponse(heartbeat=5.0, max_msg_size=codec.MAX_CALL_BYTES, compress=False)
        await socket_.prepare(self.request)
        return Frames(socket_, receives)


Handler = Callable[[Call], Awaitable[object]]

_CALL = web.RequestKey("call", Call)


class Server:
    """``async with Server(...)`` is not offered on purpose: a server is started after its routes are complete."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        check_peer: Callable[[Peer], None] | None = None,
        wall_clock: Callable[[], float] = time.time,
        handshake_timeout: float = HANDSHAKE_TIMEOUT_S,
        header_timeout: float = HEADER_TIMEOUT_S,
        keepalive_timeout: float = KEEPALIVE_TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
        max_per_certificate: int = MAX_PER_CERTIFICATE,
    ) -> None:
        """The timeouts are seconds: ``header_timeout`` for a connection's first request, ``keepalive_timeout`` between two.

        The latter has to be longer than the callers': whoever hangs up first must not be the one that is being asked.
        """
        self._context = tls.server_context(credentials, minimum=minimum)
        self._check_peer = check_peer
        self._wall_clock = wall_clock
        self._connections: dict[asyncio.BaseTransport, Peer] = {}
        self._revoked: set[Serial] = set()
        self._crowded: set[Serial] = set()
        self._handshake_timeout, self._header_timeout, self._keepalive_timeout = handshake_timeout, header_timeout, keepalive_timeout
        self._max_connections, self._max_per_certificate = max_connections, max_per_certificate
        self._runner: web.AppRunner | None = None
        self._gate: Gate | None = None
        self._listener: asyncio.Server | None = None
        self._app = web.Application(middlewares=[self._guard])

    def route(self, method: str, path: str, roles: Collection[Role], handler: Handler) -> None:
        """Serve ``handler`` on ``path`` to peers of ``roles`` alone."""
        allowed = frozenset(roles)

        async def serve(request: web.Request) -> web.StreamResponse:
            peer = self.peer(request)
            if peer.identity.role not in allowed:
                raise NotPermitted(f"{peer.identity.role} may not call {method} {path}")
            call = request[_CALL] = Call(request, peer)
            answer = await handler(call)
            if isinstance(answer, web.StreamResponse):
                return answer
            return web.Response(body=codec.encode(answer), content_type="application/json")

        self._app.router.add_route(method, path, serve)

    def peer(self, request: web.Request) -> Peer:
        """Who is at the other end. Raises ``CertificateExpired``, ``CertificateRevoked`` or what ``check_peer`` does."""
        peer = self._connections.get(request.transport) if request.transport is not None else None
        if peer is None:  # it was closed just now
            raise ConnectionResetError
        if peer.serial in self._revoked:
            raise CertificateRevoked(f"the certificate of {peer.identity.uri} is revoked")
        if peer.not_after < self._wall_clock():
            raise CertificateExpired(f"the certificate of {peer.identity.uri} has expired")
        if self._check_peer is not None:
            self._check_peer(peer)
        return peer

    def renew(self, credentials: Credentials) -> None:
        """Show a new certificate from now on."""
        tls.renew(self._context, credentials)

    def revoke(self, serials: Iterable[Serial]) -> int:
        """Refuse these certificates and close their connections now; how many were closed."""
        self._revoked.update(serials)
        doomed = [t for t, peer in self._connections.items() if peer.serial in self._revoked]
        for transport in doomed:
            self._abort(transport)
        return len(doomed)

    def close_connections(self) -> int:
        """Close every connection now, mid-request if it must be; how many were closed."""
        doomed = list(self._connections)
        for transport in doomed:
            self._abort(transport)
        return len(doomed)

    def stop_listening(self) -> None:
        """Let nobody in any more, now; open connections go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def start(self, address: tuple[str, int] | socket.socket) -> tuple[str, int]:
        """Listen, and say where. Raises ``PortTaken``."""
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            shutdown_timeout=1.0,
            keepalive_timeout=self._keepalive_timeout,
            handle_signals=False,
            auto_decompress=False,
            logger=_http_log,
        )
        await self._runner.setup()
        assert self._runner.server is not None  # noqa: S101 - it was set up
        self._gate = Gate(self._runner.server, self._admit, header_timeout=self._header_timeout, max_connections=self._max_connections)
        try:
            listener = await self._gate.listen(address, self._context, handshake_timeout=self._handshake_timeout)
        except OSError as exc:
            await self._runner.cleanup()
            raise PortTaken(f"cannot listen on {address}: {exc.strerror or exc}", "stop what listens there") from exc
        self._listener = listener
        bound = (address if isinstance(address, socket.socket) else listener.sockets[0]).getsockname()
        return str(bound[0]), int(bound[1])

    async def stop(self) -> None:
        self.stop_listening()
        if self._gate is not None:
            self._gate.close()
        if self._runner is not None:
            self.close_connections()
            await self._runner.cleanup()
            self._runner = None

    def _admit(self, transport: asyncio.BaseTransport) -> bool:
        """Note whose connection this is; ``False`` if it is nobody's of ours, or one too many of its certificate."""
        try:
            peer = peer_of(transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
        except CertificateInvalid:
            return False
        for closed in [t for t in self._connections if t.is_closing()]:
            del self._connections[closed]
        if sum(other.serial == peer.serial for other in self._connections.values()) < self._max_per_certificate:
            self._connections[transport] = peer
            return True
        if peer.serial not in self._crowded:  # once, as a log can be filled, too
            self._crowded.add(peer.serial)
            log.warning("connections of %s are refused: there are %d", peer.identity.uri, self._max_per_certificate)
        return False

    def _abort(self, transport: asyncio.BaseTransport) -> None:
        self._connections.pop(transport, None)
        transport.abort()  # type: ignore[attr-defined]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        if self._gate is not None:
            self._gate.heard(request.transport)
        try:
            return await handler(request)
        except CipherfleetError as exc:
            error = exc
        except web.HTTPException as exc:
            if exc.status not in (404, 405):
                error = Malformed(f"HTTP {exc.status}: {exc.reason}")
            else:
                error = RouteUnknown(f"there is no {request.method} {request.path[:200]}")
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as exc:
            # The type and place only: a message could hold what must not be logged.
            trace = exc.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
            log.error("internal error in %s %s: %s at %s", request.method, request.path, type(exc).__name__, place)  # noqa: TRY400
            error = Internal("something went wrong on our side")
        refusal = web.Response(status=error.status, body=codec.encode(error.to_reply()), content_type="application/json")
        if isinstance(error, RateLimited):
            refusal.headers["Retry-After"] = str(max(1, math.ceil(error.wait_s)))
        if _CALL not in request:  # who has no business here keeps no connection
            refusal.force_close()
        return refusal


__all__ = ["Call", "Handler", "Server"]
