"""The flow with domain isolation: the network is there from the first VCM to the last, and swept after a crash (root)."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cipherfleet.contract.management_api import LoginPermit, VcmCreateRequest, VcmDetail
from cipherfleet.management.drivers import namespaces
from cipherfleet.management.drivers.local_domain import LocalDomainNetwork, sweep_network
from tests.unit.management.world import ACME, World, world_in

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("nft") is None, reason="needs root and nft"),
]

NETWORK = 15


def ours() -> list[str]:
    return [name for name in namespaces.names() if name.startswith(f"cf{NETWORK}d")]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_in(tmp_path / "management", isolation="domain", network=NETWORK) as world:
        yield world
    await sweep_network(NETWORK)


async def test_the_network_lives_from_the_first_vcm_to_the_last(world: World) -> None:
    assert ours() == []
    terminal, first = await world.serving()
    assert ours() == ["cf15d1", "cf15d1a", "cf15d1v10"]
    order = world.host(first).orders[first]
    assert (order.network_namespace, order.address, order.isolation) == ("cf15d1v10", "10.15.2.10:8443", "domain")
    permit = await terminal.wait_for(LoginPermit)
    assert (permit.endpoint, permit.network_namespace) == ("https://10.15.2.10:8443", "cf15d1a")
    second = await world.operator.call("POST", "/v1/vcms", VcmCreateRequest(ACME), reply=VcmDetail)
    assert ours() == ["cf15d1", "cf15d1a", "cf15d1v10", "cf15d1v11"]
    await world.operator.call("DELETE", f"/v1/vcms/{first}", reply=VcmDetail)
    assert ours() == ["cf15d1", "cf15d1a", "cf15d1v11"]
    await world.operator.call("DELETE", f"/v1/vcms/{second.vcm.id}", reply=VcmDetail)
    assert ours() == []


async def test_what_a_crash_left_is_swept_at_the_start(world: World) -> None:
    terminal, _ = await world.serving()
    await world.kill_management()
    stray = LocalDomainNetwork(NETWORK)
    await stray.create_port(1, 13)
    await stray.create_port(7, 10)
    await terminal.end()
    await world.start_management()
    assert ours() == ["cf15d1", "cf15d1a", "cf15d1v10"]  # what the inventory knows stays until it is deleted in order
    await world.clean()
    assert ours() == []
