"""Real children under every launcher try what a VCM must not be able to do; what is in force is looked at from both sides."""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cipherfleet.channel import codec
from cipherfleet.computing import launcher as launching
from cipherfleet.computing.confinement import look_outside
from cipherfleet.computing.launcher import Child, Launcher, bubblewrap_command, readable_paths
from cipherfleet.computing.relay import Relay
from cipherfleet.contract.errors import Internal, TimedOut
from cipherfleet.contract.machine_api import Isolation
from tests.unit.computing.machine import prisoner
from tests.unit.computing.machine.prisoner import Findings, Orders

SOURCE = Path(prisoner.__file__).read_text()
LAUNCHERS = ("bubblewrap", "zygote", "unshare", "none")
ALLOWED = {"relay", "accept", "thread", "read its code", "memfd"}
MEMORY_MIB, FILES = 512, 64


@dataclass
class Cell:
    """A prisoner, what it found, and how its isolation looks from outside."""

    child: Child
    findings: Findings
    isolation: Isolation
    inherited: set[int]
    state: Path


async def echo() -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.fixture(params=LAUNCHERS)
async def cell(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cell]:
    kind: str = request.param
    state = tmp_path / "state"
    folder = state / "vcm"
    folder.mkdir(parents=True, mode=0o700)
    (state / "secret").write_text("secret")
    server = await echo()
    target = server.sockets[0].getsockname()
    relay = Relay(folder / "relay", target)
    await relay.start()
    abstract = f"cipherfleet-test-{secrets.token_hex(4)}"
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(socket.AF_UNIX) as host_socket:
        host_socket.bind(b"\0" + abstract.encode())
        host_socket.listen()
        caller = socket.create_connection(listening.getsockname())
        launcher = Launcher(kind, command=(sys.executable, "-I", "-B", "-c", SOURCE, kind))
        orders = Orders(
            launcher.confinement("process", MEMORY_MIB, FILES, (sorted(os.sched_getaffinity(0))[0],), folder),
            launcher.relay_path(folder / "relay"),
            listening.fileno(),
            [str(state), str(state / "secret"), "/etc/shadow", "/work", "/var", "/home", "/root", "/run/netns"],
            target[1],
            abstract,
            os.getpid(),
        )
        child = await launcher.start(
            orders,
            relay=folder / "relay",
            log_file=tmp_path / "log",
            descriptors=(listening.fileno(),),
            hostname="vcm-test",
            timeout=20,
        )
        try:
            findings = codec.decode(child.info, Findings)
            yield Cell(child, findings, look_outside(child.pid, findings.isolation, child.namespaces), {listening.fileno()}, state)
        finally:
            await child.end(1)
            await launcher.close()
            caller.close()
            await relay.close()
            server.close()


async def test_what_a_vcm_must_not_do_it_cannot_do(cell: Cell) -> None:
    attempts = cell.findings.attempts
    assert {name for name, error in attempts.items() if error == ""} == ALLOWED, (
        {n: attempts[n] for n in ALLOWED},
        (cell.state.parent / "log").read_text(),
    )
    if cell.isolation.launcher in ("bubblewrap", "zygote"):
        assert attempts[f"read {cell.state}"] == attempts["read /etc/shadow"] == "ENOENT"
    assert attempts["memory"] == "MemoryError"
    assert attempts["io_uring_setup"] == "ENOSYS"
    assert attempts["many files"] == "EMFILE"
    assert attempts["connect the inherited socket"] in ("EACCES", "EPERM")
    assert attempts["fast open"] == "EPERM"


async def test_what_is_reported_is_what_is_in_force(cell: Cell) -> None:
    isolation, kind = cell.isolation, cell.isolation.launcher
    assert isolation.mode == "process"
    assert isolation.no_new_privileges
    assert isolation.seccomp
    assert isolation.landlock_abi >= 1
    assert isolation.network_confined == (isolation.landlock_abi >= 4)
    assert isolation.capabilities == "0"
    assert isolation.limits["memory_bytes"] == MEMORY_MIB * 1024 * 1024
    assert isolation.limits["files"] == FILES
    assert isolation.limits["core_bytes"] == 0
    assert isolation.limits["processors"] == 1
    expected = {
        "bubblewrap": {"ipc", "mnt", "net", "pid", "user", "uts"},
        "zygote": {"ipc", "mnt", "net", "pid", "user", "uts"},
        "unshare": {"ipc", "mnt", "net", "uts"},
        "none": set(),
    }[kind]
    assert expected <= set(isolation.namespaces)
    assert isolation.read_only_root == (kind != "none")


