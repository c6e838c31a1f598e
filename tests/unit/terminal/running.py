"""The terminal in the test's own process."""

import asyncio
from pathlib import Path
from typing import Self

from cipherfleet.contract.settings import Settings
from cipherfleet.terminal.insertion import Event, ServiceInfo
from cipherfleet.terminal.process import Terminal, TerminalConfig
from tests.unit.terminal.platform import PATIENCE_S, PIN, SETTINGS, Platform


class Running:
    """``async with Running(platform) as terminal``: runs until the block ends or the terminal does."""

    def __init__(
        self, platform: Platform, *, settings: Settings = SETTINGS, pin: str = PIN, run_folder: Path | None = None, keep_pin: bool = True
    ) -> None:
        configuration = TerminalConfig(str(platform.ukey), pin, str(run_folder or ""), settings, keep_pin)
        self.events: list[Event] = []
        self.on: asyncio.Future[ServiceInfo] = asyncio.get_running_loop().create_future()
        self.stop = asyncio.Event()
        self.terminal = Terminal(configuration, ready=self.on.set_result, progress=self._progress)
        self.task = asyncio.create_task(self.terminal.run(self.stop))
        self._heard = asyncio.Event()

    def _progress(self, event: Event) -> None:
        self.events.append(event)
        self._heard.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop.set()
        await asyncio.wait({self.task}, timeout=PATIENCE_S)
        if not self.task.cancelled():
            self.task.exception()  # seen: the test asked for it with ``ends``, or does not care

    def steps(self) -> list[str]:
        return [event.step for event in self.events]

    async def tells(self, step: str, *, times: int = 1, within: float = PATIENCE_S) -> Event:
        """The ``times``-th event called ``step``, waited for."""
        async with asyncio.timeout(within):
            while True:
                self._heard.clear()
                found = [event for event in self.events if event.step == step]
                if len(found) >= times:
                    return found[times - 1]
                await self._heard.wait()

    async def ends(self, *, within: float = PATIENCE_S) -> None:
        """Wait for the terminal's own end; raises what it raised."""
        await asyncio.wait_for(asyncio.shield(self.task), within)
