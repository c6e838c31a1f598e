"""The cipher machine with a real card process, real VCM processes and a KMC that speaks the real interface."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import register, running, start_child
from cipherfleet.computing.machine import MachineConfig, main
from cipherfleet.contract.errors import (
    CardUnavailable,
    CertificateInvalid,
    Exists,
    Internal,
    IsolationUnavailable,
    MachineUnavailable,
    Malformed,
    NoCapacity,
    NotPermitted,
    PortTaken,
    ServiceUnavailable,
    StateNotWritable,
    TokenStale,
    VcmUnknown,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId, new_vcm_id
from cipherfleet.contract.machine_api import BuildOrder, MachineReport, VcmReport, VcmSize, VcmState
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcc import VccLimits
from cipherfleet.contract.vcm_api import KeyCreateRequest, KeyDescription
from tests.unit.computing.machine.conftest import reachable_from
from tests.unit.computing.machine.fake_kmc import FakeKmc


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


def application(kmc: FakeKmc, vcm: VcmReport, order: BuildOrder, name: str = "billing") -> Caller:
    consumer = kmc.consumer(vcm.consumer)
    server_name = Identity(Role.VCM, vcm.id, vcm.consumer).dns_name
    return Caller(f"https://{order.address}", server_name, consumer.application(name), ServiceUnavailable, timeout=10)


async def use(kmc: FakeKmc, vcm: VcmReport, order: BuildOrder) -> None:
    """An application makes a key."""
    async with application(kmc, vcm, order) as client:
        await client.call("POST", "/v1/keys", KeyCreateRequest("AES-256-GCM", "x"), reply=KeyDescription)


async def refused(order: BuildOrder) -> None:
    host, _, port = order.address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_a_vcm_is_built_confined_serves_and_is_deleted_without_a_trace(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        order = m.order()
        vcm = await m.serving(order)
        await use(kmc, vcm, order)
        process = psutil.Process(vcm.pid)
        assert process.exe() == str(Path(sys.executable).resolve())
        [entry] = [p for p in running(m.run_folder) if p.role == "vcm"]
        assert (entry.id, entry.pid, entry.consumer) == (vcm.id, vcm.pid, "acme")
        assert vcm.started_ms > 0
        assert vcm.isolation is not None
        assert vcm.isolation.launcher == "bubblewrap"
        assert set(vcm.isolation.namespaces) >= {"ipc", "mnt", "net", "pid", "user", "uts"}
        assert (vcm.isolation.seccomp, vcm.isolation.no_new_privileges, vcm.isolation.read_only_root) == (True, True, True)
        report = await m.report()
        assert report.card is not None
        assert report.card.vccs == 1
        assert report.vcms[0].operations > 0
        assert report.vcms[0].keys == 1
        assert (report.id, report.pid, report.capacity, report.state) == ("m1", os.getpid(), 64, "up")
        await m.delete(vcm.id)
        assert not process.is_running()
        assert m.left() == ([], [])
        await refused(order)
        report = await m.report()
        assert report.card is not None
        assert (report.vcms, report.card.vccs) == ((), 0)
        await m.delete(vcm.id)


async def test_two_consumers_share_a_machine_and_nothing_else(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        orders = m.order("acme"), m.order("rival")
        first, second = await asyncio.gather(*(m.serving(order) for order in orders))
        await asyncio.gather(use(kmc, first, orders[0]), use(kmc, second, orders[1]))
        assert first.isolation is not None
        cores = [psutil.Process(vcm.pid).cpu_affinity() for vcm in (first, second)]
        assert [len(c or ()) for c in cores] == [1, 1]
        assert len(os.sched_getaffinity(0)) < 2 or cores[0] != cores[1]
        for kind in ("net", "mnt", "pid", "user"):
            assert Path(f"/proc/{first.pid}/ns/{kind}").readlink() != Path(f"/proc/{second.pid}/ns/{kind}").readlink()


@pytest.mark.parametrize("launcher", ["zygote", "unshare", "none"])
async def test_without_bubblewrap_it_serves_as_well(tmp_path: Path, kmc: FakeKmc, launcher: str) -> None:
    async with machine(tmp_path, kmc, launcher=launcher) as m:
        order = m.order()
        vcm = await m.serving(order)
        await use(kmc, vcm, order)
        assert vcm.isolation is not None
        assert vcm.isolation.launcher == launcher
        assert vcm.isolation.seccomp
        assert vcm.isolation.landlock_abi > 0
        await m.delete(vcm.id)
        assert m.left() == ([], [])


async def test_the_same_order_again_is_answered_another_one_is_refused(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        order, id_ = m.order(), new_vcm_id()
        first, second = await asyncio.gather(m.build(order, id_), m.build(order, id_))
        assert first.pid == second.pid
        with pytest.raises(Exists):
            await m.build(m.order(), id_)
        assert kmc.seen["certificate"] == 1


async def test_a_start_that_fails_leaves_nothing(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc, vcms_per_machine=1) as m:
        with pytest.raises(TokenStale):
            await m.build(m.order(token=b"never given out"))
        taken = m.order()
        host, _, port = taken.address.rpartition(":")
        with socket.create_server((host, int(port))), pytest.raises(PortTaken):
            await m.build(taken)
        with pytest.raises(IsolationUnavailable):
            await m.build(m.order(network_namespace="cf-not-there"))
        with pytest.raises((Internal, CardUnavailable)):
            await m.build(m.order(size=VcmSize(1, 8, 512)))  # 8 MiB: Python does not start, or cannot map its vCC
        report = await m.report()
        assert report.card is not None
        assert (report.vcms, report.card.vccs, m.left()) == ((), 0, ([], []))
        assert [p for p in psutil.Process().children() if p.name() == "bwrap"] == []
        order = m.order()
        vcm = await m.serving(order)
        with pytest.raises(NoCapacity):
            await m.build(m.order())
        await use(kmc, vcm, order)


async def test_a_vcm_that_dies_is_reported_failed_until_it_is_deleted(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        order = m.order()
        vcm = await m.serving(order)
        os.kill(vcm.pid, signal.SIGKILL)
        report = await m.until(lambda r: r.vcms[0].state is VcmState.FAILED)
        assert "status" in report.vcms[0].error
        assert (report.vcms[0].pid, m.left()) == (0, ([], []))
        assert report.card is not None
        assert (await m.until(lambda r: r.card is not None and r.card.vccs == 0)).vcms
        assert (await m.build(order, vcm.id)).state is VcmState.FAILED
        await m.delete(vcm.id)
        assert (await m.report()).vcms == ()


async def test_a_vcm_whose_service_was_revoked_says_why_it_ended(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        order = m.order()
        vcm = await m.serving(order)
        process = psutil.Process(vcm.pid)
        await kmc.revoke(vcm.id)
        await asyncio.to_thread(process.wait, 5)
        await refused(order)
        report = await m.until(lambda r: r.vcms[0].state is VcmState.FAILED)
        assert report.vcms[0].error == "service-off: ukey-removed"


async def test_when_the_card_dies_its_vcms_fail_and_a_new_card_is_certified(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        first, second = await m.serving(m.order()), await m.serving(m.order("rival"))
        before = (await m.report()).card
        assert before is not None
        os.kill(before.pid, signal.SIGKILL)
        report = await m.until(lambda r: r.card is not None and r.card.id != before.id)
        assert {v.id: v.state for v in report.vcms} == {first.id: VcmState.FAILED, second.id: VcmState.FAILED}
        assert all(v.error.startswith("card-unavailable") for v in report.vcms)
        assert not psutil.pid_exists(first.pid)
        assert kmc.seen["card"] == 2
        order = m.order()
        await use(kmc, await m.serving(order), order)


async def test_without_the_kmc_it_waits_and_builds_nothing(tmp_path: Path, kmc: FakeKmc) -> None:
    await kmc.stop()
    async with machine(tmp_path, kmc, card=False) as m:
        assert (await m.report()).card is None
        with pytest.raises(CardUnavailable):
            await m.build(m.order())
        kmc.refuse_cards = CertificateInvalid("not now")
        await kmc.restart()
        await kmc.until("card")
        kmc.refuse_cards = None
        await m.until(lambda r: r.card is not None)
        order = m.order()
        await use(kmc, await m.serving(order), order)


@pytest.fixture
def survivor() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


async def test_what_an_earlier_life_left_is_swept(tmp_path: Path, kmc: FakeKmc, survivor: "subprocess.Popen[bytes]") -> None:
    run_folder, old = tmp_path / "run", "vcm-00000000dead"
    left = tmp_path / "state" / "vcm" / old
    left.mkdir(parents=True)
    run_folder.mkdir()
    (left / "log").write_text("old")
    register(run_folder, "vcm", old, survivor.pid)
    register(run_folder, "vcm", "vcm-0000000other", os.getpid())  # another machine's
    async with machine(tmp_path, kmc) as m:
        assert m.left() == ([], ["vcm-vcm-0000000other.json"])
        assert survivor.wait(5) == -signal.SIGKILL
        (run_folder / "vcm-vcm-0000000other.json").unlink()


async def test_only_the_management_platform_gives_orders(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc, card=False) as m:
        name = Identity(Role.MACHINE, "m1").dns_name
        async with Caller(m.caller.url, name, kmc.credentials(Role.OPERATOR, "operator"), MachineUnavailable) as operator:
            for method, path in (
                ("GET", "/v1/status"),
                ("PUT", f"/v1/vcms/{new_vcm_id()}/limits"),
                ("DELETE", f"/v1/vcms/{new_vcm_id()}"),
            ):
                with pytest.raises(NotPermitted):
                    await operator.call(method, path)
        with pytest.raises(Malformed):
            await m.caller.call("DELETE", "/v1/vcms/..%2F..")


async def test_limits_reach_the_card(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc) as m:
        vcm = await m.serving(m.order(limits=VccLimits(keys=9)))
        assert (await m.report()).vcms[0].limits == VccLimits(keys=9)
        path = f"/v1/vcms/{vcm.id}/limits"
        await m.caller.call("PUT", path, VccLimits(operations_s=5000, weight=2.5))
        report = (await m.report()).vcms[0]
        assert report.limits == VccLimits(operations_s=5000, weight=2.5)
        assert sum(report.statistics.service_us) == report.operations > 0
        for wrong in ({"weight": 0}, {"depth": 257}, {"keys": -1}, {"bytes_s": "many"}, {"more": 1}, [1]):
            with pytest.raises(Malformed):
                await m.caller.call("PUT", path, wrong)
        with pytest.raises(VcmUnknown):
            await m.caller.call("PUT", f"/v1/vcms/{new_vcm_id()}/limits", VccLimits())
        assert (await m.report()).vcms[0].limits == VccLimits(operations_s=5000, weight=2.5)


async def test_a_port_or_a_state_that_cannot_be_had_is_said(tmp_path: Path, kmc: FakeKmc, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("not a folder")
    with pytest.raises(StateNotWritable):
        async with machine(tmp_path, kmc):
            pass
    (tmp_path / "state").unlink()
    address = free_address()
    host, _, port = address.rpartition(":")
    monkeypatch.setattr(sys.modules[__name__], "free_address", lambda: address)
    with socket.create_server((host, int(port))), pytest.raises(PortTaken):
        async with machine(tmp_path, kmc):
            pass


@pytest.mark.root
async def test_in_domain_isolation_it_listens_in_its_ports_namespace(tmp_path: Path, kmc: FakeKmc, namespace: str) -> None:
    async with machine(tmp_path, kmc) as m:
        order = m.order(isolation="domain", network_namespace=namespace)
        vcm = await m.serving(order)
        await refused(order)  # from the host
        host, _, port = order.address.rpartition(":")
        assert await asyncio.to_thread(reachable_from, namespace, host, int(port))
        assert vcm.isolation is not None
        assert vcm.isolation.mode == "domain"
        assert Path(f"/proc/{vcm.pid}/ns/net").stat().st_ino != Path(f"/run/netns/{namespace}").stat().st_ino


async def test_when_a_machine_is_killed_its_card_and_vcms_die_with_it(tmp_path: Path, kmc: FakeKmc) -> None:
    (tmp_path / "run").mkdir()
    address = free_address()
    configuration = MachineConfig(
        id=MachineId("m2"),
        state=str(tmp_path / "state"),
        address=address,
        credentials=kmc.credentials(Role.MACHINE, "m2"),
        kmc_url=kmc.url,
        run_folder=str(tmp_path / "run"),
        isolation="process",
    )
    command = [sys.executable, "-m", "cipherfleet.app.roles", "machine"]
    child, _ = await start_child(command, configuration, log_file=tmp_path / "log")
    name = Identity(Role.MACHINE, "m2").dns_name
    async with Caller(f"https://{address}", name, kmc.credentials(Role.MANAGEMENT, "management"), MachineUnavailable) as caller:
        m = Running(kmc, tmp_path, caller, asyncio.create_task(asyncio.sleep(0)), asyncio.Event())
        await m.until(lambda r: r.card is not None)
        order = m.order()
        vcm = await m.serving(order)
        await use(kmc, vcm, order)
        report = await m.report()
        assert report.card is not None
        processes = [psutil.Process(pid) for pid in (vcm.pid, report.card.pid)]
        child.kill()
        await child.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 2)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    await refused(order)
    assert running(tmp_path / "run") == []