async def test_it_is_the_first_process_of_its_own_and_knows_nothing_of_ours(cell: Cell) -> None:
    process = psutil.Process(cell.child.pid)
    assert process.exe() == str(Path(sys.executable).resolve())
    assert not set(cell.findings.environment) - {"LANG", "MALLOC_ARENA_MAX", "PWD", "LC_CTYPE"}
    regular = {fd for fd in cell.findings.descriptors if fd > 2}
    assert cell.inherited <= regular
    if cell.isolation.launcher in ("bubblewrap", "zygote"):
        assert cell.findings.pid == 1
        assert set(cell.findings.folders) <= {"/etc", "/tmp", "/run", "/work", "/root"}
        assert socket.gethostname() != "vcm-test"


async def test_no_other_descriptor_of_ours_is_in_it(cell: Cell) -> None:
    looked_at = 0
    for descriptor in (Path(f"/proc/{cell.child.pid}/fd")).iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # it lives: what it opened for a moment is closed again
            continue
        looked_at += 1
        assert target.startswith(("socket:", "pipe:", "anon_inode:", "/dev/null", "/memfd:")) or target.endswith("/log"), target
    assert looked_at >= 3


async def test_it_ends_when_asked_and_when_it_does_not_listen(cell: Cell) -> None:
    process = psutil.Process(cell.child.pid)
    cell.child.send(signal.SIGSTOP)  # it cannot hear SIGTERM
    await cell.child.end(0.1)
    assert not process.is_running()
    await cell.child.end(0.1)
    cell.child.send(signal.SIGKILL)


async def test_under_bubblewrap_the_file_system_is_what_python_needs(tmp_path: Path) -> None:
    command = bubblewrap_command(
        "bwrap", readable_paths(), None, ("/usr/bin/find", "/", "-xdev", "-maxdepth", "2", "-not", "-path", "/usr/*")
    )
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await child.communicate()
    seen = set(out.decode().split())
    assert {"/usr", "/proc", "/dev", "/tmp"} <= seen
    assert not {"/home", "/var", "/boot", "/etc/shadow", "/etc/passwd", "/srv"} & seen


async def test_a_child_that_ends_before_it_is_ready_is_said(tmp_path: Path) -> None:
    for kind in ("bubblewrap", "unshare"):
        launcher = Launcher(kind, command=(sys.executable, "-I", "-c", "raise SystemExit(3)"))
        (tmp_path / "relay").mkdir(exist_ok=True)
        with pytest.raises(Internal):
            await launcher.start({}, relay=tmp_path / "relay", log_file=tmp_path / "log", descriptors=(), hostname="x", timeout=10)


async def test_a_child_that_is_never_ready_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "relay").mkdir()
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    launcher = Launcher("bubblewrap", command=(sys.executable, "-I", "-c", "import time; time.sleep(60)"))
    with pytest.raises(TimedOut):
        await launcher.start({}, relay=tmp_path / "relay", log_file=tmp_path / "log", descriptors=(), hostname="x", timeout=0.5)
    async with asyncio.timeout(20):
        while {p.pid for p in psutil.Process().children(recursive=True)} - before:
            await asyncio.sleep(0.01)


async def test_the_best_launcher_that_works_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (await Launcher.find()).kind == "bubblewrap"
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(broken))
    assert (await Launcher.find()).kind == "unshare"
    broken.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(launching, "PROBE_S", 0.2)
    assert (await Launcher.find()).kind == "unshare"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert (await Launcher.find()).kind == "unshare"


async def test_a_bubblewrap_that_does_not_say_whom_it_started_is_not_trusted(tmp_path: Path) -> None:
    silent = tmp_path / "bwrap"
    silent.write_text('#!/bin/sh\necho \'{"ready": true, "info": null}\'\nexec sleep 60\n')
    silent.chmod(0o755)
    launcher = Launcher("bubblewrap", program=str(silent))
    with pytest.raises(Internal):
        await launcher.start({}, relay=tmp_path, log_file=tmp_path / "log", descriptors=(), hostname="x", timeout=10)
