"""The terminal as a process of its own: configuration in, events in the log, ready once."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from cipherfleet.channel.process import running, start_child
from cipherfleet.contract.errors import PinWrong
from cipherfleet.contract.kmc_api import UkeyRemoved
from cipherfleet.contract.management_api import Removed
from cipherfleet.terminal.process import TerminalConfig
from tests.unit.terminal.platform import PIN, SETTINGS, Platform

COMMAND = [sys.executable, "-m", "cipherfleet.app.roles", "terminal"]


async def test_a_process_from_ready_to_its_end(enrolled: Platform, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    log = tmp_path / "terminal.log"
    configuration = TerminalConfig(str(enrolled.ukey), PIN, str(run), SETTINGS)
    creating = asyncio.create_task(enrolled.create())
    child, info = await start_child(COMMAND, configuration, log_file=log)
    vcm = await creating
    said = json.loads(info)
    assert (said["consumer"], said["vcm"], said["endpoint"]) == ("acme", vcm.id, vcm.endpoint)
    assert said["trace"][0]["step"] == 9
    [entry] = running(run)
    assert (entry.role, entry.id, entry.pid) == ("terminal", "acme", child.pid)
    status = Path(f"/proc/{child.pid}/cmdline").read_bytes()
    assert PIN.encode() not in status
    if os.geteuid() == 0:
        assert PIN.encode() not in Path(f"/proc/{child.pid}/environ").read_bytes()
    child.terminate()
    await enrolled.kmc.line.hears(UkeyRemoved)
    await enrolled.management.line.hears(Removed)
    assert await asyncio.wait_for(child.wait(), 5) == 0
    assert running(run) == []
    lines = log.read_text().splitlines()
    steps = [json.loads(line[line.index("{") :])["step"] for line in lines if "{" in line]
    assert steps[:3] == ["kmc-connected", "management-connected", "inserted"]
    assert "service-on" in steps
    assert PIN not in log.read_text()


async def test_a_process_reports_why_it_cannot_start(enrolled: Platform, tmp_path: Path) -> None:
    configuration = TerminalConfig(str(enrolled.ukey), "9999-wrong", "", SETTINGS)
    with pytest.raises(PinWrong):
        await start_child(COMMAND, configuration, log_file=tmp_path / "log")
    assert "9999-wrong" not in (tmp_path / "log").read_text()
