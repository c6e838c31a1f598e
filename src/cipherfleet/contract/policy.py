"""Policy profiles: which algorithms, strengths, uses and key periods a consumer permits itself. Pure decisions.

A policy lives on the consumer's Ukey and reaches each card in every lease, signed by the Ukey, so nobody else can change it,
withhold it or set it back, and a change is in force with the next heartbeat. The *card* enforces it. Each refusal names the rule.

SP 800-57 part 1 (uses, periods, strengths), SP 800-131A (what is no longer for new data may still be processed: ``legacy``).
"""

import tomllib
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from cipherfleet.contract.algorithms import REGISTRY, Algorithm, Use
from cipherfleet.contract.errors import Malformed, PolicyRefused, TooLarge
from cipherfleet.contract.ids import SLUG

MAX_FILE_BYTES = 16 * 1024
DAY_S = 86400.0


class Rule(StrEnum):
    """What a refusal names."""

    PROFILE = "profile"
    ALLOW = "allow"
    DENY = "deny"
    STRENGTH = "min-strength-bits"
    USES = "uses"
    AGE = "max-age-days"
    IMPORTED = "imported"
    BARE = "bare"


class Profile(StrEnum):
    """The built-in sets of algorithms; the registry says which are in each."""

    INTERNATIONAL = "international"
    FIPS = "fips"
    GM = "gm"


Patterns: TypeAlias = Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...], Meta(max_length=64)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A profile and what narrows it. Patterns are shell-like: ``AES-256-*``."""

    name: Annotated[str, Meta(pattern=SLUG)] = Profile.INTERNATIONAL.value
    base: Profile = Profile.INTERNATIONAL
    allow: Patterns = ("*",)
    deny: Patterns = ()
    min_strength_bits: Annotated[int, Meta(ge=0, le=256)] = 0
    uses: tuple[Use, ...] = tuple(Use)
    max_age_days: Annotated[float, Meta(ge=0, le=36500)] = 0.0
    """How old a key version may be that protects new data; 0: any age."""
    imported: bool = True
    bare: bool = True
    legacy: bool = True
    """Whether what the policy refuses for new data may still decrypt and verify (SP 800-131A)."""


INTERNATIONAL = Policy()
BUILT_IN: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        INTERNATIONAL,
        Policy("fips", Profile.FIPS, max_age_days=730),  # SP 800-57 part 1, table 1: data encryption up to 2 years
        Policy("gm", Profile.GM),
    )
}


def read_policy(raw: bytes) -> Policy:
    """A policy from a TOML file. Raises ``Malformed`` or ``TooLarge``."""
    if len(raw) > MAX_FILE_BYTES:
        raise TooLarge(f"a policy file has at most {MAX_FILE_BYTES} bytes")
    try:
        told = tomllib.loads(raw.decode())
        policy = msgspec.convert({name.replace("-", "_"): value for name, value in told.items()}, Policy)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as exc:
        raise Malformed(f"the policy cannot be read: {exc}", "see docs/services.md for what a policy may say") from exc
    if "name" not in told or policy.name in BUILT_IN:
        raise Malformed("a policy of your own has a name of its own", f"not one of: {', '.join(BUILT_IN)}")
    for pattern in (*policy.allow, *policy.deny):
        if not any(fnmatchcase(name, pattern) for name in REGISTRY):
            raise Malformed(f"the pattern {pattern!r} fits no algorithm", "see: cipherfleet algorithms")
    return policy


def refusal(
    policy: Policy, chosen: Algorithm, *, bare: bool = False, imported: bool = False, age_s: float = 0.0
) -> tuple[Rule, str] | None:
    """The rule that refuses new data to a key of ``chosen``, and why; ``age_s``: how old the key version is."""
    name = chosen.name
    if policy.base not in chosen.profiles:
        return Rule.PROFILE, f"{name} is not in the profile {policy.base}"
    if any(fnmatchcase(name, pattern) for pattern in policy.deny):
        return Rule.DENY, f"{name} is denied"
    if not any(fnmatchcase(name, pattern) for pattern in policy.allow):
        return Rule.ALLOW, f"{name} is not among what is allowed"
    if chosen.strength_bits < policy.min_strength_bits:
        return Rule.STRENGTH, f"{name} has {chosen.strength_bits} bits of strength, {policy.min_strength_bits} are asked for"
    if not set(chosen.uses) & set(policy.uses):
        return Rule.USES, f"keys may not be used to {chosen.uses[0]}"
    if bare and not policy.bare:
        return Rule.BARE, f"{name} would give bare ciphertexts"
    if imported and not policy.imported:
        return Rule.IMPORTED, "keys are made in a card, and not brought"
    if policy.max_age_days and age_s > policy.max_age_days * DAY_S:
        return Rule.AGE, f"the key version is older than {policy.max_age_days:g} days; rotate the key"
    return None


def check(
    policy: Policy, chosen: Algorithm, *, protect: bool = True, bare: bool = False, imported: bool = False, age_s: float = 0.0
) -> None:
    """That the policy permits an operation; ``protect``: it makes something new. Raises ``PolicyRefused``, which names the rule."""
    if policy is INTERNATIONAL or (not protect and policy.legacy):  # the first refuses nothing: no operation shall pay for that
        return
    refused = refusal(policy, chosen, bare=bare, imported=imported, age_s=age_s if protect else 0.0)
    if refused is not None:
        rule, why = refused
        raise PolicyRefused(f"rule {rule} of policy {policy.name}: {why}")
