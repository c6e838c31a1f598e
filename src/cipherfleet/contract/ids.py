"""The kinds of identifier, each a type of its own so that two cannot be swapped.

For the type checker every id is a distinct ``NewType`` of ``str``; at run time the same name carries the pattern that
``msgspec`` enforces when a message is decoded, so an id that arrived over a channel is already well formed (and safe
to use as a file name).
"""

import hashlib
import re
import secrets
from typing import TYPE_CHECKING, Annotated, NewType

from msgspec import Meta

SLUG = r"\A[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?\Z"

if TYPE_CHECKING:
    ConsumerId = NewType("ConsumerId", str)
    ApplicationName = NewType("ApplicationName", str)
    MachineId = NewType("MachineId", str)
    CardId = NewType("CardId", str)
    VcmId = NewType("VcmId", str)
    KeyId = NewType("KeyId", str)
    TokenId = NewType("TokenId", str)
    UkeyId = NewType("UkeyId", str)
    Serial = NewType("Serial", str)
else:
    ConsumerId = Annotated[str, Meta(pattern=SLUG)]
    ApplicationName = Annotated[str, Meta(pattern=SLUG)]
    MachineId = Annotated[str, Meta(pattern=r"\Am[0-9]{1,4}\Z")]
    CardId = Annotated[str, Meta(pattern=r"\Acard-m[0-9]{1,4}-[0-9a-f]{8}\Z")]
    VcmId = Annotated[str, Meta(pattern=r"\Avcm-[0-9a-f]{12}\Z")]
    KeyId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    UkeyId = Annotated[str, Meta(pattern=r"\Aukey-[0-9a-f]{8}\Z")]
    TokenId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    Serial = Annotated[str, Meta(pattern=r"\A[0-9a-f]{1,40}\Z")]


def is_slug(name: str) -> bool:
    """Whether ``name`` may name a consumer or an application: 1 to 32 of ``a-z 0-9 -``, no dash at an end."""
    return re.match(SLUG, name) is not None


def new_vcm_id() -> VcmId:
    return VcmId(f"vcm-{secrets.token_hex(6)}")


def new_card_id(machine: MachineId) -> CardId:
    """A card's id is new at every start of the card, as its transport keys are."""
    return CardId(f"card-{machine}-{secrets.token_hex(4)}")


def new_key_id() -> KeyId:
    return KeyId(secrets.token_hex(16))


def new_token_id() -> TokenId:
    return TokenId(secrets.token_hex(8))


def token_id_of(nonce: bytes) -> TokenId:
    """The token id that belongs to an identity challenge: a token whose reply got lost can still be revoked by its name."""
    return TokenId(hashlib.sha256(b"cipherfleet token id v1" + nonce).hexdigest()[:16])
