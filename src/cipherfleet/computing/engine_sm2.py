"""SM2 (GB/T 32918) through the system's libcrypto: what the engine asks of it. Not there yet: every call says so."""

from typing import NoReturn, Protocol

from cipherfleet.computing.engine_memory import Data
from cipherfleet.contract.errors import Unsupported


class Scheme(Protocol):
    """One signature: ``update`` takes the message, ``sign`` or ``verify`` ends it. ``held``: bytes that wait in memory (0)."""

    held: int

    def update(self, data: Data) -> None: ...

    def sign(self) -> bytes: ...

    def verify(self, signature: bytes) -> None:
        """Raises ``SignatureInvalid``."""
        ...


class PrivateKey:
    """From PKCS#8 DER that ``generate`` or ``check`` gave. Raises ``KeyMaterialInvalid``."""

    def __init__(self, material: bytes) -> None:
        _missing()

    def public_bytes(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        _missing()

    def encrypt(self, data: Data) -> bytes:
        """GB/T 32918.4, C1C3C2 in DER."""
        _missing()

    def decrypt(self, data: Data) -> bytearray:
        """Raises ``CiphertextInvalid``."""
        _missing()

    def scheme(self, user_id: bytes, *, prehashed: bool) -> Scheme:
        """With SM3 and the signer's id (empty: the usual one); ``prehashed``: the 32 bytes of SM3(Z || message) come in instead."""
        _missing()


def generate() -> bytearray:
    """A fresh private key, PKCS#8 DER."""
    _missing()


def check(material: bytes) -> bytearray:
    """A private key from outside, as ``generate`` would give it. Raises ``KeyMaterialInvalid``."""
    _missing()


def _missing() -> NoReturn:
    raise Unsupported("SM2 is not there yet")
