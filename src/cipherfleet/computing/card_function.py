"""One virtual function of a card: everything that the card holds for one vCC, and every operation on it.

Sans-IO: ``execute`` takes a request apart and answers it. Nothing of one function is reachable from another. Every operation
on keys happens under a lease that is checked before and after it; what came out under a lease that ended meanwhile is thrown away.
"""

import hmac
import secrets
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from cipherfleet.channel import codec, signing
from cipherfleet.computing import card_chain, engine, engine_wrap
from cipherfleet.computing.card_chain import KeyChain
from cipherfleet.computing.card_lease import Lease, boottime
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_memory import Data, wipe
from cipherfleet.computing.engine_message import Encryptor
from cipherfleet.computing.engine_stream import Signature, Stream, open_stream
from cipherfleet.contract.algorithms import Algorithm, Kind, algorithm
from cipherfleet.contract.errors import (
    CmkInvalid,
    ForeignConsumer,
    KeyExhausted,
    KeyUnknown,
    LeaseExpired,
    LimitReached,
    Malformed,
    OutOfOrder,
    ServiceOff,
    StatementForged,
    TooLarge,
    Unsupported,
    WrongKeyType,
)
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes, decode_attributes
from cipherfleet.contract.ids import CardId, ConsumerId, KeyId, VcmId
from cipherfleet.contract.statements import ApplicationStatement, LoginStatement, Signed
from cipherfleet.contract.vcc import (
    MAX_STREAMS,
    CardDescription,
    CmkDelivery,
    DataKeyRequest,
    Operation,
    RandomRequest,
    RowRequest,
    StreamRequest,
    Verb,
)

T = TypeVar("T")

MAX_KEYS = 16384
MAX_MESSAGES = 2**32
"""Messages under one key version: with a key of its own for each, the salts' birthday bound stays below 2**-190."""
MAX_COUNTED_KEYS = 4 * MAX_KEYS
MAX_RANDOM_BYTES = 1024 * 1024
MAX_HELD_BYTES = 8 * 1024 * 1024
MAX_ATTRIBUTE_BYTES = 64 * 1024
WAITING_S = 30.0
"""A CMK that no lease follows is dropped again after this time."""


class Request(NamedTuple):
    handle: int
    parameters: bytes
    data: Data


class Answer(NamedTuple):
    """A completion, its data not yet copied anywhere."""

    value: int = 0
    parameters: bytes = b""
    data: Data = b""


class _OpenStream(NamedTuple):
    stream: Stream
    handles: tuple[int, ...]


class Work(NamedTuple):
    """The slow part of an operation: ``run`` belongs into a thread, its result goes to ``VirtualFunction.complete``."""

    run: Callable[[], bytearray]
    chain: KeyChain
    row: RowRequest
    attributes: VersionAttributes
    algorithm: Algorithm


