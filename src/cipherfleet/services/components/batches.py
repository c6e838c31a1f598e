"""Many short operations in one request: up to 1,000, with any keys; each has its own answer or error."""

from collections.abc import Iterator
from typing import NamedTuple

from cipherfleet.channel import codec
from cipherfleet.channel.server import Call
from cipherfleet.contract.algorithms import Use, by_number
from cipherfleet.contract.ciphertext import HEADER_BYTES, Header
from cipherfleet.contract.errors import CipherfleetError, CiphertextForeignKey, CiphertextInvalid, Malformed, TooLarge
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import (
    MAX_BATCH,
    MAX_DATA_BYTES,
    MAX_PARAMETER_BYTES,
    BatchAnswer,
    BatchItem,
    BatchRequest,
    Operation,
    StreamRequest,
    Verb,
)
from cipherfleet.contract.vcm import KeyUse
from cipherfleet.services import wire
from cipherfleet.services.components.routes import ANY_RIGHT, Routes

USES: dict[Verb, tuple[Use, ...]] = {
    Verb.ENCRYPT: (Use.ENCRYPT, Use.WRAP),
    Verb.DECRYPT: (Use.ENCRYPT, Use.WRAP),
    Verb.REENCRYPT: (Use.ENCRYPT,),
    Verb.SIGN: (Use.SIGN,),
    Verb.VERIFY: (Use.SIGN,),
    Verb.MAC: (Use.MAC,),
    Verb.VERIFY_MAC: (Use.MAC,),
    Verb.DIGEST: (),
    Verb.AGREE: (Use.AGREE,),
    Verb.ENCAPSULATE: (Use.ENCAPSULATE,),
    Verb.DECAPSULATE: (Use.ENCAPSULATE,),
    Verb.DERIVE: (Use.DERIVE,),
}
RIGHTS: dict[Verb, tuple[Right, ...]] = {
    Verb.ENCRYPT: (Right.ENCRYPT,),
    Verb.DECRYPT: (Right.DECRYPT,),
    Verb.REENCRYPT: (Right.DECRYPT, Right.ENCRYPT),
    Verb.SIGN: (Right.SIGN,),
    Verb.VERIFY: (Right.VERIFY,),
    Verb.MAC: (Right.MAC,),
    Verb.VERIFY_MAC: (Right.VERIFY,),
    Verb.DIGEST: (Right.DIGEST,),
    Verb.AGREE: (Right.DERIVE,),
    Verb.ENCAPSULATE: (Right.ENCRYPT,),
    Verb.DECAPSULATE: (Right.DECRYPT,),
    Verb.DERIVE: (Right.DERIVE,),
}
_CONTEXTUAL = frozenset({Verb.ENCRYPT, Verb.DECRYPT, Verb.SIGN, Verb.VERIFY, Verb.AGREE, Verb.DERIVE})
_PARAMETERS_ROOM = MAX_PARAMETER_BYTES - 1024


PROCESSING = frozenset({Verb.DECRYPT, Verb.VERIFY, Verb.VERIFY_MAC, Verb.DECAPSULATE})
"""What makes nothing new; a re-encryption names the key that it makes something new with."""


class _Ready(NamedTuple):
    """An item on its way to the card: ``use`` names the key of its answer."""

    number: int
    use: KeyUse | None
    item: BatchItem
    data: bytes


