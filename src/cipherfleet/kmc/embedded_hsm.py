"""The embedded HSM: keys in one file, sealed under a passphrase. For trying out and tests; a real token stands behind the same port.

The file is JSON: the parameters of Argon2id (RFC 9106), then AES-256-GCM (SP 800-38D) over all keys. The parameters are
authenticated, every change takes a new nonce, and the file is replaced whole, so a crash leaves the old one or the new one.
"""

import ctypes
import errno
import os
import secrets
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding, aes_key_wrap_with_padding

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import public_key_der
from cipherfleet.contract.errors import (
    CmkInvalid,
    DiskFull,
    Exists,
    FileProblem,
    KeyUnknown,
    LimitReached,
    PassphraseWrong,
    StateNewer,
    StateNotWritable,
    TooLarge,
    Unsupported,
)
from cipherfleet.contract.settings import Settings
from cipherfleet.kmc.hsm import MAX_SIGN_BYTES, SECRET_BYTES, WRAPPED_SECRET_BYTES, KeyHandle, Label, Mechanism
from cipherfleet.state.files import write_private

FILE = "hsm.sealed"
VERSION = 1
MAX_KEYS = 10_000
_MAX_FILE_BYTES = 64 * 1024 * 1024
_MAX_RECIPIENT_BYTES = 2048
_LANES = 4
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class Kind(StrEnum):
    EC = "ec-p256"
    WRAP = "aes-256-kwp"


class _Parameters(msgspec.Struct, frozen=True):
    version: int
    salt: bytes
    memory_kib: int
    iterations: int
    lanes: int


class _SealedFile(msgspec.Struct, frozen=True):
    parameters: _Parameters
    nonce: bytes
    sealed: bytes


class _StoredKey(msgspec.Struct, frozen=True):
    handle: KeyHandle
    label: Label
    kind: Kind
    material: bytes


class _Key:
    """A key in use. Wrap keys are bytes of ours, so that they can be locked and zeroised."""

    def __init__(self, label: Label, kind: Kind, material: bytes | bytearray) -> None:
        self.label, self.kind = label, kind
        self.wrap = bytearray(material) if kind is Kind.WRAP else bytearray()
        self.private: ec.EllipticCurvePrivateKey | None = None
        if kind is Kind.EC:
            loaded = serialization.load_der_private_key(material, None)
            if not isinstance(loaded, ec.EllipticCurvePrivateKey):
                raise FileProblem("the HSM's file holds a key of another kind than it says")
            self.private = loaded
        lock_memory(self.wrap)

    def material(self) -> bytes:
        if self.private is None:
            return bytes(self.wrap)
        return self.private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    def zeroise(self) -> None:
        zeroise(self.wrap)
        self.private = None


