"""The zygote with real forks: what its children share, what they do not, and how each end is noticed."""

import asyncio
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest

from cipherfleet.channel import codec
from cipherfleet.channel.process import ReadyLine
from cipherfleet.computing import launcher as launching
from cipherfleet.computing.confinement import Confinement
from cipherfleet.computing.launcher import Child, Launcher, readable_paths
from cipherfleet.computing.zygote import ForkOrder
from cipherfleet.contract.errors import Internal, IsolationUnavailable, TimedOut
from cipherfleet.contract.machine_api import VcmState
from tests.unit.computing.machine.fake_kmc import FakeKmc
from tests.unit.computing.machine.test_machine import machine

SOURCE = """
import os, random, secrets, ssl, sys, time
from functools import partial
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cipherfleet.channel.process import as_it_is, run
from cipherfleet.computing.confinement import Confinement, confine
from cipherfleet.computing.zygote import serve

def draws():
    key = Ed25519PrivateKey.generate().private_bytes_raw().hex()
    return [str(random.random()), os.urandom(16).hex(), secrets.token_hex(16), ssl.RAND_bytes(16).hex(), key]

def prepare(confinement):
    if confinement.launcher == "zygote":
        confine(confinement)
    elif confinement.mode == "refused":
        os._exit(3)
    elif confinement.mode == "silent":
        time.sleep(60)
    return confinement

async def main(confinement, ready, stop):
    ready({"draws": draws(), "pid": os.getpid(), "session": os.getsid(0), "environment": sorted(os.environ)})
    await stop.wait()

draws()
sys.exit(serve(partial(run, main, Confinement, prepare=prepare)))
"""


class Said(msgspec.Struct):
    draws: list[str]
    pid: int
    session: int
    environment: list[str]


@pytest.fixture
async def launcher(tmp_path: Path) -> AsyncIterator[Launcher]:
    (tmp_path / "vcm" / "relay").mkdir(parents=True)
    made = Launcher("zygote", command=(sys.executable, "-I", "-B", "-c", SOURCE))
    yield made
    await made.close()


async def start(
    launcher: Launcher, folder: Path, *descriptors: int, mode: str = "process", kind: str = "zygote", timeout: float = 20
) -> Child:
    confinement = Confinement(mode, kind, 512, 64, (), launcher.readable, str(folder / "vcm"))
    return await launcher.start(
        confinement, relay=folder / "vcm" / "relay", log_file=folder / "log", descriptors=descriptors, hostname="x", timeout=timeout
    )


def zygote_of(child: Child) -> psutil.Process:
    parent = psutil.Process(child.pid).parent()
    assert parent is not None
    return parent


def descriptors(pid: int) -> list[str]:
    return sorted(f"{path.name} {path.readlink()}" for path in Path(f"/proc/{pid}/fd").iterdir())


async def gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.01)


async def test_children_of_one_zygote_draw_nothing_that_another_draws(launcher: Launcher, tmp_path: Path) -> None:
    children = await asyncio.gather(*(start(launcher, tmp_path) for _ in range(4)))
    said = [codec.decode(child.info, Said) for child in children]
    drawn = [draw for one in said for draw in one.draws]
    assert len(drawn) == len(set(drawn)) == 20
    assert {(one.pid, one.session) for one in said} == {(1, 1)}
    assert not set(said[0].environment) - {"LANG", "MALLOC_ARENA_MAX", "LC_CTYPE"}
    assert len({zygote_of(child).pid for child in children}) == 1
    for kind in ("mnt", "pid", "net", "ipc", "uts", "user"):
        assert len({Path(f"/proc/{pid}/ns/{kind}").readlink() for pid in (os.getpid(), *(child.pid for child in children))}) == 5
    for child in children:
        child.close()


async def test_what_is_open_is_only_its_own(launcher: Launcher, tmp_path: Path) -> None:
    first = await start(launcher, tmp_path)
    zygote = zygote_of(first)
    before, threads = descriptors(zygote.pid), zygote.num_threads()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = os.dup(theirs.fileno())
        inode = f"{number} socket:[{os.fstat(number).st_ino}]"
        second = await start(launcher, tmp_path, number)
        os.close(number)
    assert inode in descriptors(second.pid)
    assert threads == 1
    assert descriptors(zygote.pid) == before
    own = [re.sub(r"[0-9]+ |:.*", "", entry) for entry in descriptors(second.pid)]
    assert own.count("socket") <= 3  # the one that it was given, and the pair that wakes its loop
    assert inode not in descriptors(first.pid)
    await first.end(1)
    await second.end(1)
    assert descriptors(zygote.pid) == before


async def test_a_child_that_is_killed_is_reported(launcher: Launcher, tmp_path: Path) -> None:
    first, second = await start(launcher, tmp_path), await start(launcher, tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    assert await asyncio.wait_for(first.wait(), 5) == -signal.SIGKILL
    assert psutil.pid_exists(second.pid)
    await second.end(5)
    assert await second.wait() == 0
    first.close()


async def test_the_end_of_the_zygote_ends_its_children_and_another_one_is_started(launcher: Launcher, tmp_path: Path) -> None:
    children = [await start(launcher, tmp_path) for _ in range(3)]
    zygote = zygote_of(children[0])
    zygote.kill()
    assert [await asyncio.wait_for(child.wait(), 5) for child in children] == [-1, -1, -1]
    for child in children:
        await gone(child.pid)
        await child.end(1)
    other = await start(launcher, tmp_path)
    assert zygote_of(other).pid != zygote.pid
    await launcher.close()
    assert await asyncio.wait_for(other.wait(), 5) == -1
    await gone(other.pid)
    other.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, None], ids=["killed", "told"])
