"""Consumers, cards and platform processes: their certificates, and everything that is not certified."""

import copy
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec import structs

from cipherfleet.channel import signing, tls
from cipherfleet.channel.certificates import (
    Credentials,
    check_chain,
    identity_of,
    key_to_pem,
    make_request,
    new_key,
    public_key_der,
    split,
)
from cipherfleet.contract.errors import (
    CertificateInvalid,
    CertificateRevoked,
    CipherfleetError,
    ConsumerUnknown,
    Exists,
    FileProblem,
    HsmUnavailable,
    KmcUnavailable,
    Malformed,
    NotPermitted,
    SignatureInvalid,
    StateConflict,
    Unsupported,
)
from cipherfleet.contract.escrow import genesis
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, new_card_id
from cipherfleet.contract.kmc_api import CardReply, ConsumerEntry, ConsumerList, EnrolReply
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.statements import CheckpointStatement
from cipherfleet.kmc import certification, store
from cipherfleet.kmc.center import Center
from cipherfleet.kmc.certification import domain_label
from cipherfleet.kmc.embedded_hsm import EmbeddedHsm
from cipherfleet.kmc.hsm import Mechanism
from cipherfleet.kmc.requests import subject_key
from tests.unit.kmc.world import (
    FAST,
    MACHINE,
    PASSPHRASE,
    TestConsumer,
    World,
    card_request,
    start_vcm,
    transport_key,
)


async def test_what_goes_onto_a_ukey(world: World) -> None:
    alice = await world.enrol()
    reply = alice.reply
    for chain, role in ((reply.identity, Role.UKEY), (reply.channel, Role.TERMINAL)):
        leaf = check_chain(chain.chain, reply.root)
        named = identity_of(leaf)
        assert (named.role, named.consumer) == (role, "alice")
        assert named.id.startswith("ukey-")
        assert chain.trust == reply.root
        assert split(chain.chain)[1:] == split(reply.domain)
    statement = signing.verify(reply.checkpoint, CheckpointStatement, [reply.kmc_signing_key])
    assert (statement.consumer, statement.sequence, statement.head) == ("alice", 0, genesis(alice.name, statement.epoch))
    assert len(reply.ciphertext_cmk) == 40
    kept = await world.database.read(lambda connection: store.find_consumer(connection, alice.name))
    assert kept is not None
    assert kept.ukey == alice.signer.public_key
    assert not [p for p in world.folder.iterdir() if reply.ciphertext_cmk in p.read_bytes()]


async def test_consumers_are_listed(world: World) -> None:
    await world.enrol("alice")
    await world.enrol("bob", confirm=False)
    found = await (await world.operator()).call("GET", "/v1/consumers", reply=ConsumerList)
    assert [(c.name, c.state, c.keys, c.applications) for c in found.consumers] == [("alice", "enrolled", 0, 0), ("bob", "pending", 0, 0)]
    assert isinstance(found.consumers[0], ConsumerEntry)


async def test_a_pending_enrolment_is_replaced(world: World) -> None:
    first = await world.enrol(confirm=False)
    second = await world.enrol()
    assert first.reply.domain == second.reply.domain
    assert first.reply.ciphertext_cmk != second.reply.ciphertext_cmk
    with pytest.raises(CertificateRevoked):
        await first.terminal().call("GET", "/v1/terminal")
    await second.plug_in()


async def test_an_enrolled_consumer_stays(world: World) -> None:
    alice, operator = await world.enrol(), await world.operator()
    with pytest.raises(Exists):
        await operator.call("POST", "/v1/consumers", TestConsumer(world, alice.name).request(), reply=EnrolReply)
    with pytest.raises(StateConflict):
        await operator.call("DELETE", "/v1/consumers/alice")
    await operator.call("POST", "/v1/consumers/alice/confirm", alice.confirmation())
    with pytest.raises(ConsumerUnknown):
        await operator.call("POST", "/v1/consumers/nobody/confirm", alice.confirmation())
    await alice.plug_in()


async def test_an_enrolment_confirms_its_own_ukey_alone(world: World) -> None:
    operator, replaced = await world.operator(), await world.enrol(confirm=False)
    current = await world.enrol(confirm=False)

    async def state() -> str:
        return (await operator.call("GET", "/v1/consumers", reply=ConsumerList)).consumers[0].state

    for expected in ("pending", "enrolled"):
        with pytest.raises(Exists):
            await operator.call("POST", "/v1/consumers/alice/confirm", replaced.confirmation())
        assert await state() == expected
        await operator.call("POST", "/v1/consumers/alice/confirm", current.confirmation())
    await current.plug_in()


async def test_an_enrolment_is_taken_back(world: World) -> None:
    alice, operator = await world.enrol(confirm=False), await world.operator()
    for _ in range(2):
        await operator.call("DELETE", "/v1/consumers/alice")
    assert await world.hsm.find(domain_label(alice.name)) is None
    assert (await operator.call("GET", "/v1/consumers", reply=ConsumerList)).consumers == ()
    with pytest.raises(CertificateRevoked):
        await alice.terminal().call("GET", "/v1/terminal")
    again = await world.enrol()
    assert again.reply.domain != alice.reply.domain
    await again.plug_in()


