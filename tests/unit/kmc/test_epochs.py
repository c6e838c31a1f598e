"""A new epoch at the KMC: the consumer's word, for exactly the point where the escrow stands, once."""

from functools import partial
from typing import Any

import pytest

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.contract.errors import CipherfleetError, ForeignConsumer, StateConflict, StatementForged, StatementReplayed
from cipherfleet.contract.escrow import LogEntry, Seen, extend, statement_digest
from cipherfleet.contract.kmc_api import EpochRequest, EpochStatements, LogPage
from cipherfleet.contract.statements import CheckpointStatement, EpochStatement
from cipherfleet.kmc import store
from cipherfleet.kmc.escrow import point_of
from tests.unit.kmc.world import TestConsumer, World


async def where(world: World, consumer: TestConsumer) -> Seen:
    return point_of(await world.database.read(partial(store.get_consumer, name=consumer.name)))


async def statement(world: World, alice: TestConsumer, **changes: Any) -> EpochStatement:
    alice.sequence += 1
    there = await where(world, alice)
    values = {
        "consumer": alice.name,
        "new_epoch": there.epoch + 1,
        "sequence": alice.sequence,
        "seen_epoch": there.epoch,
        "seen_sequence": there.sequence + 9,
        "seen_head": b"s" * 32,
        "accepted_epoch": there.epoch,
        "accepted_sequence": there.sequence,
        "accepted_head": there.head,
    }
    return EpochStatement(**{**values, **changes})


async def test_a_new_epoch_is_an_entry_of_the_log(world: World) -> None:
    alice = await world.enrol()
    await alice.application()
    before = await where(world, alice)
    signed = await signing.sign(await statement(world, alice), alice.signer)
    page = await alice.terminal().call("POST", "/v1/epochs", EpochRequest(signed), reply=LogPage)
    entry = LogEntry(before.sequence + 1, "epoch/2@2", statement_digest(signed))
    assert page.log == (entry,)
    assert page.checkpoint is not None
    said = signing.verify(page.checkpoint, CheckpointStatement, [world.center.signer.public_key])
    assert Seen(said.epoch, said.sequence, said.head) == Seen(2, entry.sequence, extend(before.head, entry)) == await where(world, alice)
    assert (await alice.terminal().call("GET", "/v1/epochs", reply=EpochStatements)).statements == (signed,)
    assert ("restore-accepted", "ok") in await world.audit_lines("alice")
    with pytest.raises(StatementReplayed):
        await alice.terminal().call("POST", "/v1/epochs", EpochRequest(signed), reply=LogPage)
    await alice.application("other")  # and goes on
    assert (await where(world, alice)).epoch == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"new_epoch": 1}, StateConflict),
        ({"new_epoch": 2**31}, StateConflict),
        ({"seen_epoch": 2}, StateConflict),
        ({"accepted_sequence": 0}, StateConflict),
        ({"accepted_head": b"x" * 32}, StateConflict),
        ({"accepted_epoch": 2}, StateConflict),
        ({"sequence": 0}, StatementReplayed),
        ({"consumer": "bob"}, ForeignConsumer),
    ],
)
async def test_a_statement_that_does_not_fit_begins_nothing(world: World, changes: dict[str, Any], error: type[CipherfleetError]) -> None:
    alice = await world.enrol()
    await alice.application()
    before = await where(world, alice)
    signed = await signing.sign(await statement(world, alice, **changes), alice.signer)
    with pytest.raises(error):
        await alice.terminal().call("POST", "/v1/epochs", EpochRequest(signed), reply=LogPage)
    assert await where(world, alice) == before


async def test_nobody_else_begins_an_epoch(world: World) -> None:
    alice, bob = await world.enrol(), await world.enrol("bob")
    for signer in (bob.signer, signing.LocalSigner(new_key()), world.center.signer):
        signed = await signing.sign(await statement(world, alice), signer)
        with pytest.raises(StatementForged):
            await alice.terminal().call("POST", "/v1/epochs", EpochRequest(signed), reply=LogPage)
    ours = await signing.sign(await statement(world, alice), alice.signer)
    with pytest.raises(StatementForged):
        await bob.terminal().call("POST", "/v1/epochs", EpochRequest(ours), reply=LogPage)
    assert (await where(world, alice)).epoch == 1
