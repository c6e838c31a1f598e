"""Key material on its way in and out of the card: wrapped to an RSA key, or under a wrap key of the consumer.

RSA-OAEP with SHA-256 (RFC 8017) takes what is short; what is longer goes under a fresh AES-256 key with padding (RFC 5649), and that key
goes by OAEP before it: PKCS #11 calls it ``CKM_RSA_AES_KEY_WRAP``, AWS KMS ``RSA_AES_KEY_WRAP_SHA_256``.
"""

import secrets

import msgspec
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cipherfleet.channel import codec
from cipherfleet.computing import engine_keys
from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_memory import derive, wipe
from cipherfleet.contract.algorithms import Kind
from cipherfleet.contract.errors import (
    ImportTokenInvalid,
    KeyMaterialInvalid,
    Malformed,
    PublicKeyInvalid,
    Unsupported,
    WrongKeyType,
)
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.vcc import ImportToken

OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
RSA_BITS = (3072, 4096)
NONCE_BYTES = 12


def new_import_key(bits: int) -> bytearray:
    """PKCS#8, DER. Raises ``Malformed``."""
    if bits not in RSA_BITS:
        raise Malformed("an import key has 3072 or 4096 bits")
    return engine_keys.encode(rsa.generate_private_key(65537, bits))


def public_half(private: bytearray) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    key = serialization.load_der_private_key(private, None, unsafe_skip_rsa_key_validation=True)
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def seal_token(wrapping: bytearray, consumer: ConsumerId, token: ImportToken, private: bytearray) -> ImportToken:
    """The token with the import key in it, under the CMK: any card of the consumer opens it, and none reads it after its time."""
    key = _token_key(wrapping)
    try:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return msgspec.structs.replace(token, sealed=nonce + AESGCM(key).encrypt(nonce, private, _data(consumer, token)))
    finally:
        wipe(key)


def open_token(wrapping: bytearray, consumer: ConsumerId, token: ImportToken) -> bytearray:
    """The import key. Raises ``ImportTokenInvalid``."""
    key, size = _token_key(wrapping), len(token.sealed) - NONCE_BYTES - 16
    if size < 1:
        raise ImportTokenInvalid("the import token is cut")
    private = bytearray(size)
    try:
        AESGCM(key).decrypt_into(token.sealed[:NONCE_BYTES], token.sealed[NONCE_BYTES:], _data(consumer, token), private)
    except InvalidTag as exc:
        raise ImportTokenInvalid("the import token is not one of this consumer's cards, or was changed") from exc
    finally:
        wipe(key)
    return private


def _token_key(wrapping: bytearray) -> bytearray:
    return derive(wrapping, salt=b"", info=b"cipherfleet import token v1", length=32)


def _terms(token: ImportToken) -> tuple[object, ...]:
    return (token.key, token.algorithm, token.bare, token.expires_at)


def _data(consumer: ConsumerId, token: ImportToken) -> bytes:
    return codec.encode(["cipherfleet import token v1", consumer, *_terms(token)])


def unwrap(private: bytearray, wrapped: bytes) -> bytes:
    """What came wrapped to an import key; wipes ``private``. Raises ``KeyMaterialInvalid``."""
    try:
        key = serialization.load_der_private_key(private, None, unsafe_skip_rsa_key_validation=True)
        assert isinstance(key, rsa.RSAPrivateKey)  # noqa: S101 - the card made it
        size = key.key_size // 8
        first = key.decrypt(wrapped[:size], OAEP)
        if len(wrapped) == size:
            return first
        try:
            if len(first) not in (16, 24, 32):
                raise ValueError
            return keywrap.aes_key_unwrap_with_padding(first, wrapped[size:])
        finally:
            wipe(first)
    except (ValueError, keywrap.InvalidUnwrap) as exc:
        raise KeyMaterialInvalid("the material does not open with this import key", "wrap it to the key that came with the token") from exc
    finally:
        wipe(private)


def wrap_to(public_key: bytes, key: Key) -> bytearray:
    """``CKM_RSA_AES_KEY_WRAP`` of a key's material to an RSA key of 2048 bits or more. Raises ``PublicKeyInvalid`` or ``Unsupported``."""
    try:
        public = serialization.load_der_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise PublicKeyInvalid("this is no public key", "give SubjectPublicKeyInfo") from exc
    if not isinstance(public, rsa.RSAPublicKey) or public.key_size < 2048 or public.public_numbers().e < engine_keys.MIN_RSA_EXPONENT:
        raise PublicKeyInvalid("keys are exported to RSA keys of 2048 bits or more, exponent 65537 or more")
    material, fresh = _material(key), bytearray(secrets.token_bytes(32))
    try:
        return bytearray(public.encrypt(bytes(fresh), OAEP) + keywrap.aes_key_wrap_with_padding(bytes(fresh), bytes(material)))
    finally:
        wipe(fresh)
        wipe(material)


def wrap_under(wrapping: Key, key: Key) -> bytearray:
    """RFC 5649 under a key of AES-256-KWP. Raises ``WrongKeyType`` or ``Unsupported``."""
    wrapping.require(Kind.KEY_WRAP)
    if wrapping.algorithm.name != "AES-256-KWP":
        raise WrongKeyType(f"keys are exported under AES-256-KWP, not {wrapping.algorithm.name}")
    material = _material(key)
    try:
        return bytearray(keywrap.aes_key_wrap_with_padding(bytes(wrapping.secret), bytes(material)))
    finally:
        wipe(material)


def _material(key: Key) -> bytearray:
    """As it can be imported again: raw bytes, or PKCS#8 DER."""
    if key.algorithm.secret_key:
        return bytearray(key.secret)
    if key.private is None or isinstance(key.private, engine_keys.Hybrid) or key.algorithm.family == engine_keys.SM2:
        raise Unsupported(f"private keys of {key.algorithm.name} have no standard form to be exported in")
    return engine_keys.encode(key.private)  # type: ignore[arg-type]
