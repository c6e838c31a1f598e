"""Ciphertexts as the standards have them and no more: bare modes, key wrap, encryption to a public key.

What AEAD modes and key wrap give out has been authenticated; CBC, CTR and XTS authenticate nothing, and say so in their kind.
SP 800-38A (CBC, CTR), SP 800-38E (XTS), SP 800-38F (KW, KWP), RFC 8017 (OAEP), GB/T 32918.4 (SM2), RFC 9180 (HPKE).
"""

import secrets
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke, keywrap
from cryptography.hazmat.primitives import padding as block_padding
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from cipherfleet.channel.sealing import SUITE
from cipherfleet.computing import engine_sm2
from cipherfleet.computing.engine import DIGESTS, Key
from cipherfleet.computing.engine_aead import NONCE_BYTES, TAG_BYTES, aead_of
from cipherfleet.computing.engine_keys import Hybrid
from cipherfleet.computing.engine_memory import PART_BYTES, Data, Pause, no_pause, take, wipe
from cipherfleet.contract.algorithms import Kind
from cipherfleet.contract.errors import (
    CiphertextInvalid,
    CiphertextTruncated,
    KeyMaterialInvalid,
    Malformed,
    OutOfOrder,
    TagTooShort,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.vcc import MAX_DATA_BYTES, StreamRequest

BLOCK_BYTES = 16
_PADDING = block_padding.PKCS7(BLOCK_BYTES * 8)
MAX_WRAPPED_BYTES = 64 * 1024
MAX_SHORT_BYTES = 8 * 1024
"""Of what is encrypted to a public key at once; RSA takes less, as its modulus says."""
MAX_OVERHEAD_BYTES = 2 * 1024
"""A ciphertext may be longer than the longest plaintext by so much: nonce and tag, or what HPKE encapsulates (1120)."""


class Single:
    """What is done at once, by RUN alone: ``work`` gives the answer of the data.

    What it needs of the key it has from its opening on, so that a key that is unloaded meanwhile is never used half wiped;
    ``closing`` ends that.
    """

    first = b""

    def __init__(
        self, work: Callable[[Data], Data], *, most: int = MAX_DATA_BYTES, heavy: bool = False, closing: Callable[[], None] | None = None
    ) -> None:
        self.heavy = heavy
        self._closing = closing
        self._work: Callable[[Data], Data] | None = work
        self._most = most

    def run(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data:
        if len(data) > self._most:
            raise TooLarge(f"at most {self._most} bytes at a time")
        if self._work is None:
            raise RuntimeError("the key of this operation is gone")
        return self._work(data)

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data:
        raise OutOfOrder("this is done at once and is no stream")

    finish = update

    def close(self) -> None:
        self._work = None
        if self._closing is not None:
            self._closing()


class BlockStream:
    """CBC (PKCS#7 padding) or CTR, a stream of any length; the first 16 bytes of a ciphertext are the IV.

    UPDATE takes whole blocks of 16 bytes, FINISH the rest: of a CBC ciphertext at least its last block.
    """

    heavy = False

    def __init__(self, key: Key, *, encrypt: bool) -> None:
        self._cipher: algorithms.AES | algorithms.SM4 | None = block_cipher(key)
        self._encrypt, self._padded = encrypt, key.algorithm.mode == "CBC"
        self.first = secrets.token_bytes(BLOCK_BYTES) if encrypt else b""
        self._context: CipherContext | None = self._start(self.first) if encrypt else None

    def update(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data:
        if len(data) > MAX_DATA_BYTES:
            raise TooLarge(f"at most {MAX_DATA_BYTES} bytes at a time")
        if len(data) % BLOCK_BYTES:
            raise Malformed(f"a stream of this mode is given in blocks of {BLOCK_BYTES} bytes")
        view = memoryview(data)
        return self._sealed(view, b"", into, pause) if self._encrypt else self._opened(view, pause)

    def finish(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data:
        return self._last(data, b"", into, pause)

    def run(self, data: Data, into: memoryview | None = None, pause: Pause = no_pause) -> Data:
        return self._last(data, self.first, into, pause)

    def close(self) -> None:
        self._cipher = self._context = None

    def _last(self, data: Data, before: bytes, into: memoryview | None, pause: Pause) -> Data:
        if len(data) > MAX_DATA_BYTES + 2 * BLOCK_BYTES:
            raise TooLarge(f"at most {MAX_DATA_BYTES} bytes at a time; longer input is a stream")
        view = memoryview(data)
        if not self._encrypt:
            return self._unpadded(view, pause) if self._padded else self._opened(view, pause)
        if not self._padded:
            return self._sealed(view, before, into, pause)
        whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
        padder = _PADDING.padder()
        return self._sealed(view[:whole], before, into, pause, tail=padder.update(bytes(view[whole:])) + padder.finalize())

    def _unpadded(self, data: memoryview, pause: Pause) -> bytearray:
        if len(data) < BLOCK_BYTES or len(data) % BLOCK_BYTES:
            raise CiphertextTruncated(f"a ciphertext of CBC has whole blocks of {BLOCK_BYTES} bytes")
        opened = self._opened(data, pause)
        if not opened:
            raise CiphertextTruncated("a ciphertext of CBC has a block at least after its IV")
        unpadder = _PADDING.unpadder()
        try:
            end = unpadder.update(bytes(opened[-BLOCK_BYTES:])) + unpadder.finalize()
        except ValueError as exc:
            wipe(opened)
            raise CiphertextInvalid("the ciphertext was cut or changed, or is of another key") from exc
        del opened[len(opened) - BLOCK_BYTES + len(end) :]
        return opened

    def _sealed(self, data: memoryview, before: bytes, into: memoryview | None, pause: Pause, tail: bytes = b"") -> bytearray | memoryview:
        size = len(before) + len(data) + len(tail)
        room = size + BLOCK_BYTES - 1  # the library wants it
        out = into[:room] if into is not None and len(into) >= room else bytearray(room)
        with memoryview(out) as view:
            view[: len(before)] = before
            at = len(before) + self._pass(data, view[len(before) :], pause)
            self._pass(memoryview(tail), view[at:], pause)
        if isinstance(out, memoryview):
            return out[:size]
        del out[size:]
        return out

    def _opened(self, data: memoryview, pause: Pause) -> bytearray:
        """Never where others may read it."""
        if self._context is None:  # the first of a ciphertext
            if len(data) < BLOCK_BYTES:
                raise CiphertextTruncated(f"a ciphertext begins with {BLOCK_BYTES} bytes of IV")
            self._context = self._start(bytes(data[:BLOCK_BYTES]))
            data = data[BLOCK_BYTES:]
        out = bytearray(len(data) + BLOCK_BYTES - 1)
        with memoryview(out) as view:
            size = self._pass(data, view, pause)
        del out[size:]
        return out

    def _pass(self, data: memoryview, out: memoryview, pause: Pause) -> int:
        """How many bytes came out."""
        at = 0
        for start in range(0, len(data), PART_BYTES):
            if start:
                pause()
            at += self._require().update_into(data[start : start + PART_BYTES], out[at:])
        return at

    def _require(self) -> CipherContext:
        if self._context is None:
            raise RuntimeError("the key of this stream is gone")
        return self._context

    def _start(self, iv: bytes) -> CipherContext:
        if self._cipher is None:
            raise RuntimeError("the key of this stream is gone")
        mode = modes.CBC(iv) if self._padded else modes.CTR(iv)
        cipher = Cipher(self._cipher, mode)
        return cipher.encryptor() if self._encrypt else cipher.decryptor()


def block_cipher(key: Key) -> algorithms.AES | algorithms.SM4:
    """The block cipher of a key, with a copy of it: OpenSSL has none before there is a context."""
    kind = algorithms.SM4 if key.algorithm.family == "SM4" else algorithms.AES
    return kind(bytearray(key.secret))  # type: ignore[arg-type]  # takes any buffer, its stub says less


def open_bare(request: StreamRequest, key: Key, *, encrypt: bool) -> Single | BlockStream:
    """What encrypts or decrypts with a bare key. Raises ``WrongKeyType`` or ``Malformed``."""
    chosen = key.algorithm
    if request.header:
        raise Malformed("a bare ciphertext has no header")
    match chosen.kind:
        case Kind.AEAD:
            return _aead(key, request.context, encrypt=encrypt)
        case Kind.CIPHER if chosen.mode == "XTS":
            return _xts(key, request.context, encrypt=encrypt)
        case Kind.CIPHER:
            _no_context(request)
            return BlockStream(key, encrypt=encrypt)
        case Kind.KEY_WRAP:
            _no_context(request)
            return _key_wrap(key, encrypt=encrypt)
        case Kind.PUBLIC_KEY_ENCRYPTION:
            return _public(request, key, encrypt=encrypt)
    raise WrongKeyType(f"a key of {chosen.name} cannot encrypt or decrypt")


def _most(plaintext_bytes: int, *, encrypt: bool) -> int:
    """How much is taken at once: whatever is encrypted can be decrypted again."""
    return plaintext_bytes if encrypt else plaintext_bytes + MAX_OVERHEAD_BYTES


def _no_context(request: StreamRequest) -> None:
    if request.context:
        raise Malformed("this mode authenticates no context", "choose an AEAD mode")


def _aead(key: Key, associated: bytes, *, encrypt: bool) -> Single:
    aead = aead_of(key.algorithm, bytearray(key.secret))

    def seal(data: Data) -> bytearray:
        nonce = secrets.token_bytes(NONCE_BYTES)
        out = bytearray(NONCE_BYTES + len(data) + TAG_BYTES)
        out[:NONCE_BYTES] = nonce
        aead.seal(nonce, memoryview(data), memoryview(out)[NONCE_BYTES:], associated or None)
        return out

    def open_(data: Data) -> bytearray:
        size = len(data) - NONCE_BYTES - TAG_BYTES
        if size < 0:
            raise TagTooShort(f"nonce and tag have {NONCE_BYTES + TAG_BYTES} bytes, all of this has {len(data)}")
        view, out = memoryview(data), bytearray(size)
        try:
            aead.open(bytes(view[:NONCE_BYTES]), view[NONCE_BYTES:], memoryview(out), associated or None)
        except InvalidTag as exc:
            raise CiphertextInvalid("the ciphertext or its tag was changed or cut, or belongs to another context") from exc
        return out

    return Single(seal if encrypt else open_, most=_most(MAX_DATA_BYTES, encrypt=encrypt), closing=aead.close)


def _xts(key: Key, tweak: bytes, *, encrypt: bool) -> Single:
    if len(tweak) != BLOCK_BYTES:
        raise Malformed(f"the context of XTS is its tweak, {BLOCK_BYTES} bytes: the number of the data unit, little endian")
    cipher = Cipher(block_cipher(key), modes.XTS(tweak))
    context = cipher.encryptor() if encrypt else cipher.decryptor()

    def work(data: Data) -> bytearray:
        if len(data) < BLOCK_BYTES:
            raise Malformed(f"a data unit of XTS has at least {BLOCK_BYTES} bytes")
        out = bytearray(len(data) + BLOCK_BYTES - 1)
        del out[context.update_into(data, out) :]
        context.finalize()
        return out

    return Single(work)


def _key_wrap(key: Key, *, encrypt: bool) -> Single:
    padded, wrapping = key.algorithm.mode == "KWP", bytearray(key.secret)

    def wrap(data: Data) -> bytes:
        if not padded and (len(data) < BLOCK_BYTES or len(data) % 8):
            raise Malformed("KW wraps 16 bytes or more, a multiple of 8", "choose KWP for other lengths")
        if not data:
            raise Malformed("there is nothing to wrap")
        secret = bytes(data)
        try:
            return (keywrap.aes_key_wrap_with_padding if padded else keywrap.aes_key_wrap)(wrapping, secret)
        finally:
            wipe(secret)

    def unwrap(data: Data) -> bytearray:
        try:
            return take((keywrap.aes_key_unwrap_with_padding if padded else keywrap.aes_key_unwrap)(wrapping, bytes(data)))
        except (keywrap.InvalidUnwrap, ValueError) as exc:
            raise CiphertextInvalid("what was wrapped was changed or cut, or is of another key") from exc

    return Single(wrap if encrypt else unwrap, most=_most(MAX_WRAPPED_BYTES, encrypt=encrypt), closing=lambda: wipe(wrapping))


def _public(request: StreamRequest, key: Key, *, encrypt: bool) -> Single:
    private, context = key.private, request.context
    if isinstance(private, rsa.RSAPrivateKey):
        return Single(_oaep(private, request, key, encrypt=encrypt), most=MAX_SHORT_BYTES, heavy=not encrypt)
    if request.digest:
        raise Malformed(f"{key.algorithm.name} leaves no choice of a digest")
    if isinstance(private, Hybrid):
        return Single(_hpke(private.key, context, encrypt=encrypt), most=_most(MAX_DATA_BYTES, encrypt=encrypt))
    if isinstance(private, engine_sm2.PrivateKey):
        _no_context(request)
        return Single(private.encrypt if encrypt else private.decrypt, most=_most(MAX_SHORT_BYTES, encrypt=encrypt))
    raise KeyMaterialInvalid(f"key {key.id} cannot encrypt")


def _oaep(private: rsa.RSAPrivateKey, request: StreamRequest, key: Key, *, encrypt: bool) -> Callable[[Data], Data]:
    name = chosen_digest(request, key)
    scheme = padding.OAEP(padding.MGF1(DIGESTS[name]), DIGESTS[name], request.context or None)

    def work(data: Data) -> Data:
        if encrypt:
            most = private.key_size // 8 - 2 * DIGESTS[name].digest_size - 2
            if len(data) > most:
                raise TooLarge(f"{key.algorithm.name} with {name} encrypts at most {most} bytes", "encrypt a data key, or choose an AEAD")
            return private.public_key().encrypt(bytes(data), scheme)
        try:
            return take(private.decrypt(bytes(data), scheme))
        except ValueError as exc:
            raise CiphertextInvalid("the ciphertext was changed or cut, or is of another key, digest or label") from exc

    return work


def _hpke(private: hpke.MLKEM768X25519PrivateKey, info: bytes, *, encrypt: bool) -> Callable[[Data], Data]:
    def work(data: Data) -> Data:
        if encrypt:
            return SUITE.encrypt(data, private.public_key(), info)
        try:
            return bytearray(SUITE.decrypt(data, private, info))
        except (ValueError, InvalidTag) as exc:
            raise CiphertextInvalid("the ciphertext was changed or cut, or is of another key or context") from exc

    return work


def chosen_digest(request: StreamRequest, key: Key) -> str:
    """The digest that a request chose of those its algorithm allows. Raises ``Malformed``."""
    chosen = key.algorithm
    if not request.digest:
        return chosen.digest
    allowed = chosen.digests or ((chosen.digest,) if chosen.digest else ())
    if request.digest not in allowed:
        raise Malformed(f"{chosen.name} works with {', '.join(allowed) or 'no digest of choice'}, not with {request.digest[:40]!r}")
    return request.digest
