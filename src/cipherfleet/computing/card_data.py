"""A card's operations on data: at once, as streams, and in batches."""

import secrets
from collections.abc import Callable

from cipherfleet.channel import codec
from cipherfleet.computing.card_keys import Permit
from cipherfleet.computing.card_request import Answer, Request, Work, parameters
from cipherfleet.computing.card_tables import KeyTable, StreamTable
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_bare import Single
from cipherfleet.computing.engine_memory import no_pause, wipe
from cipherfleet.computing.engine_message import Decryptor, Encryptor
from cipherfleet.computing.engine_stream import Stream, open_stream, run_batch
from cipherfleet.contract import policy
from cipherfleet.contract.algorithms import algorithm
from cipherfleet.contract.errors import CipherfleetError, Malformed, TooLarge, Unsupported
from cipherfleet.contract.vcc import (
    MAX_BATCH,
    BatchAnswer,
    BatchItem,
    BatchRequest,
    DataKeyRequest,
    Operation,
    RandomRequest,
    StreamRequest,
    Verb,
)

MAX_RANDOM_BYTES = 1024 * 1024
LONG_BYTES = 32 * 1024
"""Of more data the work is worth a change of threads."""

_PROCESSING = frozenset({Verb.DECRYPT, Verb.REENCRYPT, Verb.VERIFY, Verb.VERIFY_MAC, Verb.DECAPSULATE})
"""What makes nothing new: a policy may allow it where it refuses the rest (SP 800-131A)."""


class DataOperations:
    """Those of one vCC."""

    def __init__(self, permit: Permit, keys: KeyTable, streams: StreamTable) -> None:
        self._permit, self._keys, self._streams = permit, keys, streams
        self.operations: dict[int, Callable[[Request], Answer | Work]] = {
            Operation.RANDOM: self._random,
            Operation.DATA_KEY: self._data_key,
            Operation.BEGIN: self._begin,
            Operation.UPDATE: self._update,
            Operation.FINISH: self._finish,
            Operation.ABORT: self._abort,
            Operation.RUN: self._run,
            Operation.BATCH: self._batch,
        }

    def _random(self, request: Request) -> Answer:
        length = parameters(request, RandomRequest).length
        if length < 1:
            raise Malformed("random bytes are asked for by a length of 1 or more")
        if length > MAX_RANDOM_BYTES:
            raise TooLarge(f"at most {MAX_RANDOM_BYTES} random bytes at a time")
        return Answer(data=bytearray(secrets.token_bytes(length)))

    def _data_key(self, request: Request) -> Answer:
        wanted = parameters(request, DataKeyRequest)
        if not 16 <= wanted.length <= 64:
            raise Malformed("a data key has 16 to 64 bytes")
        key = self._keys.get(request.handle)
        self._permit.check(key)
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
        wanted = parameters(request, StreamRequest)
        return open_stream(wanted, *self._keys_of(wanted, request.handle)), _handles(wanted, request.handle)

    def _keys_of(self, wanted: StreamRequest, handle: int) -> tuple[Key | None, Key | None]:
        """The key of a request, and the one that a re-encryption goes to; a message more is counted under who encrypts it."""
        if wanted.verb is Verb.DIGEST:
            policy.check(self._permit.policy, algorithm(wanted.digest))
            return None, None
        key = self._keys.get(handle)
        self._permit.check(key, protect=wanted.verb not in _PROCESSING)
        target = self._keys.get(wanted.target) if wanted.verb is Verb.REENCRYPT else None
        if target is not None:
            self._permit.check(target)
        if wanted.verb is Verb.ENCRYPT or target is not None:
            self._keys.count_message(target or key)
        return key, target

    def _try_keys_of(self, item: BatchItem) -> tuple[Key | None, Key | None] | CipherfleetError:
        try:
            return self._keys_of(item.request, item.handle)
        except CipherfleetError as exc:
            return exc

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
            return Work(step, lambda data: Answer(data=data), alone=alone, done=done)
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
                done=lambda _: stream.close(),
            )
        try:
            return Answer(data=stream.run(request.data, request.room))
        finally:
            stream.close()

    def _batch(self, request: Request) -> Work:
        """Many short operations for one request: each has its own answer or error."""
        wanted = parameters(request, BatchRequest)
        if not 1 <= len(wanted.items) <= MAX_BATCH:
            raise Malformed(f"a batch has 1 to {MAX_BATCH} items")
        lengths = [item.length for item in wanted.items]
        if min(lengths) < 0 or sum(lengths) != len(request.data):
            raise Malformed("the lengths of a batch's items do not make up its data")
        keys = [self._try_keys_of(item) for item in wanted.items]
        data = request.data

        def keep(made: tuple[BatchAnswer, bytearray]) -> Answer:
            return Answer(parameters=codec.encode(made[0]), data=made[1])

        return Work(lambda pause: run_batch(wanted.items, keys, data, pause), keep, alone=True)

    @staticmethod
    def _is_long(stream: Stream, request: Request) -> bool:
        return len(request.data) >= LONG_BYTES or stream.heavy


def _handles(wanted: StreamRequest, handle: int) -> tuple[int, ...]:
    if wanted.verb is Verb.DIGEST:
        return ()
    return (handle, wanted.target) if wanted.verb is Verb.REENCRYPT else (handle,)
