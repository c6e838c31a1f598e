"""A consumer's policy at the KMC: the newest that a Ukey signed, once, and nobody else's word."""

from typing import Any

import msgspec
import pytest

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.contract.errors import CipherfleetError, ForeignConsumer, Malformed, StateConflict, StatementForged, StatementReplayed
from cipherfleet.contract.escrow import statement_digest
from cipherfleet.contract.kmc_api import LogPage, PolicyReply, PolicyRequest, UkeyReply, UkeyStatements
from cipherfleet.contract.policy import BUILT_IN, Policy
from cipherfleet.contract.statements import ApplicationStatement, PolicyStatement, Signed
from tests.unit.kmc.test_ukeys import Spare
from tests.unit.kmc.world import TestConsumer, World


async def statement(alice: TestConsumer, *, by: signing.Signer | None = None, **changes: Any) -> Signed:
    alice.sequence += 1
    values = {"consumer": alice.name, "policy": BUILT_IN["fips"], "epoch": 1, "sequence": alice.sequence, **changes}
    return await signing.sign(PolicyStatement(**values), by or alice.signer)


async def submit(alice: TestConsumer, signed: Signed) -> PolicyReply:
    return await alice.terminal().call("POST", "/v1/policies", PolicyRequest(signed), reply=PolicyReply)


async def shown(alice: TestConsumer) -> UkeyStatements:
    return await alice.terminal().call("GET", "/v1/ukeys/statements", reply=UkeyStatements)


async def test_the_newest_is_kept_in_the_log_and_over_a_restart(world: World) -> None:
    alice, bob = await world.enrol(), await world.enrol("bob")
    assert (await shown(alice)).policy is None
    first = await statement(alice)
    reply = await submit(alice, first)
    assert [(entry.subject, entry.digest) for entry in reply.log] == [("policy/fips@1", statement_digest(first))]
    await alice.application()
    second = await statement(alice, policy=Policy("own", deny=("SM4-*",)))
    reply = await submit(alice, second)
    assert [entry.subject for entry in reply.log] == ["policy/fips@1", "application/shop@2", "policy/own@3"]
    await world.restart()
    told = await shown(alice)
    assert (told.policy, told.newest, told.statements) == (second, 3, ())
    assert (await shown(bob)).policy is None
    with pytest.raises(StatementReplayed):
        await alice.apply(sequence=3)  # one series
    assert ("policy-set", "ok") in await world.audit_lines("alice")


async def test_an_old_statement_is_not_taken_again(world: World) -> None:
    alice = await world.enrol()
    lax, strict = await statement(alice, policy=BUILT_IN["international"]), await statement(alice)
    await submit(alice, lax)
    await submit(alice, strict)
    await world.restart()
    for old in (lax, strict):
        with pytest.raises(StatementReplayed):
            await submit(alice, old)
    assert (await shown(alice)).policy == strict


async def test_a_spare_sets_it_too_and_a_revoked_one_does_not(world: World) -> None:
    alice = await world.enrol()
    spare = Spare(alice)
    await spare.submit()
    theirs = await statement(alice, by=spare.signer)
    await submit(alice, theirs)
    assert (await shown(alice)).policy == theirs
    kept_back = await statement(alice, by=spare.signer, policy=BUILT_IN["international"])
    await alice.terminal().call("POST", "/v1/ukeys", await spare.request(revoked=True), reply=UkeyReply)
    for signed in (kept_back, await statement(alice, by=spare.signer)):
        with pytest.raises(StatementForged):
            await submit(alice, signed)
    assert (await shown(alice)).policy == theirs


async def test_what_is_refused(world: World) -> None:
    alice, bob = await world.enrol(), await world.enrol("bob")
    good = await statement(alice)
    another = await alice.statement(b"key")
    bad = b'{"consumer":"alice","policy":{"name":"x","base":"nist"},"epoch":1,"sequence":9}'
    unknown = good.payload.replace(b'"epoch"', b'"more":1,"epoch"')
    large = Policy("own", allow=tuple(f"{number:064}" for number in range(64)))
    refused: list[tuple[Signed, type[CipherfleetError]]] = [
        (await statement(alice, by=bob.signer), StatementForged),
        (await statement(alice, by=signing.LocalSigner(new_key())), StatementForged),
        (await statement(alice, consumer=bob.name), ForeignConsumer),
        (await statement(alice, sequence=0), StatementReplayed),
        (await statement(alice, sequence=2**63 - 1), StatementReplayed),
        (await statement(alice, epoch=0), StateConflict),
        (await statement(alice, epoch=2), StateConflict),
        (await statement(alice, policy=msgspec.structs.replace(large, allow=large.allow * 2)), Malformed),
        (await signing.countersign(good, bob.signer), StatementForged),
        (msgspec.structs.replace(good, payload=good.payload[:-2]), StatementForged),
        (msgspec.structs.replace(good, signatures=()), StatementForged),
        (await signing.countersign(Signed(PolicyStatement.KIND, good.payload[:-2]), alice.signer), Malformed),
        (await signing.countersign(Signed(PolicyStatement.KIND, good.payload + b" " * 33_000), alice.signer), StatementForged),
        (await signing.countersign(Signed(PolicyStatement.KIND, bad), alice.signer), Malformed),
        (await signing.countersign(Signed(PolicyStatement.KIND, unknown), alice.signer), Malformed),
        (another, StatementForged),
        (Signed(PolicyStatement.KIND, another.payload, another.signatures), StatementForged),
    ]
    assert another.kind == ApplicationStatement.KIND
    for signed, error in refused:
        with pytest.raises(error):
            await submit(alice, signed)
    with pytest.raises(StatementForged):
        await submit(bob, good)  # what alice signed is not bob's
    page = await alice.terminal().call("GET", "/v1/escrow?after=0", reply=LogPage)
    assert page.log == ()
    await submit(alice, await statement(alice, policy=large))