class EmbeddedHsm:
    """An ``Hsm`` in this process; ``hsm_server`` gives it a process of its own."""

    def __init__(self, path: Path, parameters: _Parameters, sealing_key: bytearray, keys: dict[KeyHandle, _Key]) -> None:
        self._path, self._parameters, self._sealing_key, self._keys = path, parameters, sealing_key, keys
        self._labels = {key.label: handle for handle, key in keys.items()}

    @staticmethod
    def open(folder: Path, passphrase: str, settings: Settings) -> "EmbeddedHsm":
        """Unseal the file of ``folder``, or make an empty one. Blocking, takes as long as Argon2id does.

        Raises ``PassphraseWrong``, ``StateNewer``, ``FileProblem``, ``StateNotWritable`` or ``DiskFull``.
        """
        if not passphrase:
            raise PassphraseWrong("the HSM's passphrase is empty", "give one with --passphrase-file")
        path = folder / FILE
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            raw = path.read_bytes() if path.exists() else None
        except OSError as exc:
            raise _file_fault(exc, path) from exc
        if raw is None:
            parameters = _Parameters(VERSION, secrets.token_bytes(16), settings.argon2_memory_kib, settings.argon2_iterations, _LANES)
            hsm = EmbeddedHsm(path, parameters, _derive(passphrase, parameters), {})
            hsm._seal()
            return hsm
        return _unseal(path, raw, passphrase)

    def close(self) -> None:
        """Zeroise what can be; the object is of no use then."""
        zeroise(self._sealing_key)
        for key in self._keys.values():
            key.zeroise()
        self._keys.clear()
        self._labels.clear()

    # -- the port ------------------------------------------------------------------------------------------------------

    async def mechanisms(self) -> frozenset[Mechanism]:
        return frozenset(Mechanism)

    async def generate_key_pair(self, label: Label) -> KeyHandle:
        private = ec.generate_private_key(ec.SECP256R1())
        material = private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return self._add(label, Kind.EC, lambda: material)

    async def generate_wrap_key(self, label: Label) -> KeyHandle:
        return self._add(label, Kind.WRAP, lambda: _random(SECRET_BYTES))

    async def find(self, label: Label) -> KeyHandle | None:
        return self._labels.get(label)

    async def public_key(self, handle: KeyHandle) -> bytes:
        return public_key_der(self._private(handle).public_key())

    async def sign(self, handle: KeyHandle, data: bytes) -> bytes:
        if len(data) > MAX_SIGN_BYTES:
            raise TooLarge(f"the HSM signs at most {MAX_SIGN_BYTES} bytes")
        return self._private(handle).sign(data, ec.ECDSA(hashes.SHA256()))

    async def generate_wrapped(self, handle: KeyHandle) -> bytes:
        key, secret = self._wrap_key(handle), _random(SECRET_BYTES)
        try:
            return aes_key_wrap_with_padding(key, secret)
        finally:
            zeroise(secret)

    async def rewrap(self, handle: KeyHandle, wrapped: bytes, recipient: bytes) -> bytes:
        key, public = self._wrap_key(handle), _recipient(recipient)
        if len(wrapped) != WRAPPED_SECRET_BYTES:
            raise CmkInvalid(f"a wrapped secret has {WRAPPED_SECRET_BYTES} bytes, not {len(wrapped)}")
        try:
            secret = aes_key_unwrap_with_padding(key, wrapped)
        except (InvalidUnwrap, ValueError) as exc:
            raise CmkInvalid("the ciphertext CMK was not wrapped under this HSM's root key, or was changed") from exc
        try:
            if len(secret) != SECRET_BYTES:
                raise CmkInvalid("the ciphertext CMK holds something else than a CMK share")
            return public.encrypt(secret, _OAEP)
        finally:
            _zeroise_bytes(secret)

    async def destroy(self, handle: KeyHandle) -> None:
        key = self._keys.pop(handle, None)
        if key is None:
            return
        del self._labels[key.label]
        try:
            self._seal()
        except BaseException:
            self._keys[handle], self._labels[key.label] = key, handle
            raise
        key.zeroise()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _add(self, label: Label, kind: Kind, make: Callable[[], bytes | bytearray]) -> KeyHandle:
        if label in self._labels:
            raise Exists(f"the HSM already has a key {label}")
        if len(self._keys) >= MAX_KEYS:
            raise LimitReached(f"the HSM holds {MAX_KEYS} keys, no more")
        handle, material = KeyHandle(secrets.token_hex(16)), make()
        self._keys[handle] = _Key(label, kind, material)
        self._labels[label] = handle
        if isinstance(material, bytearray):
            zeroise(material)
        try:
            self._seal()
        except BaseException:
            self._keys.pop(handle).zeroise()
            del self._labels[label]
            raise
        return handle

    def _private(self, handle: KeyHandle) -> ec.EllipticCurvePrivateKey:
        key = self._keys.get(handle)
        if key is None or key.private is None:
            raise KeyUnknown("the HSM has no key pair under this handle")
        return key.private

    def _wrap_key(self, handle: KeyHandle) -> bytearray:
        key = self._keys.get(handle)
        if key is None or key.kind is not Kind.WRAP:
            raise KeyUnknown("the HSM has no wrap key under this handle")
        return key.wrap

    def _seal(self) -> None:
        stored = [_StoredKey(handle, key.label, key.kind, key.material()) for handle, key in self._keys.items()]
        plaintext, nonce = bytearray(codec.encode(stored)), secrets.token_bytes(12)
        try:
            sealed = AESGCM(self._sealing_key).encrypt(nonce, plaintext, codec.encode(self._parameters))
        finally:
            zeroise(plaintext)
        try:
            write_private(self._path, codec.encode(_SealedFile(self._parameters, nonce, sealed)))
            _sync_folder(self._path.parent)
        except OSError as exc:
            raise _file_fault(exc, self._path) from exc