def test_the_kernel_ends_the_children_with_the_zygote(tmp_path: Path, number: signal.Signals | None) -> None:
    """Nobody here signals them: as when the machine was killed."""
    (tmp_path / "relay").mkdir()
    confinement = Confinement("process", "zygote", 512, 64, (), readable_paths(), str(tmp_path))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stdin, to_child = os.pipe()
    from_child, stdout = os.pipe()
    with ours, os.fdopen(from_child, "rb") as said, subprocess.Popen([sys.executable, "-c", SOURCE], stdin=theirs.fileno()) as zygote:
        theirs.close()
        socket.send_fds(ours, [codec.encode(ForkOrder(1))], [stdin, stdout, 2])
        _, (pidfd,), _, _ = socket.recv_fds(ours, 1000, 1)
        os.close(stdin)
        os.close(stdout)
        os.write(to_child, codec.encode(confinement))
        os.close(to_child)
        assert codec.decode(said.readline(), ReadyLine).ready
        assert not select.select([pidfd], [], [], 0.1)[0]
        if number is not None:
            zygote.send_signal(number)
        else:
            ours.close()
        assert select.select([pidfd], [], [], 5)[0]
        os.close(pidfd)


async def test_a_zygote_that_does_not_listen_is_ended_all_the_same(launcher: Launcher, tmp_path: Path) -> None:
    child = await start(launcher, tmp_path)
    zygote = zygote_of(child)
    zygote.suspend()
    await asyncio.wait_for(launcher.close(), 10)
    assert await child.wait() == -1
    await gone(child.pid)
    assert not zygote.is_running()
    child.close()


async def test_a_child_that_ends_early_or_never_is_ready_is_not_left(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(Internal):
        await start(launcher, tmp_path, mode="refused", kind="none")
    with pytest.raises(TimedOut):
        await start(launcher, tmp_path, mode="silent", kind="none", timeout=1)
    child = await start(launcher, tmp_path)
    assert [p.pid for p in zygote_of(child).children(recursive=True)] == [child.pid]
    child.close()


async def test_a_root_that_cannot_be_had_is_said(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "vcm" / "relay").rmdir()
    with pytest.raises(IsolationUnavailable):
        await start(launcher, tmp_path)


@pytest.mark.parametrize(
    "message", [b"{}", b"no", codec.encode(ForkOrder(1)), codec.encode(ForkOrder(1, (2,))), codec.encode(ForkOrder(1, (7,)))]
)
async def test_what_is_no_order_ends_the_zygote(message: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            zygote = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", SOURCE), stdin=theirs.fileno(), stderr=asyncio.subprocess.DEVNULL
            )
        ours.send(message)
        assert await asyncio.wait_for(zygote.wait(), 20) == 1
        assert ours.recv(100) == b""


async def test_it_is_used_where_it_is_wanted_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = await Launcher.find("zygote")
    assert launcher.kind == "zygote"
    await launcher.close()
    monkeypatch.setattr(launching, "ZYGOTE_COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    assert (await Launcher.find("zygote")).kind == "bubblewrap"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert (await Launcher.find("zygote")).kind == "unshare"


async def test_a_machine_whose_zygote_is_killed_reports_its_vcms_failed_and_builds_others(tmp_path: Path, kmc: FakeKmc) -> None:
    async with machine(tmp_path, kmc, launcher="zygote") as m:
        vcms = [await m.serving(m.order()) for _ in range(2)]
        parent = psutil.Process(vcms[0].pid).parent()
        assert parent is not None
        parent.kill()
        await m.until(lambda r: {v.state for v in r.vcms} == {VcmState.FAILED})
        other = await m.serving(m.order())
        assert other.isolation is not None
        assert set(other.isolation.namespaces) >= {"ipc", "mnt", "net", "pid", "user", "uts"}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="looks at the memory of other processes, which needs root")
@pytest.mark.parametrize("kind", ["bubblewrap", "zygote"])
async def test_how_long_a_start_takes_and_how_much_a_vcm_weighs(tmp_path: Path, kmc: FakeKmc, kind: str) -> None:
    """Prints it (``pytest -s``); CIPHERFLEET_VCMS says how many."""
    count = int(os.environ.get("CIPHERFLEET_VCMS", "4"))
    async with machine(tmp_path, kmc, launcher=kind) as m:
        built = [await m.build(m.order()) for _ in range(count)]
        await m.until(lambda r: [v.state for v in r.vcms] == [VcmState.SERVING] * count, 60)
        weights = [_pss_mib(vcm.pid) for vcm in built]
    took = statistics.median(vcm.started_ms for vcm in built)
    print(f"\n{kind}: {count} VCMs, start p50 {took:.0f} ms, PSS {statistics.mean(weights):.1f} MiB each")  # noqa: T201


def _pss_mib(pid: int) -> float:
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024
