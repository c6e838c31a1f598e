"""The lease: no operation is accepted after nonce time + duration, whatever arrives in whatever order."""

import time
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.card_lease import MAX_DURATION_MS, MAX_OUTSTANDING, Lease, boottime
from cipherfleet.computing.card_request import Answer, Request
from cipherfleet.contract.errors import (
    CipherfleetError,
    LeaseExpired,
    LeaseForeign,
    LeaseForged,
    LeaseReplayed,
    LeaseStale,
    ServiceOff,
)
from cipherfleet.contract.ids import CardId, ConsumerId
from cipherfleet.contract.statements import LoginStatement, Signed
from cipherfleet.contract.vcc import LeaseState, Operation, RandomRequest
from tests.unit.computing.card.consumer import CARD, KMC_KEY, KMC_SPKI, OTHER_VCM, VCM, Clock, Consumer, Function, signed, transport

ALICE, MALLORY = Consumer("alice"), Consumer("mallory")


class Card:
    """A lease alone, with its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lease = Lease(ALICE.name, CARD, VCM, self.clock)

    def accept(self, lease: Signed) -> LeaseState:
        return self.lease.accept(lease, ukey_keys=(ALICE.spki,), kmc_key=KMC_SPKI)


@pytest.fixture
def card() -> Card:
    return Card()


def test_a_lease_lasts_from_the_nonce_not_from_its_arrival(card: Card) -> None:
    nonce = card.lease.nonce()
    assert len(nonce) == 16
    card.clock.now += 4
    assert card.accept(ALICE.lease(nonce, 6000)) == LeaseState(1006.0, 2.0, 1, 3, b"h" * 32)
    card.lease.check()
    card.clock.now = 1005.999
    card.lease.check()
    card.clock.now = 1006.0
    with pytest.raises(LeaseExpired):
        card.lease.check()


def test_before_the_first_lease(card: Card) -> None:
    with pytest.raises(ServiceOff):
        card.lease.check()
    assert not card.lease.serving


def test_late(card: Card) -> None:
    nonce = card.lease.nonce()
    card.clock.now += 6
    with pytest.raises(LeaseStale):
        card.accept(ALICE.lease(nonce, 6000))
    assert not card.lease.serving


def test_replayed(card: Card) -> None:
    lease = ALICE.lease(card.lease.nonce())
    card.accept(lease)
    with pytest.raises(LeaseReplayed):
        card.accept(lease)
    with pytest.raises(LeaseReplayed):
        card.accept(ALICE.lease(b"n" * 16))


def test_reordered(card: Card) -> None:
    older = card.lease.nonce()
    card.clock.now += 1
    newer = card.lease.nonce()
    card.accept(ALICE.lease(newer, 3000))
    with pytest.raises(LeaseStale):
        card.accept(ALICE.lease(older, 60_000))
    assert card.lease.expires_at == 1004.0


def test_only_the_newest_nonces_are_remembered(card: Card) -> None:
    nonces = [card.lease.nonce() for _ in range(MAX_OUTSTANDING + 1)]
    with pytest.raises(LeaseReplayed):
        card.accept(ALICE.lease(nonces[0]))
    for nonce in nonces[1:]:
        card.accept(ALICE.lease(nonce))


def test_forged(card: Card) -> None:
    statement = ALICE.statement(card.lease.nonce())
    whole = signed(statement, ALICE.ukey, KMC_KEY)
    forged = [
        signed(statement),
        signed(statement, ALICE.ukey),
        signed(statement, KMC_KEY),
        signed(statement, MALLORY.ukey, KMC_KEY),
        signed(statement, ALICE.ukey, MALLORY.ukey),
        msgspec.structs.replace(whole, payload=whole.payload.replace(b'"duration_ms":6000', b'"duration_ms":9000')),
        msgspec.structs.replace(whole, kind=LoginStatement.KIND),
        msgspec.structs.replace(whole, signatures=whole.signatures * 3),
        signed(LoginStatement(ALICE.name, VCM, statement.nonce), ALICE.ukey, KMC_KEY),
    ]
    for lease in forged:
        with pytest.raises(LeaseForged):
            card.accept(lease)
    card.accept(whole)


def test_foreign(card: Card) -> None:
    nonce = card.lease.nonce()
    bob = msgspec.structs.replace(ALICE.statement(nonce), consumer=ConsumerId("bob"))
    for lease in (
        ALICE.lease(nonce, card=CardId("card-m2-0badcafe")),
        ALICE.lease(nonce, vcm=OTHER_VCM),
        signed(bob, ALICE.ukey, KMC_KEY),
    ):
        with pytest.raises(LeaseForeign):
            card.accept(lease)


@pytest.mark.parametrize("duration", [0, -1, -(2**40), MAX_DURATION_MS + 1, 2**62])
def test_durations_out_of_bounds(card: Card, duration: int) -> None:
    with pytest.raises(LeaseForged):
        card.accept(ALICE.lease(card.lease.nonce(), duration))


def test_an_hour_is_the_longest(card: Card) -> None:
    assert card.accept(ALICE.lease(card.lease.nonce(), MAX_DURATION_MS)).remaining_s == 3600


def test_an_ended_lease_is_not_revived(card: Card) -> None:
    card.accept(ALICE.lease(card.lease.nonce(), 1000))
    card.clock.now += 0.9
    next_ = ALICE.lease(card.lease.nonce())
    card.clock.now += 0.2
    with pytest.raises(LeaseExpired):
        card.accept(next_)


def test_nothing_outstanding_survives_forgetting(card: Card) -> None:
    lease = ALICE.lease(card.lease.nonce())
    card.lease.forget()
    with pytest.raises(LeaseReplayed):
        card.accept(lease)


def test_the_clock_is_the_hosts_boot_time() -> None:
    first = boottime()
    assert 0 < first <= boottime()


# -- in the virtual function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-10 * 365 * 86400.0, -3600.0, 3600.0, 10 * 365 * 86400.0])
def test_the_wall_clock_may_jump(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    lease = Lease(ALICE.name, CARD, VCM)
    first = ALICE.lease(lease.nonce(), 60_000)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + jump)
    state = lease.accept(first, ukey_keys=(ALICE.spki,), kmc_key=KMC_SPKI)
    assert 59 < state.remaining_s <= 60
    lease.check()
    monkeypatch.setattr(time, "time", lambda: wall() - jump)
    lease.check()
    assert 59 < lease.accept(ALICE.lease(lease.nonce(), 60_000), ukey_keys=(ALICE.spki,), kmc_key=KMC_SPKI).remaining_s <= 60


def test_a_card_without_a_lease_does_nothing_with_keys() -> None:
    function = Function(serving=False)
    for loaded in (False, True):
        for operation in set(Operation) - {0, 1, 2, 3, 4, 7, 15}:
            with pytest.raises(ServiceOff):
                function.do(operation)
        assert function.describe()["loaded"] is loaded
        assert function.describe()["serving"] is False
        if not loaded:
            with pytest.raises(ServiceOff):
                function.renew()
        function.load_cmk()
    function.renew()
    assert function.describe()["serving"] is True
    assert len(function.do(Operation.RANDOM, RandomRequest(20)).data) == 20


def test_expiry_takes_the_keys_and_a_later_lease_does_not_bring_them_back() -> None:
    function = Function()
    handle, _ = function.generate()
    chain = function.inner._chain
    key = function.inner._keys.get(handle)
    secret = key.secret
    assert chain is not None
    assert any(secret)
    assert any(chain.wrapping)
    function.clock.now += 6
    with pytest.raises(LeaseExpired):
        function.do(Operation.RANDOM, RandomRequest(1))
    assert not any(secret)
    assert not any(chain.wrapping)
    assert not any(chain.confirm)
    assert function.inner.keys == 0
    with pytest.raises(LeaseExpired):
        function.renew()
    with pytest.raises(LeaseExpired):
        function.do(Operation.RANDOM, RandomRequest(1))
    function.load_cmk()
    with pytest.raises(ServiceOff):
        function.do(Operation.RANDOM, RandomRequest(1))
    function.renew()
    with pytest.raises(CipherfleetError):
        function.do(Operation.UNLOAD, handle=handle)


def test_the_timer_drops_without_an_operation() -> None:
    function = Function()
    function.generate()
    deadline = function.inner.deadline
    assert deadline == function.clock.now + 6
    function.clock.now = deadline - 0.001
    function.inner.tick()
    assert function.inner.keys == 1
    function.clock.now = deadline
    function.inner.tick()
    assert function.inner.keys == 0
    assert function.inner.deadline is None


def test_a_cmk_without_a_lease_goes_again() -> None:
    function = Function(serving=False)
    function.load_cmk()
    assert function.inner.deadline == function.clock.now + 30
    function.clock.now += 30
    with pytest.raises(ServiceOff):
        function.renew()


def test_a_result_is_thrown_away_when_the_lease_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    function = Function()
    results: list[bytearray] = []
    random = function.inner._under_lease[Operation.RANDOM]

    def slow(request: Request) -> Answer:
        answer = random(request)
        assert isinstance(answer, Answer)
        assert isinstance(answer.data, bytearray)
        results.append(answer.data)
        function.clock.now += 60
        return answer

    function.inner._under_lease[Operation.RANDOM] = slow
    with pytest.raises(LeaseExpired):
        function.do(Operation.RANDOM, RandomRequest(64))
    assert results == [bytearray(64)]


def test_an_uncertified_card_takes_no_lease() -> None:
    clock = Clock()
    function = Function(ALICE, serving=False)
    function.inner = VirtualFunction(CARD, VCM, ALICE.name, transport(), lambda: None, clock)
    function.load_cmk()
    with pytest.raises(ServiceOff):
        function.renew()


@dataclass(frozen=True)
class Sent:
    """A lease as it was signed: over a nonce made at ``start``."""

    lease: Signed
    start: float
    end: float


class LeaseMachine(RuleBasedStateMachine):
    """A card and everything that a network, an operator and a clock may do to its leases.

    The card must serve exactly within the last permit that it took, and never again once that had ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.function = Function(ALICE, serving=False)
        self.function.load_cmk()
        self.nonces: list[tuple[bytes, float]] = []
        self.sent: list[Sent] = []
        self.permit: Sent | None = None

    @rule()
    def load_cmk(self) -> None:
        self.function.load_cmk()

    @rule()
    def drop(self) -> None:
        self.function.do(Operation.DROP)
        self.permit = None

    @rule()
    def ask(self) -> None:
        nonce = bytes(self.function.do(Operation.LEASE_NONCE).data)
        self.nonces.append((nonce, self.function.clock.now))

    @rule(seconds=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.5, 3.0, 7.0]))
    def wait(self, seconds: float) -> None:
        self.function.clock.now += seconds

    @rule(back=st.integers(0, 5), duration=st.sampled_from([1, 500, 3000, 6000]))
    def sign(self, back: int, duration: int) -> None:
        if back < len(self.nonces):
            nonce, made_at = self.nonces[-1 - back]
            self.sent.append(Sent(ALICE.lease(nonce, duration), made_at, made_at + duration / 1000))

    @rule(back=st.integers(0, 8))
    def deliver(self, back: int) -> None:
        """Late, again, out of order: whatever was ever signed."""
        if back < len(self.sent):
            sent = self.sent[-1 - back]
            try:
                self.function.do(Operation.LEASE, sent.lease)
            except CipherfleetError:
                return
            assert self.permit is None or self.permit.start <= sent.start
            self.permit = sent

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.5]), duration=st.sampled_from([500, 3000, 6000]))
    def serve(self, seconds: float, duration: int) -> None:
        """The way it goes: a CMK, a nonce, and a lease after a while."""
        self.load_cmk()
        self.ask()
        self.wait(seconds)
        self.sign(0, duration)
        self.deliver(0)

    @rule(short=st.sampled_from([500, 1000]))
    def reorder(self, short: int) -> None:
        """Two nonces; the lease of the newer arrives first, and the older's would last longer."""
        self.load_cmk()
        self.ask()
        self.wait(0.25)
        self.ask()
        self.sign(0, short)
        self.sign(1, 6000)
        self.deliver(1)
        self.deliver(0)

    @rule()
    def forge(self) -> None:
        if self.nonces:
            with pytest.raises(CipherfleetError):
                self.function.do(Operation.LEASE, signed(ALICE.statement(self.nonces[-1][0], 60_000), MALLORY.ukey, KMC_KEY))

    @invariant()
    def serves_exactly_within_the_permit(self) -> None:
        if self.permit is not None and self.function.clock.now >= self.permit.end:
            self.permit = None
        try:
            self.function.do(Operation.RANDOM, RandomRequest(1))
        except (ServiceOff, LeaseExpired):
            assert self.permit is None
        else:
            assert self.permit is not None


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
