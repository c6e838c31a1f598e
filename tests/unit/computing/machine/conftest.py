"""A KMC for every test that wants one, and a network namespace."""

import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import cache

import pytest

from cipherfleet.computing import card
from cipherfleet.computing.engine_wrap import TransportKeys
from tests.unit.computing.machine.fake_kmc import FakeKmc

_transport_keys = cache(TransportKeys)


@pytest.fixture(autouse=True)
def one_rsa_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards of this process share their transport keys: an RSA key takes a quarter of a second to make."""
    monkeypatch.setattr(card, "TransportKeys", _transport_keys)


@pytest.fixture
async def kmc() -> AsyncIterator[FakeKmc]:
    made = FakeKmc()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def namespace() -> Iterator[str]:
    """A named network namespace with its loopback up; needs root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    name = f"cft{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def reachable_from(namespace: str, host: str, port: int) -> bool:
    """Whether a process in the namespace can connect."""
    program = f"import socket; socket.create_connection(({host!r}, {port}), timeout=2); print('in')"
    done = subprocess.run(["ip", "netns", "exec", namespace, "python3", "-c", program], capture_output=True, check=False)
    return done.stdout == b"in\n"
