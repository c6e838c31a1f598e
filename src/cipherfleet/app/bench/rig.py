"""A temporary cloud to measure on."""

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from cipherfleet.app import output
from cipherfleet.app.commands.demo import PIN, enrol_on
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.settings import LauncherChoice

T = TypeVar("T")
Say = Callable[[str], object]


async def on_a_cloud(work: Callable[[Cloud, Path, Say], Awaitable[T]], *, machines: int = 1, launcher: LauncherChoice | None = None) -> T:
    """``work(cloud, folder, say)`` on a cloud whose one consumer is acme, its Ukey ``folder/ukey-acme`` plugged in."""
    with tempfile.TemporaryDirectory(prefix="cipherfleet-bench-") as name:
        folder = Path(name)
        cloud = Cloud(folder / "state")
        try:
            with output.working("starting a cloud", quiet=False):
                await cloud.up(machines=machines, launcher=launcher)
                await enrol_on(cloud, "acme", folder / "ukey-acme")
                await cloud.start_terminal(folder / "ukey-acme", PIN)
            with output.working("measuring", quiet=False) as say:
                return await work(cloud, folder, say)
        finally:
            await cloud.down()
