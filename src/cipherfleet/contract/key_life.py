"""The life of a key (NIST SP 800-57 part 1, section 7): what may be asked of it when. Values and pure decisions.

A key may be *prepared* (its time has not come), active, disabled, scheduled for deletion, deleted. *Protecting* is making something new
with it (encrypting, signing, a MAC), *processing* is reading or checking what it made.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from cipherfleet.contract.errors import (
    KeyDeleted,
    KeyDisabled,
    KeyExpired,
    KeyNotYetValid,
    KeyPendingDeletion,
    KeyUsesSpent,
    KeyVersionTrimmed,
    LimitReached,
    Malformed,
    TooLarge,
)
from cipherfleet.contract.escrow import KeyAttributes, KeyState, is_destroyed
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.messages import Message

ALIAS_PREFIX = "alias/"
DUE = "due:"
"""It finds keys that are to be destroyed or rotated some day by this one."""
MIN_ROTATION_S = 1.0
TAG = "tag:"
"""Before NAME=VALUE: the KMC's index finds keys with that tag by it."""
ALIASED = "alias:"
"""The KMC's index finds keys that have an alias by this word."""
MAX_LABEL_CHARACTERS = 256
MAX_TAG_NAME_CHARACTERS, MAX_TAG_CHARACTERS = 128, 256
MAX_TAG_BYTES = 3 * 1024
"""Of all tags of a key, as JSON: attributes travel whole."""
MAX_ALIAS_BYTES = 3 * 1024
MAX_TAGS = 50
"""Of a key, whatever the settings say."""
NO_TAGS: Mapping[str, str] = MappingProxyType({})
DAY_S = 86400.0

_ALIAS_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9/_.-]{0,126}[A-Za-z0-9_])?")


class KeyUpdate(Message, frozen=True):
    """What to change of a key; what is ``None`` stays. ``tags`` are added or replaced by name, ``untag`` names those to remove."""

    label: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    untag: tuple[str, ...] = ()
    not_before: float | None = None
    not_after: float | None = None
    rotation_s: float | None = None
    rotation_uses: int | None = None
    max_uses: int | None = None


def tag_term(name: str, value: str) -> str:
    """What a key with this tag is found by."""
    return f"{TAG}{name}={value}"


def terms_of(attributes: KeyAttributes) -> frozenset[str]:
    """What the KMC's index finds a key by beside its columns, as whole words: ``KIND:VALUE``."""
    tags = {tag_term(name, value) for name, value in attributes.tags.items()}
    terms, state = attributes.terms, attributes.state
    due = state is KeyState.PENDING_DELETION or (state is KeyState.ENABLED and bool(terms.rotation_s or terms.rotation_uses))
    return frozenset(tags | ({ALIASED} if attributes.aliases else set()) | ({DUE} if due else set()))


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
    """That a key may process. Raises ``KeyDisabled``, ``KeyNotYetValid`` or what ``require_alive`` raises."""
    require_alive(key, attributes, now)
    if attributes.state is KeyState.DISABLED:
        raise KeyDisabled(f"key {key} is disabled")
    if now < attributes.terms.not_before:
        raise KeyNotYetValid(f"the time of key {key} has not come")


def require_protecting(key: KeyId, attributes: KeyAttributes, now: float) -> None:
    """That a key may protect. Raises ``KeyExpired`` or what ``require_usable`` raises."""
    require_usable(key, attributes, now)
    if attributes.terms.not_after and now >= attributes.terms.not_after:
        raise KeyExpired(f"key {key} has expired")


def reserved(key: KeyId, attributes: KeyAttributes, wanted: int, block: int) -> KeyAttributes:
    """With ``block`` more uses reserved, or as many as are left if that is enough. Raises ``KeyUsesSpent``."""
    most = attributes.terms.max_uses
    more = max(block, wanted) if not most else min(max(block, wanted), most - attributes.used)
    if more < wanted:
        raise KeyUsesSpent(f"key {key} may protect {most} times, and that is reserved")
    return msgspec.structs.replace(attributes, used=attributes.used + more, version_used=attributes.version_used + more)


def next_rotation(attributes: KeyAttributes) -> float | None:
    """When a key is to be rotated by its period, unix seconds."""
    if not attributes.terms.rotation_s or attributes.state is not KeyState.ENABLED:
        return None
    return (attributes.rotated_at or attributes.created_at) + attributes.terms.rotation_s


def uses_due(attributes: KeyAttributes) -> bool:
    """Whether the current version was used as often as it is to be."""
    return 0 < attributes.terms.rotation_uses <= attributes.version_used


def rotation_due(attributes: KeyAttributes, now: float) -> bool:
    terms, due = attributes.terms, next_rotation(attributes)
    if attributes.state is not KeyState.ENABLED or now < terms.not_before or (terms.not_after and now >= terms.not_after):
        return False
    return uses_due(attributes) or (due is not None and now >= due)


def deletion_due(attributes: KeyAttributes, now: float) -> bool:
    return attributes.state is KeyState.PENDING_DELETION and now >= attributes.delete_at


def check_terms(terms: KeyTerms) -> KeyTerms:
    """Raises ``Malformed``."""
    numbers = (terms.not_before, terms.not_after, terms.rotation_s, terms.rotation_uses, terms.max_uses)
    if not all(0 <= number < 2**53 for number in numbers):
        raise Malformed("a key's terms are not negative, nor out of all bounds")
    if terms.not_after and terms.not_after <= terms.not_before:
        raise Malformed("a key expires after it begins")
    if 0 < terms.rotation_s < MIN_ROTATION_S:
        raise Malformed(f"a key is rotated every {MIN_ROTATION_S:g} s at most")
    return terms


def rotated(attributes: KeyAttributes, now: float) -> KeyAttributes:
    """With one version more, which is the current one."""
    version, revision = attributes.current_version + 1, attributes.revision + 1
    return msgspec.structs.replace(attributes, current_version=version, revision=revision, rotated_at=now, version_used=0)


def trimmed(key: KeyId, attributes: KeyAttributes, before: int, now: float) -> KeyAttributes | None:
    """Without the versions below ``before``, of which the current one is none. Raises ``Malformed`` or what ``require_alive`` raises."""
    require_alive(key, attributes, now)
    if not 1 <= before <= attributes.current_version:
        raise Malformed(f"versions of key {key} are trimmed up to the current one, {attributes.current_version}, which stays")
    return msgspec.structs.replace(attributes, oldest_version=before) if before > attributes.oldest_version else None


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
    asked = {name: getattr(change, name) for name in ("not_before", "not_after", "rotation_s", "rotation_uses", "max_uses")}
    terms = msgspec.structs.replace(attributes.terms, **{name: value for name, value in asked.items() if value is not None})
    return msgspec.structs.replace(attributes, label=label, tags=check_tags(tags, most_tags), terms=check_terms(terms))


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
