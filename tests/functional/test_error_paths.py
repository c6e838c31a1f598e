"""What goes wrong is said in one clear line with a stable code, and nothing is lost."""

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.vcc import CHUNK_BYTES
from tests.support import PIN, QUICK, Consumer, Result, TestCloud, cloud_in, command, profile_file


def failed(result: Result, code: str) -> None:
    """Exit 1, the document on standard output, one line without a traceback on standard error."""
    assert result.status == 1, result
    assert result.document["error"]["code"] == code
    assert result.document["error"]["message"]
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.fixture
def pin(tmp_path: Path) -> Path:
    path = tmp_path / "pin"
    path.write_text(PIN + "\n")
    return path


def test_a_wrong_pin(shared_cloud: TestCloud, consumer: Consumer, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("9999-wrong\n")
    state = shared_cloud.cloud.state
    failed(
        command("terminal", "--ukey", consumer.ukey, "--pin-file", tmp_path / "wrong", "--detach", "--json", "--state", state), "pin-wrong"
    )
    failed(
        command("app", "add", "x", "--ukey", consumer.ukey, "--pin-file", tmp_path / "wrong", "--out", tmp_path / "p", "--json"),
        "pin-wrong",
    )
    assert not (tmp_path / "p").exists()


def test_names_that_look_like_markup_are_shown_as_they_are(plugged: Consumer, tmp_path: Path) -> None:
    profile = profile_file(plugged.sign_in(), tmp_path)
    result = command("encrypt", "--key", "0" * 32, "--in", tmp_path / "[/red]", "--profile", profile)
    assert result.status == 1
    assert "[/red]" in result.stderr
    command("key", "create", "--label", "[bold]mine[/no]", "--profile", profile)
    assert "[bold]mine[/no]" in command("key", "list", "--profile", profile).stdout


def test_no_ukey(shared_cloud: TestCloud, pin: Path, tmp_path: Path) -> None:
    state = shared_cloud.cloud.state
    failed(command("terminal", "--ukey", tmp_path / "none", "--pin-file", pin, "--detach", "--json", "--state", state), "ukey-absent")


def test_a_vcm_without_a_ukey(shared_cloud: TestCloud, consumer: Consumer) -> None:
    failed(command("vcm", "create", "--consumer", consumer.name, "--state", shared_cloud.cloud.state, "--json"), "ukey-absent")


def test_no_cloud(tmp_path: Path) -> None:
    for arguments in (["status"], ["down"], ["vcm", "list"], ["consumer", "list"]):
        result = command(*arguments, "--state", tmp_path / "none", "--json")
        if arguments != ["down"]:
            failed(result, "not-running")


def test_a_taken_port(tmp_path: Path) -> None:
    cloud = TestCloud(tmp_path)
    cloud.up()
    cloud.down()
    network = cloud.cloud.record.network
    with socket.create_server((f"127.{network}.0.2", 7443)):
        failed(command("up", "--detach", "--state", cloud.cloud.state, "--json"), "port-taken")
    try:
        assert command("up", "--detach", "--state", cloud.cloud.state, "--json").document["ready"]
    finally:
        cloud.down()


def test_a_state_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed(command("up", "--detach", "--state", tmp_path / "file", "--json"), "state-not-writable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the next test stands in for it")
def test_a_state_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    failed(command("up", "--detach", "--state", tmp_path / "state", "--json"), "state-not-writable")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_state_on_a_read_only_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path / "ro", "ro"):
        failed(command("up", "--detach", "--state", tmp_path / "ro" / "state", "--json"), "state-not-writable")


def test_a_state_of_a_newer_version(tmp_path: Path) -> None:
    (tmp_path / "cloud.json").write_text(json.dumps({"version": 99}))
    for arguments in (["up", "--detach"], ["status"], ["vcm", "list"]):
        failed(command(*arguments, "--state", tmp_path, "--json"), "state-newer")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_while_enrolling(shared_cloud: TestCloud, pin: Path, tmp_path: Path) -> None:
    state = shared_cloud.cloud.state
    with mounted(tmp_path / "stick", "size=8k") as stick:
        enrol = ("consumer", "enroll", "full-disk", "--ukey", stick / "ukey", "--pin-file", pin, "--state", state, "--json")
        failed(command(*enrol), "disk-full")
        assert list(stick.iterdir()) == []
    listed = command("consumer", "list", "--state", state, "--json").document
    assert "full-disk" not in {c["name"] for c in listed}
    again = ("consumer", "enroll", "full-disk", "--ukey", tmp_path / "ukey", "--pin-file", pin, "--state", state, "--json")
    assert command(*again).status == 0


