"""Backup while everything runs; restore where nothing is."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cipherfleet import SyncClient
from cipherfleet.app.backup.create import create
from cipherfleet.app.backup.sealed_file import open_sealed
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.rights import Right
from cipherfleet.terminal.applications import sign_in
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.support import PIN, Consumer, TestCloud, command, eventually, refusal

PASSPHRASE = "correct horse battery"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text(PASSPHRASE + "\n")
    return path


@pytest.fixture(scope="module")
def some_backup(shared_cloud: TestCloud, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of the shared cloud, with one consumer at least."""
    if not shared_cloud.platform().consumers:
        shared_cloud.enrol("backed-up")
    path = tmp_path_factory.mktemp("backup") / "file"
    asyncio.run(create(shared_cloud.cloud.state, path, bytearray(PASSPHRASE.encode())))
    return path


def restored(cloud: TestCloud, backup: Path, secret: Path, folder: Path) -> TestCloud:
    """The same cloud from its backup, in another folder; the old one is down."""
    elsewhere = TestCloud(folder, machines=cloud.machines)
    folder.mkdir(exist_ok=True)
    result = command("backup", "restore", backup, "--state", elsewhere.cloud.state, "--passphrase-file", secret, "--json")
    assert result.status == 0, result.stderr
    cloud.down()
    elsewhere.up()
    return elsewhere


def content_of(backup: Path) -> bytes:
    with backup.open("rb") as file:
        return b"".join(open_sealed(file, backup, bytearray(PASSPHRASE.encode())))


def test_a_restored_cloud_serves_what_was_there(own_cloud: TestCloud, secret: Path, tmp_path: Path) -> None:
    """Nothing changed since the backup: the Ukey takes the restored cloud for what it is, and old VCMs and tokens are gone."""
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    with consumer.client() as client:
        key = client.create_key("AES-256-GCM").id
        ciphertext = client.encrypt(key, b"attack at dawn")
    lead, temp = _sign_in(consumer, "lead", Grant((Right.DECRYPT,), delegate=True)), _sign_in(consumer, "temp", Grant((Right.MAC,)))
    with SyncClient(lead) as client:
        client.delegate_key(key, "temp", [Grant((Right.DECRYPT,))])
    backup = tmp_path / "backup"
    made = command("backup", "create", "--out", backup, "--state", own_cloud.cloud.state, "--passphrase-file", secret, "--json")
    assert made.status == 0, made.stderr
    assert [(c["name"], c["keys"], c["applications"]) for c in made.document["consumers"]] == [("acme", 1, 3)]
    old = {v.id for v in own_cloud.vcms()}
    consumer.pull()
    eventually(lambda: not own_cloud.vcms(), what="the VCMs are gone")
    elsewhere = restored(own_cloud, backup, secret, tmp_path / "elsewhere")
    try:
        consumer.put_back()
        assert elsewhere.vcms() == ()
        assert {v.id for v in elsewhere.vcms(everything=True)} == old
        there = Consumer(elsewhere, "acme", consumer.ukey)
        there.plug_in()
        with there.client() as client:
            assert client.decrypt(ciphertext) == b"attack at dawn"
        with SyncClient(temp) as client:
            assert client.decrypt(ciphertext) == b"attack at dawn"
        assert command("audit", "verify", "--state", elsewhere.cloud.state).status == 0
        events = [(e["consumer"], e["event"]) for e in _audit(elsewhere)]
        assert ("", "restored") in events
        assert ("acme", "restored") in events
    finally:
        elsewhere.down()


def _sign_in(consumer: Consumer, name: str, grant: Grant) -> Profile:
    async def work() -> Profile:
        with DirectoryUkey.open(consumer.ukey, consumer.pin) as ukey:
            return await sign_in(ukey, ApplicationName(name), (), 1, grants=(grant,))

    return asyncio.run(work())


def _audit(cloud: TestCloud) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = command("audit", "show", "--state", cloud.cloud.state, "--json").document
    return shown


