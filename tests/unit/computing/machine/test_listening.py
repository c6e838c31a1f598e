"""A VCM's listening socket, on this host and in a namespace of its own."""

import asyncio
import socket
from pathlib import Path

import pytest

from cipherfleet.computing.listening import open_listening, parse_address
from cipherfleet.contract.errors import IsolationUnavailable, Malformed, PortTaken
from tests.unit.computing.machine.conftest import reachable_from


@pytest.mark.parametrize("address", ["", "127.0.0.1", "host:80", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(Malformed):
        parse_address(address)


def test_both_families_are_understood() -> None:
    assert parse_address("127.0.0.1:8443") == ("127.0.0.1", 8443)
    assert parse_address("[::1]:8443") == ("::1", 8443)


async def test_a_taken_address_is_said() -> None:
    with await open_listening("127.0.0.1:0") as first:
        port = first.getsockname()[1]
        with pytest.raises(PortTaken, match=f"127.0.0.1:{port}"):
            await open_listening(f"127.0.0.1:{port}", patience_s=0.1)


async def test_who_is_just_leaving_is_waited_for() -> None:
    """A VCM of a machine that was killed holds its address for a moment longer."""
    first = await open_listening("127.0.0.1:0")
    port = first.getsockname()[1]
    asyncio.get_running_loop().call_later(0.3, first.close)
    with await open_listening(f"127.0.0.1:{port}") as second:
        assert second.getsockname()[1] == port


async def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(PortTaken):
        await open_listening("203.0.113.7:8443")


@pytest.mark.parametrize("name", ["../../etc", "..", "."])
async def test_a_namespace_is_named_not_pathed(name: str) -> None:
    with pytest.raises(Malformed):
        await open_listening("127.0.0.1:0", name)


async def test_a_namespace_that_is_not_there_is_said() -> None:
    with pytest.raises(IsolationUnavailable):
        await open_listening("127.0.0.1:0", "cf-not-there")


@pytest.mark.root
async def test_in_a_namespace_it_is_reachable_there_alone_and_nobody_else_moves(namespace: str) -> None:
    before = Path("/proc/self/ns/net").readlink()
    with await open_listening("127.0.0.1:0", namespace) as opened:
        port = opened.getsockname()[1]
        assert Path("/proc/self/ns/net").readlink() == before
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=2)
        assert reachable_from(namespace, "127.0.0.1", port)
        with pytest.raises(PortTaken):
            await open_listening(f"127.0.0.1:{port}", namespace, patience_s=0.1)