@contextmanager
def filled(folder: Path, room: int) -> Iterator[None]:
    """A file system with ``room`` bytes left."""
    ballast, free = folder / "ballast", os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - room)
    try:
        yield
    finally:
        ballast.unlink()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_platform_without_room_enrols_nobody_by_halves(pin: Path, tmp_path: Path) -> None:
    """However far an enrolment comes before the disk is full: the HSM's file, the KMC's database, the management's, the KMC's again."""
    with mounted(tmp_path / "state", "size=32m") as state, cloud_in(tmp_path, machines=1) as cloud:
        early = cloud.enrol("early")
        early.plug_in()
        with early.client() as client:
            ciphertext = client.encrypt(client.create_key("AES-256-GCM").id, b"from before")
        for room in range(0, 200, 16):
            name, ukey = f"room-{room}", tmp_path / f"room-{room}"
            enrol = ("consumer", "enroll", name, "--ukey", ukey, "--pin-file", pin, "--state", state, "--json")
            with filled(state, room * 1024):
                result = command(*enrol)
            if result.status == 0:
                break
            failed(result, "disk-full")
            assert not list(tmp_path.glob(f"*{name}*")), "no Ukey"
            listed = {c["name"]: c["state"] for c in command("consumer", "list", "--state", state, "--json").document}
            assert listed.get(name, "pending") == "pending"  # taking it back needs room, too
            assert room > 0 or name not in listed
            assert command(*enrol).status == 0, "with room"
        assert room > 16
        Consumer(cloud, "room-0", tmp_path / "room-0").plug_in()
        with early.client() as client:
            assert client.decrypt(ciphertext) == b"from before"


def test_enrolling_twice(shared_cloud: TestCloud, consumer: Consumer, pin: Path, tmp_path: Path) -> None:
    again = (
        "consumer",
        "enroll",
        consumer.name,
        "--ukey",
        tmp_path / "second",
        "--pin-file",
        pin,
        "--state",
        shared_cloud.cloud.state,
        "--json",
    )
    failed(command(*again), "exists")
    assert not (tmp_path / "second").exists()
    consumer.plug_in()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["consumer", "enroll", "Bad Name", "--ukey", "x", "--pin-file", "/dev/null"], "malformed"),
        (["vcm", "show", "vcm-000000000000"], "vcm-unknown"),
        (["vcm", "show", "nonsense"], "malformed"),
        (["vcm", "delete", "vcm-000000000000"], "vcm-unknown"),
        (["vcm", "migrate", "vcm-000000000000"], "vcm-unknown"),
        (["vcm", "limits", "vcm-000000000000", "--weight", "2"], "vcm-unknown"),
        (["app", "revoke", "nobody"], "application-unknown"),
        (["app", "exec", "nobody", "--", "true"], "isolation-unavailable"),
        (["vcm", "create", "--consumer", "nobody"], "consumer-unknown"),
    ],
)
def test_what_is_not_there(shared_cloud: TestCloud, arguments: list[str], code: str) -> None:
    if arguments[1] == "exec":
        result = command(*arguments[:2], "--state", shared_cloud.cloud.state, *arguments[2:])
        assert result.status == 1
        assert code in result.stderr
    else:
        failed(command(*arguments, "--state", shared_cloud.cloud.state, "--json"), code)


def test_wrong_usage_is_2() -> None:
    assert command("no-such-command").status == 2
    assert command("vcm", "show").status == 2
    assert command("up", "--machines", "0").status == 2


def test_bad_profiles(tmp_path: Path, pin: Path) -> None:
    (tmp_path / "broken").write_text("{")
    failed(command("random", "--profile", tmp_path / "broken", "--json"), "malformed")
    failed(command("random", "--profile", tmp_path / "none", "--json"), "file-problem")


def test_files_that_are_not_there(plugged: Consumer, tmp_path: Path, application: Callable[[], Path]) -> None:
    profile = application()
    missing = tmp_path / "none"
    failed(command("sign", "--key", "0" * 32, "--in", missing, "--profile", profile, "--json"), "file-problem")
    failed(command("encrypt", "--key", "0" * 32, "--in", missing, "--profile", profile, "--json"), "file-problem")
    failed(command("random", "--out", tmp_path / "no" / "where", "--profile", profile, "--json"), "file-problem")
    failed(command("encrypt", "--key", "0" * 32, "--profile", profile, "--json", stdin=b"x"), "key-unknown")


def test_nothing_is_left_of_a_failed_decryption(plugged: Consumer, tmp_path: Path, application: Callable[[], Path]) -> None:
    profile = application()
    key = command("key", "create", "--profile", profile, "--json").document["id"]
    (tmp_path / "plain").write_bytes(b"x" * 300_000)
    assert command("encrypt", "--key", key, "--in", tmp_path / "plain", "--out", tmp_path / "sealed", "--profile", profile).status == 0
    damaged = bytearray((tmp_path / "sealed").read_bytes())
    chunk, head = CHUNK_BYTES + 16, HEADER_BYTES
    for name, bad, code in (
        ("cut at the end of a chunk", bytes(damaged[: head + 2 * chunk]), "ciphertext-truncated"),
        ("cut within a tag", bytes(damaged[: head + 2 * chunk + 15]), "ciphertext-truncated"),
        ("cut within a chunk", bytes(damaged[:-1]), "ciphertext-invalid"),  # as good as changed: its tag is not its tag
        ("empty", b"", "ciphertext-truncated"),
        ("foreign", b"PK" + bytes(1000), "ciphertext-invalid"),
        ("two chunks swapped", swapped(damaged, head, chunk), "ciphertext-invalid"),
    ):
        (tmp_path / name).write_bytes(bad)
        result = command("decrypt", "--in", tmp_path / name, "--out", tmp_path / "out", "--profile", profile, "--json")
        assert result.document["error"]["code"] == code, name
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