async def test_wrong_enrolments(world: World) -> None:
    operator, alice = await world.operator(), TestConsumer(world, ConsumerId("alice"))
    good, ours = alice.request(), Identity(Role.UKEY, "x", alice.name)
    broken = bytearray(good.channel_csr)
    broken[-1] ^= 1
    wrong: list[tuple[object, type[CipherfleetError]]] = [
        (structs.replace(good, channel_csr=good.identity_csr), Malformed),
        (structs.replace(good, channel_csr=bytes(broken)), SignatureInvalid),
        (structs.replace(good, identity_csr=b""), Malformed),
        (structs.replace(good, identity_csr=make_request(transport_key(), ours)), Unsupported),
        (structs.replace(good, identity_csr=make_request(ec.generate_private_key(ec.SECP384R1()), ours)), Unsupported),
        ({"consumer": "../alice", "identity_csr": "", "channel_csr": ""}, Malformed),
        ({"consumer": "Alice", "identity_csr": "", "channel_csr": ""}, Malformed),
        ([], Malformed),
    ]
    for request, error in wrong:
        with pytest.raises(error):
            await operator.call("POST", "/v1/consumers", request, reply=EnrolReply)
    assert (await operator.call("GET", "/v1/consumers", reply=ConsumerList)).consumers == ()


async def test_an_hsm_that_goes_while_enrolling_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = await world.operator()

    async def away(handle: object) -> bytes:
        raise HsmUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.hsm, "generate_wrapped", away)
        with pytest.raises(HsmUnavailable):
            await world.enrol()
    assert (await operator.call("GET", "/v1/consumers", reply=ConsumerList)).consumers == ()
    await operator.call("DELETE", "/v1/consumers/alice")
    assert await world.hsm.find(domain_label(ConsumerId("alice"))) is None
    await world.enrol()


# -- cards -------------------------------------------------------------------------------------------------------------


async def test_a_new_card_supersedes_the_old_one(world: World) -> None:
    machine, other = await world.machine(), await world.machine(MachineId("m10"))
    first, second, foreign = new_card_id(MACHINE), new_card_id(MACHINE), new_card_id(MachineId("m10"))
    await other.call("POST", "/v1/cards", card_request(foreign), reply=CardReply)
    for card in (first, second):
        await machine.call("POST", "/v1/cards", card_request(card), reply=CardReply)
    active = [bool(world.center.registry.active(Identity(Role.CARD, card))) for card in (first, second, foreign)]
    assert active == [False, True, True]


async def test_wrong_cards(world: World) -> None:
    machine, card = await world.machine(), new_card_id(MACHINE)
    good, ours = card_request(card), Identity(Role.CARD, card)
    weak, exponent = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(3, 3072)
    wrong: list[tuple[object, type[CipherfleetError]]] = [
        (card_request(new_card_id(MachineId("m2"))), NotPermitted),
        (card_request(new_card_id(MachineId("m10"))), NotPermitted),
        (structs.replace(good, hpke_public_key=bytes(1215)), Malformed),
        (structs.replace(good, hpke_public_key=b""), Malformed),
        (structs.replace(good, csr=make_request(weak, ours)), Unsupported),
        (structs.replace(good, csr=make_request(exponent, ours)), Unsupported),
        (structs.replace(good, csr=make_request(new_key(), ours)), Unsupported),
        ({"card": "card-m1", "csr": "", "hpke_public_key": ""}, Malformed),
    ]
    for request, error in wrong:
        with pytest.raises(error):
            await machine.call("POST", "/v1/cards", request, reply=CardReply)


# -- the platform ------------------------------------------------------------------------------------------------------


async def test_platform_certificates(world: World) -> None:
    operator, key = await world.operator(), new_key()
    request = CertificateRequest(make_request(key, Identity(Role.KMC, "kmc")), ("127.0.0.5",))
    chain = await operator.call("POST", "/v1/certificates/machine/m7", request, reply=Chain)
    leaf = check_chain(chain.chain, chain.trust)
    assert identity_of(leaf) == Identity(Role.MACHINE, "m7")  # the request's own name counts for nothing
    assert public_key_der(leaf.public_key()) == public_key_der(key.public_key())
    for role, id_ in (
        ("kmc", "kmc"),
        ("card", "card-m1-00000000"),
        ("vcm", "vcm-000000000000"),
        ("ukey", "x"),
        ("operator", "root"),
        ("machine", "m1x"),
        ("machine", "x"),
        ("management", "other"),
        ("nobody", "x"),
    ):
        with pytest.raises(NotPermitted):
            await operator.call("POST", f"/v1/certificates/{role}/{id_}", request, reply=Chain)
    for addresses in (("not-an-address",), tuple(f"127.0.0.{n}" for n in range(9))):
        with pytest.raises(CertificateInvalid):
            await operator.call("POST", "/v1/certificates/machine/m7", structs.replace(request, addresses=addresses), reply=Chain)


