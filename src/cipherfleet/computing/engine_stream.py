"""The verbs: what a stream of data becomes, from BEGIN over UPDATE to FINISH, or all at once."""

from collections.abc import Sequence
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import mlkem

from cipherfleet.computing import engine_keys
from cipherfleet.computing.engine import DIGESTS, Key
from cipherfleet.computing.engine_bare import BlockStream, Single, open_bare
from cipherfleet.computing.engine_memory import Data, Pause, derive, no_pause, take, wipe
from cipherfleet.computing.engine_message import Decryptor, Encryptor, Reencryptor, check_context
from cipherfleet.computing.engine_signature import Digest, Mac, Signature
from cipherfleet.contract.algorithms import Kind
from cipherfleet.contract.errors import CipherfleetError, CiphertextInvalid, Malformed, SharedSecretZero, TooLarge, WrongKeyType
from cipherfleet.contract.vcc import BatchAnswer, BatchItem, BatchResult, StreamRequest, Verb

MAX_DERIVED_BYTES = 4096
MAX_BATCH_ANSWER_BYTES = 2 * 1024 * 1024
MAX_SALT_BYTES = 1024
BATCH_PART = 4
"""Items between two pauses."""


class Stream(Protocol):
    """``first`` is the data of BEGIN's completion; ``heavy``: even of short data it takes long. After an error a stream is of no use."""

    @property
    def first(self) -> bytes: ...

    @property
    def heavy(self) -> bool: ...

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data:
        """``into``: where the result may be written, if it is nobody's secret; what is returned is then a view of it."""
        ...

    def finish(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data: ...

    def run(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data: ...

    def close(self) -> None: ...


def open_stream(request: StreamRequest, key: Key | None, target: Key | None = None) -> Stream:
    """The stream of a request. ``key`` is there for every verb but DIGEST, ``target`` for REENCRYPT.

    Raises ``WrongKeyType``, ``AlgorithmUnknown``, ``Malformed``, ``TooLarge`` or a ciphertext error.
    """
    check_context(request.context)
    if request.verb is Verb.DIGEST:
        return Digest(request.digest, request.length)
    if key is None:
        raise RuntimeError(f"{request.verb} needs a key")
    match request.verb:
        case Verb.ENCRYPT | Verb.DECRYPT:
            return _cipher(request, key)
        case Verb.REENCRYPT:
            if target is None:
                raise RuntimeError("re-encryption needs a second key")
            return Reencryptor(Decryptor(key, request.header, request.context), Encryptor(target, request.target_context))
        case Verb.SIGN:
            return Signature(key, None, request)
        case Verb.VERIFY:
            return Signature(key, request.signature, request)
        case Verb.MAC:
            return Mac(key)
        case Verb.VERIFY_MAC:
            return Mac(key, request.signature)
        case Verb.AGREE:
            return _agreement(request, key)
        case Verb.ENCAPSULATE | Verb.DECAPSULATE:
            return _encapsulation(key, encapsulate=request.verb is Verb.ENCAPSULATE)
        case Verb.DERIVE:
            return _derivation(request, key)


def _cipher(request: StreamRequest, key: Key) -> Encryptor | Decryptor | Single | BlockStream:
    encrypt = request.verb is Verb.ENCRYPT
    if key.bare:
        return open_bare(request, key, encrypt=encrypt)
    return Encryptor(key, request.context) if encrypt else Decryptor(key, request.header, request.context)


def _check_derived(request: StreamRequest) -> None:
    if request.length > MAX_DERIVED_BYTES or len(request.salt) > MAX_SALT_BYTES:
        raise TooLarge(f"at most {MAX_DERIVED_BYTES} bytes are derived, with a salt of at most {MAX_SALT_BYTES}")


def _agreement(request: StreamRequest, key: Key) -> Single:
    """SP 800-56A, RFC 7748; through HKDF-SHA-256 (SP 800-56C) when a length is asked for."""
    key.require(Kind.KEY_AGREEMENT)
    _check_derived(request)
    if request.length < 0 or (not request.length and (request.salt or request.context)):
        raise Malformed("salt and context are for a length that is derived")
    private = key.private
    if private is None:
        raise RuntimeError("the key is gone")

    def work(data: Data) -> bytearray:
        if len(data):
            raise Malformed("an agreement takes the other side's public key and no data")
        try:
            secret = take(engine_keys.agree(private, request.peer))
        except ValueError as exc:
            raise SharedSecretZero("the other side's public key is a point of low order") from exc
        if not any(secret):
            raise SharedSecretZero("the shared secret is all zero")
        if not request.length:
            return secret
        try:
            return derive(secret, salt=request.salt, info=request.context, length=request.length)
        finally:
            wipe(secret)

    return Single(work)


def _encapsulation(key: Key, *, encapsulate: bool) -> Single:
    """FIPS 203. Encapsulated: shared secret (32) || ciphertext."""
    key.require(Kind.KEM)
    private = key.private
    if not isinstance(private, mlkem.MLKEM768PrivateKey | mlkem.MLKEM1024PrivateKey):
        raise WrongKeyType(f"{key.algorithm.name} is no KEM of ours")

    def work(data: Data) -> bytearray:
        if encapsulate:
            if len(data):
                raise Malformed("encapsulating takes no data")
            secret, ciphertext = private.public_key().encapsulate()
            return take(secret) + ciphertext
        try:
            return take(private.decapsulate(bytes(data)))
        except ValueError as exc:
            raise CiphertextInvalid(f"that is no ciphertext of {key.algorithm.name}") from exc

    return Single(work)


def derived(request: StreamRequest, key: Key) -> bytearray:
    """HKDF (RFC 5869): ``length`` bytes from the key, salt and context (the info). Raises as ``open_stream``."""
    check_context(request.context)
    key.require(Kind.KEY_DERIVATION)
    _check_derived(request)
    if request.length < 1:
        raise Malformed("a derivation says how many bytes it wants")
    return derive(key.secret, salt=request.salt, info=request.context, length=request.length, hash_=DIGESTS[key.algorithm.digest])


def _derivation(request: StreamRequest, key: Key) -> Single:
    secret = derived(request, key)

    def work(data: Data) -> bytearray:
        if len(data):
            raise Malformed("a derivation takes no data")
        return bytearray(secret)

    return Single(work, closing=lambda: wipe(secret))


Keys = tuple[Key | None, Key | None]


def run_batch(
    items: Sequence[BatchItem], keys: Sequence[Keys | CipherfleetError], data: Data, pause: Pause
) -> tuple[BatchAnswer, bytearray]:
    """Each item as RUN would; the results one after the other. What one item meets concerns no other."""
    view, results, out = memoryview(data), [], bytearray()
    at = 0
    for number, (item, theirs) in enumerate(zip(items, keys, strict=True)):
        if number and number % BATCH_PART == 0:
            pause()
        part, at = view[at : at + item.length], at + item.length
        try:
            if isinstance(theirs, CipherfleetError):
                raise theirs
            made = _run(item.request, theirs, part, pause)
            if len(out) + len(made) > MAX_BATCH_ANSWER_BYTES:
                raise TooLarge(
                    f"the answers of a batch have at most {MAX_BATCH_ANSWER_BYTES} bytes", "ask again for the items that are left"
                )
        except CipherfleetError as exc:
            results.append(BatchResult(error=exc.to_reply().error))
            continue
        out += made
        results.append(BatchResult(len(made)))
        if isinstance(made, bytearray):
            wipe(made)
    return BatchAnswer(tuple(results)), out


def _run(request: StreamRequest, keys: Keys, data: memoryview, pause: Pause) -> Data:
    stream = open_stream(request, *keys)
    try:
        return stream.run(data, None, pause)
    finally:
        stream.close()
