"""What network components and middleware say to each other beyond ``contract.vcm_api``: headers, limits and a few messages."""

import base64
import binascii
from typing import Annotated

from msgspec import Meta

from cipherfleet.contract.algorithms import Algorithm
from cipherfleet.contract.errors import ErrorBody, Malformed, TooLarge
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.messages import Message

CONTEXT = "X-Cipherfleet-Context"
TARGET_CONTEXT = "X-Cipherfleet-Target-Context"
SIGNATURE = "X-Cipherfleet-Signature"
KEY = "X-Cipherfleet-Key"
KEY_VERSION = "X-Cipherfleet-Key-Version"
ALGORITHM = "X-Cipherfleet-Algorithm"
REQUEST = "X-Cipherfleet-Request"
"""The caller's name for a request (32 hex digits). When the answer breaks off, ``GET /v1/requests/{request}/error`` says why."""

MAX_CONTEXT_BYTES = 4 * 1024
MAX_SIGNATURE_BYTES = 4 * 1024
MAX_RANDOM_BYTES = 1024 * 1024
MAX_JSON_BYTES = 256 * 1024
MAX_LABEL_CHARACTERS = 256

RequestId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class DataKeyAsk(Message, frozen=True):
    """``length``: 16 to 64 bytes. Without ``plaintext`` only the encrypted data key is returned."""

    length: int = 32
    plaintext: bool = True


class AlgorithmsReply(Message, frozen=True):
    algorithms: tuple[Algorithm, ...]


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
