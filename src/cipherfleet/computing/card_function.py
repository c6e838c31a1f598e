"""One virtual function of a card: everything that the card holds for one vCC, and every operation on it.

Sans-IO: ``execute`` takes a request apart and answers it. Nothing of one function is reachable from another. Every operation
on keys happens under a lease that is checked before and after it; what came out under a lease that ended meanwhile is thrown away.
"""

import hmac
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec

from cipherfleet.channel import codec
from cipherfleet.channel.sealing import import_info
from cipherfleet.computing import card_chain, engine, engine_transfer, engine_wrap
from cipherfleet.computing.card_chain import KeyChain
from cipherfleet.computing.card_lease import Lease, boottime
from cipherfleet.computing.card_tables import KeyTable, StreamTable
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_bare import Single
from cipherfleet.computing.engine_memory import Data, Pause, no_pause, wipe
from cipherfleet.computing.engine_message import Decryptor, Encryptor
from cipherfleet.computing.engine_stream import Stream, derived, open_stream, run_batch
from cipherfleet.contract import policy
from cipherfleet.contract.algorithms import Algorithm, Kind, algorithm
from cipherfleet.contract.errors import (
    CipherfleetError,
    CmkInvalid,
    ForeignConsumer,
    ImportTokenExpired,
    ImportTokenInvalid,
    KeyExpired,
    KeyNotExportable,
    LeaseExpired,
    Malformed,
    SealedForeign,
    ServiceOff,
    StatementForged,
    TooLarge,
    Unsupported,
    WrongKeyType,
)
from cipherfleet.contract.escrow import Attributes, EscrowRow, VersionAttributes, decode_attributes
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.statements import ApplicationStatement, LoginStatement, Signed
from cipherfleet.contract.vcc import (
    MAX_BATCH,
    BatchAnswer,
    BatchItem,
    BatchRequest,
    CardDescription,
    CmkDelivery,
    DataKeyRequest,
    DeriveKeyRequest,
    ExportRequest,
    ImportKey,
    ImportKeyRequest,
    ImportRequest,
    ImportWrappedRequest,
    KeyMaterial,
    Operation,
    RandomRequest,
    RowRequest,
    StreamRequest,
    Verb,
)

T = TypeVar("T")

MAX_RANDOM_BYTES = 1024 * 1024
MAX_ATTRIBUTE_BYTES = 64 * 1024
LONG_BYTES = 32 * 1024
"""Of more data the work is worth a change of threads."""
WAITING_S = 30.0
"""A CMK that no lease follows is dropped again after this time."""

_PROCESSING = frozenset({Verb.DECRYPT, Verb.REENCRYPT, Verb.VERIFY, Verb.VERIFY_MAC, Verb.DECAPSULATE})
"""What makes nothing new: a policy may allow it where it refuses the rest (SP 800-131A)."""

log = logging.getLogger(__name__)


class Request(NamedTuple):
    """``data`` may change while it is read, ``room`` be read while it is written: both may be in memory that the VCM shares."""

    handle: int
    parameters: bytes
    data: Data
    room: memoryview | None = None


class Answer(NamedTuple):
    """A completion, its data not yet copied anywhere: a view is one of the request's ``room``."""

    value: int = 0
    parameters: bytes = b""
    data: Data = b""


class Work(NamedTuple):
    """The slow part of an operation: ``run`` belongs into a thread, its result goes to ``VirtualFunction.complete``.

    Where there is no thread for it, ``run`` pauses between parts of long data.
    ``alone``: nothing else of this vCC may begin before it is complete; ``lasting``: it takes a good part of a second.
    """

    run: Callable[[Pause], Any]
    keep: Callable[[Any], Answer]
    life: int
    alone: bool = False
    lasting: bool = False
    done: Callable[[bool], None] = lambda _well: None


