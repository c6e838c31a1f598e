"""Domain isolation with real network namespaces and real connection attempts (root)."""

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cipherfleet.channel.namespaces import FOLDER, run_inside
from cipherfleet.contract.errors import IsolationUnavailable
from cipherfleet.management.drivers import local_domain, namespaces
from cipherfleet.management.drivers.local_domain import LocalDomainNetwork, sweep_network
from cipherfleet.management.drivers.local_process import LocalProcessNetwork

NETWORK = 14  # below 16: never a cloud's

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("nft") is None or shutil.which("ip") is None, reason="needs root, nft and ip"
)
root = [pytest.mark.root, needs_root]


@pytest.fixture
async def driver() -> AsyncIterator[LocalDomainNetwork]:
    driver = LocalDomainNetwork(NETWORK)
    driver.check()
    await sweep_network(NETWORK)
    yield driver
    await sweep_network(NETWORK)
    assert not [name for name in namespaces.names() if name.startswith(f"cf{NETWORK}d")]


@contextmanager
def listener(namespace: str, address: str, port: int) -> Iterator[socket.socket]:
    """A listening socket opened inside a namespace, as a VCM inherits it; it greets whoever comes."""

    def make() -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen()
        return made

    server = run_inside(namespace, make)

    def greet() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.sendall(b"hello")
            connection.close()

    thread = threading.Thread(target=greet)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.close()


def greeted(address: str, port: int, source: tuple[str, int] | None = None) -> bool:
    """A real connection attempt, and the greeting that comes back: a host's proxy may accept connections to anywhere."""
    try:
        with socket.create_connection((address, port), timeout=0.4, source_address=source) as connection:
            return connection.recv(5) == b"hello"
    except OSError:
        return False


async def reaches(namespace: str, address: str, port: int, *, source: tuple[str, int] | None = None) -> bool:
    return await namespaces.inside(namespace, lambda: greeted(address, port, source))


