"""The two real processes: what survives SIGKILL, what a start refuses, and an HSM that goes and comes back."""

import asyncio
import signal
import sqlite3
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import Credentials, check_chain, key_to_pem, make_request, new_key
from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import start_child
from cipherfleet.contract.errors import (
    AlreadyRunning,
    CertificateRevoked,
    FileProblem,
    HsmUnavailable,
    KmcUnavailable,
    Malformed,
    PassphraseWrong,
    PortTaken,
    StateNewer,
)
from cipherfleet.contract.escrow import RowWrite
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.kmc_api import ConsumerList, LogPage, RowsReply
from cipherfleet.contract.messages import CertificateRequest, Chain
from cipherfleet.contract.settings import Settings
from cipherfleet.kmc import process
from cipherfleet.kmc.enrolment import OPERATOR
from cipherfleet.kmc.process import HsmConfig, KmcConfig, KmcReady, hsm_main, kmc_main, parse_address
from tests.unit.kmc.world import FAST, PASSPHRASE, PIN, World, key_row, start_vcm


class Processes:
    """An HSM and a KMC as children of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.operator_key = new_key()
        self.children: list[Process] = []
        self.ready: KmcReady

    @property
    def hsm_config(self) -> HsmConfig:
        return HsmConfig(str(self.folder / "hsm"), str(self.folder / "hsm" / "hsm.sock"), PASSPHRASE, PIN, FAST)

    @property
    def kmc_config(self) -> KmcConfig:
        csr = make_request(self.operator_key, OPERATOR)
        return KmcConfig(str(self.folder / "kmc"), "127.0.0.1:0", self.hsm_config.socket, PIN, csr, FAST)

    async def start(self, role: str, config: object) -> tuple[Process, bytes]:
        command = [sys.executable, "-m", "cipherfleet.app.roles", role]
        child, info = await start_child(command, config, log_file=self.folder / f"{role}.log")
        self.children.append(child)
        return child, info

    async def start_kmc(self) -> Process:
        child, info = await self.start("kmc", self.kmc_config)
        self.ready = codec.decode(info, KmcReady)
        return child

    def operator_credentials(self) -> Credentials:
        return Credentials(key_to_pem(self.operator_key), self.ready.operator.chain, self.ready.operator.trust)

    def operator(self) -> Caller:
        return Caller(self.ready.url, process.KMC.dns_name, self.operator_credentials(), KmcUnavailable)

    async def stop(self) -> None:
        for child in self.children:
            if child.returncode is None:
                child.kill()
            await child.wait()


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    await processes.stop()


class Remote(World):
    """The world around a KMC in another process."""

    def __init__(self, processes: Processes) -> None:
        super().__init__(processes.folder, None, FAST)  # type: ignore[arg-type]
        self.processes = processes

    async def platform(self, identity: Identity) -> Caller:
        self.url = self.processes.ready.url
        if identity == OPERATOR:
            return self.call_as(self.processes.operator_credentials())
        key, operator = new_key(), await self.operator()
        request = CertificateRequest(make_request(key, identity))
        chain = await operator.call("POST", f"/v1/certificates/{identity.role}/{identity.id}", request, reply=Chain)
        return self.call_as(Credentials(key_to_pem(key), chain.chain, chain.trust))


async def test_killed_processes_come_back_with_all_that_was_acknowledged(processes: Processes, tmp_path: Path) -> None:
    hsm, _ = await processes.start("hsm", processes.hsm_config)
    kmc = await processes.start_kmc()
    world = Remote(processes)
    async with world.stack:
        alice = await world.enrol("alice")
        check_chain(alice.reply.identity.chain, processes.ready.root)
        terminal = await alice.plug_in()
        vcm = await start_vcm(world, alice, terminal)

        hsm.kill()
        await hsm.wait()
        with pytest.raises(HsmUnavailable):
            await world.enrol("bob")
        hsm, _ = await processes.start("hsm", processes.hsm_config)
        await world.enrol("bob", confirm=False)
        assert (await vcm.heartbeat(terminal)).lease.signatures

        row = key_row("alice")
        receipt = await vcm.write(RowWrite(row))
        kmc.kill()  # right after the acknowledgement
        hsm.kill()
        await asyncio.gather(kmc.wait(), hsm.wait())

    root = processes.ready.root
    await processes.start("hsm", processes.hsm_config)
    await processes.start_kmc()
    assert processes.ready.root == root
    world = Remote(processes)
    async with world.stack:
        operator = await world.operator()
        found = await operator.call("GET", "/v1/consumers", reply=ConsumerList)
        assert {(c.name, c.state, c.keys) for c in found.consumers} == {("alice", "enrolled", 0), ("bob", "pending", 0)}
        caller = world.call_as(Credentials(key_to_pem(vcm.key), vcm.chain.chain, alice.reply.root))
        assert (await caller.call("GET", "/v1/escrow", reply=LogPage)).log == receipt.log
        assert (await caller.call("GET", "/v1/escrow/rows", reply=RowsReply)).rows == (row,)
    secrets = (PASSPHRASE.encode(), b"BEGIN PRIVATE KEY", alice.reply.ciphertext_cmk, vcm.token.token)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and any(secret in p.read_bytes() for secret in secrets)]


async def test_a_wrong_passphrase_is_told_by_the_process(processes: Processes) -> None:
    hsm, _ = await processes.start("hsm", processes.hsm_config)
    with pytest.raises(AlreadyRunning):
        await processes.start("hsm", processes.hsm_config)
    hsm.send_signal(signal.SIGTERM)
    assert await hsm.wait() == 0
    with pytest.raises(PassphraseWrong):
        await processes.start("hsm", HsmConfig(processes.hsm_config.state, processes.hsm_config.socket, "Tr0ub4dor&3", PIN, FAST))
    assert "Tr0ub4dor" not in (processes.folder / "hsm.log").read_text()


# -- the same mains in this process ------------------------------------------------------------------------------------


class Running:
    """A main in this loop."""

    def __init__(self, main: object, config: object) -> None:
        self.reported: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.stop = asyncio.Event()
        self.task = asyncio.ensure_future(main(config, self.reported.set_result, self.stop))  # type: ignore[operator]

    async def ready(self) -> object:
        await asyncio.wait({self.reported, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()
        return self.reported.result()

    async def end(self) -> None:
        self.stop.set()
        await self.task


@pytest.fixture
async def hsm(processes: Processes) -> AsyncIterator[Running]:
    running = Running(hsm_main, processes.hsm_config)
    await running.ready()
    yield running
    if not running.task.done():
        await running.end()


async def test_a_restarted_kmc_knows_its_operator(processes: Processes, hsm: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Running(kmc_main, processes.kmc_config)
    ready = await first.ready()
    assert isinstance(ready, KmcReady)
    processes.ready = ready
    old = processes.operator()
    await first.end()
    port = int(ready.url.rpartition(":")[2])
    config = KmcConfig(
        processes.kmc_config.state, f"127.0.0.1:{port}", processes.hsm_config.socket, PIN, processes.kmc_config.operator_csr, FAST
    )
    second = Running(kmc_main, config)
    await second.ready()
    async with old:  # the same key: a start whose answer got lost has not locked the operator out
        await old.call("GET", "/v1/consumers", reply=ConsumerList)
        with pytest.raises(AlreadyRunning):
            await Running(kmc_main, config).ready()
    await second.end()

    processes.operator_key = new_key()
    third = Running(kmc_main, structs.replace(config, operator_csr=processes.kmc_config.operator_csr))
    await third.ready()
    async with old:
        with pytest.raises(CertificateRevoked):
            await old.call("GET", "/v1/consumers", reply=ConsumerList)
    await third.end()


async def test_a_taken_port(processes: Processes, hsm: Running) -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(PortTaken):
        await Running(kmc_main, structs.replace(processes.kmc_config, address=f"127.0.0.1:{port}")).ready()
    server.close()


async def test_no_hsm(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "HSM_WAIT_S", 0.1)
    with pytest.raises(HsmUnavailable):
        await Running(kmc_main, processes.kmc_config).ready()


async def test_another_hsm_than_before(processes: Processes, hsm: Running, tmp_path: Path) -> None:
    kmc = Running(kmc_main, processes.kmc_config)
    await kmc.ready()
    await kmc.end()
    other = HsmConfig(str(tmp_path / "other"), str(tmp_path / "other" / "hsm.sock"), PASSPHRASE, PIN, FAST)
    foreign = Running(hsm_main, other)
    await foreign.ready()
    with pytest.raises(FileProblem):
        await Running(kmc_main, structs.replace(processes.kmc_config, hsm_socket=other.socket)).ready()
    await foreign.end()


async def test_a_newer_database(processes: Processes, hsm: Running) -> None:
    kmc = Running(kmc_main, processes.kmc_config)
    await kmc.ready()
    await kmc.end()
    with sqlite3.connect(Path(processes.kmc_config.state) / "kmc.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StateNewer):
        await Running(kmc_main, processes.kmc_config).ready()


async def test_the_kmc_renews_its_own_certificate(world: World) -> None:
    def serial_seen() -> object:
        return [own.serial for own in world.center.registry.active(process.KMC)]

    world.clock.ahead = -0.7 * FAST.process_certificate_days * 86400
    world.kmc.server.renew(await process.own_credentials(world.kmc.enrolment, world.center, "127.0.0.1"))
    world.clock.ahead = 0
    before = serial_seen()
    renewal = asyncio.create_task(process._upkeep(world.kmc, world.kmc.enrolment, "127.0.0.1", every=0.01))
    async with asyncio.timeout(20):
        while serial_seen() == before:
            await asyncio.sleep(0.01)
    renewal.cancel()
    await asyncio.gather(renewal, return_exceptions=True)
    operator = await world.operator()
    await operator.call("GET", "/v1/consumers", reply=ConsumerList)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", ":1", "127.0.0.1:x", "127.0.0.1:99999"])
def test_addresses(address: str) -> None:
    with pytest.raises(Malformed):
        parse_address(address)


def test_configurations_do_not_show_their_secrets() -> None:
    shown = repr(HsmConfig("state", "socket", PASSPHRASE, PIN, Settings())) + repr(KmcConfig("state", "h:1", "socket", PIN, b""))
    assert PASSPHRASE not in shown
    assert PIN not in shown
    assert Identity(Role.KMC, "kmc") == process.KMC
