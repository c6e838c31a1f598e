"""Secrets for the caller's own use: agreed on, derived, encapsulated. Each is in one answer and stored nowhere."""

from cipherfleet.channel import codec
from cipherfleet.channel.server import Call
from cipherfleet.contract.algorithms import Use
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import Operation, StreamRequest, Verb
from cipherfleet.contract.vcm import KeyUse
from cipherfleet.contract.vcm_api import EncapsulationReply, SecretReply
from cipherfleet.services import wire
from cipherfleet.services.components.bodies import header_version
from cipherfleet.services.components.routes import Routes

SECRET_BYTES = 32
"""Of a shared secret of ML-KEM (FIPS 203)."""


class Agreements:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/keys/{key}/agree", (Right.DERIVE,), self.agree, deferred=True)
        routes.add("POST", "/v1/keys/{key}/derive", (Right.DERIVE,), self.derive, deferred=True)
        routes.add("POST", "/v1/keys/{key}/encapsulate", (Right.ENCRYPT,), self.encapsulate)
        routes.add("POST", "/v1/keys/{key}/decapsulate", (Right.DECRYPT,), self.decapsulate)

    async def agree(self, call: Call) -> SecretReply:
        ask = await self._routes.body(call).message(wire.AgreeAsk)
        await self._routes.permit(call, Right.DERIVE, await self._routes.key_id(call), ask.context)
        use = await self._use(call, Use.AGREE)
        request = StreamRequest(Verb.AGREE, ask.context, length=ask.length, salt=ask.salt, peer=ask.peer)
        return SecretReply(use.key, use.version, await self._run(use, request))

    async def derive(self, call: Call) -> SecretReply:
        ask = await self._routes.body(call).message(wire.DeriveAsk)
        await self._routes.permit(call, Right.DERIVE, await self._routes.key_id(call), ask.context)
        use = await self._use(call, Use.DERIVE)
        return SecretReply(
            use.key, use.version, await self._run(use, StreamRequest(Verb.DERIVE, ask.context, length=ask.length, salt=ask.salt))
        )

    async def encapsulate(self, call: Call) -> EncapsulationReply:
        use = await self._use(call, Use.ENCAPSULATE)
        both = await self._run(use, StreamRequest(Verb.ENCAPSULATE))
        return EncapsulationReply(use.key, use.version, both[:SECRET_BYTES], both[SECRET_BYTES:])

    async def decapsulate(self, call: Call) -> SecretReply:
        ask = await self._routes.body(call).message(wire.DecapsulateAsk)
        use = await self._use(call, Use.ENCAPSULATE, protects=False)
        return SecretReply(use.key, use.version, await self._run(use, StreamRequest(Verb.DECAPSULATE), ask.ciphertext))

    async def _use(self, call: Call, use: Use, *, protects: bool = True) -> KeyUse:
        """Of the version that the caller names, or the newest."""
        return await self._routes.key_use(call, use, version=header_version(call.request), protects=protects)

    async def _run(self, use: KeyUse, request: StreamRequest, data: bytes = b"") -> bytes:
        done = await self._routes.host.card.submit(Operation.RUN, handle=use.handle, parameters=codec.encode(request), data=data)
        return done.data