def _unseal(path: Path, raw: bytes, passphrase: str) -> EmbeddedHsm:
    version = _version(raw, path)
    if version > VERSION:
        raise StateNewer(f"{path} has version {version}, this program knows {VERSION}")
    try:
        file = msgspec.json.decode(raw, type=_SealedFile)
    except msgspec.MsgspecError as exc:
        raise FileProblem(f"{path} is damaged", "restore it from a backup") from exc
    parameters = file.parameters
    if not (8 <= parameters.lanes * 8 <= parameters.memory_kib <= 4 * 1024 * 1024 and 1 <= parameters.iterations <= 1000) or not (
        len(parameters.salt) == 16 and len(file.nonce) == 12
    ):
        raise FileProblem(f"{path} asks for parameters of Argon2id that are out of bounds")
    sealing_key = _derive(passphrase, parameters)
    plaintext = bytearray(max(0, len(file.sealed) - 16))
    try:
        AESGCM(sealing_key).decrypt_into(file.nonce, file.sealed, codec.encode(parameters), plaintext)
        stored = msgspec.json.decode(plaintext, type=list[_StoredKey])
    except (InvalidTag, ValueError) as exc:
        zeroise(sealing_key)
        raise PassphraseWrong(
            "the HSM's passphrase is wrong, or its file was changed", "give the right one with --passphrase-file"
        ) from exc
    finally:
        zeroise(plaintext)
    return EmbeddedHsm(path, parameters, sealing_key, {key.handle: _Key(key.label, key.kind, key.material) for key in stored})


def _version(raw: bytes, path: Path) -> int:
    class Version(msgspec.Struct):
        version: int

    class Head(msgspec.Struct):
        parameters: Version

    if len(raw) > _MAX_FILE_BYTES:
        raise FileProblem(f"{path} is too large for an HSM's file")
    try:
        return msgspec.json.decode(raw, type=Head).parameters.version
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise FileProblem(f"{path} is damaged", "restore it from a backup") from exc


def _derive(passphrase: str, parameters: _Parameters) -> bytearray:
    key = bytearray(32)
    lock_memory(key)
    kdf = Argon2id(
        salt=parameters.salt,
        length=32,
        iterations=parameters.iterations,
        lanes=parameters.lanes,
        memory_cost=parameters.memory_kib,
    )
    kdf.derive_into(passphrase.encode(), key)
    return key


def _recipient(spki: bytes) -> rsa.RSAPublicKey:
    if len(spki) > _MAX_RECIPIENT_BYTES:
        raise Unsupported("the recipient's key is too large")
    try:
        public = serialization.load_der_public_key(spki)
    except Exception as exc:  # the parser's errors are of many kinds
        raise Unsupported("the recipient's key cannot be read") from exc
    if not isinstance(public, rsa.RSAPublicKey) or not 3072 <= public.key_size <= 8192:
        raise Unsupported("the HSM rewraps for RSA keys of 3072 bits or more alone")
    return public


def _random(length: int) -> bytearray:
    """Fresh bytes that can be zeroised, which ``os.urandom`` does not give."""
    buffer = bytearray(length)
    lock_memory(buffer)
    with open("/dev/urandom", "rb", buffering=0) as source:  # noqa: PTH123 - unbuffered, so that no copy stays behind
        if source.readinto(buffer) != length:
            raise RuntimeError("the kernel's random source gave too little")
    return buffer


_libc: Final = ctypes.CDLL(None, use_errno=True)


def zeroise(buffer: bytearray) -> None:
    """Overwrite in place."""
    buffer[:] = bytes(len(buffer))


def _zeroise_bytes(secret: bytes) -> None:
    """The unwrapped share is an object of OpenSSL's binding that no one else holds: overwrite what Python would only free."""
    if len(secret) > 1:  # shorter ones are shared by the interpreter
        ctypes.memset(id(secret) + bytes.__basicsize__ - 1, 0, len(secret))


def lock_memory(buffer: bytearray) -> bool:
    """Try to keep the buffer's page from being swapped out; a limit may forbid it."""
    if not buffer:
        return True
    address = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
    return bool(_libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(buffer))) == 0)


def lock_all_memory() -> bool:
    """Try to keep all of this process from being swapped out (``mlockall``)."""
    current_and_future = 1 | 2
    return bool(_libc.mlockall(current_and_future) == 0)


def _sync_folder(folder: Path) -> None:
    """So that the new file's name survives a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_fault(exc: OSError, path: Path) -> DiskFull | StateNotWritable:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no space left for {path}")
    return StateNotWritable(f"cannot use {path}: {os.strerror(exc.errno or 0)}", "check the folder's owner and mode")


__all__ = ["EmbeddedHsm", "lock_all_memory", "zeroise"]