def test_no_share_of_a_cmk_and_no_token_is_in_a_backup(own_cloud: TestCloud, secret: Path, tmp_path: Path) -> None:
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    backup = tmp_path / "backup"
    assert command("backup", "create", "--out", backup, "--state", own_cloud.cloud.state, "--passphrase-file", secret).status == 0
    content = content_of(backup)
    with DirectoryUkey.open(consumer.ukey, PIN) as ukey:
        share = bytes(ukey._unlocked().share)
        ciphertext_cmk = asyncio.run(ukey.ciphertext_cmk())
    assert b"acme" in content  # it is the content that we look at
    for name, unwanted in (("Ukey share", share), ("ciphertext CMK", ciphertext_cmk)):
        assert unwanted not in content, name
    assert (own_cloud.cloud.state / "hsm" / "pin").read_bytes() not in content
    assert own_cloud.vcms()[0].id.encode() in content  # the inventory's history
    assert not (own_cloud.cloud.state / "backup").exists()
    assert backup.stat().st_mode & 0o777 == 0o600


def test_show_and_verify(some_backup: Path, secret: Path, tmp_path: Path) -> None:
    shown = command("backup", "show", some_backup, "--passphrase-file", secret, "--json").document
    verified = command("backup", "verify", some_backup, "--passphrase-file", "-", "--json", stdin=PASSPHRASE.encode())
    assert (verified.status, verified.document) == (0, shown)
    assert {f["name"] for f in shown["files"]} >= {"kmc/kmc.sqlite", "management/inventory.sqlite", "hsm/hsm.sealed"}
    assert command("backup", "show", some_backup, "--passphrase-file", secret).status == 0


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda raw: raw[: len(raw) // 2], "backup-truncated"),
        (lambda raw: raw[:200], "backup-truncated"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "backup-invalid"),
        (lambda raw: b"something else", "backup-invalid"),
        (lambda raw: b"", "backup-invalid"),
    ],
)
def test_a_spoilt_backup_restores_nothing(
    spoil: Callable[[bytes], bytes], code: str, some_backup: Path, secret: Path, tmp_path: Path
) -> None:
    spoilt, target = tmp_path / "spoilt", tmp_path / "state"
    spoilt.write_bytes(spoil(some_backup.read_bytes()))
    for arguments in (("verify", spoilt), ("restore", spoilt, "--state", target)):
        result = command("backup", *arguments, "--passphrase-file", secret, "--json")
        assert result.status == 1
        assert result.document["error"]["code"] == code, arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["passphrase", "spoilt"]


def test_a_wrong_passphrase_and_a_folder_that_is_not_empty(some_backup: Path, secret: Path, tmp_path: Path) -> None:
    wrong, target = tmp_path / "wrong", tmp_path / "state"
    wrong.write_text("something else\n")
    refused = command("backup", "restore", some_backup, "--state", target, "--passphrase-file", wrong, "--json")
    assert refused.document["error"]["code"] == "passphrase-wrong"
    assert not target.exists()
    target.mkdir()
    (target / "mine").touch()
    refused = command("backup", "restore", some_backup, "--state", target, "--passphrase-file", secret, "--json")
    assert refused.document["error"]["code"] == "exists"
    assert [p.name for p in target.iterdir()] == ["mine"]
    again = command("backup", "create", "--out", some_backup, "--state", target, "--passphrase-file", secret, "--json")
    assert again.document["error"]["code"] == "not-running"


def test_a_backup_never_replaces_a_file(shared_cloud: TestCloud, secret: Path, tmp_path: Path) -> None:
    out = tmp_path / "backup"
    out.write_text("mine")
    refused = command("backup", "create", "--out", out, "--state", shared_cloud.cloud.state, "--passphrase-file", secret, "--json")
    assert (refused.document["error"]["code"], out.read_text()) == ("exists", "mine")
    secret.write_text("short\n")
    refused = command(
        "backup", "create", "--out", tmp_path / "new", "--state", shared_cloud.cloud.state, "--passphrase-file", secret, "--json"
    )
    assert refused.document["error"]["code"] == "passphrase-wrong"


