"""Policies: what each rule refuses, and what a file may say."""

import pytest

from cipherfleet.contract.algorithms import REGISTRY, Use, algorithm
from cipherfleet.contract.errors import CipherfleetError, Malformed, PolicyRefused, TooLarge
from cipherfleet.contract.policy import BUILT_IN, DAY_S, INTERNATIONAL, Policy, Profile, check, read_policy, refusal

FILE = b"""
name = "bank"
base = "fips"
allow = ["AES-256-*", "ECDSA-*", "SHA-384"]
deny = ["*-CBC"]
min-strength-bits = 192
uses = ["encrypt", "sign", "digest"]
max-age-days = 365
imported = false
bare = false
legacy = false
"""


def test_the_built_in_profiles_follow_the_registry() -> None:
    for name, policy in BUILT_IN.items():
        assert {n for n, a in REGISTRY.items() if refusal(policy, a) is None} == {n for n, a in REGISTRY.items() if name in a.profiles}
    for name in ("SM2", "ChaCha20-Poly1305", "X25519", "BLAKE2b", "ECDSA-secp256k1"):
        assert refusal(BUILT_IN["fips"], algorithm(name)) is not None
    assert {a.name for a in REGISTRY.values() if "gm" in a.profiles and a.family not in ("SM2", "SM4") and "SM3" not in a.name} == set()
    assert all(refusal(INTERNATIONAL, a) is None for a in REGISTRY.values())


@pytest.mark.parametrize(
    ("name", "more", "rule"),
    [
        ("SM4-GCM", {}, "profile"),
        ("AES-256-CBC", {}, "deny"),
        ("HMAC-SHA-384", {}, "allow"),
        ("ECDSA-P-256", {}, "min-strength-bits"),
        ("AES-256-CMAC", {}, "min-strength-bits"),
        ("AES-256-KW", {}, "uses"),
        ("AES-256-GCM", {"bare": True}, "bare"),
        ("AES-256-GCM", {"imported": True}, "imported"),
        ("AES-256-GCM", {"age_s": 365 * DAY_S + 1}, "max-age-days"),
    ],
)
def test_each_rule_refuses_by_its_name(name: str, more: dict[str, object], rule: str) -> None:
    policy = read_policy(FILE)
    with pytest.raises(PolicyRefused, match=f"rule {rule} of policy bank"):
        check(policy, algorithm(name), **more)  # type: ignore[arg-type]
    for allowed in ("AES-256-GCM", "ECDSA-P-384", "SHA-384"):
        check(policy, algorithm(allowed), age_s=364 * DAY_S)


def test_what_is_not_for_new_data_may_still_be_read_unless_the_policy_says_no() -> None:
    gm, strict = BUILT_IN["gm"], Policy("strict", Profile.GM, legacy=False)
    for policy in (gm, strict):
        with pytest.raises(PolicyRefused):
            check(policy, algorithm("AES-256-GCM"))
    check(gm, algorithm("AES-256-GCM"), protect=False)
    with pytest.raises(PolicyRefused):
        check(strict, algorithm("AES-256-GCM"), protect=False)
    check(read_policy(FILE), algorithm("AES-256-GCM"), protect=False, age_s=1e12)  # what was made in time stays readable


def test_a_file_says_what_it_says() -> None:
    policy = read_policy(FILE)
    assert (policy.name, policy.base, policy.uses) == ("bank", Profile.FIPS, (Use.ENCRYPT, Use.SIGN, Use.DIGEST))
    assert read_policy(b'name = "mine"') == Policy("mine")


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", Malformed),
        (b"name", Malformed),
        (b'name = "fips"', Malformed),
        (b'base = "fips"', Malformed),
        (b'name = "Not A Slug"', Malformed),
        (b'name = "x"\nbase = "nist"', Malformed),
        (b'name = "x"\nallow = "AES-256-GCM"', Malformed),
        (b'name = "x"\nallow = ["AES-512-*"]', Malformed),
        (b'name = "x"\ndeny = [""]', Malformed),
        (b'name = "x"\nuses = ["steal"]', Malformed),
        (b'name = "x"\nmin-strength-bits = -1', Malformed),
        (b'name = "x"\nmax-age-days = "never"', Malformed),
        (b'name = "x"\nanything = 1', Malformed),
        (b'name = "x"\nlegacy = 1', Malformed),
        (b'name = "\xff"', Malformed),
        (b'name = "x"\nallow = [' + b'"*",' * 65 + b"]", Malformed),
        (b"#" * 20_000, TooLarge),
    ],
)
def test_a_file_that_is_not_one(raw: bytes, error: type[CipherfleetError]) -> None:
    with pytest.raises(error):
        read_policy(raw)
