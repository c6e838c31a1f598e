"""The client's side of the channel: call a peer by its name, get a message or the error it sent."""

import asyncio
import errno
import io
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import BaseConnector

from cipherfleet.channel import codec, tls
from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.frames import Frames
from cipherfleet.contract.errors import (
    CertificateExpired,
    CertificateInvalid,
    CipherfleetError,
    ErrorReply,
    PeerError,
    ServiceUnavailable,
    TimedOut,
)
from cipherfleet.contract.messages import Done

KEEP_S = 15.0
"""How long a connection is kept for the next call: a server keeps it longer, or a call might meet one that is being closed."""
MAX_CONNECTIONS = 32
"""At once: a server takes more of one certificate. Further calls wait for their turn."""

T = TypeVar("T")


class RelayConnector(BaseConnector):
    """TLS over a unix socket whose other end relays to the server: the one way out of a VCM's empty network."""

    def __init__(self, path: str, context: ssl.SSLContext, server_name: str) -> None:
        super().__init__(keepalive_timeout=KEEP_S, limit=MAX_CONNECTIONS)
        self._path, self._context, self._server_name = path, context, server_name

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        _, protocol = await self._loop.create_unix_connection(
            self._factory, self._path, ssl=self._context, server_hostname=self._server_name
        )
        return protocol


class Caller:
    """Calls one server. ``server_name`` is what its certificate must carry, whatever its address.

    ``unavailable`` is the error that stands for "cannot be reached". ``sockets`` makes the sockets (given an address), for a
    server that only another network namespace reaches.
    """

    def __init__(
        self,
        url: str,
        server_name: str,
        credentials: Credentials,
        unavailable: type[ServiceUnavailable],
        *,
        relay: str | None = None,
        timeout: float = 30.0,
        sockets: Callable[[Any], socket.socket] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._name = server_name
        self._context = tls.client_context(credentials)
        self._not_after = credentials.not_after
        self._unavailable = unavailable
        self._relay = relay
        self._sockets = sockets
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def renew(self, credentials: Credentials) -> None:
        tls.renew(self._context, credentials)
        self._not_after = credentials.not_after

    async def call(
        self, method: str, path: str, body: object | None = None, *, reply: type[T] | None = None, timeout: float | None = None
    ) -> T:
        """One request. Raises the error the peer sent, ``unavailable``, ``TimedOut`` or a certificate error."""
        data = None if body is None else io.BytesIO(codec.encode(body))
        limit = aiohttp.ClientTimeout(total=self._timeout if timeout is None else timeout)
        with self._seam():
            async with self._open().request(
                method, self.url + path, data=data, timeout=limit, ssl=self._context, server_hostname=self._name
            ) as response:
                raw = await response.read()
        if response.status >= 400:
            raise error_of(raw, response.status)
        return codec.decode(raw, reply if reply is not None else Done, what=f"the reply to {method} {path}")  # type: ignore[return-value]

    @asynccontextmanager
    async def frames(self, path: str, receives: Any) -> AsyncIterator[Frames[Any, Any]]:
        """A channel of frames; ``receives`` is the base class of what the server sends."""
        with self._seam():
            web_socket = await self._open().ws_connect(
                self.url + path,
                ssl=self._context,
                server_hostname=self._name,
                heartbeat=5.0,
                max_msg_size=codec.MAX_BODY_BYTES,
            )
        try:
            yield Frames(web_socket, receives)
        finally:
            await web_socket.close()

    def _seam(self) -> "_Seam":
        # A server that refuses our certificate resets the connection before its alert can be read, so look ourselves first.
        if self._not_after < time.time():
            raise CertificateExpired("our own certificate has expired")
        return _Seam(self._unavailable, self.url)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            connector: BaseConnector
            if self._relay is not None:
                connector = RelayConnector(self._relay, self._context, self._name)
            else:
                connector = aiohttp.TCPConnector(socket_factory=self._sockets, keepalive_timeout=KEEP_S, limit=MAX_CONNECTIONS)
            self._session = aiohttp.ClientSession(connector=connector, middlewares=(_stay_here,))
        return self._session


async def _stay_here(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """No redirect is followed, of a call or of a channel: it would lead to a peer whose name nobody checks, or out of TLS."""
    response = await handler(request)
    if 300 <= response.status < 400:
        response.close()
        raise PeerError(f"the peer answered {response.status}: it sends us elsewhere")
    return response


class _Seam:
    """Maps what the transport raises to our tree."""

    def __init__(self, unavailable: type[ServiceUnavailable], where: str) -> None:
        self._unavailable, self._where = unavailable, where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, asyncio.TimeoutError):
            raise TimedOut(f"{self._where} did not answer in time") from exc
        if isinstance(exc, (aiohttp.ClientError, OSError)):
            raise transport_error(exc, self._unavailable, self._where) from exc


def transport_error(exc: BaseException, unavailable: type[ServiceUnavailable], where: str) -> CipherfleetError:
    """What a failed connection means: a certificate that was refused, or a peer that is not there."""
    text = str(exc).lower()
    if "certificate" in text and "expired" in text:
        return CertificateExpired(f"{where}: the handshake was refused, a certificate has expired")
    if "alert" in text or "certificate" in text or isinstance(exc, ssl.SSLError):
        return CertificateInvalid(f"{where}: the handshake was refused")
    if isinstance(exc, (ConnectionResetError, aiohttp.ServerDisconnectedError)) or getattr(exc, "errno", None) == errno.ECONNRESET:
        return unavailable(f"{where} closed the connection", "the service ended, or it does not accept this certificate")
    return unavailable(f"{where} cannot be reached")


def error_of(raw: bytes, status: int) -> CipherfleetError:
    """The error in a reply's body."""
    try:
        return CipherfleetError.from_body(codec.decode(raw, ErrorReply).error)
    except CipherfleetError:
        return PeerError(f"the peer answered {status} without saying why")