class VirtualFunction:
    """The card's side of one vCC, for one VCM of one consumer."""

    def __init__(
        self,
        card: CardId,
        vcm: VcmId,
        consumer: ConsumerId,
        transport: engine_wrap.TransportKeys,
        kmc_key: Callable[[], bytes],
        clock: Callable[[], float] = boottime,
    ) -> None:
        self.card, self.vcm, self.consumer = card, vcm, consumer
        self.operations = self.bytes = 0
        self._transport, self._kmc_key, self._clock = transport, kmc_key, clock
        self._lease = Lease(consumer, card, vcm, clock)
        self._chain: KeyChain | None = None
        self._waits_until = 0.0
        self._ended = False
        self._newest_point = (-1, -1)
        self._keys: dict[int, Key] = {}
        self._streams: dict[int, _OpenStream] = {}
        self._messages: dict[tuple[KeyId, int], int] = {}
        self._without_lease: dict[int, Callable[[Request], Answer]] = {
            Operation.NULL: lambda _: Answer(),
            Operation.DESCRIBE: self._describe,
            Operation.LOAD_CMK: self._load_cmk,
            Operation.LEASE_NONCE: lambda _: Answer(data=self._lease.nonce()),
            Operation.LEASE: self._take_lease,
            Operation.DROP: self._drop,
        }
        self._under_lease: dict[int, Callable[[Request], Answer | Work]] = {
            Operation.CONFIRM: self._confirm,
            Operation.VERIFY_STATEMENT: self._verify_statement,
            Operation.GENERATE: self._generate,
            Operation.LOAD: self._load,
            Operation.UNLOAD: self._unload,
            Operation.SEAL_ATTRIBUTES: self._seal_attributes,
            Operation.VERIFY_ATTRIBUTES: self._verify_attributes,
            Operation.RANDOM: self._random,
            Operation.DATA_KEY: self._data_key,
            Operation.BEGIN: self._begin,
            Operation.UPDATE: self._update,
            Operation.FINISH: self._finish,
            Operation.ABORT: self._abort,
            Operation.RUN: self._run,
        }

    @property
    def keys(self) -> int:
        """How many keys are loaded."""
        return len(self._keys)

    @property
    def serving(self) -> bool:
        return self._chain is not None and self._lease.serving

    @property
    def deadline(self) -> float | None:
        """When ``tick`` has something to do, by the card's clock."""
        if self._chain is None:
            return None
        return self._waits_until if self._lease.expires_at is None else self._lease.expires_at

    def tick(self) -> None:
        """Drop everything if its time is over."""
        deadline = self.deadline
        if deadline is not None and self._clock() >= deadline:
            ended = self._lease.expires_at is not None
            self.drop()
            self._ended = ended

    def drop(self) -> None:
        """Zeroise all keys, end all streams, forget the lease."""
        for opened in self._streams.values():
            opened.stream.close()
        self._streams.clear()
        for key in self._keys.values():
            key.close()
        self._keys.clear()
        if self._chain is not None:
            self._chain.close()
            self._chain = None
        self._lease.forget()
        self._ended = False

    def execute(self, operation: int, handle: int, parameters: bytes, data: Data) -> Answer | Work:
        """Run one operation. Raises a ``CipherfleetError``."""
        self.operations += 1
        self.bytes += len(data)
        self.tick()
        request = Request(handle, parameters, data)
        free = self._without_lease.get(operation)
        if free is not None:
            return free(request)
        run = self._under_lease.get(operation)
        if run is None:
            raise Unsupported(f"a vCC has no operation {operation}")
        self._require_lease()
        answer = run(request)
        return answer if isinstance(answer, Work) else self._release(answer)

    def complete(self, work: Work, material: bytearray) -> Answer:
        """The rest of an operation, after its ``Work`` was done. Takes ``material`` over."""
        try:
            self.tick()
            if self._require_lease() is not work.chain:
                raise ServiceOff("the keys were dropped meanwhile")
            return self._release(self._keep(work, material))
        except BaseException:
            wipe(material)
            raise

    # -- the lease -----------------------------------------------------------------------------------------------------

    def _require_lease(self) -> KeyChain:
        """Raises ``ServiceOff`` or ``LeaseExpired``."""
        chain = self._require_chain()
        try:
            self._lease.check()
        except LeaseExpired:
            self.tick()
            raise
        return chain

    def _require_chain(self) -> KeyChain:
        if self._chain is not None:
            return self._chain
        if self._ended:
            raise LeaseExpired("the lease has ended and the keys are gone", "the CMK must be released to the card again")
        raise ServiceOff("this card does not hold the consumer's CMK")

    def _release(self, answer: Answer) -> Answer:
        """The answer, if the lease still holds."""
        try:
            self._require_lease()
        except (LeaseExpired, ServiceOff):
            if isinstance(answer.data, bytearray):
                wipe(answer.data)
            raise
        return answer

    def _take_lease(self, request: Request) -> Answer:
        chain, kmc_key = self._require_chain(), self._kmc_key()
        if not kmc_key:
            raise ServiceOff("this card is not certified yet")
        signed = _parameters(request, Signed)
        state = self._lease.accept(signed, ukey_keys=chain.ukey_keys, kmc_key=kmc_key)
        return Answer(parameters=codec.encode(state))

    def _describe(self, _: Request) -> Answer:
        chain = self._chain
        seen = (*chain.point, chain.head) if chain is not None else (0, 0, b"")
        return Answer(
            parameters=codec.encode(
                CardDescription(
                    self.card,
                    self.vcm,
                    self.consumer,
                    chain is not None,
                    self.serving,
                    *seen,
                    operations=self.operations,
                    bytes=self.bytes,
                    keys=len(self._keys),
                )
            )
        )

    def _drop(self, _: Request) -> Answer:
        self.drop()
        return Answer()

    # -- the CMK -------------------------------------------------------------------------------------------------------

    def _load_cmk(self, request: Request) -> Answer:
        """step f, in the card: the one place where both shares meet."""
        chain = card_chain.open_delivery(_parameters(request, CmkDelivery), self._transport, self.consumer, self.card, self.vcm)
        if chain.point < self._newest_point:
            chain.close()
            raise CmkInvalid("the sealed share is older than one that this vCC has had before")
        self._newest_point = chain.point
        if self._chain is not None and self._chain.is_like(chain):
            self._chain.close()
            self._chain = chain  # the same CMK with news from the Ukey: keys and lease go on
            return Answer()
        self.drop()
        self._chain = chain
        self._waits_until = self._clock() + WAITING_S
        return Answer()

    def _confirm(self, request: Request) -> Answer:
        if len(request.data) != 32:
            raise Malformed("a nonce to confirm has 32 bytes")
        message = b"cipherfleet card confirm v1" + self.card.encode() + b"|" + self.vcm.encode() + b"|" + bytes(request.data)
        return Answer(data=hmac.digest(self._require_chain().confirm, message, "sha256"))

    def _verify_statement(self, request: Request) -> Answer:
        signed = _parameters(request, Signed)
        kind: type[ApplicationStatement | LoginStatement]
        match signed.kind:
            case ApplicationStatement.KIND:
                kind = ApplicationStatement
            case LoginStatement.KIND:
                kind = LoginStatement
            case _:
                raise StatementForged("a card checks application and login statements alone")
        statement = signing.verify(signed, kind, self._require_chain().ukey_keys)
        if statement.consumer != self.consumer:
            raise ForeignConsumer("the statement is about another consumer")
        return Answer(data=signed.payload)

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _generate(self, request: Request) -> Answer | Work:
        row = _parameters(request, RowRequest)
        self._check_room(len(self._keys), MAX_KEYS, "keys")
        attributes = _version_attributes(EscrowRow(self.consumer, row.key, row.version, row.attributes, b""))
        chosen = algorithm(attributes.algorithm)
        if chosen.kind is Kind.DIGEST:
            raise WrongKeyType(f"there are no keys of {chosen.name}")
        work = Work(lambda: engine.generate_material(chosen), self._require_chain(), row, attributes, chosen)
        return work if engine.is_slow(chosen) else self._keep(work, work.run())

    def _keep(self, work: Work, material: bytearray) -> Answer:
        attributes = msgspec.structs.replace(
            work.attributes, algorithm=work.algorithm.name, public_key=engine.public_key(work.algorithm, material)
        )
        row = engine_wrap.wrap(work.chain.wrapping, self.consumer, work.row.key, work.row.version, codec.encode(attributes), material)
        handle = self._add_key(Key(work.row.key, work.row.version, work.algorithm, material))
        return Answer(value=handle, parameters=codec.encode(row))

    def _load(self, request: Request) -> Answer:
        row = _parameters(request, EscrowRow)
        self._check_room(len(self._keys), MAX_KEYS, "keys")
        material = engine_wrap.unwrap(self._require_chain().wrapping, self.consumer, row)
        try:
            chosen = algorithm(_version_attributes(row).algorithm)
        except BaseException:
            wipe(material)
            raise
        return Answer(value=self._add_key(Key(row.key, row.version, chosen, material)))

    def _unload(self, request: Request) -> Answer:
        key = self._key(request.handle)
        for number in [n for n, opened in self._streams.items() if request.handle in opened.handles]:
            self._take_stream(number).close()
        del self._keys[request.handle]
        key.close()
        return Answer()

    def _seal_attributes(self, request: Request) -> Answer:
        row = _parameters(request, RowRequest)
        if row.version != 0:
            raise Malformed("attributes of a key as a whole are row version 0")
        _check_attributes(EscrowRow(self.consumer, row.key, row.version, row.attributes, b""))
        sealed = engine_wrap.wrap(self._require_chain().wrapping, self.consumer, row.key, 0, row.attributes, bytearray())
        return Answer(parameters=codec.encode(sealed))

    def _verify_attributes(self, request: Request) -> Answer:
        row = _parameters(request, EscrowRow)
        if row.version != 0:
            raise Malformed("attributes of a key as a whole are row version 0")
        wipe(engine_wrap.unwrap(self._require_chain().wrapping, self.consumer, row))
        return Answer()

    def _add_key(self, key: Key) -> int:
        handle = secrets.randbits(63) or 1
        self._keys[handle] = key
        return handle

    def _key(self, handle: int) -> Key:
        key = self._keys.get(handle)
        if key is None:
            raise KeyUnknown("no key of this vCC has that handle")
        return key

    # -- data ----------------------------------------------------------------------------------------------------------

    def _random(self, request: Request) -> Answer:
        length = _parameters(request, RandomRequest).length
        if length < 1:
            raise Malformed("random bytes are asked for by a length of 1 or more")
        if length > MAX_RANDOM_BYTES:
            raise TooLarge(f"at most {MAX_RANDOM_BYTES} random bytes at a time")
        return Answer(data=bytearray(secrets.token_bytes(length)))

    def _data_key(self, request: Request) -> Answer:
        wanted = _parameters(request, DataKeyRequest)
        if not 16 <= wanted.length <= 64:
            raise Malformed("a data key has 16 to 64 bytes")
        key = self._key(request.handle)
        encryptor = Encryptor(key, wanted.context)
        self._count_message(key)
        fresh = secrets.token_bytes(wanted.length)
        try:
            data = encryptor.run(fresh)
            length = len(data)
            if wanted.plaintext:
                data += fresh
        finally:
            encryptor.close()
            wipe(fresh)
        return Answer(value=length, data=data)

    def _open(self, request: Request) -> _OpenStream:
        wanted = _parameters(request, StreamRequest)
        if wanted.verb is Verb.DIGEST:
            return _OpenStream(open_stream(wanted, None), ())
        key = self._key(request.handle)
        if wanted.verb is Verb.REENCRYPT:
            target = self._key(wanted.target)
            stream = open_stream(wanted, key, target)
            self._count_message(target)
            return _OpenStream(stream, (request.handle, wanted.target))
        stream = open_stream(wanted, key)
        if wanted.verb is Verb.ENCRYPT:
            self._count_message(key)
        return _OpenStream(stream, (request.handle,))

    def _begin(self, request: Request) -> Answer:
        self._check_room(len(self._streams), MAX_STREAMS, "streams")
        opened = self._open(request)
        number = secrets.randbits(63) or 1
        self._streams[number] = opened
        return Answer(value=number, data=opened.stream.first)

    def _update(self, request: Request) -> Answer:
        stream = self._stream(request.handle)
        try:
            if isinstance(stream, Signature):
                held = sum(o.stream.held_bytes for o in self._streams.values() if isinstance(o.stream, Signature))
                self._check_room(held, MAX_HELD_BYTES, "bytes of messages to sign")
            return Answer(data=stream.update(request.data))
        except BaseException:
            self._take_stream(request.handle).close()
            raise

    def _finish(self, request: Request) -> Answer:
        stream = self._take_stream(request.handle)
        try:
            return Answer(data=stream.finish(request.data))
        finally:
            stream.close()

    def _abort(self, request: Request) -> Answer:
        self._take_stream(request.handle).close()
        return Answer()

    def _run(self, request: Request) -> Answer:
        stream = self._open(request).stream
        try:
            return Answer(data=stream.run(request.data))
        finally:
            stream.close()

    def _stream(self, number: int) -> Stream:
        found = self._streams.get(number)
        if found is None:
            raise OutOfOrder("no stream of this vCC has that number", "begin one first")
        return found.stream

    def _take_stream(self, number: int) -> Stream:
        stream = self._stream(number)
        del self._streams[number]
        return stream

    def _count_message(self, key: Key) -> None:
        name = (key.id, key.version)
        count = self._messages.get(name, 0)
        if count >= MAX_MESSAGES:
            raise KeyExhausted(f"version {key.version} of key {key.id} has encrypted {MAX_MESSAGES} messages")
        if count == 0 and len(self._messages) >= MAX_COUNTED_KEYS:
            del self._messages[next(iter(self._messages))]
        self._messages[name] = count + 1

    @staticmethod
    def _check_room(used: int, limit: int, what: str) -> None:
        if used >= limit:
            raise LimitReached(f"a vCC holds at most {limit} {what}")


def _parameters(request: Request, kind: type[T]) -> T:
    return codec.decode(request.parameters, kind, what="the operation's parameters")


def _check_attributes(row: EscrowRow) -> None:
    if len(row.attributes) > MAX_ATTRIBUTE_BYTES:
        raise TooLarge(f"attributes have at most {MAX_ATTRIBUTE_BYTES} bytes")
    decode_attributes(row)


def _version_attributes(row: EscrowRow) -> VersionAttributes:
    if not 1 <= row.version < 2**32:
        raise Malformed("key material has a version of 1 or more")
    if len(row.attributes) > MAX_ATTRIBUTE_BYTES:
        raise TooLarge(f"attributes have at most {MAX_ATTRIBUTE_BYTES} bytes")
    attributes = decode_attributes(row)
    if not isinstance(attributes, VersionAttributes):
        raise Malformed("these are not attributes of a key version")
    return attributes
