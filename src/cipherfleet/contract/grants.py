"""Grants: what an application may do with which keys, until when, in which contexts and how often. Pure decisions.

They stand in the application's statement, which the Ukey signed, beside its rights, which are good for every key of the domain.
"""

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated

import msgspec
from msgspec import Meta

from cipherfleet.contract.errors import ContextNotGranted, DelegationTooWide, GrantExpired, Malformed, NotPermitted, RateLimited
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.rights import Right

MAX_GRANTS = 64
MAX_GRANT_KEYS = 256
MAX_DELEGATED = 8

PER_KEY = (Right.SHOW, Right.MANAGE, Right.ENCRYPT, Right.DECRYPT, Right.SIGN, Right.VERIFY, Right.MAC, Right.DERIVE)
"""What is done with a key: all else is a right in the domain."""
WITH_CONTEXT = (Right.ENCRYPT, Right.DECRYPT, Right.SIGN, Right.VERIFY, Right.DERIVE)


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``keys`` by id and ``labels`` by pattern, either is enough; without both it is every key. All that is set must hold.

    ``context``: what an operation's context must be. ``context_pairs``: the context is a JSON object of strings that has these.
    ``rate``: operations per second at each VCM, with as many at once, one at least; 0 is any number. ``delegate``: who has the grant
    is administrator of what it names, and may delegate it to other applications, within it.
    """

    operations: Annotated[tuple[Right, ...], Meta(min_length=1, max_length=len(PER_KEY))]
    keys: Annotated[tuple[KeyId, ...], Meta(max_length=MAX_GRANT_KEYS)] = ()
    labels: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=MAX_GRANTS)] = ()
    not_after: Annotated[int, Meta(ge=0)] = 0  # unix seconds; 0: as long as the statement
    context: bytes | None = None
    context_pairs: Annotated[dict[str, str], Meta(max_length=MAX_GRANTS)] = {}
    rate: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    delegate: bool = False

    @property
    def every_key(self) -> bool:
        return not self.keys and not self.labels


def check_grants(grants: Sequence[Grant]) -> None:
    """That each says what can be held to. Raises ``Malformed``."""
    if len(grants) > MAX_GRANTS:
        raise Malformed(f"an application has at most {MAX_GRANTS} grants")
    for grant in grants:
        wrong = [right for right in grant.operations if right not in PER_KEY]
        if wrong or len(set(grant.operations)) != len(grant.operations):
            raise Malformed(f"a grant names each of these once: {', '.join(PER_KEY)}", "give other rights to the application as a whole")
        bound = grant.context is not None or bool(grant.context_pairs)
        without = [right for right in grant.operations if right not in WITH_CONTEXT]
        if bound and without:
            raise Malformed(f"there is no context to {without[0]} in", f"a grant with a context is to: {', '.join(WITH_CONTEXT)}")


def check_delegated(grants: Sequence[Grant], key: KeyId) -> None:
    """That these can be delegated at all: each names ``key`` alone, and none can be delegated once more. Raises ``Malformed``."""
    if not 1 <= len(grants) <= MAX_DELEGATED:
        raise Malformed(f"a delegation has 1 to {MAX_DELEGATED} grants")
    check_grants(grants)
    if any(grant.keys != (key,) or grant.labels for grant in grants):
        raise Malformed("what is delegated names one key by its id, and no label")
    if any(grant.delegate for grant in grants):
        raise Malformed("what is delegated cannot be delegated further", "the consumer makes an administrator with: cipherfleet app grant")


def check_within(given: Grant, own: Grant, key: KeyId, label: str) -> None:
    """That whatever ``given`` permits with ``key``, whose label is ``label``, ``own`` permits as well, and lets be delegated.

    Raises ``DelegationTooWide``, which names the first thing that is wider.
    """
    if not own.delegate:
        raise DelegationTooWide("the grant is not one to delegate", "the consumer lets it be with: cipherfleet app grant")
    if given.delegate:
        raise DelegationTooWide("what is delegated cannot be delegated further")
    if given.keys != (key,) or given.labels or not names(own, key, label):
        raise DelegationTooWide(f"the grant is not for key {key}")
    wider = [right for right in given.operations if right not in own.operations]
    if wider:
        raise DelegationTooWide(f"the grant is not to {', '.join(wider)} with key {key}")
    if own.not_after and not 0 < given.not_after <= own.not_after:
        raise DelegationTooWide(f"the grant for key {key} ends at {own.not_after}, what is delegated has to end by then")
    if own.rate and not 0 < given.rate <= own.rate:
        raise DelegationTooWide(f"the grant for key {key} allows {own.rate:g} operations per second, what is delegated has to name as few")
    if given.context is not None:
        if not _fits(own, given.context):
            raise DelegationTooWide(f"the grant for key {key} is for another context")
    elif own.context is not None or not own.context_pairs.items() <= given.context_pairs.items():
        raise DelegationTooWide(f"the grant for key {key} is bound to a context, what is delegated has to be bound to it as well")


def administrator(grants: Sequence[Grant], given: Grant, key: KeyId, label: str) -> int:
    """Which of a delegator's ``grants`` holds all of ``given``: its number. Two that hold it together are not enough.

    Raises ``DelegationTooWide``: what was wrong with the one that came nearest, or that there is none.
    """
    refused = DelegationTooWide(f"there is no grant to delegate for key {key}", "the consumer makes one with: cipherfleet app grant")
    for number, own in enumerate(grants):
        try:
            check_within(given, own, key, label)
        except DelegationTooWide as exc:
            if own.delegate and names(own, key, label):
                refused = exc
        else:
            return number
    raise refused


def decide(grants: Sequence[Grant], right: Right, key: KeyId, label: str, context: bytes, now: float, take: Callable[[int], float]) -> None:
    """That one of ``grants`` permits it. ``take(n)`` spends an operation of grant ``n``: 0.0, or the seconds until there is one.

    Raises ``NotPermitted``, or of a grant that would have been the one: ``GrantExpired``, ``ContextNotGranted``, ``RateLimited``.
    """
    refused: GrantExpired | ContextNotGranted | RateLimited | None = None
    for number, grant in enumerate(grants):
        if right not in grant.operations or not names(grant, key, label):
            continue
        if grant.not_after and grant.not_after <= now:
            refused = refused or GrantExpired(f"the grant to {right} with key {key} has expired")
        elif not _fits(grant, context):
            refused = ContextNotGranted(f"the grant to {right} with key {key} is for another context")
        elif wait_s := take(number):
            refused = RateLimited(f"the grant to {right} with key {key} allows {grant.rate:g} operations per second", wait_s=wait_s)
        else:
            return
    if refused is not None:
        raise refused
    raise NotPermitted(f"it may not {right} with key {key}", "the consumer grants it with: cipherfleet app grant")


def names(grant: Grant, key: KeyId, label: str) -> bool:
    """Whether a grant is for a key."""
    return grant.every_key or key in grant.keys or any(fnmatchcase(label, pattern) for pattern in grant.labels)


def _fits(grant: Grant, context: bytes) -> bool:
    if grant.context is not None and context != grant.context:
        return False
    if not grant.context_pairs:
        return True
    try:
        told = json.loads(context, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and all(told.get(name) == value for name, value in grant.context_pairs.items())


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """No name twice: who reads the first and who reads the last must not differ."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made


class Rates:
    """How much of each grant was used: one bucket for each, of ``rate`` operations, one at least."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[int, tuple[float, float]] = {}

    def take(self, number: int, rate: float) -> float:
        """Spend one operation: 0.0, or the seconds until there is one."""
        if not rate:
            return 0.0
        now, most = self._clock(), max(1.0, rate)
        left, at = self._buckets.get(number, (most, now))
        left = min(most, left + (now - at) * rate)
        if left < 1.0:
            self._buckets[number] = left, now
            return (1.0 - left) / rate
        self._buckets[number] = left - 1.0, now
        return 0.0
