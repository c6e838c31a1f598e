"""What the KMC keeps of delegations: in order, bounded, by whoever signed them; whether they count is not its to say."""

from typing import Any

import pytest
from msgspec import structs

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.contract.audit import AuditLog
from cipherfleet.contract.errors import (
    ApplicationUnknown,
    CipherfleetError,
    ForeignConsumer,
    LimitReached,
    Malformed,
    NotPermitted,
    ServiceOff,
    StatementForged,
    StatementReplayed,
)
from cipherfleet.contract.escrow import DelegationName, LogEntry, statement_digest
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, new_key_id
from cipherfleet.contract.kmc_api import (
    MAX_STATEMENT_NAMES,
    DelegationRequest,
    DelegationsFound,
    DelegationsRequest,
    EscrowChanged,
    EscrowReceipt,
    LogPage,
)
from cipherfleet.contract.statements import DelegationStatement, Right, Signed
from cipherfleet.kmc import delegations, escrow
from cipherfleet.kmc.pace import Pace
from tests.unit.kmc.world import TestConsumer, TestVcm, World, start_vcm

KEY = new_key_id()
GIVEN = Grant((Right.ENCRYPT,), (KEY,))
NAME = DelegationName(ApplicationName("lead"), ApplicationName("temp"), KEY)


class Desk:
    """A consumer with a VCM and two applications, one of which delegates."""

    def __init__(self, world: World, consumer: TestConsumer, vcm: TestVcm) -> None:
        self.world, self.consumer, self.vcm = world, consumer, vcm
        self.key = new_key()
        self.signer = signing.LocalSigner(self.key)

    async def told(self, number: int = 1, *, signer: signing.LocalSigner | None = None, **changes: Any) -> Signed:
        by = signer or self.signer
        made = DelegationStatement(self.consumer.name, NAME.delegator, NAME.delegate, KEY, (GIVEN,), number, by.public_key)
        return await signing.sign(structs.replace(made, **changes), by)

    async def send(self, statement: Signed) -> LogEntry:
        receipt = await self.vcm.caller.call("POST", "/v1/delegations", DelegationRequest(statement), reply=EscrowReceipt)
        (entry,) = receipt.log
        return entry

    async def kept(self, *names: DelegationName) -> tuple[Signed, ...]:
        asked = DelegationsRequest(names or (NAME,))
        return (await self.vcm.caller.call("POST", "/v1/escrow/delegations", asked, reply=DelegationsFound)).statements


@pytest.fixture
async def desk(world: World) -> Desk:
    alice = await world.enrol()
    vcm = await start_vcm(world, alice, await alice.plug_in())
    made = Desk(world, alice, vcm)
    await alice.apply("lead", key=made.key, rights=(), grants=(Grant((Right.ENCRYPT,), (KEY,), delegate=True),))
    await alice.apply("temp")
    return made


async def test_it_is_kept_logged_told_and_audited(desk: Desk) -> None:
    other = await start_vcm(desk.world, desk.consumer)
    given = await desk.told()
    entry = await desk.send(given)
    assert (entry.subject, entry.digest) == (NAME.subject(1), statement_digest(given))
    assert await desk.kept() == (given,)
    while await other.channel.next(EscrowChanged) != EscrowChanged(entry.sequence):
        pass
    taken = await desk.told(2, grants=(), revoked=True)
    await desk.send(taken)
    assert await desk.kept() == (taken,)
    page = await desk.vcm.caller.call("GET", "/v1/escrow?after=0", reply=LogPage)
    assert [e.subject for e in page.log if e.subject.startswith("delegation/")] == [NAME.subject(1), NAME.subject(2)]
    found = await desk.vcm.caller.call("GET", f"/v1/audit?key={KEY}", reply=AuditLog)
    actor = f"application/lead for application/temp via {desk.vcm.id}"
    assert [(e.event, e.actor) for e in found.entries] == [("key-delegated", actor), ("key-delegation-revoked", actor)]


