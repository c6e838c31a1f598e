"""Who may do what: statements that the Ukey signed, checked by a real card."""

import time
from collections.abc import AsyncIterator

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from cipherfleet.channel.certificates import new_key
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.computing.vcm_grants import Grants, Logins
from cipherfleet.contract.errors import (
    ApplicationRevoked,
    ApplicationUnknown,
    EscrowRolledBack,
    ForeignConsumer,
    GrantExpired,
    LoginRefused,
    NotPermitted,
    RateLimited,
    ServiceOff,
    StatementExpired,
    StatementForged,
    StatementReplayed,
)
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ApplicationName, KeyId, VcmId, new_key_id, new_vcm_id
from cipherfleet.contract.statements import ApplicationStatement, Right, Signature
from tests.unit.computing.machine.fake_kmc import EPOCH, FakeConsumer, FakeKmc, other_key, peer, signed
from tests.unit.computing.machine.stage import CardOfTests

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def other_form(signature: Signature) -> Signature:
    r, s = decode_dss_signature(signature.value)
    return msgspec.structs.replace(signature, value=encode_dss_signature(r, P256_ORDER - s))


class Doorkeeper:
    """A VCM's grants and logins, with the card behind them."""

    def __init__(self, kmc: FakeKmc, consumer: FakeConsumer, vcm: VcmId, card: RingCard) -> None:
        self.consumer, self.vcm = consumer, vcm
        self.now = time.time()
        self.escrow = Escrow(consumer.name, consumer, kmc.signing_key)
        self.grants = Grants(consumer.name, self.escrow, card, lambda: self.now, label_of=self.label_of)
        self.labels: dict[str, str] = {}
        self.logins = Logins(vcm, consumer.name, card)

    async def label_of(self, key: KeyId) -> str:
        return self.labels[key]

    async def load(self) -> None:
        await self.escrow.load(Seen(EPOCH, len(self.consumer.log), self.consumer.head()))


@pytest.fixture
async def door() -> AsyncIterator[Doorkeeper]:
    kmc = FakeKmc()
    consumer, vcm, card = kmc.consumer("acme"), new_vcm_id(), CardOfTests(kmc)
    vcc = await card.vcc(vcm, consumer, kmc)
    made = Doorkeeper(kmc, consumer, vcm, vcc)
    await made.load()
    yield made
    await vcc.close()
    card.server.close()


async def test_a_right_that_was_granted_may_be_used_and_no_other(door: Doorkeeper) -> None:
    billing = peer(door.consumer.application("billing", (Right.ENCRYPT,)))
    await door.grants.authorise(billing, Right.ENCRYPT)
    with pytest.raises(NotPermitted):
        await door.grants.authorise(billing, Right.DECRYPT)
    door.consumer.calls.clear()
    await door.grants.authorise(billing, Right.ENCRYPT)
    assert door.consumer.calls == []


def granted(door: Doorkeeper, *grants: Grant) -> Peer:
    """An application with grants alone, signed by the Ukey."""
    credentials = door.consumer.domain.credentials(
        Identity(Role.APPLICATION, "billing", door.consumer.name), trust=door.consumer.domain.pem
    )
    one = peer(credentials)
    door.consumer.sequence += 1
    until = int(door.now) + 3600
    name = ApplicationName("billing")
    made = ApplicationStatement(door.consumer.name, name, one.public_key_sha256, (), until, door.consumer.sequence, grants=grants)
    door.consumer.keep("billing", signed(made, door.consumer.ukey))
    return one


async def test_a_grant_of_the_ukey_holds_for_its_key_until_its_end(door: Doorkeeper) -> None:
    key, other = new_key_id(), new_key_id()
    billing = granted(door, Grant((Right.ENCRYPT,), (key,), not_after=int(door.now) + 60), Grant((Right.SIGN,), labels=("b*",), rate=1))
    assert not await door.grants.may_some(billing, Right.ENCRYPT)
    await door.grants.authorise_key(billing, Right.ENCRYPT, key, b"any")
    for refused in (door.grants.authorise(billing, Right.ENCRYPT), door.grants.authorise_key(billing, Right.ENCRYPT, other, b"")):
        with pytest.raises(NotPermitted):
            await refused
    with pytest.raises(NotPermitted):
        await door.grants.may_some(billing, Right.DECRYPT)
    door.labels = {key: "billing", other: "payroll"}
    await door.grants.authorise_key(billing, Right.SIGN, key, b"")
    with pytest.raises(NotPermitted, match="billing may not sign"):
        await door.grants.authorise_key(billing, Right.SIGN, other, b"")
    with pytest.raises(RateLimited):
        await door.grants.authorise_key(billing, Right.SIGN, key, b"")
    door.now += 60
    with pytest.raises(GrantExpired):
        await door.grants.authorise_key(billing, Right.ENCRYPT, key, b"")