def swapped(sealed: bytearray, head: int, chunk: int) -> bytes:
    """The first two chunks in the other order."""
    first, second = sealed[head : head + chunk], sealed[head + chunk : head + 2 * chunk]
    return bytes(sealed[:head] + second + first + sealed[head + 2 * chunk :])


def test_a_ciphertext_of_another_key(plugged: Consumer, tmp_path: Path, application: Callable[[], Path]) -> None:
    profile = application()
    key, other = (command("key", "create", "--profile", profile, "--json").document["id"] for _ in range(2))
    sealed = tmp_path / "sealed"
    assert command("encrypt", "--key", key, "--out", sealed, "--profile", profile, stdin=b"mine").status == 0
    failed(command("decrypt", "--key", other, "--in", sealed, "--profile", profile, "--json"), "ciphertext-foreign-key")
    failed(command("decrypt", "--key", "no id", "--in", sealed, "--profile", profile, "--json"), "malformed")
    assert command("decrypt", "--key", key, "--in", sealed, "--profile", profile).stdout == "mine"
    raw = bytearray(sealed.read_bytes())
    at = raw.find(bytes.fromhex(key))
    assert at > 0
    raw[at : at + 16] = bytes.fromhex(other)
    sealed.write_bytes(raw)  # the header says so, the tag does not
    failed(command("decrypt", "--in", sealed, "--profile", profile, "--json"), "ciphertext-invalid")


@pytest.fixture
def application(plugged: Consumer, tmp_path: Path) -> Callable[[], Path]:
    from tests.support import profile_file

    return lambda: profile_file(plugged.sign_in(), tmp_path)


def test_a_cloud_of_another_isolation(shared_cloud: TestCloud) -> None:
    failed(command("up", "--detach", "--isolation", "domain", "--state", shared_cloud.cloud.state, "--json"), "exists")


def test_down_twice(tmp_path: Path) -> None:
    cloud = TestCloud(tmp_path, machines=1, settings=QUICK)
    cloud.up()
    assert command("down", "--state", cloud.cloud.state, "--json").document["stopped"] >= 5
    assert command("down", "--state", cloud.cloud.state, "--json").document["stopped"] == 0


def test_a_typed_passphrase_is_on_no_disk_and_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = TestCloud(tmp_path, machines=1)
    up = ("up", "--detach", "--machines", 1, "--ask-passphrase", "--state", cloud.cloud.state, "--json")
    typed = ["correct horse", "correct horse", "battery staple", "correct horse"]
    monkeypatch.setattr("getpass.getpass", lambda *_: typed.pop(0))
    try:
        assert command(*up).status == 0
        assert not (cloud.cloud.state / "hsm" / "passphrase").exists()
        assert not [p for p in cloud.cloud.state.rglob("*") if p.is_file() and b"correct horse" in p.read_bytes()]
        cloud.down()
        failed(command("up", "--detach", "--state", cloud.cloud.state, "--json"), "passphrase-wrong")
        failed(command(*up), "passphrase-wrong")
        assert command(*up).status == 0
        assert typed == []
    finally:
        cloud.down()


def test_a_passphrase_file_that_others_may_read_is_refused_and_a_private_one_used(tmp_path: Path) -> None:
    cloud = TestCloud(tmp_path, machines=1)
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse\n")
    up = ("up", "--detach", "--machines", 1, "--passphrase-file", passphrase, "--state", cloud.cloud.state, "--json")
    try:
        for mode in (0o640, 0o604):
            passphrase.chmod(mode)
            failed(command(*up), "file-problem")
        assert cloud.processes() == []
        passphrase.chmod(0o600)
        assert command(*up).status == 0
        assert not (cloud.cloud.state / "hsm" / "passphrase").exists()
        cloud.down()
        passphrase.write_text("battery staple\n")
        failed(command(*up), "passphrase-wrong")
    finally:
        cloud.down()


def test_a_passphrase_comes_through_a_pipe(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"correct horse\n")
    os.close(write_end)
    cloud = TestCloud(tmp_path, machines=1)
    up = ("up", "--detach", "--machines", 1, "--passphrase-file", f"/dev/fd/{read_end}", "--state", cloud.cloud.state, "--json")
    try:
        assert command(*up).status == 0
        assert not (cloud.cloud.state / "hsm" / "passphrase").exists()
    finally:
        os.close(read_end)
        cloud.down()
