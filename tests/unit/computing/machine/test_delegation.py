"""Delegation at a VCM: an application gives what the Ukey lets it give, and whoever else makes one up gains nothing."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import structs

from cipherfleet.channel.certificates import Credentials, new_key, public_key_der
from cipherfleet.contract.errors import (
    ApplicationRevoked,
    ApplicationUnknown,
    ContextNotGranted,
    DelegationTooWide,
    EscrowRolledBack,
    EscrowRowTampered,
    Forbidden,
    ForeignConsumer,
    GrantExpired,
    Malformed,
    NotPermitted,
    RateLimited,
    StatementForged,
    StatementReplayed,
)
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ApplicationName, new_key_id, new_vcm_id
from cipherfleet.contract.statements import ApplicationStatement, DelegationStatement, Right, Signed
from tests.unit.computing.machine.fake_kmc import FakeKmc, other_key, peer, signed
from tests.unit.computing.machine.stage import CardOfTests
from tests.unit.computing.machine.test_grants import Doorkeeper

KEY, OTHER = new_key_id(), new_key_id()
OWN = Grant((Right.ENCRYPT, Right.DECRYPT), (KEY,), delegate=True)
GIVEN = Grant((Right.ENCRYPT,), (KEY,))


class Office:
    """``lead`` may delegate, ``temp`` and ``other`` are signed in, with nothing of the key's."""

    def __init__(self, door: Doorkeeper) -> None:
        self.door, self.consumer, self.grants = door, door.consumer, door.grants
        self.credentials = {
            name: self.consumer.domain.credentials(Identity(Role.APPLICATION, name, self.consumer.name), trust=self.consumer.domain.pem)
            for name in ("lead", "temp", "other")
        }

    def peer(self, name: str) -> Peer:
        return peer(self.credentials[name])

    def sign_in(self, name: str, *grants: Grant, rights: tuple[Right, ...] = (), **changes: Any) -> None:
        """By the Ukey."""
        self.consumer.sequence += 1
        made = ApplicationStatement(
            self.consumer.name,
            ApplicationName(name),
            self.peer(name).public_key_sha256,
            rights,
            int(self.door.now) + 3600,
            self.consumer.sequence,
            grants=grants,
        )
        self.consumer.keep(name, signed(structs.replace(made, **changes), self.consumer.ukey))

    def key_of(self, name: str) -> ec.EllipticCurvePrivateKey:
        return key_of(self.credentials[name])

    def statement(self, *grants: Grant, number: int = 1, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> Signed:
        return signed(self.told(*grants, number=number, key=key, **changes), key or self.key_of("lead"))

    def told(self, *grants: Grant, number: int = 1, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> DelegationStatement:
        public_key = public_key_der((key or self.key_of("lead")).public_key())
        lead, temp = ApplicationName("lead"), ApplicationName("temp")
        made = DelegationStatement(self.consumer.name, lead, temp, KEY, grants or (GIVEN,), number, public_key)
        return structs.replace(made, **changes)

    async def delegate(self, statement: Signed, *, by: str = "lead") -> str:
        return (await self.grants.delegate(self.peer(by), KEY, statement)).state

    async def uses(self, right: Right = Right.ENCRYPT, *, by: str = "temp", context: bytes = b"") -> None:
        await self.grants.authorise_key(self.peer(by), right, KEY, context)

    async def states(self, by: str = "lead") -> Sequence[tuple[str, str]]:
        found = await self.grants.delegations(self.peer(by), KEY)
        return [(one.delegate, one.state) for one in found.delegations]


def key_of(credentials: Credentials) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(credentials.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


@pytest.fixture
async def office() -> AsyncIterator[Office]:
    kmc = FakeKmc()
    consumer, vcm, card = kmc.consumer("acme"), new_vcm_id(), CardOfTests(kmc)
    vcc = await card.vcc(vcm, consumer, kmc)
    made = Office(Doorkeeper(kmc, consumer, vcm, vcc))
    made.sign_in("lead", OWN)
    for name in ("temp", "other"):
        made.sign_in(name, rights=(Right.RANDOM,))
    await made.door.load()
    yield made
    await vcc.close()
    card.server.close()


async def test_what_was_delegated_may_be_done_and_nothing_else(office: Office) -> None:
    with pytest.raises(NotPermitted):
        await office.uses()
    assert await office.delegate(office.statement()) == "active"
    assert not await office.grants.may_some(office.peer("temp"), Right.ENCRYPT)
    await office.uses()
    with pytest.raises(NotPermitted, match="temp may not decrypt"):
        await office.uses(Right.DECRYPT)
    with pytest.raises(NotPermitted):
        await office.grants.authorise_key(office.peer("temp"), Right.ENCRYPT, OTHER, b"")
    with pytest.raises(NotPermitted):
        await office.grants.authorise(office.peer("temp"), Right.ENCRYPT)
    with pytest.raises(NotPermitted):
        await office.uses(by="other")
    office.consumer.calls.clear()
    await office.uses()
    assert office.consumer.calls == []


async def test_it_is_listed_for_those_whom_it_concerns(office: Office) -> None:
    await office.delegate(office.statement())
    assert await office.states("lead") == await office.states("temp") == [("temp", "active")]
    assert await office.states("other") == []
    office.sign_in("other", rights=(Right.SHOW,))
    await office.door.escrow.refresh()
    assert await office.states("other") == [("temp", "active")]
    assert (await office.grants.delegations(office.peer("lead"), KEY)).next == 2


async def test_taken_back_it_is_gone_and_stays_so(office: Office) -> None:
    given = office.statement()
    await office.delegate(given)
    assert await office.delegate(office.statement(number=2, grants=(), revoked=True)) == "revoked"
    with pytest.raises(NotPermitted):
        await office.uses()
    with pytest.raises(StatementReplayed):
        await office.delegate(given)
    with pytest.raises(StatementReplayed):
        await office.delegate(office.statement(number=2))
    assert await office.states() == [("temp", "revoked")]
    await office.delegate(office.statement(number=3))
    await office.uses()


async def test_a_newer_one_replaces_it(office: Office) -> None:
    await office.delegate(office.statement())
    await office.delegate(office.statement(Grant((Right.DECRYPT,), (KEY,)), number=7))
    await office.uses(Right.DECRYPT)
    with pytest.raises(NotPermitted):
        await office.uses(Right.ENCRYPT)


WIDER = [
    Grant((Right.SIGN,), (KEY,)),
    Grant((Right.ENCRYPT, Right.MANAGE), (KEY,)),
]


@pytest.mark.parametrize("grant", WIDER)
async def test_nobody_delegates_beyond_their_own_rights(office: Office, grant: Grant) -> None:
    before = len(office.consumer.log)
    with pytest.raises(DelegationTooWide):
        await office.delegate(office.statement(grant))
    with pytest.raises(DelegationTooWide):
        await office.delegate(office.statement(GIVEN, grant))
    assert len(office.consumer.log) == before


@pytest.mark.parametrize("grants", [(structs.replace(OWN, delegate=False),), (structs.replace(OWN, keys=(OTHER,)),)])
async def test_only_an_administrator_of_the_key_delegates(office: Office, grants: tuple[Grant, ...]) -> None:
    office.sign_in("lead", *grants, rights=tuple(Right))
    await office.door.escrow.refresh()
    with pytest.raises(DelegationTooWide):
        await office.delegate(office.statement())


async def test_what_was_delegated_is_not_delegated_further(office: Office) -> None:
    await office.delegate(office.statement())
    key = office.key_of("temp")
    second = office.statement(number=1, key=key, delegator="temp", delegate="other")
    with pytest.raises(DelegationTooWide):
        await office.delegate(second, by="temp")
    office.consumer.delegate(second)  # not even with the operator's help
    await office.door.escrow.refresh()
    with pytest.raises(DelegationTooWide):
        await office.uses(by="other")
    with pytest.raises(Malformed):
        await office.delegate(office.statement(structs.replace(GIVEN, delegate=True), number=2))


async def test_what_stands_behind_it_is_looked_at_each_time(office: Office) -> None:
    await office.delegate(office.statement())
    changes: list[tuple[tuple[Grant, ...], dict[str, Any], type[Forbidden]]] = [
        ((structs.replace(OWN, operations=(Right.DECRYPT,)),), {}, DelegationTooWide),
        ((structs.replace(OWN, delegate=False),), {}, DelegationTooWide),
        ((structs.replace(OWN, context=b"c"),), {}, DelegationTooWide),
        ((), {"revoked": True}, NotPermitted),
        ((OWN,), {"not_after": int(office.door.now)}, NotPermitted),
        ((OWN,), {"public_key_sha256": bytes(32)}, NotPermitted),
    ]
    for grants, change, refused in changes:
        office.sign_in("lead", *grants, **change)
        await office.door.escrow.refresh()
        with pytest.raises(refused):
            await office.uses()
        assert await office.states("temp") == [("temp", "void")]
    office.sign_in("lead", OWN)
    await office.door.escrow.refresh()
    await office.uses()


async def test_a_delegate_that_was_signed_out_is_out(office: Office) -> None:
    await office.delegate(office.statement())
    office.sign_in("temp", revoked=True)
    await office.door.escrow.refresh()
    with pytest.raises(ApplicationRevoked):
        await office.uses()
    with pytest.raises(ApplicationRevoked):
        await office.delegate(office.statement(number=2))
    with pytest.raises(ApplicationUnknown):
        await office.delegate(office.statement(number=3, delegate="nobody"))


async def test_its_own_constraints_hold(office: Office) -> None:
    end = int(office.door.now) + 60
    await office.delegate(office.statement(structs.replace(GIVEN, not_after=end, context_pairs={"tenant": "a"})))
    await office.uses(context=b'{"tenant": "a"}')
    with pytest.raises(ContextNotGranted):
        await office.uses(context=b'{"tenant": "b"}')
    office.door.now = end
    with pytest.raises(GrantExpired):
        await office.uses(context=b'{"tenant": "a"}')
    assert await office.states() == [("temp", "expired")]
    with pytest.raises(GrantExpired):
        await office.delegate(office.statement(structs.replace(GIVEN, not_after=end), number=2))


async def test_a_rate_is_the_delegators_and_its_delegates_together(office: Office) -> None:
    office.sign_in("lead", structs.replace(OWN, rate=2.0))
    await office.door.escrow.refresh()
    given = structs.replace(GIVEN, rate=2.0)
    await office.delegate(office.statement(given))
    await office.delegate(office.statement(given, number=2, delegate="other"))
    await office.uses(by="lead")
    await office.uses(by="temp")
    for name in ("temp", "other", "lead"):
        with pytest.raises(RateLimited):
            await office.uses(by=name)


async def test_a_grant_by_label_goes_by_the_label_of_now(office: Office) -> None:
    office.door.labels = {KEY: "billing-1"}
    office.sign_in("lead", structs.replace(OWN, keys=(), labels=("billing-*",)))
    await office.door.escrow.refresh()
    await office.delegate(office.statement())
    await office.uses()
    office.door.labels = {KEY: "payroll"}
    with pytest.raises(DelegationTooWide):
        await office.uses()


# -- bad statements ----------------------------------------------------------------------------------------------------


async def test_a_statement_that_is_not_the_callers_is_refused(office: Office) -> None:
    good = office.statement()
    rogue = new_key()
    forged: list[Signed] = [
        structs.replace(good, signatures=()),
        structs.replace(good, signatures=good.signatures * 2),
        structs.replace(good, kind=ApplicationStatement.KIND),
        structs.replace(good, payload=good.payload.replace(b'"encrypt"', b'"decrypt"')),
        structs.replace(good, payload=good.payload + b" " * 20_000),
        signed(office.told(), rogue),  # says lead's key, signed with another
        office.statement(key=rogue),  # signed with the key it names, which is not lead's
        office.statement(key=office.key_of("temp")),
    ]
    for statement in forged:
        with pytest.raises(StatementForged):
            await office.delegate(statement)
    with pytest.raises(StatementForged):
        await office.delegate(good, by="temp")
    for cut in (b"", good.payload[:-1], b"[]", b"\xff"):
        with pytest.raises(Malformed):
            await office.delegate(structs.replace(good, payload=cut))
    with pytest.raises(ForeignConsumer):
        await office.delegate(office.statement(consumer="rival"))
    for wrong in (
        signed(structs.replace(office.told(Grant((Right.ENCRYPT,), (OTHER,))), key=OTHER), office.key_of("lead")),
        office.statement(delegate="lead"),
        office.statement(revoked=True),
        office.statement(grants=()),
        office.statement(structs.replace(GIVEN, keys=())),
        office.statement(sequence=0),
    ):
        with pytest.raises(Malformed):
            await office.delegate(wrong)
    assert office.consumer.delegations == {}


async def test_another_key_under_the_delegators_name_delegates_nothing(office: Office) -> None:
    stolen = other_key(office.credentials["lead"], office.consumer.domain)
    with pytest.raises(ApplicationUnknown):
        await office.grants.delegate(peer(stolen), KEY, office.statement(key=key_of(stolen)))


# -- the operator, who keeps them --------------------------------------------------------------------------------------


async def test_a_delegation_that_the_operator_made_up_gives_nothing(office: Office) -> None:
    rogue = new_key()
    told = office.told()
    for number, made_up in enumerate(
        (
            office.statement(key=rogue),
            signed(told, rogue),
            structs.replace(office.statement(), signatures=()),
            Signed(DelegationStatement.KIND, b"{"),
            office.statement(key=office.key_of("temp")),
        ),
        1,
    ):
        office.consumer.delegate(made_up, told=structs.replace(told, sequence=number))
        await office.door.escrow.refresh()
        with pytest.raises(NotPermitted):
            await office.uses()
        assert await office.states("lead") in ([], [("temp", "void")])


async def test_a_good_one_under_another_name_or_number_gives_nothing(office: Office) -> None:
    good = office.statement(number=5)
    moves: list[dict[str, Any]] = [{"delegate": "other"}, {"sequence": 6}, {"key": OTHER, "sequence": 7}]
    for moved in moves:
        office.consumer.delegations.clear()
        told = structs.replace(office.told(number=5), **moved)
        office.consumer.delegate(good, told=told)
        await office.door.escrow.refresh()
        for name in ("temp", "other"):
            for key in (KEY, OTHER):
                with pytest.raises(Forbidden):
                    await office.grants.authorise_key(office.peer(name), Right.ENCRYPT, key, b"")


async def test_an_old_one_does_not_come_back(office: Office) -> None:
    given = office.statement()
    await office.delegate(given)
    (name,) = office.consumer.delegations
    taken = office.statement(number=2, grants=(), revoked=True)
    await office.delegate(taken)
    office.consumer.delegations[name] = given  # the row is set back, the log is not
    office.grants._delegated._kept.clear()  # as after a restart
    with pytest.raises(EscrowRowTampered):
        await office.uses()
    del office.consumer.delegations[name]
    with pytest.raises(EscrowRowTampered):
        await office.uses()
    office.consumer.delegations[name] = taken
    with pytest.raises(NotPermitted):
        await office.uses()
    office.consumer.delegate(given)  # the log, too
    with pytest.raises(EscrowRolledBack):
        await office.door.escrow.refresh()
    with pytest.raises(EscrowRolledBack):
        await office.uses()


async def test_what_the_escrow_did_not_write_is_not_acknowledged(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    other = office.statement(Grant((Right.DECRYPT,), (KEY,)))
    keep = office.consumer.delegate
    monkeypatch.setattr(office.consumer, "delegate", lambda statement: keep(other))
    with pytest.raises(EscrowRowTampered):
        await office.delegate(office.statement())
