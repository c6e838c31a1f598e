"""The client delegates: it signs itself, for the key that it means, with the number that is next."""

import pytest
from msgspec import structs

from cipherfleet import Client
from cipherfleet.channel import signing
from cipherfleet.channel.certificates import leaf, public_key_der
from cipherfleet.contract.errors import CertificateInvalid, Malformed, PeerError, StatementReplayed
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.identities import Peer
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.statements import DelegationStatement, Right, Signed
from cipherfleet.contract.vcm_api import Delegation, DelegationsReply
from tests.unit.services.stage import Stage

ENCRYPT = Grant((Right.ENCRYPT,))


async def test_it_signs_for_the_key_that_a_name_stands_for(stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    key = (await client.create_key()).id
    await client.set_alias("main", key)
    sent: list[Signed] = []
    take = stage.host.delegate

    async def delegate(peer: Peer, named: KeyId, statement: Signed) -> Delegation:
        sent.append(statement)
        return await take(peer, named, statement)

    monkeypatch.setattr(stage.host, "delegate", delegate)
    assert (await client.delegate_key("alias/main", "temp", [ENCRYPT])).state == "active"
    assert (await client.revoke_delegation(key, "temp")).state == "revoked"
    public_key = public_key_der(leaf(client.profile.chain.encode()).public_key())
    given, taken = (signing.verify(one, DelegationStatement, (public_key,)) for one in sent)
    assert (given.key, given.grants, given.sequence) == (key, (structs.replace(ENCRYPT, keys=(key,)),), 1)
    assert (given.delegator, given.delegate, given.public_key) == (client.profile.application, "temp", public_key)
    assert (taken.revoked, taken.grants, taken.sequence) == (True, (), 2)
    assert [one.delegate for one in await client.list_delegations(key)] == ["temp", "temp"]


async def test_a_number_that_is_taken_is_not_the_end(stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    key = (await client.create_key()).id
    take, refusals = stage.host.delegate, [1, 1]

    async def delegate(peer: Peer, named: KeyId, statement: Signed) -> Delegation:
        if refusals:
            refusals.pop()
            raise StatementReplayed("somebody was faster")
        return await take(peer, named, statement)

    monkeypatch.setattr(stage.host, "delegate", delegate)
    await client.delegate_key(key, "temp", [ENCRYPT])
    refusals += [1, 1, 1]
    with pytest.raises(StatementReplayed):
        await client.delegate_key(key, "temp", [ENCRYPT])


async def test_it_signs_nothing_for_another_key_than_it_was_told(stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = (await client.create_key()).id, (await client.create_key()).id

    async def delegations(peer: Peer, named: KeyId) -> DelegationsReply:
        return DelegationsReply(other, (), 1)

    monkeypatch.setattr(stage.host, "delegations", delegations)
    with pytest.raises(PeerError):
        await client.delegate_key(key, "temp", [ENCRYPT])
    with pytest.raises(Malformed):
        await client.delegate_key(key, "No Name", [ENCRYPT])
    assert stage.host.delegated == []


async def test_without_a_key_of_its_own_it_delegates_nothing(client: Client) -> None:
    client.profile = structs.replace(client.profile, key="not a key")
    with pytest.raises(CertificateInvalid):
        await client.delegate_key("0" * 32, "temp", [ENCRYPT])
