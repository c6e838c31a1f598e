"""What may be delegated: never more than the delegator's own grant gives, whatever is asked."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipherfleet.contract.errors import CipherfleetError, DelegationTooWide, EscrowRolledBack, Malformed
from cipherfleet.contract.escrow import DelegationName, LogEntry, delegation_of
from cipherfleet.contract.escrow_state import EscrowState
from cipherfleet.contract.grants import MAX_DELEGATED, WITH_CONTEXT, Grant, administrator, check_delegated, check_within, decide
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.rights import Right

ONE, OTHER = KeyId("1" * 32), KeyId("2" * 32)
GIVEN = Grant((Right.ENCRYPT,), (ONE,))
NAME = DelegationName(ApplicationName("lead"), ApplicationName("temp"), ONE)


def own(**changes: Any) -> Grant:
    return Grant(**{"operations": (Right.ENCRYPT, Right.DECRYPT), "keys": (ONE,), "delegate": True, **changes})


def narrow(**changes: Any) -> Grant:
    return Grant(**{"operations": (Right.ENCRYPT,), "keys": (ONE,), **changes})


WITHIN: list[tuple[Grant, Grant]] = [
    (narrow(), own()),
    (narrow(operations=(Right.DECRYPT, Right.ENCRYPT)), own()),
    (narrow(), own(keys=())),
    (narrow(), own(keys=(OTHER,), labels=("billing-*",))),
    (narrow(not_after=9), own()),
    (narrow(not_after=9), own(not_after=9)),
    (narrow(rate=1.0), own(rate=1.0)),
    (narrow(context=b"c"), own(context=b"c")),
    (narrow(context=b'{"a": "1", "b": "2"}'), own(context_pairs={"a": "1"})),
    (narrow(context_pairs={"a": "1", "b": "2"}), own(context_pairs={"a": "1"})),
]


@pytest.mark.parametrize(("less", "more"), WITHIN)
def test_what_is_within_may_be_delegated(less: Grant, more: Grant) -> None:
    check_within(less, more, ONE, "billing-1")
    assert administrator((Grant((Right.SIGN,), delegate=True), more), less, ONE, "billing-1") == 1


WIDER: list[tuple[Grant, Grant]] = [
    (narrow(), own(delegate=False)),
    (narrow(delegate=True), own()),
    (narrow(operations=(Right.ENCRYPT, Right.SIGN)), own()),
    (narrow(keys=(OTHER,)), own()),
    (narrow(keys=(ONE, OTHER)), own(keys=())),
    (narrow(keys=()), own(keys=())),
    (narrow(labels=("*",)), own(keys=())),
    (narrow(), own(keys=(OTHER,))),
    (narrow(), own(keys=(), labels=("payroll-*",))),
    (narrow(), own(not_after=9)),
    (narrow(not_after=10), own(not_after=9)),
    (narrow(), own(rate=1.0)),
    (narrow(rate=1.1), own(rate=1.0)),
    (narrow(), own(context=b"c")),
    (narrow(context=b"d"), own(context=b"c")),
    (narrow(context_pairs={"a": "1"}), own(context=b"c")),
    (narrow(context_pairs={"a": "2"}), own(context_pairs={"a": "1"})),
    (narrow(context_pairs={"b": "1"}), own(context_pairs={"a": "1"})),
    (narrow(context=b'{"a": "2", "a": "1"}'), own(context_pairs={"a": "1"})),
]


@pytest.mark.parametrize(("more", "less"), WIDER)
def test_what_is_wider_may_not(more: Grant, less: Grant) -> None:
    with pytest.raises(DelegationTooWide):
        check_within(more, less, ONE, "billing-1")
    with pytest.raises(DelegationTooWide):
        administrator((less,), more, ONE, "billing-1")


def test_two_grants_together_are_not_one() -> None:
    with pytest.raises(DelegationTooWide, match="is not to"):
        administrator((own(operations=(Right.ENCRYPT,)), own(operations=(Right.DECRYPT,))), OWN_WITHOUT, ONE, "")


OWN_WITHOUT = narrow(operations=(Right.ENCRYPT, Right.DECRYPT))
MOMENTS = st.sampled_from((0, 10, 20, 30))
PAIRS = st.dictionaries(st.sampled_from("ab"), st.sampled_from("12"))
CONTEXTS = st.one_of(st.sampled_from((b"", b"c")), PAIRS.map(lambda pairs: json.dumps(pairs).encode()))
GRANTS = st.builds(
    Grant,
    st.lists(st.sampled_from(WITH_CONTEXT), min_size=1, unique=True).map(tuple),
    st.sampled_from(((), (ONE,), (OTHER,), (ONE, OTHER))),
    st.sampled_from(((), ("billing-*",), ("*",))),
    MOMENTS,
    st.none() | CONTEXTS,
    PAIRS,
    st.sampled_from((0.0, 1.0, 2.0)),
    st.booleans(),
)


@given(GRANTS, GRANTS, st.sampled_from(WITH_CONTEXT), st.sampled_from((ONE, OTHER)), st.sampled_from(("", "billing-1")), CONTEXTS, MOMENTS)
def test_nothing_that_is_within_permits_more(
    less: Grant, more: Grant, right: Right, key: KeyId, label: str, context: bytes, now: int
) -> None:
    """Whatever passes the check and then permits an operation: the delegator's own grant permits it, too."""
    try:
        check_within(less, more, ONE, label)
        decide((less,), right, key, label, context, now, lambda _: 0.0)
    except CipherfleetError:
        return
    decide((more,), right, key, label, context, now, lambda _: 0.0)
    assert key == ONE
    assert not more.rate or 0 < less.rate <= more.rate


