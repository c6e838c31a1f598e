"""What a grant permits, and by which name the rest is refused."""

from typing import Any

import pytest

from cipherfleet.contract.errors import CipherfleetError, ContextNotGranted, GrantExpired, Malformed, NotPermitted, RateLimited
from cipherfleet.contract.grants import MAX_GRANTS, Grant, Rates, check_grants, decide
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.statements import Right

ONE, OTHER = KeyId("1" * 32), KeyId("2" * 32)
ENCRYPT = (Right.ENCRYPT,)


def ask(
    *grants: Grant,
    right: Right = Right.ENCRYPT,
    key: KeyId = ONE,
    label: str = "",
    context: bytes = b"",
    now: float = 100.0,
    wait: float = 0.0,
) -> None:
    decide(grants, right, key, label, context, now, lambda _: wait)


PERMITTED: list[tuple[Grant, dict[str, Any]]] = [
    (Grant(ENCRYPT), {}),
    (Grant(ENCRYPT, keys=(OTHER, ONE)), {}),
    (Grant(ENCRYPT, labels=("billing-*",)), {"label": "billing-2030"}),
    (Grant(ENCRYPT, keys=(OTHER,), labels=("billing",)), {"label": "billing"}),
    (Grant(ENCRYPT, not_after=101), {}),
    (Grant(ENCRYPT, context=b"invoice"), {"context": b"invoice"}),
    (Grant(ENCRYPT, context=b""), {}),
    (Grant(ENCRYPT, context_pairs={"a": "1"}), {"context": b'{"b": "2", "a": "1"}'}),
    (Grant((Right.MANAGE, Right.ENCRYPT)), {"right": Right.MANAGE}),
]


@pytest.mark.parametrize(("grant", "asked"), PERMITTED)
def test_what_a_grant_names_is_permitted(grant: Grant, asked: dict[str, Any]) -> None:
    ask(grant, **asked)


REFUSED: list[tuple[Grant, dict[str, Any], type[CipherfleetError]]] = [
    (Grant(ENCRYPT), {"right": Right.DECRYPT}, NotPermitted),
    (Grant(ENCRYPT, keys=(OTHER,)), {}, NotPermitted),
    (Grant(ENCRYPT, labels=("billing-*",)), {"label": "Billing-1"}, NotPermitted),
    (Grant(ENCRYPT, labels=("billing-*",)), {}, NotPermitted),
    (Grant(ENCRYPT, not_after=100), {}, GrantExpired),
    (Grant(ENCRYPT, keys=(OTHER,), not_after=100), {}, NotPermitted),  # another key's grant says nothing
    (Grant(ENCRYPT, context=b"invoice"), {}, ContextNotGranted),
    (Grant(ENCRYPT, context=b""), {"context": b"x"}, ContextNotGranted),
    (Grant(ENCRYPT, context_pairs={"a": "1"}), {"context": b'{"a": "2"}'}, ContextNotGranted),
    (Grant(ENCRYPT, context_pairs={"a": "1"}), {"context": b'{"a": "2", "a": "1"}'}, ContextNotGranted),
    (Grant(ENCRYPT, context_pairs={"a": "1"}), {"context": b'{"a": 1}'}, ContextNotGranted),
    (Grant(ENCRYPT, context_pairs={"a": "1"}), {"context": b'["a"]'}, ContextNotGranted),
    (Grant(ENCRYPT, context_pairs={"a": "1"}), {"context": b"\xff" + b"[" * 2000}, ContextNotGranted),
    (Grant(ENCRYPT, context_pairs={"a": "1"}), {"context": b"[" * 4000}, ContextNotGranted),
    (Grant(ENCRYPT, rate=2), {"wait": 0.5}, RateLimited),
]


@pytest.mark.parametrize(("grant", "asked", "error"), REFUSED)
def test_all_else_is_refused_by_its_name(grant: Grant, asked: dict[str, Any], error: type[CipherfleetError]) -> None:
    with pytest.raises(error) as caught:
        ask(grant, **asked)
    assert type(caught.value) is error


def test_one_grant_that_permits_is_enough() -> None:
    ask(Grant(ENCRYPT, not_after=1), Grant(ENCRYPT, context=b"x"), Grant(ENCRYPT, keys=(ONE,)))


def test_constraints_of_two_grants_do_not_add_up() -> None:
    with pytest.raises(NotPermitted):
        ask(Grant(ENCRYPT, keys=(OTHER,)), Grant((Right.DECRYPT,), keys=(ONE,)))


@pytest.mark.parametrize(
    "grants",
    [
        (Grant((Right.CREATE,)),),
        (Grant((Right.DIGEST, Right.ENCRYPT)),),
        (Grant((Right.ENCRYPT, Right.ENCRYPT)),),
        (Grant((Right.MANAGE,), context=b"x"),),
        (Grant((Right.MAC,), context_pairs={"a": "1"}),),
        (Grant(ENCRYPT),) * (MAX_GRANTS + 1),
    ],
)
def test_what_cannot_be_held_to_is_no_grant(grants: tuple[Grant, ...]) -> None:
    with pytest.raises(Malformed):
        check_grants(grants)


def test_a_rate_is_spent_and_comes_back() -> None:
    now = 0.0
    rates = Rates(lambda: now)
    assert [rates.take(0, 2.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    assert rates.take(1, 2.0) == 0.0  # another grant has its own
    now = 0.5
    assert [rates.take(0, 2.0) for _ in range(2)] == [0.0, 0.5]
    now = 1000.0
    assert [rates.take(0, 0.1) for _ in range(2)] == [0.0, pytest.approx(10.0)]
    assert rates.take(2, 0.0) == 0.0
