"""The system's ``libcrypto.so.3`` by dlopen: the calls that SM2 needs.

``None`` or ``False`` is a refusal; what was refused is the caller's to say.
Every pointer is freed by its owner in Python, on errors too; the error queue of the thread is left empty.
"""

import threading
from functools import cache
from typing import Any

from cipherfleet.computing.engine_memory import Data, wipe
from cipherfleet.contract.errors import Internal, Unsupported

LIBRARY = "libcrypto.so.3"
_PUBLIC, _KEYPAIR = 0x86, 0x87  # EVP_PKEY_PUBLIC_KEY with the parameters, EVP_PKEY_KEYPAIR
_MAX_KEY_BYTES = 4096
_MAX_SIGNATURE_BYTES = 128
_DECLARATIONS = """
typedef struct evp_pkey_st EVP_PKEY; typedef struct evp_pkey_ctx_st EVP_PKEY_CTX;
typedef struct ossl_decoder_ctx_st OSSL_DECODER_CTX; typedef struct p8_st PKCS8_PRIV_KEY_INFO;
void ERR_clear_error(void);
EVP_PKEY_CTX *EVP_PKEY_CTX_new_from_name(void *, const char *, const char *);
EVP_PKEY_CTX *EVP_PKEY_CTX_new_from_pkey(void *, EVP_PKEY *, const char *);
void EVP_PKEY_CTX_free(EVP_PKEY_CTX *); void EVP_PKEY_free(EVP_PKEY *);
int EVP_PKEY_keygen_init(EVP_PKEY_CTX *); int EVP_PKEY_generate(EVP_PKEY_CTX *, EVP_PKEY **);
int EVP_PKEY_check(EVP_PKEY_CTX *); int EVP_PKEY_public_check(EVP_PKEY_CTX *);
int EVP_PKEY_is_a(const EVP_PKEY *, const char *);
int EVP_PKEY_sign_init(EVP_PKEY_CTX *); int EVP_PKEY_verify_init(EVP_PKEY_CTX *);
int EVP_PKEY_encrypt_init(EVP_PKEY_CTX *); int EVP_PKEY_decrypt_init(EVP_PKEY_CTX *);
int EVP_PKEY_sign(EVP_PKEY_CTX *, unsigned char *, size_t *, const unsigned char *, size_t);
int EVP_PKEY_verify(EVP_PKEY_CTX *, const unsigned char *, size_t, const unsigned char *, size_t);
int EVP_PKEY_encrypt(EVP_PKEY_CTX *, unsigned char *, size_t *, const unsigned char *, size_t);
int EVP_PKEY_decrypt(EVP_PKEY_CTX *, unsigned char *, size_t *, const unsigned char *, size_t);
OSSL_DECODER_CTX *OSSL_DECODER_CTX_new_for_pkey(EVP_PKEY **, const char *, const char *, const char *, int, void *, const char *);
void OSSL_DECODER_CTX_free(OSSL_DECODER_CTX *);
int OSSL_DECODER_from_data(OSSL_DECODER_CTX *, const unsigned char **, size_t *);
PKCS8_PRIV_KEY_INFO *EVP_PKEY2PKCS8(const EVP_PKEY *); void PKCS8_PRIV_KEY_INFO_free(PKCS8_PRIV_KEY_INFO *);
int i2d_PKCS8_PRIV_KEY_INFO(const PKCS8_PRIV_KEY_INFO *, unsigned char **);
int i2d_PUBKEY(const EVP_PKEY *, unsigned char **);
"""


