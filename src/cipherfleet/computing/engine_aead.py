"""The modes of authenticated encryption, one interface: 12-byte nonces, 16-byte tags, into the caller's buffer.

SP 800-38D (GCM), SP 800-38C (CCM), RFC 8452 (GCM-SIV), RFC 8439 (ChaCha20-Poly1305), RFC 8998 (SM4-GCM).
"""

from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, AESGCMSIV, ChaCha20Poly1305

from cipherfleet.computing.engine_memory import wipe
from cipherfleet.contract.algorithms import Algorithm

NONCE_BYTES, TAG_BYTES = 12, 16


class Aead(Protocol):
    """One key of an AEAD with 12-byte nonces and 16-byte tags, writing into the caller's buffer."""

    def seal(self, nonce: bytes, plaintext: memoryview, into: memoryview, associated: bytes | None = None) -> None: ...

    def open(self, nonce: bytes, sealed: memoryview, into: memoryview, associated: bytes | None = None) -> None:
        """Raises ``InvalidTag``, and leaves zeros in ``into`` then."""
        ...

    def close(self) -> None: ...


class LibraryAead:
    """A mode that the library has whole. Takes ``key`` over."""

    def __init__(self, kind: type[AESGCM | AESCCM | AESGCMSIV | ChaCha20Poly1305], key: bytearray) -> None:
        self._aead: AESGCM | AESCCM | AESGCMSIV | ChaCha20Poly1305 | None = kind(key)
        self._key = key  # until the end: AESCCM has no copy of its own, but reads the key at every call

    def seal(self, nonce: bytes, plaintext: memoryview, into: memoryview, associated: bytes | None = None) -> None:
        self._open().encrypt_into(nonce, plaintext, associated, into)

    def open(self, nonce: bytes, sealed: memoryview, into: memoryview, associated: bytes | None = None) -> None:
        try:
            self._open().decrypt_into(nonce, sealed, associated, into)
        except InvalidTag:
            into[:] = bytes(len(into))
            raise

    def close(self) -> None:
        self._aead = None
        wipe(self._key)

    def _open(self) -> AESGCM | AESCCM | AESGCMSIV | ChaCha20Poly1305:
        if self._aead is None:
            raise RuntimeError("the message key is gone")
        return self._aead


class Sm4Gcm:
    """SM4-GCM (GB/T 32907, RFC 8998). Takes ``key`` over."""

    def __init__(self, key: bytearray) -> None:
        self._key = key

    def seal(self, nonce: bytes, plaintext: memoryview, into: memoryview, associated: bytes | None = None) -> None:
        context = Cipher(self._algorithm(), modes.GCM(nonce)).encryptor()
        if associated:
            context.authenticate_additional_data(associated)
        context.update_into(plaintext, into[: len(plaintext)])
        context.finalize()
        into[len(plaintext) :] = context.tag

    def open(self, nonce: bytes, sealed: memoryview, into: memoryview, associated: bytes | None = None) -> None:
        context = Cipher(self._algorithm(), modes.GCM(nonce)).decryptor()
        if associated:
            context.authenticate_additional_data(associated)
        context.update_into(sealed[: len(into)], into)
        try:
            context.finalize_with_tag(bytes(sealed[len(into) :]))
        except InvalidTag:
            into[:] = bytes(len(into))
            raise

    def close(self) -> None:
        wipe(self._key)
        self._key = bytearray()

    def _algorithm(self) -> algorithms.SM4:
        if not self._key:
            raise RuntimeError("the message key is gone")
        return algorithms.SM4(self._key)  # type: ignore[arg-type]  # takes any buffer, its stub says less


_LIBRARY: dict[tuple[str, str], type[AESGCM | AESCCM | AESGCMSIV | ChaCha20Poly1305]] = {
    ("AES", "GCM"): AESGCM,
    ("AES", "CCM"): AESCCM,
    ("AES", "GCM-SIV"): AESGCMSIV,
    ("ChaCha20", "Poly1305"): ChaCha20Poly1305,
}


def aead_of(chosen: Algorithm, key: bytearray) -> Aead:
    """The mode of ``chosen`` under ``key``, which it takes over."""
    if chosen.family == "SM4":
        return Sm4Gcm(key)
    return LibraryAead(_LIBRARY[chosen.family, chosen.mode], key)
