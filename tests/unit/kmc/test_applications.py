"""Applications: only the Ukey signs them in; forged, replayed, foreign and late statements are refused."""

import secrets

import pytest
from msgspec import structs

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import check_chain, identity_of, make_request, new_key, public_key_der, serial_of
from cipherfleet.contract.errors import (
    ApplicationUnknown,
    CipherfleetError,
    ConsumerUnknown,
    ForeignConsumer,
    HsmUnavailable,
    LimitReached,
    Malformed,
    NotPermitted,
    PolicyRefused,
    SignatureInvalid,
    StatementExpired,
    StatementForged,
    StatementReplayed,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.kmc_api import ApplicationList, ApplicationReply, ApplicationRequest, CertificatesRevoked, EscrowChanged
from cipherfleet.contract.statements import ApplicationStatement, CheckpointStatement, LoginStatement, Right, Signed
from cipherfleet.kmc import applications
from tests.unit.kmc.world import TestConsumer, World, start_vcm


async def listed(world: World, query: str = "") -> dict[str, str]:
    found = await (await world.operator()).call("GET", f"/v1/applications{query}", reply=ApplicationList)
    return {f"{a.consumer}/{a.name}": a.state for a in found.applications}


async def test_an_application_is_signed_in(world: World) -> None:
    alice = await world.enrol()
    chain = await alice.application("shop", not_after=int(world.clock()) + 1000)
    leaf = check_chain(chain.chain, chain.trust)
    assert identity_of(leaf) == Identity(Role.APPLICATION, "shop", alice.name)
    assert chain.trust == alice.reply.domain
    assert abs(leaf.not_valid_after_utc.timestamp() - world.clock() - 1000) < 3
    found = await (await world.operator()).call("GET", "/v1/applications", reply=ApplicationList)
    (entry,) = found.applications
    assert (entry.name, entry.state, entry.rights, entry.serial) == ("shop", "active", (Right.ENCRYPT, Right.DECRYPT), serial_of(leaf))
    assert ("application-signed-in", "ok") in await world.audit_lines("alice")


async def test_states(world: World) -> None:
    alice, bob = await world.enrol(), await world.enrol("bob")
    await alice.application("short", not_after=int(world.clock()) + 10)
    await alice.application("gone")
    await bob.application("shop")
    await (await world.operator()).call("POST", "/v1/applications/alice/gone/revoke")
    world.clock.ahead = 20
    assert await listed(world) == {"alice/gone": "revoked", "alice/short": "expired", "bob/shop": "active"}
    assert await listed(world, "?consumer=bob") == {"bob/shop": "active"}
    with pytest.raises(Malformed):
        await listed(world, "?consumer=Not%20A%20Name")


async def test_the_operator_revokes(world: World) -> None:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    vcm = await start_vcm(world, alice, terminal)
    chain = await alice.application()
    assert isinstance(await vcm.channel.next(EscrowChanged), EscrowChanged)
    operator = await world.operator()
    for _ in range(2):
        await operator.call("POST", "/v1/applications/alice/shop/revoke")
    serial = serial_of(check_chain(chain.chain, chain.trust))
    assert await vcm.channel.next(CertificatesRevoked) == CertificatesRevoked((serial,))
    assert await vcm.join() == CertificatesRevoked((serial,))  # and whoever connects later learns it first
    for path in ("alice/other", "bob/shop"):
        with pytest.raises(ApplicationUnknown):
            await operator.call("POST", f"/v1/applications/{path}/revoke")
    await alice.application()  # the consumer's next statement stands again
    assert await listed(world) == {"alice/shop": "active"}


async def test_the_ukey_signs_out(world: World) -> None:
    alice = await world.enrol()
    chain = await alice.application()
    statement = await alice.statement(b"", revoked=True)
    reply = await alice.terminal().call("POST", "/v1/applications", ApplicationRequest(statement, b""), reply=ApplicationReply)
    assert reply.chain.chain == b""
    assert serial_of(check_chain(chain.chain, chain.trust)) in world.center.registry.revoked_of(alice.name)
    assert await listed(world) == {"alice/shop": "revoked"}
    unknown = await alice.statement(b"", "other", revoked=True)
    with pytest.raises(ApplicationUnknown):
        await alice.terminal().call("POST", "/v1/applications", ApplicationRequest(unknown, b""), reply=ApplicationReply)


async def test_the_reply_shows_that_the_statement_is_in_the_log(world: World) -> None:
    alice = await world.enrol()
    await alice.application("shop")
    seen = await world.kmc.escrow.sequence(alice.name)
    reply = await alice.apply("billing", since=seen)
    (entry,) = reply.log
    assert (entry.sequence, entry.subject) == (seen + 1, "application/billing@2")
    checkpoint = signing.verify(reply.checkpoint, CheckpointStatement, [alice.reply.kmc_signing_key])
    assert checkpoint.sequence == seen + 1
    for since, count in ((-(2**70), 3), (2**62, 0)):
        assert len((await alice.apply("billing", since=since)).log) == count


async def test_a_newer_statement_replaces_the_older_certificate(world: World) -> None:
    alice = await world.enrol()
    first, second = await alice.application(), await alice.application(rights=(Right.SHOW,))
    revoked = world.center.registry.revoked_of(alice.name)
    assert [serial_of(check_chain(c.chain, c.trust)) in revoked for c in (first, second)] == [True, False]


async def test_wrong_statements(world: World) -> None:
    alice, bob = await world.enrol(), await world.enrol("bob")
    key = new_key()
    spki, csr = public_key_der(key.public_key()), make_request(key, Identity(Role.APPLICATION, "shop", alice.name))
    good = await alice.statement(spki)
    decoded = signing.verify(good, ApplicationStatement, [alice.signer.public_key])
    other, now = new_key(), int(world.clock())

    async def signed(**changes: object) -> Signed:
        return await signing.sign(structs.replace(decoded, **changes), alice.signer)

    wrong: list[tuple[Signed, bytes, type[CipherfleetError]]] = [
        (await signing.sign(decoded, bob.signer), csr, StatementForged),
        (await signing.sign(decoded, signing.LocalSigner(other)), csr, StatementForged),
        (structs.replace(good, signatures=()), csr, StatementForged),
        (structs.replace(good, payload=good.payload.replace(b"encrypt", b"MANAGE!")), csr, StatementForged),
        (structs.replace(good, kind=LoginStatement.KIND), csr, StatementForged),
        (await signing.countersign(good, bob.signer), csr, StatementForged),
        (good, make_request(other, Identity(Role.APPLICATION, "shop", alice.name)), StatementForged),
        (await signed(consumer="bob"), csr, ForeignConsumer),
        (await signed(sequence=0), csr, StatementReplayed),
        (await signed(sequence=-5), csr, StatementReplayed),
        (await signed(sequence=2**62 + 1), csr, StatementReplayed),
        (await signed(not_after=now), csr, StatementExpired),
        (await signed(not_after=0), csr, StatementExpired),
        (await signed(not_after=now + 830 * 86400), csr, PolicyRefused),
        (await signed(rights=()), csr, Malformed),
        (await signed(rights=(Right.SHOW, Right.SHOW)), csr, Malformed),
        (await signed(name="Not A Name"), csr, Malformed),
        (good, b"garbage", Malformed),
        (good, csr[:-1] + bytes([csr[-1] ^ 1]), SignatureInvalid),
    ]
    for statement, request, error in wrong:
        with pytest.raises(error):
            await alice.terminal().call("POST", "/v1/applications", ApplicationRequest(statement, request), reply=ApplicationReply)
    with pytest.raises(StatementForged):  # bob's terminal with alice's statement
        await bob.terminal().call("POST", "/v1/applications", ApplicationRequest(good, csr), reply=ApplicationReply)
    assert await listed(world) == {}
    await alice.terminal().call("POST", "/v1/applications", ApplicationRequest(good, csr), reply=ApplicationReply)
    with pytest.raises(StatementReplayed):
        await alice.terminal().call("POST", "/v1/applications", ApplicationRequest(good, csr), reply=ApplicationReply)
    outcomes = [outcome for event, outcome in await world.audit_lines("alice") if event == "POST /v1/applications"]
    assert StatementReplayed.code in outcomes
    assert StatementForged.code in outcomes


async def test_nobody_else_signs_in(world: World) -> None:
    alice = await world.enrol()
    key = new_key()
    request = ApplicationRequest(await alice.statement(public_key_der(key.public_key())), make_request(key, Identity(Role.KMC, "kmc")))
    for caller in (await world.operator(), await world.management(), await world.machine()):
        with pytest.raises(NotPermitted):
            await caller.call("POST", "/v1/applications", request, reply=ApplicationReply)


async def test_a_pending_consumer_signs_nothing_in(world: World) -> None:
    alice: TestConsumer = await world.enrol(confirm=False)
    with pytest.raises(ConsumerUnknown):
        await alice.application()


async def test_applications_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applications, "MAX_APPLICATIONS", 1)
    alice = await world.enrol()
    await alice.application("one")
    with pytest.raises(LimitReached):
        await alice.application("two")
    await alice.application("one")


async def test_an_hsm_that_is_away_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = await world.enrol()

    async def away(handle: object, data: bytes) -> bytes:
        raise HsmUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.hsm, "sign", away)
        with pytest.raises(HsmUnavailable):
            await alice.application()
    assert await listed(world) == {}
    assert (await world.kmc.escrow.sequence(alice.name)) == 0
    alice.sequence -= 1  # the statement was never taken
    await alice.application()


async def test_sequences_survive_a_restart(world: World) -> None:
    alice = await world.enrol()
    await alice.application()
    await world.restart()
    alice.sequence = 0
    with pytest.raises(StatementReplayed):
        await alice.application(secrets.token_hex(4))
