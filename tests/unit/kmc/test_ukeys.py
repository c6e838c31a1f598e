"""Several Ukeys of a consumer at the KMC: by whose word they come and go, and what is refused."""

from typing import Any

import pytest

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import Credentials, key_to_pem, make_request, new_key, public_key_der
from cipherfleet.contract.errors import (
    CertificateRevoked,
    CipherfleetError,
    ConsumerUnknown,
    Exists,
    ForeignConsumer,
    LimitReached,
    Malformed,
    StateConflict,
    StatementForged,
    StatementReplayed,
    UkeyUnknown,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.contract.kmc_api import UkeyList, UkeyReply, UkeyRequest, UkeyStatements
from cipherfleet.contract.messages import Done
from cipherfleet.contract.statements import UkeyStatement
from cipherfleet.kmc import store
from tests.unit.kmc.world import TestConsumer, World, start_vcm


class Spare:
    """The keys of a Ukey that is to come."""

    def __init__(self, of: TestConsumer) -> None:
        self.of, self.identity, self.channel = of, new_key(), new_key()
        self.public_key = public_key_der(self.identity.public_key())
        self.id = store.ukey_id(self.public_key)
        self.signer = signing.LocalSigner(self.identity)

    async def request(self, by: signing.Signer | None = None, **changes: Any) -> UkeyRequest:
        self.of.sequence += 1
        values = {"consumer": self.of.name, "ukey": self.id, "public_key": self.public_key, "sequence": self.of.sequence, **changes}
        signed = await signing.sign(UkeyStatement(**values), by or self.of.signer)
        named = Identity(Role.UKEY, self.id, self.of.name)
        if changes.get("revoked"):
            return UkeyRequest(signed)
        return UkeyRequest(signed, make_request(self.identity, named), make_request(self.channel, named))

    async def submit(self, **changes: Any) -> UkeyReply:
        return await self.of.terminal().call("POST", "/v1/ukeys", await self.request(**changes), reply=UkeyReply)


async def test_a_spare_comes_in_and_the_first_goes(world: World) -> None:
    alice = await world.enrol()
    spare = Spare(alice)
    reply = await spare.submit(label="spare")
    assert [entry.subject for entry in reply.log] == [f"ukey/{spare.id}@1"]
    listed = (await alice.terminal().call("GET", "/v1/ukeys", reply=UkeyList)).ukeys
    assert {(u.ukey, u.state, u.label) for u in listed} == {(spare.id, "active", "spare"), (alice.confirmation().ukey, "active", "first")}
    alice.signer = spare.signer  # the spare signs from now on, as the first does
    await alice.application()
    first = Spare(alice)
    first.public_key, first.id = public_key_der(alice.identity_key.public_key()), UkeyId(alice.confirmation().ukey)
    terminal = alice.terminal()
    at_spare = world.call_as(Credentials(key_to_pem(spare.channel), reply.channel.chain, reply.channel.trust))
    await at_spare.call("POST", "/v1/ukeys", await first.request(revoked=True), reply=UkeyReply)
    with pytest.raises(CertificateRevoked):
        await terminal.call("GET", "/v1/ukeys/statements", reply=UkeyStatements)
    assert ("ukey-revoked", "ok") in await world.audit_lines("alice")


async def test_a_revoked_ukey_signs_nothing_and_its_service_ends(world: World) -> None:
    alice = await world.enrol()
    spare = Spare(alice)
    await spare.submit()
    terminal = await alice.plug_in()
    await start_vcm(world, alice, terminal)
    operator = await world.operator()
    with pytest.raises(UkeyUnknown):
        await operator.call("POST", f"/v1/ukeys/{alice.name}/ukey-00000000/revoke", reply=Done)
    await operator.call("POST", f"/v1/ukeys/{alice.name}/{alice.confirmation().ukey}/revoke", reply=Done)
    assert terminal.frames is not None
    assert [type(frame).__name__ for frame in await terminal.closed()][-1] == "TerminalRefused"
    with pytest.raises(StatementForged):
        await world.kmc.identity.verify(await alice.identity_request(await world.management()), actor="m")
    with pytest.raises(StateConflict):  # the last one
        await operator.call("POST", f"/v1/ukeys/{alice.name}/{spare.id}/revoke", reply=Done)


async def test_what_is_refused(world: World) -> None:
    alice, bob = await world.enrol(), await world.enrol("bob")
    spare = Spare(alice)
    refused: list[tuple[dict[str, Any], type[CipherfleetError]]] = [
        ({"by": signing.LocalSigner(new_key())}, StatementForged),
        ({"by": spare.signer}, StatementForged),
        ({"by": bob.signer}, StatementForged),
        ({"consumer": bob.name}, ForeignConsumer),
        ({"public_key": public_key_der(new_key().public_key())}, StatementForged),
        ({"ukey": UkeyId("ukey-00000000")}, Malformed),
        ({"sequence": 0}, StatementReplayed),
        ({"label": "x" * 65}, Malformed),
        ({"label": "a\nb"}, Malformed),
        ({"revoked": True}, UkeyUnknown),
    ]
    for changes, error in refused:
        with pytest.raises(error):
            await spare.submit(**changes)
    request = await spare.request()
    terminal = alice.terminal()
    await terminal.call("POST", "/v1/ukeys", request, reply=UkeyReply)
    with pytest.raises(StatementReplayed):
        await terminal.call("POST", "/v1/ukeys", request, reply=UkeyReply)
    with pytest.raises(Exists):
        await spare.submit()
    with pytest.raises(ForeignConsumer):  # what alice signed, at bob's terminal, is not bob's
        await world.kmc.ukeys.submit(await Spare(alice).request(by=bob.signer), _peer(bob))
    for _ in range(6):
        await Spare(alice).submit()
    with pytest.raises(LimitReached):
        await Spare(alice).submit()
    with pytest.raises(ConsumerUnknown):
        await world.kmc.ukeys.statements(ConsumerId("nobody"))


def _peer(consumer: TestConsumer) -> Any:
    class Peer:
        identity = Identity(Role.TERMINAL, "ukey-00000000", consumer.name)

    return Peer()
