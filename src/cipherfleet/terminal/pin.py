"""The PIN and what lies under it: the Ukey's secrets, AES-256-GCM under Argon2id (RFC 9106)."""

import hashlib
import hmac
import os
import unicodedata
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from msgspec import Meta

from cipherfleet.contract.errors import PinWrong, UkeyInvalid
from cipherfleet.contract.settings import Settings

PIN_MINIMUM, PIN_MAXIMUM = 4, 64
SECRET_BYTES = 128
_MAGIC = b"CFU1"
_NONCE_BYTES, _TAG_BYTES, _CHECKSUM_BYTES = 12, 16, 32
SEALED_BYTES = len(_MAGIC) + _NONCE_BYTES + SECRET_BYTES + _TAG_BYTES + _CHECKSUM_BYTES


class PinHash(msgspec.Struct, frozen=True):
    """How the PIN becomes a key. The upper bounds keep a doctored file from eating the terminal's memory."""

    salt: Annotated[bytes, Meta(min_length=16, max_length=64)]
    memory_kib: Annotated[int, Meta(ge=8192, le=4 * 1024 * 1024)]
    iterations: Annotated[int, Meta(ge=1, le=64)]
    lanes: Annotated[int, Meta(ge=1, le=16)] = 1

    @staticmethod
    def new(settings: Settings) -> "PinHash":
        return PinHash(os.urandom(16), settings.argon2_memory_kib, settings.argon2_iterations)


def pin_bytes(pin: str | bytes | bytearray) -> bytearray:
    """The PIN's bytes (NFC, UTF-8), in a buffer the caller can wipe. Raises ``PinWrong`` unless it has 4 to 64 characters."""
    try:
        text = unicodedata.normalize("NFC", pin if isinstance(pin, str) else pin.decode())
    except UnicodeDecodeError:
        raise PinWrong("the PIN is not text") from None
    if not PIN_MINIMUM <= len(text) <= PIN_MAXIMUM:
        raise PinWrong(f"a PIN has {PIN_MINIMUM} to {PIN_MAXIMUM} characters")
    return bytearray(text.encode())


def wipe(*buffers: bytearray) -> None:
    """Overwrite secrets in place."""
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))


def seal_secrets(secrets: bytearray, pin: bytearray, pin_hash: PinHash, record: bytes) -> bytes:
    """``secrets`` (128 bytes) under the PIN, bound to the Ukey's public ``record``: who edits a trust anchor locks the Ukey."""
    key = _derive(pin, pin_hash)
    try:
        nonce = os.urandom(_NONCE_BYTES)
        body = _MAGIC + nonce + AESGCM(key).encrypt(nonce, secrets, _associated(record))
    finally:
        wipe(key)
    return body + _checksum(body, record)


def open_secrets(sealed: bytes, pin: bytearray, pin_hash: PinHash, record: bytes) -> bytearray:
    """The secrets. Raises ``UkeyInvalid`` when a file is damaged, ``PinWrong`` when the key does not fit.

    The checksum is no protection, only the difference between a damaged stick and a mistyped PIN: what was changed on
    purpose, checksum and all, still fails the authentication under the PIN.
    """
    body, checksum = sealed[:-_CHECKSUM_BYTES], sealed[-_CHECKSUM_BYTES:]
    if len(sealed) != SEALED_BYTES or not body.startswith(_MAGIC) or not hmac.compare_digest(checksum, _checksum(body, record)):
        raise UkeyInvalid("the Ukey's files are damaged: its secrets and its public record do not belong together")
    key = _derive(pin, pin_hash)
    secrets = bytearray(SECRET_BYTES)
    start = len(_MAGIC) + _NONCE_BYTES
    try:
        AESGCM(key).decrypt_into(body[len(_MAGIC) : start], body[start:], _associated(record), secrets)
    except InvalidTag:
        wipe(secrets)
        raise PinWrong("the PIN does not open this Ukey") from None
    finally:
        wipe(key)
    return secrets


def _derive(pin: bytearray, pin_hash: PinHash) -> bytearray:
    key = bytearray(32)
    kdf = Argon2id(
        salt=pin_hash.salt, length=len(key), iterations=pin_hash.iterations, lanes=pin_hash.lanes, memory_cost=pin_hash.memory_kib
    )
    kdf.derive_into(pin, key)  # type: ignore[arg-type]  # it takes any buffer, which its stub does not say
    return key


def _associated(record: bytes) -> bytes:
    return b"cipherfleet ukey v1" + hashlib.sha256(record).digest()


def _checksum(body: bytes, record: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(record).digest() + body).digest()
