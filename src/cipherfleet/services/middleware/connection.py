"""The way to a VCM: mutual TLS with the domain's CA, the right peer or nothing, and a retry where it is safe."""

import asyncio
import os
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import aiohttp
from aiohttp.client_proto import ResponseHandler

from cipherfleet.channel import codec, tls
from cipherfleet.channel.certificates import Credentials, leaf, peer_of
from cipherfleet.channel.client import error_of, transport_error
from cipherfleet.contract.errors import (
    CertificateExpired,
    CertificateInvalid,
    CipherfleetError,
    FileProblem,
    NotFound,
    PeerError,
    ServiceOff,
    ServiceUnavailable,
    TimedOut,
)
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.vcm_api import EndpointsReply
from cipherfleet.services import wire
from cipherfleet.services.middleware.endpoints import Endpoints
from cipherfleet.services.middleware.sources import Bytes, Upload

T = TypeVar("T")
Headers: TypeAlias = Mapping[str, str]

REFRESH_S = 30.0
HANDSHAKE_S = 5.0
"""For connection and TLS handshake together: many begun at once take turns on both sides."""
KEEP_S = 300.0
_SMALL_BYTES = 64 * 1024
_MAX_ERROR_BYTES = 64 * 1024
_NO_HEADERS: Headers = MappingProxyType({})
_EXPIRED_HINT = "sign the application in again: cipherfleet app add"


def read_profile(profile: Profile | str | os.PathLike[str]) -> Profile:
    """Raises ``FileProblem`` or ``Malformed``."""
    if isinstance(profile, Profile):
        return profile
    path = Path(profile)
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise FileProblem(f"cannot read the profile {path}: {exc.strerror}", "make one with: cipherfleet app add") from exc
    return codec.decode(raw, Profile, what=f"the profile {path}")


class VcmConnector(aiohttp.TCPConnector):
    """Connections to VCMs of one consumer. Before a byte of a request leaves, the peer has shown a certificate of the
    domain's CA that names a VCM of this consumer; which one does not matter, so no host name is compared.
    """

    def __init__(self, context: ssl.SSLContext, consumer: ConsumerId, not_after: float) -> None:
        super().__init__(ssl=context, limit=0, keepalive_timeout=KEEP_S)
        self._consumer, self._not_after = consumer, not_after
        self._made: dict[ResponseHandler, asyncio.Transport] = {}

    async def close(self, *, abort_ssl: bool = False) -> None:
        """Returns when every connection has ended, also those that were given back half-read and would still say goodbye:
        the loop may be closed right after."""
        ends = [protocol.closed for protocol in self._made]
        await super().close(abort_ssl=abort_ssl)
        for transport in self._made.values():
            transport.abort()
        await asyncio.gather(*(end for end in ends if end is not None), return_exceptions=True)

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        if self._not_after < time.time():
            raise CertificateExpired("the application's own certificate has expired", _EXPIRED_HINT)
        protocol = await super()._create_connection(req, traces, timeout)
        self._remember(protocol)
        try:
            self._check(protocol)
        except BaseException:
            protocol.abort()
            raise
        return protocol

    def _remember(self, protocol: ResponseHandler) -> None:
        transport, closed = protocol.transport, protocol.closed
        if transport is None or closed is None:  # it has ended already
            return
        self._made[protocol] = transport

        def forget(end: asyncio.Future[None]) -> None:
            end.cancelled() or end.exception()  # looked at: why it ended, its request was told
            del self._made[protocol]

        closed.add_done_callback(forget)

    def _check(self, protocol: ResponseHandler) -> None:
        tls_object = protocol.transport.get_extra_info("ssl_object") if protocol.transport is not None else None
        der = tls_object.getpeercert(binary_form=True) if tls_object is not None else None
        if der is None:
            raise CertificateInvalid("the peer shows no certificate")
        identity = peer_of(der).identity
        if identity.role is not Role.VCM or identity.consumer != self._consumer:
            raise CertificateInvalid(f"{identity.uri} is not a VCM of {self._consumer}")


