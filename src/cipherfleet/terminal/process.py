"""The consumer's terminal as a process: one agent per insertion of the Ukey, again and again until it is stopped."""

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cipherfleet.channel import codec
from cipherfleet.channel.process import protect, register
from cipherfleet.contract.errors import AlreadyRunning, StateNotWritable, UkeyAbsent, UkeyInvalid
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.settings import Settings
from cipherfleet.terminal.agent import Agent, Ended
from cipherfleet.terminal.insertion import Event, ServiceInfo
from cipherfleet.terminal.pin import pin_bytes, wipe
from cipherfleet.terminal.ukey import WATCH_S, DirectoryUkey

log = logging.getLogger(__name__)

_REOPEN_ATTEMPTS = 20


class TerminalConfig(msgspec.Struct, frozen=True):
    """``ukey``: the Ukey's folder. ``run_folder``: where running processes are listed, empty for none.

    ``keep_pin``: whether the PIN may stay in memory to open the Ukey again when it comes back; otherwise the terminal ends
    with ``ukey-absent`` when the Ukey goes.
    """

    ukey: str
    pin: str
    run_folder: str = ""
    settings: Settings = Settings()
    keep_pin: bool = True

    def __repr__(self) -> str:
        return f"TerminalConfig({self.ukey!r})"


class Terminal:
    """The terminal, in this process. ``progress`` hears of every step, ``ready`` once, when the service is on."""

    def __init__(
        self, configuration: TerminalConfig, *, ready: Callable[[ServiceInfo], None], progress: Callable[[Event], None] = lambda _: None
    ) -> None:
        self._folder = Path(configuration.ukey).absolute()
        self._run_folder = Path(configuration.run_folder) if configuration.run_folder else None
        self._settings, self._keep_pin = configuration.settings, configuration.keep_pin
        self._pin = pin_bytes(configuration.pin)
        self._ready, self._progress = ready, progress
        self._served = False

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set.

        Raises ``UkeyAbsent``, ``PinWrong``, ``UkeyInvalid``, ``AlreadyRunning``, or what ended the service for good.
        """
        try:
            ukey = await self._open(attempts=1)
            if not self._keep_pin:
                wipe(self._pin)
            with ukey, only_one(self._run_folder, ukey.record.consumer):
                while await self._insertion(ukey, stop) is Ended.REMOVED:
                    if not self._keep_pin:
                        raise UkeyAbsent("the Ukey was removed and its PIN is not kept", "run the terminal again")
                    if not await self._returned(ukey, stop):
                        return
                    ukey = await self._open(attempts=_REOPEN_ATTEMPTS)
        finally:
            wipe(self._pin)

    async def _insertion(self, ukey: DirectoryUkey, stop: asyncio.Event) -> Ended:
        with ukey:
            agent = Agent(ukey, self._settings, progress=self._progress, service_on=self._on, served_before=self._served)
            return await agent.run(stop)

    async def _returned(self, ukey: DirectoryUkey, stop: asyncio.Event) -> bool:
        """Wait for the Ukey; whether it came before the terminal was stopped."""
        waiting = [asyncio.ensure_future(ukey.returned()), asyncio.ensure_future(stop.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return not stop.is_set()
        finally:
            for task in waiting:
                task.cancel()

    async def _open(self, *, attempts: int) -> DirectoryUkey:
        """A fresh opening; a stick that is just being plugged in may not show all its files at once."""
        for left in reversed(range(attempts)):
            try:
                return await asyncio.to_thread(DirectoryUkey.open, self._folder, self._pin)
            except (UkeyAbsent, UkeyInvalid):
                if not left:
                    raise
            await asyncio.sleep(WATCH_S)
        raise RuntimeError("no attempt was allowed")

    def _on(self, info: ServiceInfo) -> None:
        if not self._served:
            self._served = True
            self._ready(info)


@contextmanager
def only_one(run_folder: Path | None, consumer: ConsumerId) -> Iterator[None]:
    """This process is the consumer's terminal in this run folder. Raises ``AlreadyRunning``."""
    if run_folder is None:
        yield
        return
    try:
        descriptor = os.open(run_folder / f"terminal-{consumer}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StateNotWritable(f"cannot write {run_folder}: {os.strerror(exc.errno or 0)}") from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise AlreadyRunning(f"a terminal of {consumer} is running already", "stop it first, or pull its Ukey") from exc
        entry = register(run_folder, "terminal", consumer, os.getpid(), consumer)
        try:
            yield
        finally:
            entry.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def log_progress(event: Event) -> None:
    """Progress as lines of JSON in the process's log."""
    log.info("%s", codec.encode(event).decode())


async def main(
    configuration: TerminalConfig,
    ready: Callable[[object], None],
    stop: asyncio.Event,
    *,
    progress: Callable[[Event], None] = log_progress,
) -> None:
    """``ready`` hears ``{"consumer", "vcm", "endpoint", "trace"}`` once the service is on."""
    protect()
    await Terminal(configuration, ready=ready, progress=progress).run(stop)