async def test_a_grant_that_the_operator_wrote_is_worth_nothing(door: Doorkeeper) -> None:
    domain = door.consumer.domain
    rogue = peer(domain.credentials(Identity(Role.APPLICATION, "rogue", door.consumer.name), trust=domain.pem))
    door.consumer.sequence += 1
    made = ApplicationStatement(
        door.consumer.name,
        ApplicationName("rogue"),
        rogue.public_key_sha256,
        (),
        int(door.now) + 60,
        door.consumer.sequence,
        grants=(Grant((Right.DECRYPT,)),),
    )
    door.consumer.keep("rogue", signed(made, new_key()))
    with pytest.raises(StatementForged):
        await door.grants.may_some(rogue, Right.DECRYPT)
    with pytest.raises(StatementForged):
        await door.grants.authorise_key(rogue, Right.DECRYPT, new_key_id(), b"")


async def test_nothing_is_granted_before_the_escrow_is_loaded(door: Doorkeeper) -> None:
    door.escrow.seen = None
    with pytest.raises(ServiceOff):
        await door.grants.authorise(peer(door.consumer.application("billing")), Right.SHOW)


async def test_a_certificate_alone_is_worth_nothing(door: Doorkeeper) -> None:
    certified = door.consumer.domain.credentials(Identity(Role.APPLICATION, "rogue", door.consumer.name))
    with pytest.raises(ApplicationUnknown):
        await door.grants.authorise(peer(certified), Right.SHOW)


async def test_another_key_under_a_granted_name_is_refused(door: Doorkeeper) -> None:
    billing = door.consumer.application("billing")
    await door.grants.authorise(peer(billing), Right.SHOW)
    with pytest.raises(ApplicationUnknown):
        await door.grants.authorise(peer(other_key(billing, door.consumer.domain)), Right.SHOW)


async def test_signed_in_anew_the_new_key_counts_at_once(door: Doorkeeper) -> None:
    old = door.consumer.application("billing")
    await door.grants.authorise(peer(old), Right.SHOW)
    new = door.consumer.application("billing", (Right.SHOW,))
    await door.grants.authorise(peer(new), Right.SHOW)
    with pytest.raises(ApplicationUnknown):
        await door.grants.authorise(peer(old), Right.SHOW)


async def test_signed_out_is_out(door: Doorkeeper) -> None:
    billing = peer(door.consumer.application("billing"))
    await door.grants.authorise(billing, Right.SHOW)
    door.consumer.keep("billing", door.consumer.statement("billing", billing.public_key_sha256, revoked=True))
    await door.escrow.refresh()
    with pytest.raises(ApplicationRevoked):
        await door.grants.authorise(billing, Right.SHOW)


async def test_a_statement_ends_with_its_time(door: Doorkeeper) -> None:
    billing = peer(door.consumer.application("billing"))
    await door.grants.authorise(billing, Right.SHOW)
    door.now += 3601
    with pytest.raises(StatementExpired):
        await door.grants.authorise(billing, Right.SHOW)


async def test_a_statement_that_the_operator_made_is_forged(door: Doorkeeper) -> None:
    rogue = door.consumer.domain.credentials(Identity(Role.APPLICATION, "rogue", door.consumer.name))
    door.consumer.keep("rogue", door.consumer.statement("rogue", peer(rogue).public_key_sha256, key=new_key()))
    with pytest.raises(StatementForged):
        await door.grants.authorise(peer(rogue), Right.SHOW)


async def test_a_statement_kept_under_another_name_is_refused(door: Doorkeeper) -> None:
    rogue = door.consumer.domain.credentials(Identity(Role.APPLICATION, "rogue", door.consumer.name))
    door.consumer.keep("rogue", door.consumer.statement("billing", peer(rogue).public_key_sha256))
    with pytest.raises(ApplicationUnknown):
        await door.grants.authorise(peer(rogue), Right.SHOW)


async def test_a_login_is_no_grant(door: Doorkeeper) -> None:
    rogue = door.consumer.domain.credentials(Identity(Role.APPLICATION, "rogue", door.consumer.name))
    door.consumer.keep("rogue", door.consumer.login(door.vcm))
    with pytest.raises(Exception, match="application"):
        await door.grants.authorise(peer(rogue), Right.SHOW)


