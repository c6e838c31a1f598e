"""Sign, verify, MAC and digest: the body is the message, of any size."""

from aiohttp import web

from cipherfleet.channel.server import Call
from cipherfleet.contract.algorithms import Kind, Use, algorithm
from cipherfleet.contract.errors import CipherfleetError, Internal, MacInvalid, Malformed, SignatureInvalid, WrongKeyType
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import StreamRequest, Verb
from cipherfleet.contract.vcm import KeyUse
from cipherfleet.services import wire
from cipherfleet.services.components.bodies import Body, digest_choice, header_bytes, header_version, prehashed, whole_number
from cipherfleet.services.components.routes import Routes, key_headers, raw
from cipherfleet.services.components.streams import absorb

MAX_TRIED_VERSIONS = 8
"""How many versions of a key, newest first, a signature is checked against when the caller names none."""


class Signatures:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/keys/{key}/sign", (Right.SIGN,), self.sign, contextual=True)
        routes.add("POST", "/v1/keys/{key}/verify", (Right.VERIFY,), self.verify, contextual=True)
        routes.add("POST", "/v1/keys/{key}/mac", (Right.MAC,), self.mac)
        routes.add("POST", "/v1/keys/{key}/verify-mac", (Right.VERIFY,), self.verify_mac)
        routes.add("POST", "/v1/digest/{algorithm}", (Right.DIGEST,), self.digest)

    async def sign(self, call: Call) -> web.Response:
        return await self._make(call, self._request(call, Verb.SIGN), Use.SIGN)

    async def mac(self, call: Call) -> web.Response:
        return await self._make(call, StreamRequest(Verb.MAC), Use.MAC)

    async def verify(self, call: Call) -> web.Response:
        return await self._check(call, Verb.VERIFY, Use.SIGN, SignatureInvalid)

    async def verify_mac(self, call: Call) -> web.Response:
        return await self._check(call, Verb.VERIFY_MAC, Use.MAC, MacInvalid)

    async def digest(self, call: Call) -> web.Response:
        body = self._routes.body(call)
        chosen = algorithm(call.path("algorithm", str))
        if chosen.kind is not Kind.DIGEST:
            raise WrongKeyType(f"{chosen.name} is not a digest")
        length = whole_number(call.query("length", "0"), "length", 0, wire.MAX_DIGEST_BYTES)
        value = await self._one(0, StreamRequest(Verb.DIGEST, digest=chosen.name, length=length), body)
        return raw(value)

    def _request(self, call: Call, verb: Verb, signature: bytes = b"") -> StreamRequest:
        """A signature's choices: digest, whether the body is one already, context."""
        context = self._routes.context(call)
        return StreamRequest(verb, context, signature=signature, digest=digest_choice(call.request), prehashed=prehashed(call.request))

    async def _make(self, call: Call, request: StreamRequest, use: Use) -> web.Response:
        body = self._routes.body(call)
        key = await self._routes.key_use(call, use, protects=True)
        return raw(await self._one(key.handle, request, body), key_headers(key))

    async def _check(self, call: Call, verb: Verb, use: Use, invalid: type[CipherfleetError]) -> web.Response:
        body = self._routes.body(call)
        signature = header_bytes(call.request, wire.SIGNATURE, wire.MAX_SIGNATURE_BYTES)
        if not signature:
            raise Malformed(f"the header {wire.SIGNATURE} is missing")
        keys = await self._versions(call, use)
        request = self._request(call, verb, signature) if verb is Verb.VERIFY else StreamRequest(verb, signature=signature)
        answers = await absorb(self._routes.host.card, [(key.handle, request) for key in keys], body)
        for key, answer in zip(keys, answers, strict=True):
            if not isinstance(answer, CipherfleetError):
                return web.Response(status=204, headers=key_headers(key))
        for answer in answers:
            if isinstance(answer, CipherfleetError) and not isinstance(answer, invalid):
                raise answer
        raise answers[0] if isinstance(answers[0], CipherfleetError) else Internal("a check had no answer")

    async def _versions(self, call: Call, use: Use) -> list[KeyUse]:
        """The version that the caller names, else the newest ones: a signature does not say which one made it."""
        version = header_version(call.request)
        newest = await self._routes.key_use(call, use, version=version)
        if version is not None:
            return [newest]
        described = await self._routes.host.keys.describe(newest.key)
        older = sorted((v for v in described.versions if v != newest.version), reverse=True)[: MAX_TRIED_VERSIONS - 1]
        return [newest, *[await self._routes.key_use(call, use, version=v) for v in older]]

    async def _one(self, handle: int, request: StreamRequest, body: Body) -> bytes:
        (answer,) = await absorb(self._routes.host.card, [(handle, request)], body)
        if isinstance(answer, CipherfleetError):
            raise answer
        return answer
