"""Encrypt, decrypt, re-encrypt and data keys: ciphertexts in the format of ``contract.ciphertext``, streamed both ways."""

from urllib.parse import unquote

from cipherfleet.channel import codec
from cipherfleet.channel.server import Call
from cipherfleet.contract.algorithms import Kind, Use, algorithm, by_number
from cipherfleet.contract.ciphertext import HEADER_BYTES, TAG_BYTES, Header, sealed_length
from cipherfleet.contract.errors import CiphertextForeignKey, CiphertextInvalid, CiphertextTruncated, Malformed
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import CHUNK_BYTES, MAX_DATA_BYTES, DataKeyRequest, Operation, StreamRequest, Verb
from cipherfleet.contract.vcm import KeyUse
from cipherfleet.contract.vcm_api import DataKeyReply
from cipherfleet.services import wire
from cipherfleet.services.components.bodies import Body, digest_choice, header_version
from cipherfleet.services.components.routes import Routes, key_headers, raw
from cipherfleet.services.components.streams import run

_SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES


class Ciphers:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/keys/{key}/encrypt", (Right.ENCRYPT,), self.encrypt, contextual=True)
        routes.add("POST", "/v1/decrypt", (Right.DECRYPT,), self.decrypt, deferred=True)
        routes.add("POST", "/v1/keys/{key}/decrypt", (Right.DECRYPT,), self.decrypt_with, contextual=True)
        routes.add("POST", "/v1/keys/{key}/reencrypt", (Right.DECRYPT, Right.ENCRYPT), self.reencrypt, deferred=True)
        routes.add("POST", "/v1/keys/{key}/data-key", (Right.ENCRYPT,), self.data_key, contextual=True)

    async def encrypt(self, call: Call) -> object:
        body = self._routes.body(call)
        context = self._routes.context(call)
        use = await self._routes.key_use(call, Use.ENCRYPT, Use.WRAP, protects=True)
        if use.bare:
            return await self._bare(call, body, use, StreamRequest(Verb.ENCRYPT, context, digest=digest_choice(call.request)))
        length = None if body.length is None else sealed_length(body.length)
        return await self._routes.cipher(call, body, use, StreamRequest(Verb.ENCRYPT, context), handle=use.handle, length=length)

    async def decrypt(self, call: Call) -> object:
        """The key and its version come from the ciphertext's header; a caller may name the key that it must be.

        Only verified plaintext leaves the card.
        """
        return await self._decrypt(call, expected=call.request.headers.get(wire.KEY), permit=True)

    async def decrypt_with(self, call: Call) -> object:
        """With the key that the path names: a bare ciphertext, of the version that the caller names or the newest; or a message."""
        use = await self._routes.key_use(call, Use.ENCRYPT, Use.WRAP, version=header_version(call.request))
        if not use.bare:
            return await self._decrypt(call, expected=use.key)
        request = StreamRequest(Verb.DECRYPT, self._routes.context(call), digest=digest_choice(call.request))
        return await self._bare(call, self._routes.body(call), use, request)

    async def _decrypt(self, call: Call, *, expected: str | None, permit: bool = False) -> object:
        body = self._routes.body(call)
        context = self._routes.context(call)
        header, use = await self._source(call, body, context, permit=permit, expected=expected)
        length = _opened_length(body.length)
        return await self._routes.cipher(call, body, use, StreamRequest(Verb.DECRYPT, context, header), handle=use.handle, length=length)

    async def reencrypt(self, call: Call) -> object:
        """A ciphertext under any key becomes one under the path's key; the plaintext stays in the card."""
        body = self._routes.body(call)
        context, target_context = self._routes.context(call), self._routes.context(call, wire.TARGET_CONTEXT)
        await self._routes.permit(call, Right.ENCRYPT, await self._routes.key_id(call), target_context)
        target = await self._routes.key_use(call, Use.ENCRYPT, protects=True)
        header, source = await self._source(call, body, context, permit=True)
        _opened_length(body.length)  # cut ciphertexts are refused before anything is sent
        request = StreamRequest(Verb.REENCRYPT, context, header, target=target.handle, target_context=target_context)
        return await self._routes.cipher(call, body, target, request, handle=source.handle, length=body.length)

    async def data_key(self, call: Call) -> DataKeyReply:
        """A new key for the caller's own use, encrypted under the path's key; it is not stored."""
        ask = await self._routes.body(call).message(wire.DataKeyAsk)
        if not 16 <= ask.length <= 64:
            raise Malformed("a data key has 16 to 64 bytes")
        context = self._routes.context(call)
        use = await self._routes.key_use(call, Use.ENCRYPT, protects=True)
        parameters = codec.encode(DataKeyRequest(ask.length, ask.plaintext, context))
        done = await self._routes.host.card.submit(Operation.DATA_KEY, handle=use.handle, parameters=parameters)
        plaintext = done.data[done.value :] if ask.plaintext else None
        return DataKeyReply(use.key, use.version, done.data[: done.value], plaintext)

    async def _bare(self, call: Call, body: Body, use: KeyUse, request: StreamRequest) -> object:
        """As the algorithm's standard says. CBC and CTR stream; all else is done at once."""
        chosen = algorithm(use.algorithm)
        if chosen.kind is Kind.CIPHER and chosen.mode != "XTS":
            return await self._routes.cipher(call, body, use, request, handle=use.handle, length=None, bare=True)
        data = await body.whole(MAX_DATA_BYTES)
        return raw(await run(self._routes.host.card, use.handle, request, data), key_headers(use))

    async def _source(self, call: Call, body: Body, context: bytes, *, permit: bool, expected: str | None = None) -> tuple[bytes, KeyUse]:
        """The header of the ciphertext in the body, and the key it names, which must be granted in ``context`` if ``permit``.

        Raises ``CiphertextForeignKey`` unless it is ``expected``.
        """
        await body.fill(HEADER_BYTES - 1)
        raw = body.take(HEADER_BYTES)
        header = Header.decode(raw)
        if permit:
            await self._routes.permit(call, Right.DECRYPT, KeyId(header.key), context)
        if expected is not None and header.key != await self._routes.named_key(unquote(expected)):
            raise CiphertextForeignKey("the ciphertext was made with another key than the one that was named")
        named = by_number(header.algorithm)
        use = self._routes.check_use(await self._routes.host.keys.use(KeyId(header.key), version=header.version), Use.ENCRYPT)
        await self._routes.about_to_use(call, use)
        if named.name != use.algorithm:
            raise CiphertextInvalid(f"the ciphertext's header names {named.name}, its key is one of {use.algorithm}")
        return raw, use


def _opened_length(sealed: int | None) -> int | None:
    """Size of the plaintext of a ciphertext of ``sealed`` bytes. Raises ``CiphertextTruncated``."""
    if sealed is None:
        return None
    rest = sealed - HEADER_BYTES
    chunks = max(1, -(-rest // _SEALED_CHUNK))
    if rest - (chunks - 1) * _SEALED_CHUNK < TAG_BYTES:
        raise CiphertextTruncated("the ciphertext was cut within a chunk")
    return rest - chunks * TAG_BYTES