class TestReal:
    pytestmark = root

    async def test_applications_reach_their_vcm_on_its_port_alone(self, driver: LocalDomainNetwork) -> None:
        port = await driver.create_port(1, 10)
        applications = driver.applications(1)
        with listener(port, "10.14.2.10", 8443), listener(port, "10.14.2.10", 8444):
            assert await reaches(applications, "10.14.2.10", 8443)
            assert not await reaches(applications, "10.14.2.10", 8444)

    async def test_a_vcm_reaches_nobody(self, driver: LocalDomainNetwork) -> None:
        first, second = await driver.create_port(1, 10), await driver.create_port(1, 11)
        applications = driver.applications(1)
        with listener(second, "10.14.2.11", 8443), listener(applications, "10.14.2.200", 8443), listener(applications, "10.14.2.200", 80):
            assert await reaches(applications, "10.14.2.11", 8443)
            assert not await reaches(first, "10.14.2.11", 8443)
            for target in (8443, 80):
                assert not await reaches(first, "10.14.2.200", target)
            # not even from the port that answers may leave through
            assert not await reaches(first, "10.14.2.200", 80, source=("10.14.2.10", 8443))
            assert not await reaches(first, "127.0.0.1", 22)

    async def test_the_rules_of_the_fabric_hold_without_those_of_the_port(self, driver: LocalDomainNetwork) -> None:
        first, second = await driver.create_port(1, 10), await driver.create_port(1, 11)
        for name in (first, second, driver.applications(1)):
            await namespaces.inside(name, lambda: local_domain.load_rules("delete table inet cipherfleet\n"))
        with listener(second, "10.14.2.11", 8443), listener(driver.applications(1), "10.14.2.200", 80):
            assert await reaches(driver.applications(1), "10.14.2.11", 8443)
            assert not await reaches(first, "10.14.2.11", 8443)
            assert not await reaches(first, "10.14.2.200", 80, source=("10.14.2.10", 8443))

    async def test_another_domain_is_out_of_reach(self, driver: LocalDomainNetwork) -> None:
        port, _ = await driver.create_port(1, 10), await driver.create_port(2, 10)
        with listener(port, "10.14.2.10", 8443):
            assert not await reaches(driver.applications(2), "10.14.2.10", 8443)
            assert not await reaches(driver.port(2, 10), "10.14.2.10", 8443)
            assert not await asyncio.to_thread(greeted, "10.14.2.10", 8443)
            assert await reaches(driver.applications(1), "10.14.2.10", 8443)

    async def test_a_deleted_port_is_cut_off_whoever_holds_its_socket(self, driver: LocalDomainNetwork) -> None:
        port = await driver.create_port(1, 10)
        with listener(port, "10.14.2.10", 8443):
            assert await reaches(driver.applications(1), "10.14.2.10", 8443)
            await driver.delete_port(1, 10)
            assert port not in namespaces.names()
            assert not await reaches(driver.applications(1), "10.14.2.10", 8443)
            again = await driver.create_port(1, 10)  # the slot can be used again while the old socket lives
            with listener(again, "10.14.2.10", 8443):
                assert await reaches(driver.applications(1), "10.14.2.10", 8443)

    async def test_creating_and_deleting_again_succeeds(self, driver: LocalDomainNetwork) -> None:
        port = await driver.create_port(1, 10)
        with listener(port, "10.14.2.10", 8443):
            assert await driver.create_port(1, 10) == port
            await driver.create_port(1, 11)
            assert await reaches(driver.applications(1), "10.14.2.10", 8443)
        for _ in range(2):
            await driver.delete_port(1, 10)
        for _ in range(2):
            await driver.delete_domain(1)
        assert not [name for name in namespaces.names() if name.startswith("cf14d1")]

    async def test_a_half_made_domain_is_made_anew(self, driver: LocalDomainNetwork) -> None:
        namespaces.create(driver.fabric(1))
        namespaces.create(driver.applications(1))
        namespaces.create(driver.port(1, 10))
        port = await driver.create_port(1, 10)
        with listener(port, "10.14.2.10", 8443):
            assert await reaches(driver.applications(1), "10.14.2.10", 8443)

    async def test_a_failed_creation_leaves_nothing(self, driver: LocalDomainNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local_domain, "_application_rules", lambda: "no such rule")
        with pytest.raises(IsolationUnavailable, match="nft refused"):
            await driver.create_port(1, 10)
        monkeypatch.undo()
        assert not [name for name in namespaces.names() if name.startswith("cf14d1")]
        monkeypatch.setattr(local_domain, "_port_rules", lambda vcm, application: "no such rule")
        with pytest.raises(IsolationUnavailable, match="nft refused"):
            await driver.create_port(1, 10)
        assert driver.port(1, 10) not in namespaces.names()

    async def test_a_sweep_deletes_what_the_inventory_does_not_know(self, driver: LocalDomainNetwork) -> None:
        for index, slot in ((1, 10), (1, 11), (2, 10)):
            await driver.create_port(index, slot)
        other = LocalDomainNetwork(13)
        try:
            await other.create_port(1, 10)
            assert await driver.sweep({1: {10}}) == 4
            left = [name for name in namespaces.names() if name.startswith("cf1")]
            assert left == ["cf13d1", "cf13d1a", "cf13d1v10", "cf14d1", "cf14d1a", "cf14d1v10"]
        finally:
            assert await sweep_network(13) == 3

    async def test_nothing_of_it_is_seen_on_the_host(self, driver: LocalDomainNetwork) -> None:
        before = sorted(name for _, name in socket.if_nameindex())
        await driver.create_port(1, 10)
        assert sorted(name for _, name in socket.if_nameindex()) == before

    async def test_forwarding_is_off_in_every_namespace(self, driver: LocalDomainNetwork) -> None:
        await driver.create_port(1, 10)
        for name in (driver.fabric(1), driver.applications(1), driver.port(1, 10)):
            switch = Path("/proc/sys/net/ipv4/ip_forward")
            assert (await namespaces.inside(name, switch.read_text)).strip() == "0"

    async def test_a_leftover_file_without_its_mount_is_no_namespace(self, driver: LocalDomainNetwork) -> None:
        path = FOLDER / driver.fabric(3)
        await driver.create_port(1, 10)
        path.touch()
        namespaces.create(path.name)
        assert await namespaces.inside(path.name, lambda: [name for _, name in socket.if_nameindex()]) == ["lo"]
        namespaces.create(path.name)  # and again
        namespaces.delete(path.name)
        namespaces.delete(path.name)

    async def test_what_runs_inside_raises_outside(self, driver: LocalDomainNetwork) -> None:
        port = await driver.create_port(1, 10)

        def fail() -> None:
            raise LookupError("inside")

        with pytest.raises(LookupError, match="inside"):
            await namespaces.inside(port, fail)
        with pytest.raises(IsolationUnavailable, match="is not there"):
            await namespaces.inside("cf14d9", fail)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(IsolationUnavailable, match="needs root") as caught:
        LocalDomainNetwork.check()
    assert "--isolation process" in caught.value.hint


def test_without_nft_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(IsolationUnavailable, match="nft"):
        LocalDomainNetwork.check()


async def test_with_process_isolation_there_is_nothing_to_create() -> None:
    driver = LocalProcessNetwork()
    assert (await driver.create_port(1, 10), driver.applications(1)) == ("", "")
    await driver.delete_port(1, 10)
    await driver.delete_domain(1)
    assert await driver.sweep({}) == 0