class VirtualFunction:
    """The card's side of one vCC, for one VCM of one consumer."""

    def __init__(
        self,
        card: CardId,
        vcm: VcmId,
        consumer: ConsumerId,
        transport: engine_wrap.TransportKeys,
        certified: Callable[[], CardReply | None],
        clock: Callable[[], float] = boottime,
        deliveries: card_chain.Deliveries | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.card, self.vcm, self.consumer = card, vcm, consumer
        self.operations = self.bytes = 0
        self._transport, self._certified, self._clock, self._wall_clock = transport, certified, clock, wall_clock
        self._lease = Lease(consumer, card, vcm, clock)
        self._chain: KeyChain | None = None
        self._fingerprint = b""  # of the one CMK that this vCC takes in its life
        self._deliveries = deliveries or card_chain.Deliveries()
        self._waits_until = 0.0
        self._ended = False
        self._newest_point = (-1, -1)
        self._life = 0
        self._keys, self._streams = KeyTable(), StreamTable()
        self._without_lease: dict[int, Callable[[Request], Answer]] = {
            Operation.NULL: lambda _: Answer(),
            Operation.DESCRIBE: self._describe,
            Operation.LOAD_CMK: self._load_cmk,
            Operation.LEASE_NONCE: lambda _: Answer(data=self._lease.nonce()),
            Operation.LEASE: self._take_lease,
            Operation.DROP: self._drop,
            Operation.TRANSPORT: self._show_transport,
        }
        self._under_lease: dict[int, Callable[[Request], Answer | Work]] = {
            Operation.CONFIRM: self._confirm,
            Operation.VERIFY_STATEMENT: self._verify_statement,
            Operation.GENERATE: self._generate,
            Operation.IMPORT: self._import,
            Operation.DERIVE_KEY: self._derive_key,
            Operation.IMPORT_KEY: self._import_key,
            Operation.IMPORT_WRAPPED: self._import_wrapped,
            Operation.EXPORT: self._export,
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
            Operation.BATCH: self._batch,
        }

    @property
    def keys(self) -> int:
        """How many keys are loaded."""
        return len(self._keys)

    def limit_keys(self, most: int) -> None:
        """From now on; what is loaded stays."""
        self._keys.most = most

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
        """Zeroise all keys, end all streams, forget the lease. What a thread is at, it ends; its result is thrown away."""
        self._life += 1
        self._streams.clear()
        self._keys.clear()
        if self._chain is not None:
            self._chain.close()
            self._chain = None
            until = self._lease.expires_at
            log.info("keys of %s dropped at %.3f, lease until %.3f", self.consumer, self._clock(), until if until is not None else 0.0)
        self._lease.forget()
        self._ended = False

    def execute(self, operation: int, handle: int, parameters: bytes, data: Data, room: memoryview | None = None) -> Answer | Work:
        """Run one operation. Only what may be seen at once is written into ``room``: ciphertext. Raises a ``CipherfleetError``."""
        self.operations += 1
        self.bytes += len(data)
        self.tick()
        request = Request(handle, parameters, data, room)
        free = self._without_lease.get(operation)
        if free is not None:
            return free(request)
        run = self._under_lease.get(operation)
        if run is None:
            raise Unsupported(f"a vCC has no operation {operation}")
        self._require_lease()
        answer = run(request)
        return answer if isinstance(answer, Work) else self._release(answer)

    def complete(self, work: Work, result: Any, error: Exception | None = None) -> Answer:
        """The rest of an operation, after its ``Work`` was done. Takes ``result`` over. Raises ``error``, or why it is thrown away."""
        well = False
        try:
            if error is not None:
                raise error
            self.tick()
            self._require_lease()
            if work.life != self._life:
                raise ServiceOff("the keys were dropped meanwhile")
            answer = work.keep(result)
            well = True
        except BaseException:
            _destroy(result)
            raise
        finally:
            work.done(well)
        return self._release(answer)

    def run(self, operation: int, handle: int, parameters: bytes, data: Data, room: memoryview | None = None) -> Answer:
        """``execute``, its work included."""
        answer = self.execute(operation, handle, parameters, data, room)
        if not isinstance(answer, Work):
            return answer
        try:
            result = answer.run(no_pause)
        except Exception as exc:
            return self.complete(answer, None, exc)
        return self.complete(answer, result)

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
            _destroy(answer.data)
            raise
        return answer

    def _take_lease(self, request: Request) -> Answer:
        chain = self._require_chain()
        self._require_certified()
        signed = _parameters(request, Signed)
        before = self._lease.policy
        state = self._lease.accept(signed, ukey_keys=chain.ukey_keys, kmc_key=chain.kmc_key)
        if self._lease.policy != before:
            self._streams.clear()  # they were begun under another policy
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
                    kmc_signing_key=b"" if chain is None else chain.kmc_key,
                    policy=self._lease.policy,
                    operations=self.operations,
                    bytes=self.bytes,
                    keys=len(self._keys),
                )
            )
        )

    def _require_certified(self) -> CardReply:
        certified = self._certified()
        if certified is None:
            raise ServiceOff("this card is not certified yet")
        return certified

    def _show_transport(self, _: Request) -> Answer:
        return Answer(data=self._require_certified().chain.chain)

    def _drop(self, _: Request) -> Answer:
        self.drop()
        return Answer()

    # -- the CMK -------------------------------------------------------------------------------------------------------

    def _load_cmk(self, request: Request) -> Answer:
        """step f, in the card: the one place where both shares meet.

        A vCC takes one CMK in its life, the one that the terminal made the card confirm: another is for another VCM.
        """
        delivery = _parameters(request, CmkDelivery)
        chain = card_chain.open_delivery(delivery, self._transport, self.consumer, self.card, self.vcm)
        try:
            self._deliveries.spend(delivery.sealed_ukey_share)
            if self._fingerprint and not hmac.compare_digest(self._fingerprint, chain.fingerprint):
                raise CmkInvalid("this vCC has had another CMK")
            if chain.point < self._newest_point:
                raise CmkInvalid("the sealed share is older than one that this vCC has had before")
        except CmkInvalid:
            chain.close()
            raise
        self._newest_point, self._fingerprint = chain.point, chain.fingerprint
        if self._chain is not None:
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
        if len(signed.signatures) != 1:
            raise StatementForged("a statement carries the Ukey's signature and no other")
        statement = self._require_chain().verify(signed, kind)
        if statement.consumer != self.consumer:
            raise ForeignConsumer("the statement is about another consumer")
        return Answer(data=signed.payload)

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _generate(self, request: Request) -> Answer | Work:
        row = _parameters(request, RowRequest)
        attributes, chosen = self._wanted(row)
        return self._make(row, attributes, chosen, lambda: engine.generate_material(chosen))

    def _import(self, request: Request) -> Answer | Work:
        """Key material that an application sealed to this card; the VCM that brings it cannot read it."""
        row, sealed = msgspec.structs.astuple(_parameters(request, ImportRequest))
        attributes, chosen = self._wanted(row, imported=True)
        plaintext = self._transport.open_sealed(sealed, import_info(self.card, self.vcm))
        try:
            brought = codec.decode(plaintext, KeyMaterial, what="the sealed key material")
        finally:
            wipe(plaintext)
        if brought.consumer != self.consumer or brought.algorithm != chosen.name:
            wipe(brought.material)
            raise SealedForeign("the key material was sealed for another consumer or algorithm")
        return self._make(row, attributes, chosen, lambda: engine.check_material(chosen, brought.material))

    def _derive_key(self, request: Request) -> Answer | Work:
        """A key that another one gives, the same each time; nobody sees it."""
        asked = _parameters(request, DeriveKeyRequest)
        attributes, chosen = self._wanted(asked.row)
        source = self._keys.get(asked.source)
        self._permit(source)
        if not chosen.secret_key:
            raise WrongKeyType(f"a key of {chosen.name} cannot be derived", "choose a symmetric algorithm")
        info = b"cipherfleet derived key v1|" + chosen.name.encode() + b"|" + asked.context
        material = derived(StreamRequest(Verb.DERIVE, info, length=chosen.key_bits // 8, salt=asked.salt), source)
        return self._make(asked.row, attributes, chosen, lambda: material)

    def _import_key(self, request: Request) -> Work:
        """step one of bringing a key: whoever has the token can import one key, under the id in it."""
        asked = _parameters(request, ImportKeyRequest)
        algorithm(asked.token.algorithm)

        def keep(private: bytearray) -> Answer:
            try:
                token = engine_transfer.seal_token(self._require_chain().wrapping, self.consumer, asked.token, private)
                return Answer(parameters=codec.encode(ImportKey(token, engine_transfer.public_half(private))))
            finally:
                wipe(private)

        return Work(lambda _: engine_transfer.new_import_key(asked.bits), keep, self._life, alone=True, lasting=True)

    def _import_wrapped(self, request: Request) -> Answer | Work:
        row, token, wrapped = msgspec.structs.astuple(_parameters(request, ImportWrappedRequest))
        attributes, chosen = self._wanted(row, imported=True)
        private = engine_transfer.open_token(self._require_chain().wrapping, self.consumer, token)
        if self._wall_clock() >= token.expires_at:
            wipe(private)
            raise ImportTokenExpired("the import token has expired")
        if (row.key, row.version, chosen.name, attributes.bare) != (token.key, 1, token.algorithm, token.bare):
            wipe(private)
            raise ImportTokenInvalid("the import token is for another key")
        material = engine_transfer.unwrap(private, wrapped)
        return self._make(row, attributes, chosen, lambda: engine.check_material(chosen, material))

    def _export(self, request: Request) -> Answer:
        asked = _parameters(request, ExportRequest)
        key = self._keys.get(request.handle)
        if not key.exportable:
            raise KeyNotExportable(f"key {key.id} was not made to leave the card")
        self._permit(key)
        if bool(asked.public_key) == bool(asked.wrapping):
            raise Malformed("a key is exported to a public key, or under a wrap key")
        if asked.public_key:
            return Answer(data=engine_transfer.wrap_to(asked.public_key, key))
        wrapping = self._keys.get(asked.wrapping)
        self._permit(wrapping)
        return Answer(data=engine_transfer.wrap_under(wrapping, key))

    def _wanted(self, row: RowRequest, *, imported: bool = False) -> tuple[VersionAttributes, Algorithm]:
        """What a new version shall be."""
        self._keys.check_room()
        attributes = _version_attributes(EscrowRow(self.consumer, row.key, row.version, row.attributes, b""))
        chosen = algorithm(attributes.algorithm)
        if chosen.kind is Kind.DIGEST:
            raise WrongKeyType(f"there are no keys of {chosen.name}")
        if attributes.bare and chosen.kind is not Kind.AEAD and not chosen.bare_only:
            raise WrongKeyType(f"a key of {chosen.name} encrypts nothing, so it cannot be bare")
        bare = attributes.bare or chosen.bare_only
        policy.check(self._lease.policy, chosen, bare=bare, imported=imported)
        made_at = min(attributes.created_at, self._wall_clock())  # never in the future, where its age would begin late
        return msgspec.structs.replace(attributes, imported=imported, bare=bare, created_at=made_at), chosen

    def _make(self, row: RowRequest, attributes: VersionAttributes, chosen: Algorithm, material: Callable[[], bytearray]) -> Answer | Work:
        def keep(made: bytearray) -> Answer:
            try:
                self._keys.check_room()
                whole = msgspec.structs.replace(attributes, algorithm=chosen.name, public_key=engine.public_key(chosen, made))
                wrapping = self._require_chain().wrapping
                wrapped = engine_wrap.wrap(wrapping, self.consumer, row.key, row.version, codec.encode(whole), made)
            except BaseException:
                wipe(made)
                raise
            key = Key(row.key, row.version, chosen, made, whole)
            return Answer(value=self._keys.add(key), parameters=codec.encode(wrapped))

        return Work(lambda _: material(), keep, self._life, alone=True, lasting=True) if engine.is_slow(chosen) else keep(material())

    def _load(self, request: Request) -> Answer:
        row = _parameters(request, EscrowRow)
        self._keys.check_room()
        material = engine_wrap.unwrap(self._require_chain().wrapping, self.consumer, row)
        try:
            attributes = _version_attributes(row)
            chosen = algorithm(attributes.algorithm)
        except BaseException:
            wipe(material)
            raise
        return Answer(value=self._keys.add(Key(row.key, row.version, chosen, material, attributes)))

    def _unload(self, request: Request) -> Answer:
        self._streams.end_those_of(request.handle)
        self._keys.remove(request.handle)
        return Answer()

    def _seal_attributes(self, request: Request) -> Answer:
        row = _parameters(request, RowRequest)
        if row.version != 0:
            raise Malformed("attributes of a key as a whole are row version 0")
        _attributes(EscrowRow(self.consumer, row.key, row.version, row.attributes, b""))
        sealed = engine_wrap.wrap(self._require_chain().wrapping, self.consumer, row.key, 0, row.attributes, bytearray())
        return Answer(parameters=codec.encode(sealed))

    def _verify_attributes(self, request: Request) -> Answer:
        row = _parameters(request, EscrowRow)
        if row.version != 0:
            raise Malformed("attributes of a key as a whole are row version 0")
        wipe(engine_wrap.unwrap(self._require_chain().wrapping, self.consumer, row))
        return Answer()

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
        key = self._keys.get(request.handle)
        self._permit(key)
        self._keys.count_message(key)
        encryptor = Encryptor(key, wanted.context)
        fresh = secrets.token_bytes(wanted.length)
        try:
            data = bytearray(encryptor.run(fresh))
            length = len(data)
            if wanted.plaintext:
                data += fresh
        finally:
            encryptor.close()
            wipe(fresh)
        return Answer(value=length, data=data)

    def _open(self, request: Request) -> tuple[Stream, tuple[int, ...]]:
        """The stream that a request asks for, and the handles of its keys."""
        wanted = _parameters(request, StreamRequest)
        return open_stream(wanted, *self._keys_of(wanted, request.handle)), _handles(wanted, request.handle)

    def _keys_of(self, wanted: StreamRequest, handle: int) -> tuple[Key | None, Key | None]:
        """The key of a request, and the one that a re-encryption goes to; a message more is counted under who encrypts it."""
        if wanted.verb is Verb.DIGEST:
            policy.check(self._lease.policy, algorithm(wanted.digest))
            return None, None
        key = self._keys.get(handle)
        self._permit(key, protect=wanted.verb not in _PROCESSING)
        target = self._keys.get(wanted.target) if wanted.verb is Verb.REENCRYPT else None
        if target is not None:
            self._permit(target)
        if wanted.verb is Verb.ENCRYPT or target is not None:
            self._keys.count_message(target or key)
        return key, target

    def _try_keys_of(self, item: BatchItem) -> tuple[Key | None, Key | None] | CipherfleetError:
        try:
            return self._keys_of(item.request, item.handle)
        except CipherfleetError as exc:
            return exc

    def _permit(self, key: Key, *, protect: bool = True) -> None:
        """Raises ``PolicyRefused`` or ``KeyExpired``."""
        if protect and key.not_after and self._wall_clock() >= key.not_after:
            raise KeyExpired(f"key {key.id} has expired")
        age_s = self._wall_clock() - key.created_at
        policy.check(self._lease.policy, key.algorithm, protect=protect, bare=key.bare, imported=key.imported, age_s=age_s)

    def _begin(self, request: Request) -> Answer:
        self._streams.check_room()
        stream, handles = self._open(request)
        if isinstance(stream, Single):
            stream.close()
            raise Unsupported("this is done at once and is no stream", "give all of the data in one request")
        return Answer(value=self._streams.add(stream, handles), data=stream.first)

    def _update(self, request: Request) -> Answer | Work:
        return self._part(request, last=False)

    def _finish(self, request: Request) -> Answer | Work:
        return self._part(request, last=True)

    def _part(self, request: Request, *, last: bool) -> Answer | Work:
        """The next part of a stream. Parts of an AEAD are independent of each other: several may be under way at once."""
        number, streams = request.handle, self._streams
        opened = streams.get(number)
        step = streams.step(number, request.data, request.room, last=last)
        opened.enter()

        def done(well: bool) -> None:
            opened.leave()
            if last or not well:
                streams.forget(number)

        if self._is_long(opened.stream, request):
            alone = last or not isinstance(opened.stream, Encryptor | Decryptor)
            return Work(step, lambda data: Answer(data=data), self._life, alone=alone, done=done)
        well = False
        try:
            answer = Answer(data=step(no_pause))
            well = True
        finally:
            done(well)
        return answer

    def _abort(self, request: Request) -> Answer:
        self._streams.abort(request.handle)
        return Answer()

    def _run(self, request: Request) -> Answer | Work:
        stream, _ = self._open(request)
        if self._is_long(stream, request):
            return Work(
                lambda pause: stream.run(request.data, request.room, pause),
                lambda data: Answer(data=data),
                self._life,
                done=lambda _: stream.close(),
            )
        try:
            return Answer(data=stream.run(request.data, request.room))
        finally:
            stream.close()

    def _batch(self, request: Request) -> Work:
        """Many short operations for one request: each has its own answer or error."""
        wanted = _parameters(request, BatchRequest)
        if not 1 <= len(wanted.items) <= MAX_BATCH:
            raise Malformed(f"a batch has 1 to {MAX_BATCH} items")
        lengths = [item.length for item in wanted.items]
        if min(lengths) < 0 or sum(lengths) != len(request.data):
            raise Malformed("the lengths of a batch's items do not make up its data")
        keys = [self._try_keys_of(item) for item in wanted.items]
        data = request.data

        def keep(made: tuple[BatchAnswer, bytearray]) -> Answer:
            return Answer(parameters=codec.encode(made[0]), data=made[1])

        return Work(lambda pause: run_batch(wanted.items, keys, data, pause), keep, self._life, alone=True)

    @staticmethod
    def _is_long(stream: Stream, request: Request) -> bool:
        return len(request.data) >= LONG_BYTES or stream.heavy


def _handles(wanted: StreamRequest, handle: int) -> tuple[int, ...]:
    if wanted.verb is Verb.DIGEST:
        return ()
    return (handle, wanted.target) if wanted.verb is Verb.REENCRYPT else (handle,)


def _destroy(result: object) -> None:
    """Wipe what nobody may have."""
    if isinstance(result, tuple):
        for part in result:
            _destroy(part)
    elif isinstance(result, bytearray):
        wipe(result)
    elif isinstance(result, memoryview):
        result[:] = bytes(len(result))


def _parameters(request: Request, kind: type[T]) -> T:
    return codec.decode(request.parameters, kind, what="the operation's parameters")


def _attributes(row: EscrowRow) -> Attributes:
    if len(row.attributes) > MAX_ATTRIBUTE_BYTES:
        raise TooLarge(f"attributes have at most {MAX_ATTRIBUTE_BYTES} bytes")
    return decode_attributes(row)


def _version_attributes(row: EscrowRow) -> VersionAttributes:
    attributes = _attributes(row)
    if not 1 <= row.version < 2**32 or not isinstance(attributes, VersionAttributes):
        raise Malformed("key material has a version of 1 or more, and the attributes of one version")
    return attributes
