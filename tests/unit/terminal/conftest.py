"""A platform, an enrolled consumer's Ukey, and the terminal running with it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.terminal.platform import Platform, platform_in
from tests.unit.terminal.running import Running


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with platform_in(tmp_path) as running:
        yield running


@pytest.fixture
async def enrolled(platform: Platform) -> Platform:
    """The platform with acme enrolled; its Ukey is at ``platform.ukey``."""
    await platform.enrol()
    return platform


@pytest.fixture
async def terminal(enrolled: Platform) -> AsyncIterator[Running]:
    """The terminal of acme, its Ukey just plugged in."""
    async with Running(enrolled) as running:
        yield running
