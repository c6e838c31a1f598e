"""The cipher machine with a real card process, real VCM processes and a KMC that speaks the real interface."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import running
from cipherfleet.computing.machine import MachineConfig, main
from cipherfleet.contract.errors import (
    CardUnavailable,
    CipherfleetError,
    Exists,
    MachineUnavailable,
    NoCapacity,
    PortTaken,
    ServiceUnavailable,
    StateNotWritable,
    TokenStale,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId, new_vcm_id
from cipherfleet.contract.kmc_api import CertificatesRevoked
from cipherfleet.contract.machine_api import BuildOrder, MachineReport, VcmReport, VcmSize, VcmState
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcm_api import KeyCreateRequest, KeyDescription, LoginReply
from tests.unit.computing.machine.fake_kmc import FakeKmc, serial


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@dataclass
class Running:
    """A machine in this process; its card and VCMs are processes of their own."""

    kmc: FakeKmc
    folder: Path
    caller: Caller
    machine: "asyncio.Task[None]"
    stop: asyncio.Event

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    async def report(self) -> MachineReport:
        return await self.caller.call("GET", "/v1/status", reply=MachineReport)

    async def until(self, check: Callable[[MachineReport], bool], within: float = 15.0) -> MachineReport:
        async with asyncio.timeout(within):
            while not check(report := await self.report()):
                await asyncio.sleep(0.02)
        return report

    def order(self, consumer: str = "acme", **changes: object) -> BuildOrder:
        values: dict[str, object] = {
            "consumer": ConsumerId(consumer),
            "token": self.kmc.token(consumer),
            "address": free_address(),
            "isolation": "process",
            "size": VcmSize(1, 1024, 512),
        }
        return BuildOrder(**{**values, **changes})  # type: ignore[arg-type]

    async def build(self, order: BuildOrder, vcm: VcmId | None = None) -> VcmReport:
        return await self.caller.call("PUT", f"/v1/vcms/{vcm or new_vcm_id()}", order, reply=VcmReport)

    async def delete(self, vcm: VcmId) -> None:
        await self.caller.call("DELETE", f"/v1/vcms/{vcm}")

    async def serving(self, order: BuildOrder) -> VcmReport:
        built = await self.build(order)
        report = await self.until(lambda r: any(v.id == built.id and v.state is VcmState.SERVING for v in r.vcms))
        return next(v for v in report.vcms if v.id == built.id)

    def left(self) -> tuple[list[str], list[str]]:
        """Folders of VCMs, and run files of VCMs."""
        folders = [p.name for p in (self.folder / "state" / "vcm").iterdir()]
        return folders, [p.name for p in self.run_folder.glob("vcm-*")]


@asynccontextmanager
async def machine(folder: Path, kmc: FakeKmc, *, launcher: str = "", card: bool = True, **settings: object) -> AsyncIterator[Running]:
    (folder / "run").mkdir(exist_ok=True)
    address = free_address()
    stop, is_ready = asyncio.Event(), asyncio.Event()
    configuration = MachineConfig(
        id=MachineId("m1"),
        state=str(folder / "state"),
        address=address,
        credentials=kmc.credentials(Role.MACHINE, "m1"),
        kmc_url=kmc.url,
        run_folder=str(folder / "run"),
        isolation="process",
        settings=Settings(**settings),  # type: ignore[arg-type]
        launcher=launcher,
    )
    task = asyncio.create_task(main(configuration, lambda _: is_ready.set(), stop))
    waiting = asyncio.create_task(is_ready.wait())
    await asyncio.wait((waiting, task), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    name = Identity(Role.MACHINE, "m1").dns_name
    async with Caller(f"https://{address}", name, kmc.credentials(Role.MANAGEMENT, "management"), MachineUnavailable) as caller:
        running_ = Running(kmc, folder, caller, task, stop)
        try:
            if card:
                await running_.until(lambda r: r.card is not None)
            yield running_
        finally:
            stop.set()
            await task
    assert running(folder / "run") == []


@pytest.fixture
async def kmc() -> AsyncIterator[FakeKmc]:
    made = FakeKmc()
    await made.start()
    yield made
    await made.stop()


def application(kmc: FakeKmc, vcm: VcmReport, order: BuildOrder, name: str = "billing") -> Caller:
    consumer = kmc.consumer(vcm.consumer)
    server_name = Identity(Role.VCM, vcm.id, vcm.consumer).dns_name
    return Caller(f"https://{order.address}", server_name, consumer.application(name), ServiceUnavailable, timeout=10)


async def test_a_vcm_is_built_confined_serves_and_is_deleted_without_a_trace(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        order = m.order()
        vcm = await m.serving(order)
        print(vcm)
        async with application(kmc, vcm, order) as client:
            key = await client.call("POST", "/v1/keys", KeyCreateRequest("AES-256-GCM", "x"), reply=KeyDescription)
            print(key)
        begin = time.monotonic()
        await m.delete(vcm.id)
        print("deleted in", time.monotonic() - begin)
        assert m.left() == ([], [])