@pytest.mark.parametrize("identity", [Identity(Role.MACHINE, "m7"), Identity(Role.MANAGEMENT, "management")])
async def test_a_newer_platform_certificate_ends_the_older(world: World, identity: Identity) -> None:
    operator = await world.operator()

    async def certified(identity: Identity) -> Credentials:
        key = new_key()
        request = CertificateRequest(make_request(key, identity))
        chain = await operator.call("POST", f"/v1/certificates/{identity.role}/{identity.id}", request, reply=Chain)
        return Credentials(key_to_pem(key), chain.chain, chain.trust)

    older, other = await certified(identity), await certified(Identity(Role.MACHINE, "m8"))
    newer = await certified(identity)
    with pytest.raises(CertificateRevoked):
        await world.call_as(older).call("GET", "/v1/consumers")
    for credentials in (newer, other):
        with pytest.raises(NotPermitted):
            await world.call_as(credentials).call("GET", "/v1/consumers")
    assert len(world.center.registry.active(identity)) == 1


async def test_who_may_be_a_server(world: World) -> None:
    """Extended key usage keeps a Ukey's and a card's certificate out of TLS, a terminal's from being a server."""
    alice = await world.enrol()
    vcm = await start_vcm(world, alice)

    def usage(chain: bytes) -> set[x509.ObjectIdentifier]:
        return set(split(chain)[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert ExtendedKeyUsageOID.SERVER_AUTH in usage(vcm.chain.chain)
    assert usage(alice.reply.channel.chain) == {ExtendedKeyUsageOID.CLIENT_AUTH}
    assert usage(alice.reply.identity.chain) == {certification.STATEMENT_USAGE_OID}
    with pytest.raises((CertificateInvalid, KmcUnavailable)):
        ukey = Credentials(key_to_pem(alice.identity_key), alice.reply.identity.chain, alice.reply.root)
        await world.call_as(ukey).call("GET", "/v1/consumers")


async def test_chains_pass_the_strict_verifier(world: World, tmp_path: Path) -> None:
    """OpenSSL with X509_STRICT, as TLS uses it: a VCM's certificate under its domain alone, and not under another's."""
    alice, bob = await world.enrol(), await world.enrol("bob")
    vcm = await start_vcm(world, alice)
    server = tls.server_context(Credentials(key_to_pem(vcm.key), vcm.chain.chain, vcm.chain.trust))

    def handshake(client: Credentials) -> None:
        ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
        caller = tls.client_context(client).wrap_bio(theirs, ours, server_hostname=Identity(Role.VCM, vcm.id, alice.name).dns_name)
        called = server.wrap_bio(ours, theirs, server_side=True)
        for side in (caller, called, caller, called):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue

    def terminal_of(consumer: TestConsumer) -> Credentials:
        return Credentials(key_to_pem(consumer.channel_key), consumer.reply.channel.chain, consumer.reply.root)

    handshake(terminal_of(alice))
    with pytest.raises(ssl.SSLError):
        handshake(terminal_of(bob))


async def test_an_applications_key(world: World) -> None:
    name = Identity(Role.APPLICATION, "shop", ConsumerId("alice"))
    for good in (new_key(), ec.generate_private_key(ec.SECP384R1()), transport_key()):
        subject_key(make_request(good, name), Role.APPLICATION)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    subject_key(builder.sign(ed25519.Ed25519PrivateKey.generate(), None).public_bytes(Encoding.DER), Role.APPLICATION)
    for bad in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256K1())):
        with pytest.raises(Unsupported):
            subject_key(make_request(bad, name), Role.APPLICATION)
    with pytest.raises(Unsupported):
        subject_key(make_request(transport_key(), name), Role.TERMINAL)


# -- the CA and its HSM ------------------------------------------------------------------------------------------------


async def test_a_foreign_hsm_is_refused(world: World, tmp_path: Path) -> None:
    other = EmbeddedHsm.open(tmp_path / "other", PASSPHRASE, FAST)
    with pytest.raises(FileProblem):
        await Center.open(world.database, other, FAST)


async def test_an_hsm_without_a_mechanism_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def few() -> frozenset[Mechanism]:
        return frozenset(Mechanism) - {Mechanism.RSA_OAEP_SHA256}

    monkeypatch.setattr(world.hsm, "mechanisms", few)
    with pytest.raises(HsmUnavailable, match="OAEP"):
        await Center.open(world.database, world.hsm, FAST)


async def test_a_ca_key_stays_in_the_hsm(world: World) -> None:
    key = world.center.certification._authorities[certification.ROOT].key
    assert key.key_size == 256
    assert key.curve.name == "secp256r1"
    assert copy.copy(key) is key
    assert copy.deepcopy(key) is key
    attempts: tuple[Callable[[], object], ...] = (
        lambda: key.private_numbers(),
        lambda: key.private_bytes(None, None, None),
        lambda: key.exchange(ec.ECDH(), key.public_key()),
        lambda: key.sign(b"", ec.ECDSA(hashes.SHA512())),
    )
    for attempt in attempts:
        with pytest.raises(RuntimeError):
            attempt()