class Batches:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/batch", ANY_RIGHT, self.batch)

    async def batch(self, call: Call) -> wire.BatchReply:
        raw = await self._routes.body(call).whole(wire.MAX_BATCH_BYTES)
        ask = codec.decode(raw, wire.BatchAsk, what="the batch")
        if not 1 <= len(ask.items) <= MAX_BATCH:
            raise Malformed(f"a batch has 1 to {MAX_BATCH} items, not {len(ask.items)}")
        answers: list[wire.BatchReplyItem | None] = [None] * len(ask.items)
        ready: list[_Ready] = []
        for number, item in enumerate(ask.items):
            try:
                ready.append(await self._prepare(call, number, item))
            except CipherfleetError as exc:
                answers[number] = wire.BatchReplyItem(error=exc.to_reply().error)
                self._routes.host.note_use(call.peer, item.operation, "", 0, exc.code)
        for part in _parts(ready):
            await self._run(call, part, answers)
        return wire.BatchReply(tuple(answer for answer in answers if answer is not None))

    async def _prepare(self, call: Call, number: int, item: wire.BatchAskItem) -> _Ready:
        """Who may, which key, and what the card is to do."""
        for right in RIGHTS[item.operation]:
            if item.operation is Verb.DIGEST:
                await self._routes.host.authorise(call.peer, right)
            else:
                await self._routes.host.may_some(call.peer, right)
        if len(item.data) > MAX_DATA_BYTES or len(item.context) > wire.MAX_CONTEXT_BYTES or len(item.signature) > wire.MAX_SIGNATURE_BYTES:
            raise TooLarge("data, context or signature of this item is too large")
        request = StreamRequest(
            item.operation,
            item.context,
            signature=item.signature,
            digest=item.digest,
            prehashed=item.prehashed,
            length=item.length,
            salt=item.salt,
            peer=item.peer,
            target_context=item.target_context,
        )
        if item.operation is Verb.DIGEST:
            return _Ready(number, None, BatchItem(request, 0, len(item.data)), item.data)
        keys = self._routes.host.keys
        named = None
        if item.key:
            key = await self._routes.named_key(item.key)
            if item.operation is Verb.REENCRYPT:
                await self._routes.permit(call, Right.ENCRYPT, key, item.target_context)
            else:
                (right,) = RIGHTS[item.operation]
                await self._routes.permit(call, right, key, item.context if item.operation in _CONTEXTUAL else b"")
            named = await keys.use(key, version=item.version, protects=item.operation not in PROCESSING)
            self._routes.check_use(named, *USES[item.operation])
        if item.operation is Verb.REENCRYPT or (item.operation is Verb.DECRYPT and (named is None or not named.bare)):
            return await self._from_message(call, number, item, request, named)
        if named is None:
            raise Malformed("this item names no key")
        return _Ready(number, named, BatchItem(request, named.handle, len(item.data)), item.data)

    async def _from_message(self, call: Call, number: int, item: wire.BatchAskItem, request: StreamRequest, named: KeyUse | None) -> _Ready:
        raw = item.data[:HEADER_BYTES]
        header = Header.decode(raw)
        if item.operation is Verb.REENCRYPT or named is None:
            await self._routes.permit(call, Right.DECRYPT, KeyId(header.key), item.context)
        source = self._routes.check_use(await self._routes.host.keys.use(KeyId(header.key), version=header.version), Use.ENCRYPT)
        if by_number(header.algorithm).name != source.algorithm:
            raise CiphertextInvalid("the ciphertext's header names another algorithm than its key has")
        target = 0
        if item.operation is Verb.REENCRYPT:
            if named is None:
                raise Malformed("this item names no key to re-encrypt to")
            target = named.handle
        elif named is not None and named.key != source.key:
            raise CiphertextForeignKey("the ciphertext was made with another key than the one that was named")
        request = StreamRequest(item.operation, item.context, raw, target=target, target_context=item.target_context)
        data = item.data[HEADER_BYTES:]
        return _Ready(number, named if target else source, BatchItem(request, source.handle, len(data)), data)

    async def _run(self, call: Call, part: list[_Ready], answers: list[wire.BatchReplyItem | None]) -> None:
        request = BatchRequest(tuple(ready.item for ready in part))
        data = b"".join(ready.data for ready in part)
        await self._routes.host.ask_use(call.peer, *((ready.item.request.verb, *_named(ready)) for ready in part))
        done = await self._routes.host.card.submit(Operation.BATCH, parameters=codec.encode(request), data=data)
        results, at = codec.decode(done.parameters, BatchAnswer).results, 0
        for ready, result in zip(part, results, strict=True):
            key, version = _named(ready)
            outcome = "ok" if result.error is None else result.error.code
            self._routes.host.note_use(call.peer, ready.item.request.verb, key, version, outcome)
            answers[ready.number] = wire.BatchReplyItem(done.data[at : at + result.length], key, version, result.error)
            at += result.length


def _named(ready: _Ready) -> tuple[str, int]:
    return ("", 0) if ready.use is None else (ready.use.key, ready.use.version)


def _parts(ready: list[_Ready]) -> Iterator[list[_Ready]]:
    """As many batches of the card as parameters and data need."""
    part: list[_Ready] = []
    parameters = data = 0
    for one in ready:
        size = len(codec.encode(one.item)) + 1
        if part and (parameters + size > _PARAMETERS_ROOM or data + len(one.data) > MAX_DATA_BYTES):
            yield part
            part, parameters, data = [], 0, 0
        part.append(one)
        parameters, data = parameters + size, data + len(one.data)
    if part:
        yield part