def test_what_a_delegation_says_at_all() -> None:
    check_delegated((GIVEN,) * MAX_DELEGATED, ONE)
    for wrong in ((), (GIVEN,) * (MAX_DELEGATED + 1), (narrow(keys=()),), (narrow(labels=("*",)),), (narrow(delegate=True),)):
        with pytest.raises(Malformed):
            check_delegated(wrong, ONE)
    with pytest.raises(Malformed):
        check_delegated((GIVEN,), OTHER)


# -- the log -----------------------------------------------------------------------------------------------------------


def entry(number: int, subject: str, digest: bytes = b"d" * 32) -> LogEntry:
    return LogEntry(number, subject, digest)


def test_the_log_names_each_delegation_once_and_in_order() -> None:
    state = EscrowState(ConsumerId("acme"), 1)
    state.apply([entry(1, NAME.subject(1)), entry(2, NAME.subject(3), b"e" * 32)])
    assert state.delegation(NAME) == (3, b"e" * 32)
    assert state.newest_delegation(NAME.delegator) == 3
    assert list(state.delegated(NAME.delegate, ONE)) == [NAME] == list(state.delegated(NAME.delegate)) == list(state.delegations)
    assert state.delegated(NAME.delegator) == []
    for late in (3, 2, 1):
        with pytest.raises(EscrowRolledBack, match="after delegation 3"):
            state.apply([entry(3, NAME.subject(late))])


@pytest.mark.parametrize(
    "subject",
    [
        f"delegation/lead/temp/{ONE}",
        f"delegation/lead/temp/{ONE}@",
        f"delegation/lead/temp/{ONE}@01",
        f"delegation/lead/temp/{ONE}@-1",
        f"delegation/lead/temp/{ONE}@{'9' * 17}",
        f"delegation/lead/{ONE}@1",
        f"delegation/lead/temp/more/{ONE}@1",
        f"delegation/Lead/temp/{ONE}@1",
        f"delegation/lead//{ONE}@1",
        f"delegation/lead/temp/{ONE[1:]}@1",
        f"delegation/lead/temp/{ONE}\n@1",
        "delegation/",
    ],
)
def test_what_nobody_would_write_is_refused(subject: str) -> None:
    assert delegation_of(subject) is None
    with pytest.raises(EscrowRolledBack, match="nobody wrote"):
        EscrowState(ConsumerId("acme"), 1).apply([entry(1, subject)])
