"""What tests of whole clouds share: a cloud in a folder, consumers with Ukeys, applications, and the command line."""

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cipherfleet import SyncClient
from cipherfleet.app import cli
from cipherfleet.app.options import Wish
from cipherfleet.app.wiring import Cloud
from cipherfleet.channel.process import ProcessEntry
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.ids import ApplicationName, ConsumerId
from cipherfleet.contract.management_api import PlatformStatus, VcmDetail, VcmEntry, VcmList
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import Right
from cipherfleet.terminal.applications import sign_in
from cipherfleet.terminal.enrol import enrol
from cipherfleet.terminal.ukey import DirectoryUkey

T = TypeVar("T")

PIN = "1357-test"

QUICK = Settings(argon2_memory_kib=8192, argon2_iterations=1)
"""Test clouds differ from real ones in the cost of a PIN alone."""


def boottime() -> float:
    """The card's clock, seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def eventually(check: Callable[[], Any], *, within: float = 20.0, what: str = "") -> Any:
    """The first true value of ``check``; fails after ``within`` seconds."""
    end = time.monotonic() + within
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < end, f"not within {within} s: {what or check}"
        time.sleep(0.02)


def persistently(work: Callable[[], T], *, within: float = 60.0) -> T:
    """What ``work`` gives, asked again when it is refused: after a kill service may end once more, as a lease did, before it is back."""
    end = time.monotonic() + within
    while True:
        try:
            return work()
        except CipherfleetError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@dataclass
class Result:
    """What one command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


def command(*arguments: object, stdin: bytes = b"") -> Result:
    """Run ``cipherfleet ARGUMENTS`` in this process."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    given = io.TextIOWrapper(io.BytesIO(stdin))
    old = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["cipherfleet", *map(str, arguments)], given
    Wish.json = False
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.argv, sys.stdin = old
        out.flush()
        err.flush()
    return Result(status, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(errors="replace")


@dataclass
class Consumer:
    """A consumer of a test cloud, with its Ukey's folder."""

    cloud: "TestCloud"
    name: str
    ukey: Path
    pin: str = PIN

    def plug_in(self, *, timeout: float = 60.0) -> dict[str, Any]:
        """The terminal agent starts; returns once the service is on."""
        info: dict[str, Any] = json.loads(asyncio.run(self.cloud.cloud.start_terminal(self.ukey, self.pin, timeout=timeout)))
        return info

    def pull(self) -> Path:
        """The Ukey is gone: its folder is renamed."""
        pocket = self.ukey.with_name(self.ukey.name + "-pocket")
        self.ukey.rename(pocket)
        return pocket

    def put_back(self) -> None:
        self.ukey.with_name(self.ukey.name + "-pocket").rename(self.ukey)

    def sign_in(self, name: str = "billing", rights: tuple[Right, ...] = tuple(Right)) -> Profile:
        async def work() -> Profile:
            with DirectoryUkey.open(self.ukey, self.pin) as ukey:
                return await sign_in(ukey, ApplicationName(name), rights, 1)

        return asyncio.run(work())

    def client(self, name: str = "billing") -> SyncClient:
        return SyncClient(self.sign_in(name))

    def vcms(self) -> list[VcmEntry]:
        return [v for v in self.cloud.vcms() if v.consumer == self.name]

    @property
    def service(self) -> str:
        return next((c.service for c in self.cloud.platform().consumers if c.name == self.name), "off")


@dataclass
class TestCloud:
    """A cloud of a test, and its operator."""

    __test__ = False
    folder: Path
    isolation: str = "process"
    machines: int = 2
    settings: Settings = QUICK
    cloud: Cloud = field(init=False)

    def __post_init__(self) -> None:
        self.cloud = Cloud(self.folder / "state")

    def up(self) -> None:
        asyncio.run(self.cloud.up(machines=self.machines, isolation=self.isolation, settings=self.settings))

    def down(self) -> None:
        asyncio.run(self.cloud.down())

    def enrol(self, name: str) -> Consumer:
        consumer = Consumer(self, name, self.folder / f"ukey-{name}")

        async def work() -> None:
            async with self.cloud.kmc() as kmc, self.cloud.management() as management:
                await enrol(
                    kmc,
                    management,
                    ConsumerId(name),
                    consumer.ukey,
                    consumer.pin,
                    kmc_url=self.cloud.kmc_url,
                    management_url=self.cloud.management_url,
                    settings=self.settings,
                )

        asyncio.run(work())
        return consumer

    def platform(self) -> PlatformStatus:
        async def ask() -> PlatformStatus:
            async with self.cloud.management() as management:
                return await management.call("GET", "/v1/status", reply=PlatformStatus)

        return asyncio.run(ask())

    def vcms(self, *, everything: bool = False) -> tuple[VcmEntry, ...]:
        async def ask() -> VcmList:
            async with self.cloud.management() as management:
                return await management.call("GET", f"/v1/vcms?all={int(everything)}", reply=VcmList)

        return asyncio.run(ask()).vcms

    def vcm(self, id_: str) -> VcmDetail:
        async def ask() -> VcmDetail:
            async with self.cloud.management() as management:
                return await management.call("GET", f"/v1/vcms/{id_}", reply=VcmDetail)

        return asyncio.run(ask())

    def processes(self, *roles: str) -> list[ProcessEntry]:
        return [p for p in self.cloud.processes() if not roles or p.role in roles]

    def kill(self, *roles: str, number: int = signal.SIGKILL) -> list[int]:
        """Kill every process of these roles; their pids, once they are gone."""
        entries = self.processes(*roles)
        for entry in entries:
            self.end(entry, number)
        return [e.pid for e in entries]

    def end(self, entry: ProcessEntry, number: int = signal.SIGTERM) -> None:
        """Signal one process and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.pid, number)
        eventually(lambda: not entry.alive, what=f"{entry.role} ends")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(entry.pid, os.WNOHANG)


def refusal(work: Callable[[], object]) -> str:
    """The code with which ``work`` is refused; empty when it is not."""
    try:
        work()
    except CipherfleetError as error:
        return error.code
    return ""


@contextlib.contextmanager
def cloud_in(folder: Path, **options: Any) -> Iterator[TestCloud]:
    """A cloud that is up, and gone at the end."""
    made = TestCloud(folder, **options)
    try:
        made.up()
        yield made
    finally:
        made.down()


def profile_file(profile: Profile, folder: Path) -> Path:
    path = folder / f"{profile.consumer}-{profile.application}.json"
    path.write_bytes(msgspec.json.encode(profile))
    return path
