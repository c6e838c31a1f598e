"""What network components and middleware say to each other beyond ``contract.vcm_api``: headers, limits and a few messages."""

import base64
import binascii
from typing import Annotated

from msgspec import Meta, field

from cipherfleet.contract import key_life
from cipherfleet.contract.algorithms import Algorithm
from cipherfleet.contract.errors import ErrorBody, Malformed, TooLarge
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.messages import Message
from cipherfleet.contract.vcc import Verb

CONTEXT = "X-Cipherfleet-Context"
TARGET_CONTEXT = "X-Cipherfleet-Target-Context"
SIGNATURE = "X-Cipherfleet-Signature"
KEY = "X-Cipherfleet-Key"
KEY_VERSION = "X-Cipherfleet-Key-Version"
ALGORITHM = "X-Cipherfleet-Algorithm"
DIGEST = "X-Cipherfleet-Digest"
"""One of the digests that the key's algorithm allows (signatures, RSA-OAEP)."""
PREHASHED = "X-Cipherfleet-Prehashed"
"""``true``: the message is its digest already."""
REQUEST = "X-Cipherfleet-Request"
"""The caller's name for a request (32 hex digits). When the answer breaks off, ``GET /v1/requests/{request}/error`` says why."""

MAX_CONTEXT_BYTES = 4 * 1024
MAX_SIGNATURE_BYTES = 5 * 1024
MAX_RANDOM_BYTES = 1024 * 1024
MAX_DIGEST_BYTES = 4096
MAX_JSON_BYTES = 256 * 1024
MAX_BATCH_BYTES = 8 * 1024 * 1024
MAX_LABEL_CHARACTERS = key_life.MAX_LABEL_CHARACTERS

RequestId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class DataKeyAsk(Message, frozen=True):
    """``length``: 16 to 64 bytes. Without ``plaintext`` only the encrypted data key is returned."""

    length: int = 32
    plaintext: bool = True


class AgreeAsk(Message, frozen=True):
    """``peer``: the other side's public key, SubjectPublicKeyInfo DER. ``length`` 0: the shared secret itself, else HKDF-SHA-256 of it."""

    peer: bytes
    length: int = 0
    salt: bytes = b""
    context: bytes = b""


class DeriveAsk(Message, frozen=True):
    """HKDF's parameters; ``context`` is its info."""

    length: int
    salt: bytes = b""
    context: bytes = b""


class DecapsulateAsk(Message, frozen=True):
    ciphertext: bytes


class BatchAskItem(Message, frozen=True, omit_defaults=True):
    """One operation of a batch. Decrypting a message of ours, ``key`` may be left out; re-encrypting, it is the new key."""

    operation: Verb
    key: str = ""
    version: int | None = None
    data: bytes = b""
    context: bytes = b""
    target_context: bytes = b""
    signature: bytes = b""
    digest: str = ""
    prehashed: bool = False
    length: int = 0
    salt: bytes = b""
    peer: bytes = b""


class BatchAsk(Message, frozen=True):
    """1 to 1,000 items."""

    items: tuple[BatchAskItem, ...]


class BatchReplyItem(Message, frozen=True, omit_defaults=True):
    """The item's result, empty for a check that held; or why there is none."""

    result: bytes = b""
    key: str = ""
    version: int = 0
    error: ErrorBody | None = None


class BatchReply(Message, frozen=True):
    items: tuple[BatchReplyItem, ...]


class AlgorithmsReply(Message, frozen=True):
    """``refused``: what the consumer's policy does not allow for new data, each with the rule."""

    algorithms: tuple[Algorithm, ...]
    policy: str = ""
    refused: dict[str, str] = field(default_factory=dict)


class HealthReply(Message, frozen=True):
    vcm: VcmId
    consumer: ConsumerId
    card: CardId
    serving: bool


class RequestError(Message, frozen=True):
    """Why a request of this caller broke off; nothing when it did not, or too long ago."""

    error: ErrorBody | None


def to_header(value: bytes) -> str:
    return base64.b64encode(value).decode()


def from_header(name: str, value: str, limit: int) -> bytes:
    """The bytes of a base64 header. Raises ``Malformed`` or ``TooLarge`` (``limit`` is in bytes, decoded)."""
    try:
        decoded = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Malformed(f"the header {name} is not base64") from exc
    if len(decoded) > limit:
        raise TooLarge(f"{name} has {len(decoded)} bytes, {limit} are allowed")
    return decoded
