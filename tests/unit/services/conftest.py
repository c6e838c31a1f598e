"""A VCM and a client of it, fresh for every test."""

from collections.abc import AsyncIterator

import aiohttp
import pytest

from cipherfleet import Client
from tests.unit.services.stage import Stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    started = await Stage.start()
    yield started
    await started.stop()


@pytest.fixture
async def client(stage: Stage) -> AsyncIterator[Client]:
    async with stage.client() as opened:
        yield opened


@pytest.fixture
async def raw(stage: Stage) -> AsyncIterator[aiohttp.ClientSession]:
    async with stage.raw() as session:
        yield session
