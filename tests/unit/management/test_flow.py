"""The whole flow through the real process: creation in nine steps, deletion in eight, with the actors of the paper."""

from cipherfleet.contract.lifecycle import CREATION, DELETION, Process
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import DeletePermit, ServiceOn, VcmDetail
from tests.unit.management.world import ACME, World


async def test_plugging_in_creates_a_vcm_in_nine_steps(world: World) -> None:
    terminal, vcm = await world.serving()
    detail = await world.detail(vcm)
    assert detail.vcm.state is VcmState.SERVING
    assert [(e.process, e.step, e.actor, e.action) for e in detail.trace] == [
        (Process.CREATE, s.number, s.actor, s.action) for s in CREATION
    ]
    assert all(e.ms >= 0 and e.error == "" for e in detail.trace)
    assert [e.at for e in detail.trace] == sorted(e.at for e in detail.trace)
    assert (await terminal.wait_for(ServiceOn)).trace == detail.trace


async def test_deletion_takes_eight_steps_and_leaves_nothing(world: World) -> None:
    terminal, vcm = await world.serving()
    detail = await world.operator.call("DELETE", f"/v1/vcms/{vcm}", reply=VcmDetail)
    assert detail.vcm.state is VcmState.DELETED
    assert [(e.step, e.actor, e.action) for e in detail.trace if e.process is Process.DELETE] == [
        (s.number, s.actor, s.action) for s in DELETION
    ]
    assert (await terminal.wait_for(DeletePermit)).vcm == vcm
    await world.clean()
    assert await world.service(ACME) == "off"
