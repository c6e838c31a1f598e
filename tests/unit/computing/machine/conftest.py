"""A KMC for every test that wants one."""

from collections.abc import AsyncIterator
from functools import cache

import pytest

from cipherfleet.computing import card
from tests.unit.computing.machine.fake_kmc import FakeKmc

_transport_keys = cache(card.TransportKeys)


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
