"""The HSM as the KMC sees it: handles, and only what a PKCS#11 token can do.

Everything asymmetric is P-256; the AES keys wrap and never encrypt data. No method gives a secret in the clear: what is
generated wrapped is unwrapped again only inside, on its way to the next wrapping.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NewType, Protocol

from msgspec import Meta

from cipherfleet.contract.errors import Exists

SECRET_BYTES = 32
WRAPPED_SECRET_BYTES = 40  # RFC 5649: 32 bytes and one semiblock
MAX_SIGN_BYTES = 32 * 1024
LABEL = r"\A[a-z0-9][a-z0-9/-]{0,62}\Z"

if TYPE_CHECKING:
    KeyHandle = NewType("KeyHandle", str)
    Label = NewType("Label", str)
else:
    KeyHandle = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    Label = Annotated[str, Meta(pattern=LABEL)]


class Mechanism(StrEnum):
    """What a token may offer, by the names of PKCS#11 3.1."""

    EC_KEY_PAIR_GEN = "CKM_EC_KEY_PAIR_GEN"
    ECDSA_SHA256 = "CKM_ECDSA_SHA256"
    AES_KEY_GEN = "CKM_AES_KEY_GEN"
    AES_KEY_WRAP_KWP = "CKM_AES_KEY_WRAP_KWP"
    RSA_OAEP_SHA256 = "CKM_RSA_PKCS_OAEP/SHA256"


class Hsm(Protocol):
    """One token. Every method raises ``HsmUnavailable`` when it cannot be reached.

    A handle stands for one key as long as the key exists (PKCS#11: its ``CKA_ID``), also after the token was restarted.
    An unknown or unfit handle is ``KeyUnknown``.
    """

    async def mechanisms(self) -> frozenset[Mechanism]: ...

    async def generate_key_pair(self, label: Label) -> KeyHandle:
        """A new P-256 key pair, stored before this returns. Raises ``Exists`` when the label is taken."""
        ...

    async def generate_wrap_key(self, label: Label) -> KeyHandle:
        """A new AES-256 key that only wraps. Raises ``Exists``."""
        ...

    async def find(self, label: Label) -> KeyHandle | None: ...

    async def public_key(self, handle: KeyHandle) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        ...

    async def sign(self, handle: KeyHandle, data: bytes) -> bytes:
        """ECDSA with SHA-256 over ``data`` (at most ``MAX_SIGN_BYTES``), DER."""
        ...

    async def generate_wrapped(self, handle: KeyHandle) -> bytes:
        """A fresh 32-byte secret that exists only like this: AES-KWP (RFC 5649) under the wrap key."""
        ...

    async def rewrap(self, handle: KeyHandle, wrapped: bytes, recipient: bytes) -> bytes:
        """Such a secret, wrapped anew by RSA-OAEP (SHA-256, MGF1-SHA-256, no label) for ``recipient`` (SPKI, DER).

        Raises ``CmkInvalid`` when ``wrapped`` was not wrapped under this key, ``Unsupported`` for a recipient that is not RSA-3072 or more.
        """
        ...

    async def destroy(self, handle: KeyHandle) -> None:
        """Idempotent."""
        ...


async def ensure_key_pair(hsm: Hsm, label: Label) -> KeyHandle:
    """The key pair called ``label``, made if it is not there (also when an earlier reply got lost)."""
    found = await hsm.find(label)
    if found is not None:
        return found
    try:
        return await hsm.generate_key_pair(label)
    except Exists:
        return await _there(hsm, label)


async def ensure_wrap_key(hsm: Hsm, label: Label) -> KeyHandle:
    """The wrap key called ``label``, made if it is not there."""
    found = await hsm.find(label)
    if found is not None:
        return found
    try:
        return await hsm.generate_wrap_key(label)
    except Exists:
        return await _there(hsm, label)


async def _there(hsm: Hsm, label: Label) -> KeyHandle:
    found = await hsm.find(label)
    if found is None:
        raise Exists(f"the HSM's key {label} was made and removed meanwhile")
    return found