async def test_it_survives_a_restart(desk: Desk) -> None:
    given = await desk.told(5)
    await desk.send(given)
    await desk.world.restart()
    vcm = await start_vcm(desk.world, desk.consumer, await desk.consumer.plug_in())
    again = Desk(desk.world, desk.consumer, vcm)
    again.key, again.signer = desk.key, desk.signer
    assert await again.kept() == (given,)
    for number in (1, 5):
        with pytest.raises(StatementReplayed):
            await again.send(await again.told(number))


async def test_what_is_not_the_delegators_own_word_is_refused(desk: Desk) -> None:
    good, rogue = await desk.told(), signing.LocalSigner(new_key())
    bad: list[tuple[Signed, type[CipherfleetError]]] = [
        (structs.replace(good, signatures=()), StatementForged),
        (structs.replace(good, signatures=good.signatures * 2), StatementForged),
        (structs.replace(good, kind="cipherfleet/application/v1"), StatementForged),
        (structs.replace(good, payload=good.payload.replace(b"temp", b"shop")), StatementForged),
        (structs.replace(good, payload=good.payload + b" " * 20_000), StatementForged),
        (structs.replace(good, payload=good.payload[:-1]), Malformed),
        (structs.replace(good, payload=b""), Malformed),
        (await desk.told(signer=rogue), StatementForged),
        (await desk.told(delegator="temp", delegate="lead"), StatementForged),
        (await desk.told(consumer="bob"), ForeignConsumer),
        (await desk.told(delegate="nobody"), ApplicationUnknown),
        (await desk.told(delegator="nobody"), ApplicationUnknown),
        (await desk.told(delegate="lead"), Malformed),
        (await desk.told(grants=()), Malformed),
        (await desk.told(grants=(structs.replace(GIVEN, keys=()),)), Malformed),
        (await desk.told(grants=(structs.replace(GIVEN, delegate=True),)), Malformed),
        (await desk.told(revoked=True), Malformed),
        (await desk.told(grants=(), revoked=True), ApplicationUnknown),
        (await desk.told(0), Malformed),
        (await desk.told(2**53 + 1), Malformed),
        (await desk.told(delegations.MAX_STEP + 1), Malformed),
    ]
    for statement, refused in bad:
        with pytest.raises(refused):
            await desk.send(statement)
    assert await desk.kept() == ()
    await desk.consumer.apply("lead", revoked=True)
    with pytest.raises(StatementForged):
        await desk.send(good)


async def test_there_is_an_end_to_them(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegations, "MAX_PER_DELEGATOR", 1)
    await desk.consumer.apply("shop")
    await desk.send(await desk.told(1))
    with pytest.raises(LimitReached):
        await desk.send(await desk.told(2, delegate="shop"))
    await desk.send(await desk.told(3))  # one that is there may change
    monkeypatch.setattr(desk.world.kmc.delegations, "_pace", Pace(0.001, 1))
    await desk.send(await desk.told(4))
    with pytest.raises(LimitReached):
        await desk.send(await desk.told(5))
    with pytest.raises(Malformed):
        await desk.kept(*[NAME] * (MAX_STATEMENT_NAMES + 1))


async def test_the_log_keeps_room_for_the_ukeys_word(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegations, "STATEMENT_ENTRIES", desk.world.settings.changes_per_consumer - 2)
    with pytest.raises(LimitReached):
        await desk.send(await desk.told())
    assert escrow.STATEMENT_ENTRIES == 1024
    await desk.consumer.apply("lead", revoked=True)


async def test_others_do_not_reach_them(desk: Desk) -> None:
    given = await desk.told()
    await desk.send(given)
    bob = await desk.world.enrol("bob")
    theirs = Desk(desk.world, bob, await start_vcm(desk.world, bob, await bob.plug_in()))
    assert await theirs.kept() == ()
    with pytest.raises(ForeignConsumer):
        await theirs.send(await desk.told(2))
    idle = Desk(desk.world, desk.consumer, await start_vcm(desk.world, desk.consumer))
    for refused in (idle.send(await desk.told(2)), idle.kept()):
        with pytest.raises(ServiceOff):
            await refused
    with pytest.raises(NotPermitted):
        await desk.consumer.terminal().call("POST", "/v1/delegations", DelegationRequest(given))
