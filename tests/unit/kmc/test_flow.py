"""Service on: identity, token, certificate, download signal, CMK, lease (the paper, flow steps b, e, f)."""

from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import check_chain, identity_of
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.kmc_api import Serving, VcmKmcState
from cipherfleet.contract.statements import LeaseStatement
from cipherfleet.kmc.embedded_hsm import EmbeddedHsm
from tests.unit.kmc.world import OAEP, SEALED, World, start_vcm, transport_key


async def test_service_goes_on(world: World) -> None:
    alice = await world.enrol()
    terminal = await alice.plug_in()
    vcm = await start_vcm(world, alice)
    delivered = await vcm.load(terminal)

    assert delivered.sealed_ukey_share == SEALED
    share = transport_key().decrypt(delivered.wrapped_hsm_share, OAEP)
    assert isinstance(world.hsm, EmbeddedHsm)
    root_key = world.hsm._wrap_key(world.center.root_key)
    assert share == aes_key_unwrap_with_padding(root_key, alice.reply.ciphertext_cmk)

    granted = await vcm.heartbeat(terminal)
    keys = [alice.signer.public_key], [alice.reply.kmc_signing_key]
    assert {signing.verify(granted.lease, LeaseStatement, key).vcm for key in keys} == {vcm.id}
    await vcm.channel.send(Serving())
    await vcm.heartbeat(terminal)
    state = await (await world.management()).call("GET", f"/v1/vcms/{vcm.id}", reply=VcmKmcState)
    assert state == VcmKmcState(certified=True, connected=True, released=True, serving=True)
    assert [event for event, _ in await world.audit_lines("alice")] == [
        "enrolled",
        "enrolled",
        "terminal-joined",
        "identity-verified",
        "token-created",
        "vcm-authorised",
        "vcm-certified",
        "cmk-released",
        "cmk-loaded",
        "lease-started",
        "serving",
    ]
    assert identity_of(check_chain(vcm.chain.chain, alice.reply.root)) == Identity(Role.VCM, vcm.id, alice.name)
    assert vcm.chain.trust == alice.reply.domain
