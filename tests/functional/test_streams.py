"""A gibibyte through the command line: bounded memory at both ends, and the same bytes back."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.support import Consumer, command, profile_file

GIBIBYTE = 1024**3
LIMIT = 150 * 1024 * 1024


class Watch:
    """The largest resident set of some processes while the block runs."""

    def __init__(self, **pids: int) -> None:
        self.peak = dict.fromkeys(pids, 0)
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for name, process in self._processes.items():
                try:
                    self.peak[name] = max(self.peak[name], process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


@pytest.mark.slow
def test_a_gibibyte_streams_with_bounded_memory(plugged: Consumer, tmp_path: Path) -> None:
    profile = profile_file(plugged.sign_in(), tmp_path)
    key = command("key", "create", "AES-256-GCM", "--profile", profile, "--json").document["id"]
    plain, sealed, opened = (tmp_path / name for name in ("plain", "sealed", "opened"))
    block = os.urandom(1024 * 1024)
    with plain.open("wb") as file:
        for _ in range(1024):
            file.write(block)
    cipherfleet = [sys.executable, "-c", "from cipherfleet.app.cli import main; main()"]
    vcm = plugged.vcms()[0].pid
    for arguments in (
        ["encrypt", "--key", key, "--in", plain, "--out", sealed],
        ["decrypt", "--in", sealed, "--out", opened],
    ):
        process = subprocess.Popen([*cipherfleet, *map(str, arguments), "--profile", str(profile)])
        with Watch(client=process.pid, vcm=vcm) as watch:
            assert process.wait(150) == 0
        print(arguments[0], {name: f"{peak / 2**20:.0f} MiB" for name, peak in watch.peak.items()})  # noqa: T201
        assert 0 < watch.peak["client"] < LIMIT
        assert 0 < watch.peak["vcm"] < LIMIT
    with opened.open("rb") as result, plain.open("rb") as original:
        assert hashlib.file_digest(result, "sha256").digest() == hashlib.file_digest(original, "sha256").digest()
    assert plain.stat().st_size == GIBIBYTE
