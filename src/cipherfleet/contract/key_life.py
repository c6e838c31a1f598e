"""The life of a key (NIST SP 800-57 part 1, section 7): what may be asked of it when. Values and pure decisions.

A key may be *prepared* (its time has not come), active, disabled, scheduled for deletion, deleted. *Protecting* is making something new
with it (encrypting, signing, a MAC), *processing* is reading or checking what it made.
"""

import re

import msgspec

from cipherfleet.contract.errors import (
    KeyDeleted,
    KeyDisabled,
    KeyPendingDeletion,
    KeyVersionTrimmed,
    LimitReached,
    Malformed,
    TooLarge,
)
from cipherfleet.contract.escrow import KeyAttributes, KeyState, is_destroyed
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.messages import Message

ALIAS_PREFIX = "alias/"
ALIASED = "alias:"
"""The KMC's index finds keys that have an alias by this word."""
MAX_LABEL_CHARACTERS = 256
MAX_TAG_NAME_CHARACTERS, MAX_TAG_CHARACTERS = 128, 256
MAX_TAG_BYTES = 3 * 1024
"""Of all tags of a key, as JSON: attributes travel whole."""
MAX_ALIAS_BYTES = 3 * 1024
DAY_S = 86400.0

_ALIAS_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9/_.-]{0,126}[A-Za-z0-9_])?")


class KeyUpdate(Message, frozen=True):
    """What to change of a key; what is ``None`` stays. ``tags`` are added or replaced by name, ``untag`` names those to remove."""

    label: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    untag: tuple[str, ...] = ()


def terms_of(attributes: KeyAttributes) -> frozenset[str]:
    """What the KMC's index finds a key by beside its columns, as whole words: ``KIND:VALUE``."""
    tags = {f"tag:{name}={value}" for name, value in attributes.tags.items()}
    return frozenset(tags | ({ALIASED} if attributes.aliases else set()))


def require_there(key: KeyId, attributes: KeyAttributes, now: float) -> None:
    """That a key is not gone, nor past its time. Raises ``KeyDeleted``."""
    if is_over(attributes, now):
        raise KeyDeleted(f"key {key} is deleted")


def require_alive(key: KeyId, attributes: KeyAttributes, now: float) -> None:
    """That a key may still be changed. Raises ``KeyDeleted`` or ``KeyPendingDeletion``."""
    require_there(key, attributes, now)
    if attributes.state is KeyState.PENDING_DELETION:
        raise KeyPendingDeletion(f"key {key} is scheduled for deletion")


def require_usable(key: KeyId, attributes: KeyAttributes, now: float) -> None:
    """That a key may process. Raises ``KeyDisabled`` or what ``require_alive`` raises."""
    require_alive(key, attributes, now)
    if attributes.state is KeyState.DISABLED:
        raise KeyDisabled(f"key {key} is disabled")


def require_version(key: KeyId, attributes: KeyAttributes, version: int) -> None:
    """Raises ``KeyVersionTrimmed``."""
    if version > 0 and is_destroyed(attributes, version):
        raise KeyVersionTrimmed(f"version {version} of key {key} was trimmed: its material is destroyed")


def is_over(attributes: KeyAttributes, now: float) -> bool:
    """Whether a key is deleted, or its waiting time is over, even where nobody has destroyed it yet."""
    return attributes.state is KeyState.DELETED or (attributes.state is KeyState.PENDING_DELETION and now >= attributes.delete_at)


def updated(attributes: KeyAttributes, change: KeyUpdate, *, most_tags: int) -> KeyAttributes:
    """The attributes after ``change``. Raises ``Malformed``, ``TooLarge`` or ``LimitReached``."""
    label = attributes.label if change.label is None else check_label(change.label)
    tags = {name: value for name, value in attributes.tags.items() if name not in change.untag} | change.tags
    return msgspec.structs.replace(attributes, label=label, tags=check_tags(tags, most_tags))


def check_label(label: str) -> str:
    """Raises ``Malformed``."""
    if len(label) > MAX_LABEL_CHARACTERS or not label.isprintable():
        raise Malformed(f"a label has at most {MAX_LABEL_CHARACTERS} characters, all printable")
    return label


def check_tags(tags: dict[str, str], most: int) -> dict[str, str]:
    """Raises ``Malformed``, ``TooLarge`` or ``LimitReached``."""
    for name, value in tags.items():
        if not 1 <= len(name) <= MAX_TAG_NAME_CHARACTERS or len(value) > MAX_TAG_CHARACTERS or not (name + value).isprintable():
            raise Malformed(
                f"a tag's name has 1 to {MAX_TAG_NAME_CHARACTERS} characters, its value at most {MAX_TAG_CHARACTERS}, all printable"
            )
    if len(tags) > most:
        raise LimitReached(f"a key has at most {most} tags")
    if len(msgspec.json.encode(tags)) > MAX_TAG_BYTES:
        raise TooLarge(f"the tags of a key have at most {MAX_TAG_BYTES} bytes together")
    return tags


def check_alias(name: str) -> str:
    """An alias' name, without ``alias/``. Raises ``Malformed``."""
    if _ALIAS_NAME.fullmatch(name) is None or name.startswith(ALIAS_PREFIX):
        raise Malformed("an alias is called by 1 to 128 of a-z A-Z 0-9 / _ . -, and begins with a letter or digit")
    return name


def with_alias(attributes: KeyAttributes, name: str, *, most: int) -> KeyAttributes:
    """Raises ``LimitReached``."""
    aliases = (*attributes.aliases, name)
    if len(aliases) > most or len(msgspec.json.encode(aliases)) > MAX_ALIAS_BYTES:
        raise LimitReached(f"a key has at most {most} aliases, of {MAX_ALIAS_BYTES} bytes together")
    return msgspec.structs.replace(attributes, aliases=aliases)


def without_alias(attributes: KeyAttributes, name: str) -> KeyAttributes:
    return msgspec.structs.replace(attributes, aliases=tuple(a for a in attributes.aliases if a != name))


def scheduled(attributes: KeyAttributes, delete_at: float) -> KeyAttributes:
    return msgspec.structs.replace(attributes, state=KeyState.PENDING_DELETION, delete_at=delete_at)


def destroyed(attributes: KeyAttributes, now: float) -> KeyAttributes:
    """Its names are free again; what it was is still shown."""
    return msgspec.structs.replace(attributes, state=KeyState.DELETED, delete_at=now, aliases=())


def cancelled(attributes: KeyAttributes) -> KeyAttributes:
    """It comes back disabled, as at AWS: whoever wants it enables it."""
    return msgspec.structs.replace(attributes, state=KeyState.DISABLED, delete_at=0.0)
