"""Challenges, identity requests, tokens, authorisations and step e: each hostile or late attempt by its own error."""

import secrets

import pytest
from cryptography import x509
from msgspec import structs

from cipherfleet.channel import codec, signing
from cipherfleet.channel.certificates import check_chain, identity_of, make_request, new_key
from cipherfleet.contract.errors import (
    CardUntrusted,
    ChallengeReplayed,
    ChallengeUnknown,
    CipherfleetError,
    ConsumerUnknown,
    Exists,
    ForeignConsumer,
    LimitReached,
    Malformed,
    NotPermitted,
    SignatureInvalid,
    StatementForged,
    TokenStale,
    Unsupported,
    VcmUnknown,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, new_card_id, new_token_id, new_vcm_id, token_id_of
from cipherfleet.contract.kmc_api import Challenge, ChallengeRequest, IdentityReply, VcmAuthorisation, VcmKmcState
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.statements import IdentityRequest, LoginStatement, Purpose, Signed
from cipherfleet.kmc import challenges, identity, store
from cipherfleet.kmc.challenges import Challenges
from tests.unit.kmc.world import TestVcm, World, start_vcm, transport_key

ALICE, BOB = ConsumerId("alice"), ConsumerId("bob")


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# -- challenges --------------------------------------------------------------------------------------------------------


def test_a_challenge_is_answered_once() -> None:
    ours = Challenges(30)
    nonce = ours.new(ALICE)
    ours.redeem(nonce, ALICE)
    with pytest.raises(ChallengeReplayed):
        ours.redeem(nonce, ALICE)


def test_a_challenge_is_one_consumers() -> None:
    ours = Challenges(30)
    nonce = ours.new(ALICE)
    with pytest.raises(ChallengeUnknown):
        ours.redeem(nonce, BOB)
    with pytest.raises(ChallengeUnknown):
        ours.redeem(bytes(32), ALICE)
    ours.redeem(nonce, ALICE)


def test_a_challenge_has_its_time() -> None:
    time = Time()
    ours = Challenges(30, clock=time)
    early = ours.new(ALICE)
    time.now = 29
    late = ours.new(ALICE)
    time.now = 30
    with pytest.raises(ChallengeUnknown):
        ours.redeem(early, ALICE)
    ours.redeem(late, ALICE)


def test_challenges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Challenges(30)
    first = ours.new(ALICE)
    for _ in range(challenges.MAX_PER_CONSUMER):
        ours.new(ALICE)
    with pytest.raises(ChallengeUnknown):
        ours.redeem(first, ALICE)
    monkeypatch.setattr(challenges, "MAX_ALL", challenges.MAX_PER_CONSUMER)
    with pytest.raises(LimitReached):
        ours.new(BOB)


# -- steps 1 and 2 -----------------------------------------------------------------------------------------------------


async def test_a_token_of_its_own_for_each_request(world: World) -> None:
    alice, management = await world.enrol(), await world.management()
    request = await alice.identity_request(management)
    first = await management.call("POST", "/v1/identity/verify", request, reply=IdentityReply)
    second = await alice.token(management)
    assert len(first.token) == 32
    assert first.mark == identity.mark_of(first.token)
    assert len({first.token, second.token, first.mark, second.mark}) == 4
    nonce = signing.verify(request, IdentityRequest, [alice.signer.public_key]).nonce
    assert first.token_id == token_id_of(nonce)


async def test_a_replayed_request(world: World) -> None:
    alice, management = await world.enrol(), await world.management()
    request = await alice.identity_request(management)
    await management.call("POST", "/v1/identity/verify", request, reply=IdentityReply)
    with pytest.raises(ChallengeReplayed):
        await management.call("POST", "/v1/identity/verify", request, reply=IdentityReply)
    assert ("identity-verified", ChallengeReplayed.code) in await world.audit_lines("alice")


async def test_a_token_that_was_revoked_before_it_was_made_is_never_made(world: World) -> None:
    """Who asked for it gave up, and had it revoked by its name while the request was still on its way."""
    alice, management = await world.enrol(), await world.management()
    request = await alice.identity_request(management)
    nonce = codec.decode(request.payload, IdentityRequest).nonce
    await management.call("DELETE", f"/v1/tokens/{token_id_of(nonce)}")
    with pytest.raises(TokenStale):
        await management.call("POST", "/v1/identity/verify", request, reply=IdentityReply)
    assert await world.database.read(lambda connection: store.count_tokens(connection, alice.name)) == 0
    await alice.token(management)  # the next one is


async def test_wrong_requests(world: World) -> None:
    alice, bob, management = await world.enrol(), await world.enrol("bob"), await world.management()
    good = await alice.identity_request(management)
    statement = signing.verify(good, IdentityRequest, [alice.signer.public_key])
    other = signing.LocalSigner(new_key())
    bobs = await management.call("POST", "/v1/identity/challenges", ChallengeRequest(BOB), reply=Challenge)

    async def signed(**changes: object) -> Signed:
        return await signing.sign(structs.replace(statement, **changes), alice.signer)

    wrong: list[tuple[Signed, type[CipherfleetError]]] = [
        (await signing.sign(statement, other), StatementForged),
        (await signing.sign(statement, bob.signer), StatementForged),
        (structs.replace(good, signatures=()), StatementForged),
        (structs.replace(good, payload=good.payload + b" "), StatementForged),
        (structs.replace(good, kind=LoginStatement.KIND), StatementForged),
        (structs.replace(good, payload=bytes(70_000)), StatementForged),
        (structs.replace(good, payload=b"garbage"), Malformed),
        (await signed(nonce=secrets.token_bytes(32)), ChallengeUnknown),
        (await signed(nonce=bobs.nonce), ChallengeUnknown),
        (await signed(consumer=BOB), StatementForged),
        (await signed(consumer=ConsumerId("nobody")), ConsumerUnknown),
        (await signed(vcm=new_vcm_id()), Malformed),
        (await signed(purpose=Purpose.DELETE_VCM), Malformed),
    ]
    for request, error in wrong:
        with pytest.raises(error):
            await management.call("POST", "/v1/identity/verify", request, reply=IdentityReply)
    await management.call("POST", "/v1/identity/verify", good, reply=IdentityReply)  # none of them used the challenge up


async def test_no_challenge_for_who_is_not_enrolled(world: World) -> None:
    await world.enrol("pending", confirm=False)
    management = await world.management()
    for name in ("pending", "nobody"):
        with pytest.raises(ConsumerUnknown):
            await management.call("POST", "/v1/identity/challenges", ChallengeRequest(ConsumerId(name)), reply=Challenge)
    with pytest.raises(Malformed):
        await management.call("POST", "/v1/identity/challenges", {"consumer": "../etc"}, reply=Challenge)


async def test_tokens_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MAX_TOKENS", 1)
    alice, management = await world.enrol(), await world.management()
    await alice.token(management)
    with pytest.raises(LimitReached):
        await alice.token(management)


async def test_a_foreign_vcm_is_not_deleted(world: World) -> None:
    alice, bob, management = await world.enrol(), await world.enrol("bob"), await world.management()
    vcm = await start_vcm(world, alice)
    request = await bob.identity_request(management, Purpose.DELETE_VCM, vcm.id)
    with pytest.raises(ForeignConsumer):
        await management.call("POST", "/v1/identity/verify", request, reply=IdentityReply)
    assert (await world.kmc.service.state(vcm.id)).connected


# -- steps 4 and e -----------------------------------------------------------------------------------------------------


async def test_authorisations(world: World) -> None:
    alice, bob, management = await world.enrol(), await world.enrol("bob"), await world.management()
    mine, other, bobs = await alice.token(management), await alice.token(management), await bob.token(management)
    assert mine.token_id is not None
    assert other.token_id is not None
    assert bobs.token_id is not None
    vcm, order = new_vcm_id(), VcmAuthorisation(ALICE, MachineId("m1"), mine.token_id, "127.0.0.1:8443")
    for _ in range(2):  # the same again is the same
        await management.call("PUT", f"/v1/vcms/{vcm}", order)
    state = await management.call("GET", f"/v1/vcms/{vcm}", reply=VcmKmcState)
    assert state == VcmKmcState(certified=False, connected=False, released=False, serving=False)
    wrong: list[tuple[str, VcmAuthorisation, type[CipherfleetError]]] = [
        (new_vcm_id(), order, Exists),
        (vcm, structs.replace(order, token_id=other.token_id), Exists),
        (vcm, structs.replace(order, machine=MachineId("m2")), Exists),
        (vcm, structs.replace(order, address="127.0.0.9:8443"), Exists),
        (new_vcm_id(), structs.replace(order, token_id=bobs.token_id), ForeignConsumer),
        (new_vcm_id(), structs.replace(order, token_id=new_token_id()), TokenStale),
        (new_vcm_id(), structs.replace(order, consumer=ConsumerId("nobody")), ConsumerUnknown),
        (new_vcm_id(), structs.replace(order, token_id=other.token_id, address="somewhere:8443"), Malformed),
        ("vcm-1", order, Malformed),
    ]
    for id_, bad, error in wrong:
        with pytest.raises(error):
            await management.call("PUT", f"/v1/vcms/{id_}", bad)
    with pytest.raises(VcmUnknown):
        await management.call("GET", f"/v1/vcms/{new_vcm_id()}", reply=VcmKmcState)


async def test_step_e(world: World) -> None:
    alice, machine = await world.enrol(), await world.machine()
    vcm = TestVcm(world, alice)
    reply = await vcm.put_card(machine)
    assert reply.kmc_signing_key == alice.reply.kmc_signing_key
    assert identity_of(check_chain(reply.chain.chain, alice.reply.root)) == Identity(Role.CARD, vcm.card)
    await vcm.authorise(await world.management(), address="127.0.0.7:8443")
    await vcm.certify(machine)
    first = vcm.chain
    await vcm.certify(machine)  # its answer got lost: once more, the earlier one is void
    leaf = check_chain(vcm.chain.chain, alice.reply.root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.7"]
    assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds() <= world.settings.vcm_certificate_s + 302
    with pytest.raises(CipherfleetError, match="revoked"):
        await vcm.call_with(first).call("GET", "/v1/escrow")
    await vcm.join()
    with pytest.raises(TokenStale):  # a token is used up once its VCM has joined
        await vcm.certify(machine)


async def test_wrong_certificate_requests(world: World) -> None:
    alice, machine, second = await world.enrol(), await world.machine(), await world.machine(MachineId("m2"))
    vcm, other = TestVcm(world, alice), TestVcm(world, alice)
    await other.put_card(second, MachineId("m2"))
    await vcm.put_card(machine)
    management = await world.management()
    await vcm.authorise(management)
    await other.authorise(management)
    good, path = vcm.certificate_request(), f"/v1/vcms/{vcm.id}/certificate"
    broken = bytearray(good.csr)
    broken[-1] ^= 1
    wrong: list[tuple[object, type[CipherfleetError]]] = [
        (structs.replace(good, token=bytes(32)), TokenStale),
        (structs.replace(good, token=b""), TokenStale),
        (structs.replace(good, token=other.token.token), TokenStale),
        (structs.replace(good, token=good.token[:-1]), TokenStale),
        (structs.replace(good, card=other.card), CardUntrusted),
        (structs.replace(good, card=new_card_id(MachineId("m1"))), CardUntrusted),
        (structs.replace(good, csr=b"garbage"), Malformed),
        (structs.replace(good, csr=bytes(20_000)), Malformed),
        (structs.replace(good, csr=bytes(broken)), SignatureInvalid),
        (structs.replace(good, csr=make_request(transport_key(), Identity(Role.VCM, vcm.id, ALICE))), Unsupported),
        ({"csr": ""}, Malformed),
    ]
    for request, error in wrong:
        with pytest.raises(error):
            await machine.call("POST", path, request, reply=Chain)
    with pytest.raises(NotPermitted):
        await second.call("POST", path, good, reply=Chain)
    with pytest.raises(TokenStale):
        await machine.call("POST", f"/v1/vcms/{new_vcm_id()}/certificate", good, reply=Chain)
    await machine.call("POST", path, good, reply=Chain)


async def test_only_an_authorised_vcm_renews(world: World) -> None:
    alice, management = await world.enrol(), await world.management()
    vcm = await start_vcm(world, alice)
    await world.database.write(lambda connection: store.remove_vcm(connection, vcm.id))
    request = {"csr": vcm.certificate_request().csr, "addresses": []}
    with pytest.raises(VcmUnknown):
        await vcm.caller.call("POST", "/v1/certificate", request, reply=Chain)
    await management.call("DELETE", f"/v1/vcms/{vcm.id}")
