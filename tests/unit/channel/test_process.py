"""How processes start, report, are found and end; with real ones."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from cipherfleet.channel import codec
from cipherfleet.channel.process import ProcessEntry, register, running, start_child, start_daemon
from cipherfleet.contract.errors import CipherfleetError, Internal, PortTaken, TimedOut
from cipherfleet.state.files import write_private

CHILD = """
import asyncio, sys
from cipherfleet.channel.process import as_it_is, run, protect
from cipherfleet.contract.errors import PortTaken
protect(die_with_parent=True)
async def main(configuration, ready, stop):
    if configuration["do"] == "fail":
        raise PortTaken("taken", "free it")
    if configuration["do"] == "vanish":
        import os; os._exit(3)
    if configuration["do"] != "hang":
        print("this goes to the log")
        ready({"said": configuration["do"]})
    await stop.wait()
sys.exit(run(main, dict, prepare=as_it_is))
"""
COMMAND = [sys.executable, "-c", CHILD]


async def test_a_child_reports_and_ends_when_asked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child, info = await start_child(COMMAND, {"do": "work"}, log_file=log)
    assert msgspec.json.decode(info) == {"said": "work"}
    child.terminate()
    assert await child.wait() == 0
    assert "this goes to the log" in log.read_text()


@pytest.mark.parametrize(("what", "error"), [("fail", PortTaken), ("vanish", Internal), ("hang", TimedOut)])
async def test_a_child_that_does_not_get_ready_is_not_left(tmp_path: Path, what: str, error: type[CipherfleetError]) -> None:
    before = {p.pid for p in psutil.Process().children()}
    with pytest.raises(error):
        await start_child(COMMAND, {"do": what}, log_file=tmp_path / "log", timeout=1.5)
    with pytest.raises(error):
        await asyncio.to_thread(start_daemon, COMMAND, {"do": what}, log_file=tmp_path / "log", timeout=1.5)
    assert {p.pid for p in psutil.Process().children()} <= before


async def test_a_malformed_configuration_is_said(tmp_path: Path) -> None:
    with pytest.raises(CipherfleetError, match="configuration"):
        await start_child(COMMAND, ["not", "a", "dict"], log_file=tmp_path / "log")


def test_a_daemon_is_registered_before_it_is_ready_and_found(tmp_path: Path) -> None:
    def spawned(pid: int) -> None:
        register(tmp_path, "kmc", "kmc", pid, "acme")
        assert running(tmp_path)[0].pid == pid

    info = start_daemon(COMMAND, {"do": "serve"}, log_file=tmp_path / "log", spawned=spawned)
    assert msgspec.json.decode(info) == {"said": "serve"}
    [entry] = running(tmp_path)
    assert (entry.role, entry.id, entry.consumer) == ("kmc", "kmc", "acme")
    assert os.getsid(entry.pid) == entry.pid
    os.kill(entry.pid, signal.SIGKILL)
    os.waitpid(entry.pid, 0)
    assert running(tmp_path) == []
    assert list(tmp_path.glob("*.json")) == []


def test_a_reused_pid_is_not_taken_for_ours(tmp_path: Path) -> None:
    write_private(tmp_path / "kmc-kmc.json", codec.encode(ProcessEntry("kmc", "kmc", os.getpid(), 1.0)))
    write_private(tmp_path / "broken.json", b"{")
    assert running(tmp_path) == []


async def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    parent = f"""
import asyncio, sys
from pathlib import Path
from cipherfleet.channel.process import start_child
async def main():
    child, _ = await start_child([sys.executable, "-c", {CHILD!r}], {{"do": "work"}}, log_file=Path({str(tmp_path / "log")!r}))
    print(child.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", parent, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    grandchild = psutil.Process(int(await process.stdout.readline()))
    process.kill()
    await process.wait()
    await asyncio.to_thread(grandchild.wait, 5)
    assert not grandchild.is_running()


def test_a_private_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_private(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        write_private(path, None)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