class Libcrypto:
    """Raises ``Unsupported`` where the library is not there, or has no SM2."""

    def __init__(self) -> None:
        try:
            import cffi

            self._ffi: Any = cffi.FFI()
            self._ffi.cdef(_DECLARATIONS)
            self._lib: Any = self._ffi.dlopen(LIBRARY)
            for name in _names():
                getattr(self._lib, name)
        except (ImportError, OSError, AttributeError) as exc:
            raise Unsupported("SM2 needs libcrypto.so.3", "install OpenSSL 3.0 or later") from exc
        if self.generate() is None:  # also does what the library does once: its configuration, its random numbers
            raise Unsupported("SM2 needs libcrypto.so.3 with SM2 in it", "install OpenSSL 3.0 or later")

    def generate(self) -> Any:
        context = self._own(self._lib.EVP_PKEY_CTX_new_from_name(self._ffi.NULL, b"SM2", self._ffi.NULL), "EVP_PKEY_CTX_free")
        made = self._ffi.new("EVP_PKEY **")
        if context is None or not self._did(self._lib.EVP_PKEY_keygen_init(context)):
            return None
        self._did(self._lib.EVP_PKEY_generate(context, made))
        return self._own(made[0], "EVP_PKEY_free")

    def decode(self, encoded: Data, *, private: bool) -> Any:
        """An SM2 key of all of ``encoded``, unchecked."""
        if not 0 < len(encoded) <= _MAX_KEY_BYTES:
            return None
        null, made = self._ffi.NULL, self._ffi.new("EVP_PKEY **")
        structure, selection = (b"PrivateKeyInfo", _KEYPAIR) if private else (b"SubjectPublicKeyInfo", _PUBLIC)
        context = self._own(
            self._lib.OSSL_DECODER_CTX_new_for_pkey(made, b"DER", structure, b"SM2", selection, null, null), "OSSL_DECODER_CTX_free"
        )
        if context is None:
            return None
        buffer = self._ffi.from_buffer("unsigned char[]", encoded)
        at, left = self._ffi.new("const unsigned char **", buffer), self._ffi.new("size_t *", len(encoded))
        done = self._did(self._lib.OSSL_DECODER_from_data(context, at, left))
        key = self._own(made[0], "EVP_PKEY_free")
        return key if done and not left[0] and key is not None and self._lib.EVP_PKEY_is_a(key, b"SM2") == 1 else None

    def check(self, key: Any, *, private: bool) -> bool:
        """Whether the point is on the curve; of a private key: whether scalar and point belong together."""
        context = self._context(key)
        return self._did(self._lib.EVP_PKEY_check(context) if private else self._lib.EVP_PKEY_public_check(context))

    def encode_private(self, key: Any) -> bytearray | None:
        info = self._own(self._lib.EVP_PKEY2PKCS8(key), "PKCS8_PRIV_KEY_INFO_free")
        return None if info is None else self._encode(self._lib.i2d_PKCS8_PRIV_KEY_INFO, info)

    def encode_public(self, key: Any) -> bytes | None:
        made = self._encode(self._lib.i2d_PUBKEY, key)
        return None if made is None else bytes(made)

    def sign(self, key: Any, digest: bytes) -> bytes | None:
        made = self._transform("sign", key, digest, _MAX_SIGNATURE_BYTES)
        return None if made is None else bytes(made)

    def verify(self, key: Any, signature: bytes, digest: bytes) -> bool:
        context = self._context(key)
        if not self._did(self._lib.EVP_PKEY_verify_init(context)):
            raise Internal("SM2 could not begin to verify")
        given = self._ffi.from_buffer("unsigned char[]", signature)
        return self._did(self._lib.EVP_PKEY_verify(context, given, len(signature), digest, len(digest)))

    def encrypt(self, key: Any, data: Data) -> bytes | None:
        made = self._transform("encrypt", key, data, len(data) + 256)
        return None if made is None else bytes(made)

    def decrypt(self, key: Any, data: Data) -> bytearray | None:
        return self._transform("decrypt", key, data, len(data))

    def _transform(self, name: str, key: Any, data: Data, room: int) -> bytearray | None:
        """The result, in a buffer that can be wiped: no copy of it stays."""
        context = self._context(key)
        if not self._did(getattr(self._lib, f"EVP_PKEY_{name}_init")(context)):
            return None
        out, size = bytearray(room), self._ffi.new("size_t *", room)
        given = self._ffi.from_buffer("unsigned char[]", data)
        target = self._ffi.from_buffer("unsigned char[]", out)
        done = self._did(getattr(self._lib, f"EVP_PKEY_{name}")(context, target, size, given, len(data)))
        self._ffi.release(target)
        made = out[: size[0]] if done else None
        wipe(out)
        return made

    def _encode(self, encode: Any, what: Any) -> bytearray | None:
        size = encode(what, self._ffi.NULL)
        if size <= 0:
            self._did(0)
            return None
        out = bytearray(size)
        target = self._ffi.from_buffer("unsigned char[]", out)
        done = encode(what, self._ffi.new("unsigned char **", target)) == size
        self._ffi.release(target)
        self._did(int(done))
        return out if done else None

    def _context(self, key: Any) -> Any:
        context = self._own(self._lib.EVP_PKEY_CTX_new_from_pkey(self._ffi.NULL, key, self._ffi.NULL), "EVP_PKEY_CTX_free")
        if context is None:
            raise Internal("libcrypto gave no context")
        return context

    def _own(self, pointer: Any, free: str) -> Any:
        if pointer == self._ffi.NULL:
            self._lib.ERR_clear_error()
            return None
        return self._ffi.gc(pointer, getattr(self._lib, free))

    def _did(self, result: int) -> bool:
        """1 alone is success. Nobody else's call meets what this one left in the queue."""
        if result == 1:
            return True
        self._lib.ERR_clear_error()
        return False


def _names() -> tuple[str, ...]:
    return ("OSSL_DECODER_from_data", "EVP_PKEY_generate", "EVP_PKEY_CTX_new_from_pkey", "EVP_PKEY2PKCS8", "EVP_PKEY_is_a")


_opening = threading.Lock()


def libcrypto() -> Libcrypto:
    """The library, opened once. Raises ``Unsupported``."""
    with _opening:
        return _opened()


@cache
def _opened() -> Libcrypto:
    return Libcrypto()
