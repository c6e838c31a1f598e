"""A KMC for every test that wants one."""

from collections.abc import AsyncIterator

import pytest

from tests.unit.computing.machine.fake_kmc import FakeKmc


@pytest.fixture
async def kmc() -> AsyncIterator[FakeKmc]:
    made = FakeKmc()
    await made.start()
    yield made
    await made.stop()