async def test_an_older_statement_in_a_new_envelope_is_a_replay(door: Doorkeeper) -> None:
    billing = peer(door.consumer.application("billing", (Right.SHOW,)))
    await door.grants.authorise(billing, Right.SHOW)
    old = ApplicationStatement(
        door.consumer.name, ApplicationName("billing"), billing.public_key_sha256, tuple(Right), int(time.time()) + 99, 0
    )
    before = list(door.consumer.log)
    door.consumer.keep("billing", signed(old, door.consumer.ukey))
    with pytest.raises(EscrowRolledBack):
        await door.escrow.refresh()
    door.consumer.log[:] = before
    door.consumer.keep("billing", signed(old, door.consumer.ukey), sequence=door.consumer.sequence + 1)
    await door.escrow.refresh()
    with pytest.raises(EscrowRolledBack):
        await door.grants.authorise(billing, Right.DECRYPT)


async def test_a_statement_with_another_signature_over_it_is_no_newer_one(door: Doorkeeper) -> None:
    """ECDSA signatures can be rewritten by anybody: the operator appends the grant again after the signing out."""
    billing = peer(door.consumer.application("billing"))
    grant = door.consumer.statements[ApplicationName("billing")].statement
    door.consumer.keep("billing", door.consumer.statement("billing", bytes(32), (), revoked=True))
    rewritten = msgspec.structs.replace(grant, signatures=(other_form(grant.signatures[0]),))
    log = list(door.consumer.log)
    for sequence in (1, 2):
        door.consumer.log[:] = log
        door.consumer.keep("billing", rewritten, sequence=sequence)
        with pytest.raises(EscrowRolledBack):
            await door.escrow.refresh()
    door.consumer.log[:] = log
    door.consumer.keep("billing", rewritten, sequence=3)
    await door.escrow.refresh()
    with pytest.raises(EscrowRolledBack):
        await door.grants.authorise(billing, Right.SHOW)


async def test_a_grant_carries_one_signature(door: Doorkeeper) -> None:
    billing = door.consumer.domain.credentials(Identity(Role.APPLICATION, "billing", door.consumer.name))
    grant = door.consumer.statement("billing", peer(billing).public_key_sha256)
    door.consumer.keep("billing", msgspec.structs.replace(grant, signatures=grant.signatures * 2))
    with pytest.raises(StatementForged):
        await door.grants.authorise(peer(billing), Right.SHOW)


async def test_other_consumers_and_other_roles_are_not_let_in(door: Doorkeeper) -> None:
    billing = peer(door.consumer.application("billing"))
    foreign = msgspec.structs.replace(billing, identity=msgspec.structs.replace(billing.identity, consumer="rival"))
    with pytest.raises(ForeignConsumer):
        await door.grants.authorise(foreign, Right.SHOW)
    with pytest.raises(NotPermitted):
        await door.grants.authorise(peer(door.consumer.terminal()), Right.SHOW)


# -- logins ------------------------------------------------------------------------------------------------------------


async def test_the_card_confirms_a_login_once(door: Doorkeeper) -> None:
    terminal, login = peer(door.consumer.terminal()), door.consumer.login(door.vcm)
    assert len(await door.logins.login(terminal, login)) == 32
    with pytest.raises(StatementReplayed):
        await door.logins.login(terminal, login)
    await door.logins.login(terminal, door.consumer.login(door.vcm))


async def test_logins_of_others_elsewhere_or_without_a_nonce_are_refused(door: Doorkeeper) -> None:
    terminal, consumer = peer(door.consumer.terminal()), door.consumer
    with pytest.raises(LoginRefused):
        await door.logins.login(peer(consumer.application("billing")), consumer.login(door.vcm))
    with pytest.raises(LoginRefused):
        await door.logins.login(terminal, consumer.login(new_vcm_id()))
    with pytest.raises(LoginRefused):
        await door.logins.login(terminal, consumer.login(door.vcm, b"short"))
    with pytest.raises(LoginRefused):
        await door.logins.login(terminal, consumer.statement("billing", b"x" * 32))


async def test_a_login_that_the_ukey_did_not_sign_is_forged(door: Doorkeeper) -> None:
    forged = msgspec.structs.replace(door.consumer.login(door.vcm), signatures=())
    with pytest.raises(StatementForged):
        await door.logins.login(peer(door.consumer.terminal()), forged)


async def test_logins_are_counted(door: Doorkeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cipherfleet.computing.vcm_grants.MAX_LOGINS", 1)
    terminal = peer(door.consumer.terminal())
    await door.logins.login(terminal, door.consumer.login(door.vcm))
    with pytest.raises(LoginRefused):
        await door.logins.login(terminal, door.consumer.login(door.vcm))
