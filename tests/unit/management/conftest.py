"""Fixtures of the management platform's tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.management.world import QUICK, World, world_in


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with world_in(tmp_path / "management") as world:
        yield world


@pytest.fixture
async def quick(tmp_path: Path) -> AsyncIterator[World]:
    """A world whose steps run out of time soon."""
    async with world_in(tmp_path / "management", QUICK) as world:
        yield world
