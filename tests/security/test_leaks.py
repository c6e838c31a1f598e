"""Secrets are in no argv, no environment, no log, and in no file that somebody else may read."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import Consumer, TestCloud


def secrets_of(cloud: TestCloud, consumer: Consumer) -> dict[str, bytes]:
    """What must not be seen: the Ukey's PIN, the HSM's passphrase and PIN, the VCM's token."""
    hsm = cloud.cloud.state / "hsm"
    [inventory] = (cloud.cloud.state / "management").glob("*.sqlite")
    with closing(sqlite3.connect(f"file:{inventory}?mode=ro", uri=True)) as connection:
        tokens = [row[0] for row in connection.execute("select token from tokens")]
    assert tokens
    known = {"PIN": consumer.pin.encode(), "passphrase": (hsm / "passphrase").read_bytes(), "HSM PIN": (hsm / "pin").read_bytes()}
    return {**known, **{f"token {n}": bytes(token) for n, token in enumerate(tokens)}}


def test_nothing_secret_is_in_argv_environment_or_logs(shared_cloud: TestCloud, plugged: Consumer) -> None:
    with plugged.client() as client:
        client.create_key("AES-256-GCM")
    needles = secrets_of(shared_cloud, plugged)
    looked = 0
    for process in shared_cloud.processes():
        for name in ("cmdline", "environ"):
            try:
                content = Path(f"/proc/{process.pid}/{name}").read_bytes()
            except PermissionError:  # not dumpable, and we are not root: nobody can look
                continue
            looked += 1
            for secret, needle in needles.items():
                assert needle not in content, f"{secret} in {name} of {process.role}"
    assert looked >= len(shared_cloud.processes())
    logs = list(Path(shared_cloud.cloud.state).rglob("*.log"))
    assert len(logs) > 5
    for log in logs:
        content = log.read_bytes()
        for secret, needle in needles.items():
            assert needle not in content, f"{secret} in {log}"
            assert needle.hex().encode() not in content, f"{secret} in {log}"


def test_everything_on_disk_is_ours_alone(shared_cloud: TestCloud, plugged: Consumer) -> None:
    for root in (shared_cloud.cloud.state, plugged.ukey):
        assert root.stat().st_mode & 0o077 == 0, root
        for path in root.rglob("*"):
            private = path.is_dir() or path.suffix in (".pem", ".json", ".sealed", ".sqlite") or path.parent.name in ("hsm", "credentials")
            if private and not path.is_symlink():
                assert path.stat().st_mode & 0o007 == 0, path


@pytest.mark.parametrize("name", ["passphrase", "pin"])
def test_the_hsms_secrets_are_made_once(shared_cloud: TestCloud, name: str) -> None:
    path = shared_cloud.cloud.state / "hsm" / name
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    asyncio.run(shared_cloud.cloud.up())
    assert path.read_bytes() == before
    assert len(before) >= 32
