"""What every component stands on: rights first, then the handler; answers that broke off are remembered."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from cipherfleet.channel.server import Call, Server
from cipherfleet.contract.algorithms import Use, algorithm
from cipherfleet.contract.errors import CipherfleetError, ErrorBody, Internal, Malformed, NotPermitted, WrongKeyType
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import KeyId, Serial
from cipherfleet.contract.key_life import ALIAS_PREFIX
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import StreamRequest
from cipherfleet.contract.vcm import KeyUse, VcmHost
from cipherfleet.services import wire
from cipherfleet.services.components.bodies import Body, header_bytes, request_id
from cipherfleet.services.components.streams import Answer, transform

Handler = Callable[[Call], Awaitable[object]]

MAX_REMEMBERED_ERRORS = 1024
_KEY = web.RequestKey("key", str)
_USED = web.RequestKey("used", KeyUse)
_OPERATION = web.RequestKey("operation", str)
_BROKEN = web.RequestKey("broken", str)
_ON_DATA = frozenset({Right.ENCRYPT, Right.DECRYPT, Right.SIGN, Right.VERIFY, Right.MAC, Right.DERIVE, Right.DIGEST, Right.RANDOM})
_KEYLESS = frozenset({"digest", "random"})
ANY_RIGHT: tuple[Right, ...] = ()
_NO_STORE = {"Cache-Control": "no-store"}
_VERBS_OF = {
    Use.ENCRYPT: "encrypt or decrypt",
    Use.WRAP: "wrap or unwrap",
    Use.SIGN: "sign or verify",
    Use.MAC: "make or check a MAC",
    Use.DIGEST: "make a digest",
    Use.AGREE: "agree on a secret",
    Use.ENCAPSULATE: "encapsulate or decapsulate",
    Use.DERIVE: "derive",
}


class Routes:
    """The components' view of their server and of the VCM that hosts them."""

    def __init__(self, server: Server, host: VcmHost, stall_s: float) -> None:
        self.host = host
        self._server = server
        self._stall_s = stall_s
        self._errors: OrderedDict[tuple[Serial, str], ErrorBody] = OrderedDict()

    def add(
        self, method: str, path: str, rights: tuple[Right, ...], handler: Handler, *, contextual: bool = False, deferred: bool = False
    ) -> None:
        """Serve ``handler`` to applications that have all of ``rights`` (with ``ANY_RIGHT``: at least one of any).

        A grant is enough for the key that the path names. ``contextual``: the operation's context is the header's; else it has
        none. ``deferred``: key or context are not known before the handler, which calls ``permit`` itself.
        """
        keyed = "{key}" in path
        audited = _operation(path) if set(rights) & _ON_DATA else ""

        async def serve(call: Call) -> object:
            outcome = "ok"
            if audited:
                call.request[_OPERATION] = audited
            try:
                await self._authorise(call, rights, keyed=keyed, contextual=contextual, deferred=deferred)
                if audited in _KEYLESS:
                    await self.host.ask_use(call.peer, (audited, "", 0))
                with self.host.keys.hold():
                    return await handler(call)
            except ConnectionError:
                outcome = "connection-lost"
                return web.Response(status=499)  # nobody is there to read it
            except CipherfleetError as exc:
                outcome = exc.code
                raise
            finally:
                if audited:
                    used = call.request.get(_USED)
                    key, version = ("", 0) if used is None else (used.key, used.version)
                    self.host.note_use(call.peer, audited, key, version, call.request.get(_BROKEN, outcome))

        self._server.route(method, path, {Role.APPLICATION}, serve)

    def body(self, call: Call) -> Body:
        return Body(call.request, self._stall_s)

    async def key_use(self, call: Call, *uses: Use, version: int | None = None, protects: bool = False) -> KeyUse:
        """The key that the path names, fit for one of ``uses``; ``protects``: to make something new.

        Raises ``WrongKeyType`` and what ``KeyStore.use`` raises.
        """
        found = self.check_use(await self.host.keys.use(await self.key_id(call), version=version, protects=protects), *uses)
        await self.about_to_use(call, found)
        return found

    async def about_to_use(self, call: Call, use: KeyUse) -> None:
        """For the audit log: with which key the request works. The first time, and in ``full`` mode it is written then."""
        if _USED not in call.request:
            call.request[_USED] = use
            await self.host.ask_use(call.peer, (call.request.get(_OPERATION, ""), use.key, use.version))

    async def key_id(self, call: Call) -> KeyId:
        """The key that the path names, by its id or as ``alias/NAME``: one for the whole request.

        Raises ``Malformed`` or ``AliasUnknown``.
        """
        found = call.request.get(_KEY)
        if found is None:
            found = call.request[_KEY] = await self.named_key(call.path("key", str))
        return KeyId(found)

    async def permit(self, call: Call, right: Right, key: KeyId, context: bytes = b"") -> None:
        """What a ``deferred`` handler asks before it does anything. Raises as ``VcmHost.authorise_key``."""
        await self.host.authorise_key(call.peer, right, key, context)

    async def named_key(self, name: str) -> KeyId:
        """As ``key_id``, of a name from elsewhere."""
        if name.startswith(ALIAS_PREFIX):
            return await self.host.key_life.resolve(name.removeprefix(ALIAS_PREFIX))
        try:
            return msgspec.convert(name, KeyId)
        except msgspec.ValidationError as exc:
            raise Malformed("a key is named by its id (32 hex digits) or as alias/NAME") from exc

    @staticmethod
    def check_use(found: KeyUse, *uses: Use) -> KeyUse:
        if not set(uses) & set(algorithm(found.algorithm).uses):
            raise WrongKeyType(f"a key of {found.algorithm} cannot {_VERBS_OF[uses[0]]}")
        return found

    @staticmethod
    def context(call: Call, name: str = wire.CONTEXT) -> bytes:
        """The encryption context. Raises ``Malformed`` or ``TooLarge``."""
        return header_bytes(call.request, name, wire.MAX_CONTEXT_BYTES)

    async def cipher(
        self, call: Call, body: Body, use: KeyUse, request: StreamRequest, *, handle: int, length: int | None, bare: bool = False
    ) -> object:
        """Answer with the body, transformed; ``use`` is the key that the answer names. A broken answer's reason is kept."""
        name = request_id(call.request)
        headers = key_headers(use)
        answer = Answer(call.request, headers, length, self._stall_s)
        try:
            return await transform(self.host.card, handle, request, body, answer, plain_headers=headers, bare=bare)
        except Exception as exc:
            if not answer.begun:
                raise
            call.request[_BROKEN] = exc.code if isinstance(exc, CipherfleetError) else "connection-lost"
            if name is not None and not isinstance(exc, ConnectionError):
                error = exc if isinstance(exc, CipherfleetError) else Internal("something went wrong on our side")
                self._errors[(call.peer.serial, name)] = error.to_reply().error
                while len(self._errors) > MAX_REMEMBERED_ERRORS:
                    self._errors.popitem(last=False)
            answer.break_off()
            return answer.response

    async def request_error(self, call: Call) -> object:
        """Why a request of this very caller broke off."""
        return wire.RequestError(self._errors.get((call.peer.serial, call.path("request", wire.RequestId))))

    async def _authorise(self, call: Call, rights: tuple[Right, ...], *, keyed: bool, contextual: bool, deferred: bool) -> None:
        for right in rights:
            if not keyed and not deferred:
                await self.host.authorise(call.peer, right)
            elif not await self.host.may_some(call.peer, right) and not deferred:
                context = self.context(call) if contextual else b""
                await self.host.authorise_key(call.peer, right, await self.key_id(call), context)
        if rights:
            return
        refused = NotPermitted("this application has no rights")
        for right in Right:
            try:
                await self.host.may_some(call.peer, right)
            except NotPermitted as exc:
                refused = exc
            else:
                return
        raise refused


def _operation(path: str) -> str:
    """What the audit log calls it: the last word of its path."""
    return next(part for part in reversed(path.split("/")) if part and not part.startswith("{"))


def key_headers(use: KeyUse) -> dict[str, str]:
    """What every answer made with a key says of it."""
    return {**_NO_STORE, wire.KEY: use.key, wire.KEY_VERSION: str(use.version), wire.ALGORITHM: use.algorithm}


def raw(data: bytes, headers: dict[str, str] | None = None) -> web.Response:
    """A short answer of raw bytes."""
    return web.Response(body=data, headers=headers or _NO_STORE, content_type="application/octet-stream")


def actor(call: Call) -> str:
    """Who a change is noted for."""
    return f"application/{call.peer.identity.id}"