class Connection:
    """Sends requests to whichever VCM of the profile's consumer serves."""

    def __init__(self, profile: Profile, timeout: float) -> None:
        self.profile = profile
        self.endpoints = Endpoints(profile.endpoints)
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None
        self._refreshed = time.monotonic()
        self._refreshing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Load the certificate; no connection is made yet. Raises ``CertificateInvalid``."""
        if not self.profile.key:
            raise CertificateInvalid("the profile has no private key", "put the key of the CSR into the profile, PEM")
        credentials = Credentials(self.profile.key.encode(), self.profile.chain.encode(), self.profile.trust.encode())
        try:
            context = tls.client_context(credentials)
            not_after = leaf(credentials.chain).not_valid_after_utc.timestamp()
        except (ssl.SSLError, ValueError, IndexError) as exc:
            raise CertificateInvalid("key, chain or trust of the profile cannot be used") from exc
        context.check_hostname = False  # VcmConnector checks role and consumer instead
        self._session = aiohttp.ClientSession(
            connector=VcmConnector(context, self.profile.consumer, not_after),
            timeout=aiohttp.ClientTimeout(total=None, connect=HANDSHAKE_S, sock_connect=HANDSHAKE_S, sock_read=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "cipherfleet"},
            auto_decompress=False,
        )

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(
        self, method: str, path: str, reply: type[T], *, body: object | None = None, headers: Headers = _NO_HEADERS, safe: bool = True
    ) -> T:
        """One question in JSON. ``safe``: asking twice does no harm."""
        upload = Upload(codec.encode(body)) if body is not None else None
        raw = await self.fetch(method, path, upload, headers=headers, safe=safe)
        return codec.decode(raw, reply, what=f"the answer to {method} {path}")

    async def fetch(
        self,
        method: str,
        path: str,
        upload: Upload | None = None,
        *,
        headers: Headers = _NO_HEADERS,
        safe: bool = True,
        answered: Callable[[Mapping[str, str]], object] = lambda _: None,
    ) -> bytes:
        """One request, its whole answer; ``answered`` is given the answer's headers."""
        pieces = [piece async for piece in self.stream(method, path, upload, headers=headers, safe=safe, answered=answered)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def stream(
        self,
        method: str,
        path: str,
        upload: Upload | None = None,
        *,
        headers: Headers = _NO_HEADERS,
        safe: bool = True,
        answered: Callable[[Mapping[str, str]], object] = lambda _: None,
    ) -> AsyncIterator[bytes]:
        """One request, its answer piece by piece while the body still goes out.

        Raises the error that the VCM sent; when the answer breaks off, the reason that the VCM gives, or ``PeerError``.
        """
        name = secrets.token_hex(16)
        pieces = 0
        failure: CipherfleetError
        async with self._open(method, path, upload, {**headers, wire.REQUEST: name}, safe) as (response, watch):
            answered(response.headers)
            while True:
                try:
                    async with watch:
                        piece = await response.content.readany()
                except (aiohttp.ClientError, OSError) as exc:
                    raise_source_failure(upload)
                    failure, cause = PeerError(f"the answer to {method} {path} broke off", "nothing of it is to be used; try again"), exc
                    break
                if not piece:
                    return
                pieces += 1
                yield piece
        reason = await self._reason(name)
        raise reason or failure from cause

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, upload: Upload | None, headers: dict[str, str], safe: bool
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, "Watch"]]:
        """A response of status 2xx that has begun, from the first endpoint that gives one."""
        watch = Watch(self._timeout, f"the VCM of {self.profile.consumer}")
        if upload is not None:
            upload.touch = watch.touch
        response = await self._first_response(method, path, upload, headers, safe, watch)
        try:
            yield response, watch
        finally:
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def _first_response(
        self, method: str, path: str, upload: Upload | None, headers: dict[str, str], safe: bool, watch: "Watch"
    ) -> aiohttp.ClientResponse:
        failed: dict[str, CipherfleetError] = {}
        stale: set[str] = set()
        while (endpoint := await self.endpoints.choose(failed)) is not None:
            if upload is not None:  # a small one is gathered before there is a connection
                await upload.rewind()
            try:
                response = await self._send(endpoint, method, path, upload, headers, watch)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:  # nothing was sent
                failed[endpoint] = self._failure(endpoint, exc)
                self.endpoints.forget(endpoint)
                continue
            except CertificateInvalid as exc:  # somebody else lives there now
                failed[endpoint] = exc
                self.endpoints.forget(endpoint)
                continue
            except (aiohttp.ClientError, OSError) as exc:
                raise_source_failure(upload)
                failure = self._failure(endpoint, exc)
                if not self._may_repeat(failure, upload, safe):
                    raise failure from exc
                if endpoint in stale:  # the second time it is not a kept connection that had gone
                    failed[endpoint] = failure
                    self.endpoints.forget(endpoint)
                stale.add(endpoint)
            else:
                if response.status < 300:
                    self.endpoints.good = endpoint
                    self._refresh()
                    return response
                failure = await self._refusal(response, watch)
                if not self._may_repeat(failure, upload, safe):
                    raise failure
                failed[endpoint] = failure
                self.endpoints.forget(endpoint)
        raise self._verdict(list(failed.values()))

    @staticmethod
    def _may_repeat(failure: CipherfleetError, upload: Upload | None, safe: bool) -> bool:
        """Whether another try, perhaps elsewhere, could help and does no harm."""
        passing = isinstance(failure, ServiceUnavailable) and not isinstance(failure, TimedOut)
        return safe and passing and (upload is None or upload.replayable)

    async def _send(
        self, endpoint: str, method: str, path: str, upload: Upload | None, headers: dict[str, str], watch: "Watch"
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("the client is not open: use `async with Client(...)`")
        data: Upload | Bytes | None = upload
        if upload is not None and upload.size is not None:
            if upload.size <= _SMALL_BYTES:
                data = b"".join([piece async for piece in upload])
            else:
                headers = {**headers, "Content-Length": str(upload.size)}
        async with watch:
            return await self._session.request(method, endpoint + path, data=data, headers=headers, allow_redirects=False)

    async def _refusal(self, response: aiohttp.ClientResponse, watch: "Watch") -> CipherfleetError:
        """The error in an answer of status 4xx or 5xx."""
        try:
            async with watch:
                raw = await response.content.read(_MAX_ERROR_BYTES)
        except (aiohttp.ClientError, OSError):
            raw = b""
        finally:
            response.close()  # the body may still be on its way
        return error_of(raw, response.status)

    def _failure(self, endpoint: str, exc: BaseException) -> CipherfleetError:
        cause: BaseException | None = exc
        while cause is not None:  # the alert that explains a reset stands below it
            if isinstance(cause, ssl.SSLError):
                found = transport_error(cause, ServiceOff, endpoint)
                if isinstance(found, CertificateExpired):
                    return CertificateExpired(found.message, _EXPIRED_HINT)
                return found
            cause = cause.__cause__ or cause.__context__
        return transport_error(exc, ServiceOff, endpoint)

    def _verdict(self, failures: list[CipherfleetError]) -> CipherfleetError:
        """What it means when no endpoint gave an answer: a wrong certificate says more than an address without a VCM."""
        for failure in failures:
            if not isinstance(failure, ServiceOff):
                return failure
        return ServiceOff(f"no VCM of {self.profile.consumer} answers at any of its {len(self.endpoints.all)} addresses")

    async def _reason(self, name: str) -> CipherfleetError | None:
        """Why the VCM broke off the answer to the request called ``name``, if it can say."""
        try:
            reply = await self.ask("GET", f"/v1/requests/{name}/error", wire.RequestError)
        except (NotFound, PeerError):
            return None
        except CipherfleetError as exc:
            return exc
        return CipherfleetError.from_body(reply.error) if reply.error is not None else None

    def _refresh(self) -> None:
        """Now and then, aside, learn where the domain's VCMs are."""
        if time.monotonic() - self._refreshed < REFRESH_S or (self._refreshing is not None and not self._refreshing.done()):
            return
        self._refreshed = time.monotonic()
        self._refreshing = asyncio.create_task(self._learn())

    async def _learn(self) -> None:
        with suppress(CipherfleetError):
            self.endpoints.learn((await self.ask("GET", "/v1/endpoints", EndpointsReply)).endpoints)


class Watch:
    """``async with watch``: a wait that ends with ``TimedOut`` when nothing moved, in either direction, for ``limit`` seconds."""

    def __init__(self, limit: float, whom: str) -> None:
        self._limit, self._whom = limit, whom
        self._deadline: asyncio.Timeout | None = None

    def touch(self) -> None:
        """Something moved."""
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._limit)

    async def __aenter__(self) -> None:
        self._deadline = asyncio.timeout(self._limit)
        await self._deadline.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        deadline, self._deadline = self._deadline, None
        if deadline is not None:
            try:
                await deadline.__aexit__(*exc)
            except TimeoutError as timeout:
                raise TimedOut(f"{self._whom} did not answer for {self._limit:g} s") from timeout


def raise_source_failure(upload: Upload | None) -> None:
    """What the caller's own source raised goes to the caller as it was."""
    if upload is not None and upload.failure is not None:
        raise upload.failure