def test_a_restore_that_is_killed_leaves_nothing_that_counts(some_backup: Path, secret: Path, tmp_path: Path) -> None:
    """Wherever it stops, the target is not there; the next one clears what the killed one left."""
    target = tmp_path / "state"
    stop = (
        "import os, signal, sys\n"
        "from cipherfleet.app.backup import restore\n"
        "from cipherfleet.app import cli\n"
        "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        "setattr(restore, sys.argv.pop(1), die)\n"
        "cli.main()\n"
    )
    for where in ("_check", "_void", "settle", "write_private", "flush_folder"):
        arguments = ["backup", "restore", str(some_backup), "--state", str(target), "--passphrase-file", str(secret)]
        died = subprocess.run([sys.executable, "-c", stop, where, *arguments], check=False, capture_output=True)
        assert died.returncode == -signal.SIGKILL, (where, died.stderr)
        assert not target.exists(), where
    assert (tmp_path / ".state.restoring").exists()
    assert command("backup", "restore", some_backup, "--state", target, "--passphrase-file", secret).status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["passphrase", "state"]


def test_a_backup_under_load_loses_nothing_that_was_acknowledged_before(own_cloud: TestCloud, secret: Path, tmp_path: Path) -> None:
    """Keys are made all the while. The Ukey has seen more than the restored cloud shows, so its consumer must say yes first."""
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    profile = consumer.sign_in()
    acknowledged: dict[str, bytes] = {}
    stop = threading.Event()

    def make_keys() -> None:
        with SyncClient(profile) as client:
            while not stop.is_set():
                key = client.create_key("AES-256-GCM").id
                acknowledged[key] = client.encrypt(key, key.encode())

    maker = threading.Thread(target=make_keys, daemon=True)
    maker.start()
    eventually(lambda: len(acknowledged) > 10, what="keys are made")
    before = dict(acknowledged)
    backup = tmp_path / "backup"
    made = command("backup", "create", "--out", backup, "--state", own_cloud.cloud.state, "--passphrase-file", secret, "--json")
    assert made.status == 0, made.stderr
    during = len(acknowledged)
    assert during > len(before), "the backup was taken under load"
    eventually(lambda: len(acknowledged) > during + 5, what="keys are made after the backup")
    stop.set()
    maker.join(15)
    last = next(c["sequence"] for c in made.document["consumers"] if c["name"] == "acme")
    eventually(lambda: own_point(consumer).sequence > last, what="the Ukey heard of what came after the backup")
    for agent in own_cloud.processes("terminal"):
        own_cloud.end(agent)
    elsewhere = restored(own_cloud, backup, secret, tmp_path / "elsewhere")
    pin = tmp_path / "pin"
    pin.write_text(PIN + "\n")
    there = Consumer(elsewhere, "acme", consumer.ukey)
    try:
        assert refusal(lambda: there.plug_in(timeout=15)) == "escrow-rolled-back"
        asked = ("consumer", "accept-restore", "acme", "--ukey", consumer.ukey, "--pin-file", pin, "--json")
        foreign = command("consumer", "accept-restore", "other", *asked[3:])
        assert foreign.document["error"]["code"] == "foreign-consumer"
        accepted = command(*asked)
        assert accepted.status == 0, accepted.stderr
        assert (accepted.document["seen"]["epoch"], accepted.document["now"]["epoch"]) == (1, 2)
        assert accepted.document["lost_changes"] > 0
        assert command(*asked).document["error"]["code"] == "state-conflict"  # nothing more to accept
        there.plug_in()
        with SyncClient(profile) as client:
            for key, ciphertext in before.items():
                assert client.decrypt(ciphertext) == key.encode()
            new = client.create_key("AES-256-GCM").id
            assert client.decrypt(client.encrypt(new, b"goes on")) == b"goes on"
        eventually(lambda: own_point(consumer).sequence > accepted.document["now"]["sequence"], what="the Ukey hears of the new key")
    finally:
        elsewhere.down()
    own_cloud.up()  # the old cloud, which must not run: what it shows is refused
    try:
        assert refusal(lambda: consumer.plug_in(timeout=15)) == "escrow-rolled-back"
    finally:
        own_cloud.down()


def own_point(consumer: Consumer) -> Seen:
    with DirectoryUkey.open(consumer.ukey, PIN) as ukey:
        return ukey.memory.seen
