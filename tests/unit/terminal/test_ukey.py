"""The directory Ukey: its files, its PIN, its memory, its presence."""

import asyncio
import hashlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from cipherfleet.channel import codec, signing
from cipherfleet.channel.certificates import new_key, public_key_der
from cipherfleet.contract.errors import (
    CardUnconfirmed,
    CipherfleetError,
    DiskFull,
    EscrowRolledBack,
    Exists,
    FileProblem,
    PinWrong,
    StateNewer,
    UkeyAbsent,
    UkeyInvalid,
)
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import IdentityRequest, Purpose
from cipherfleet.terminal import ukey as ukey_module
from cipherfleet.terminal.memory import Remembered
from cipherfleet.terminal.pin import SEALED_BYTES, PinHash, _checksum, pin_bytes
from cipherfleet.terminal.sealing import confirmation
from cipherfleet.terminal.ukey import DirectoryUkey, PublicRecord, UkeySecrets, read_record
from tests.pki import Authority

PIN = "2468-test"
ACME = ConsumerId("acme")
FAST = Settings(argon2_memory_kib=8192, argon2_iterations=1)
SEEN = Seen(1, 0, b"h" * 32)
CARD, VCM = CardId("card-m1-00000000"), VcmId("vcm-000000000000")
FILES = ["checkpoint.json", "cmk.bin", "secrets.sealed", "ukey.json"]


class Made:
    """The parts of a Ukey, to be written wherever a test wants it."""

    def __init__(self) -> None:
        root = Authority("root")
        domain = root.subordinate("domain acme")
        self.identity, self.channel = new_key(), new_key()
        self.secrets = UkeySecrets.new(self.identity, self.channel)
        self.cmk = os.urandom(40)
        self.record = PublicRecord(
            serial="ukey-1a2b3c4d",
            consumer=ACME,
            kmc_url="https://127.0.0.1:1",
            management_url="https://127.0.0.1:2",
            root=root.pem.decode(),
            domain=domain.pem.decode(),
            kmc_signing_key=public_key_der(new_key().public_key()),
            identity=domain.certify(Identity(Role.UKEY, "ukey-1a2b3c4d", ACME), self.identity.public_key()).decode(),
            channel=domain.certify(Identity(Role.TERMINAL, "ukey-1a2b3c4d", ACME), self.channel.public_key()).decode(),
            cmk_sha256=hashlib.sha256(self.cmk).digest(),
            pin=PinHash.new(FAST),
        )

    def write(self, folder: Path, pin: str = PIN) -> None:
        DirectoryUkey.create(folder, self.record, self.secrets, self.cmk, Remembered(SEEN), pin_bytes(pin))


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    made.write(tmp_path / "ukey")
    return tmp_path / "ukey"


async def test_what_was_written_is_there_again(made: Made, folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        assert ukey.record == made.record
        assert ukey.memory.seen == SEEN
        assert await ukey.ciphertext_cmk() == made.cmk
        assert ukey.signer.public_key == public_key_der(made.identity.public_key())
        statement = IdentityRequest(ACME, b"n" * 32, Purpose.BUILD_VCM)
        assert signing.verify(await signing.sign(statement, ukey.signer), IdentityRequest, [ukey.signer.public_key]) == statement
        credentials = ukey.channel(made.record.root)
        assert credentials.identity == Identity(Role.TERMINAL, "ukey-1a2b3c4d", ACME)
        assert credentials.trust == made.record.root.encode()


def test_its_files_are_private(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.parent.iterdir()) == [folder], "nothing is left beside it"


def test_no_secret_stands_in_a_public_file(made: Made, folder: Path) -> None:
    secrets = bytes(made.secrets.buffer)
    for path in folder.iterdir():
        content = path.read_bytes()
        for start in range(0, len(secrets), 32):
            part = secrets[start : start + 32]
            assert part not in content
            assert part.hex().encode() not in content
            assert codec.encode(part).strip(b'"') not in content


def test_nothing_secret_in_a_repr(made: Made, folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        shown = f"{ukey!r} {ukey.memory!r} {ukey._secrets!r} {ukey.signer!r}"
    assert "acme" in shown
    assert "bytearray" not in shown
    assert made.secrets.share.hex() not in shown


@pytest.mark.parametrize("pin", ["2468-tesT", "2468-test ", "2468", "x" * 64])
def test_a_wrong_pin(folder: Path, pin: str) -> None:
    with pytest.raises(PinWrong):
        DirectoryUkey.open(folder, pin)


@pytest.mark.parametrize("pin", ["", "123", "x" * 65, b"\xff\xfe\xfd\xfc"])
def test_what_is_no_pin(folder: Path, pin: str | bytes) -> None:
    with pytest.raises(PinWrong):
        DirectoryUkey.open(folder, pin)


@pytest.mark.parametrize("pin", ["1234", "x" * 64, "påss wörd ☂", "ｆｕｌｌ"])
def test_pins_of_every_kind(made: Made, tmp_path: Path, pin: str) -> None:
    made.write(tmp_path / "ukey", pin)
    DirectoryUkey.open(tmp_path / "ukey", pin.encode()).close()


def test_a_pin_may_be_typed_composed_or_not(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path / "ukey", "p\u00e5ss")
    DirectoryUkey.open(tmp_path / "ukey", "pa\u030ass").close()


def test_no_ukey(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UkeyAbsent) as caught:
            DirectoryUkey.open(folder, PIN)
        assert caught.value.hint


@pytest.mark.parametrize("name", ["secrets.sealed", "cmk.bin", "checkpoint.json"])
def test_a_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UkeyInvalid, match=name):
        DirectoryUkey.open(folder, PIN)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_truncated(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        (folder / name).write_bytes(content[:length])
        with pytest.raises(UkeyInvalid):
            DirectoryUkey.open(folder, PIN)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_too_long(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UkeyInvalid):
        DirectoryUkey.open(folder, PIN)
    (folder / name).write_bytes(bytes(1024 * 1024 + 1))
    with pytest.raises(UkeyInvalid):
        DirectoryUkey.open(folder, PIN)


def test_every_altered_byte_of_the_sealed_file_shows(folder: Path) -> None:
    content = (folder / "secrets.sealed").read_bytes()
    assert len(content) == SEALED_BYTES
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        (folder / "secrets.sealed").write_bytes(changed)
        with pytest.raises(UkeyInvalid):
            DirectoryUkey.open(folder, PIN)


def test_every_altered_byte_of_the_cmk_shows(folder: Path) -> None:
    content = (folder / "cmk.bin").read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        (folder / "cmk.bin").write_bytes(changed)
        with pytest.raises(UkeyInvalid):
            DirectoryUkey.open(folder, PIN)


def test_an_edited_trust_anchor_locks_the_ukey(made: Made, folder: Path) -> None:
    """Even by somebody who knows the format and mends the checksum."""
    record = codec.encode(msgspec.structs.replace(made.record, root=Authority("root").pem.decode()))
    (folder / "ukey.json").write_bytes(record)
    with pytest.raises(UkeyInvalid):
        DirectoryUkey.open(folder, PIN)
    body = (folder / "secrets.sealed").read_bytes()[:-32]
    (folder / "secrets.sealed").write_bytes(body + _checksum(body, record))
    with pytest.raises(PinWrong):
        DirectoryUkey.open(folder, PIN)


def test_a_changed_memory_shows(folder: Path) -> None:
    path = folder / "checkpoint.json"
    content = path.read_bytes()
    for old, new in ((b'"sequence":0', b'"sequence":9'), (b'"statement_sequence":0', b'"statement_sequence":9'), (b"aGho", b"aGhp")):
        assert old in content
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(UkeyInvalid):
            DirectoryUkey.open(folder, PIN)


def test_a_newer_format(folder: Path) -> None:
    record = codec.decode((folder / "ukey.json").read_bytes(), dict[str, object])
    (folder / "ukey.json").write_bytes(codec.encode({**record, "version": 2, "new": True}))
    with pytest.raises(StateNewer):
        DirectoryUkey.open(folder, PIN)


@pytest.mark.parametrize("change", [{"memory_kib": 2**40}, {"iterations": 10**9}, {"salt": ""}, {"lanes": 0}])
def test_a_doctored_pin_hash_costs_nothing(folder: Path, change: dict[str, object]) -> None:
    record = codec.decode((folder / "ukey.json").read_bytes(), dict[str, object])
    assert isinstance(record["pin"], dict)
    (folder / "ukey.json").write_bytes(codec.encode({**record, "pin": {**record["pin"], **change}}))
    with pytest.raises(UkeyInvalid):
        DirectoryUkey.open(folder, PIN)


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "cmk.bin").unlink()
    (folder / "cmk.bin").mkdir()
    with pytest.raises(FileProblem):
        DirectoryUkey.open(folder, PIN)


async def test_closed_it_is_wiped_and_does_nothing(folder: Path) -> None:
    ukey = DirectoryUkey.open(folder, PIN)
    assert ukey._secrets is not None
    buffer, memory_key = ukey._secrets.buffer, ukey.memory._key
    ukey.close()
    ukey.close()
    assert buffer == bytearray(len(buffer))
    assert memory_key == bytearray(32)
    for use in (lambda: ukey.sign(b"x"), lambda: ukey.memory.next_sequence(), lambda: ukey.check_confirmation(CARD, VCM, b"n", b"m")):
        with pytest.raises(UkeyAbsent):
            await use()
    with pytest.raises(UkeyAbsent):
        ukey.channel("")
    with pytest.raises(UkeyAbsent):
        _ = ukey.public_key


async def test_without_the_folder_nothing_is_signed(folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        await ukey.sign(b"x")
        folder.rename(folder.with_name("pocket"))
        assert not ukey.present
        for use in (lambda: ukey.sign(b"x"), ukey.ciphertext_cmk, ukey.memory.next_sequence, lambda: ukey.memory.remember(Seen(1, 1, b""))):
            with pytest.raises(UkeyAbsent):
                await use()
        folder.with_name("pocket").rename(folder)
        await ukey.sign(b"x")


async def test_another_ukey_in_the_folder_is_not_this_one(folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        for content in (b"{}", b"nonsense", b'{"serial":"ukey-00000000"}', bytes(1024 * 1024 + 1)):
            (folder / "ukey.json").write_bytes(content)
            assert not ukey.present
        with pytest.raises(UkeyAbsent):
            await ukey.memory.next_sequence()


async def test_removal_and_return_are_noticed(folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        removed = asyncio.ensure_future(ukey.removed())
        await asyncio.sleep(0)
        assert not removed.done()
        pocket = folder.rename(folder.with_name("pocket"))
        await asyncio.wait_for(removed, 10)
        returned = asyncio.ensure_future(ukey.returned())
        await asyncio.sleep(0)
        assert not returned.done()
        pocket.rename(folder)
        await asyncio.wait_for(returned, 10)


async def test_a_confirmation_is_checked_with_the_share(made: Made, folder: Path) -> None:
    nonce = os.urandom(32)
    with DirectoryUkey.open(folder, PIN) as ukey:
        await ukey.share.check_confirmation(CARD, VCM, nonce, confirmation(made.secrets.share, CARD, VCM, nonce))
        with pytest.raises(CardUnconfirmed):
            await ukey.share.check_confirmation(CARD, VCM, nonce, os.urandom(32))


# -- memory ------------------------------------------------------------------------------------------------------------


async def test_it_remembers(folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        await ukey.memory.remember(Seen(1, 5, b"five"))
        assert [await ukey.memory.next_sequence() for _ in range(3)] == [1, 2, 3]
    with DirectoryUkey.open(folder, PIN) as ukey:
        assert ukey.memory.seen == Seen(1, 5, b"five")
        assert await ukey.memory.next_sequence() == 4
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("older", [Seen(1, 4, b"four"), Seen(1, 5, b"other"), Seen(2, 6, b"six"), Seen(0, 9, b"nine")])
async def test_it_never_goes_back(folder: Path, older: Seen) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        await ukey.memory.remember(Seen(1, 5, b"five"))
        with pytest.raises(EscrowRolledBack):
            await ukey.memory.remember(older)
        assert ukey.memory.seen == Seen(1, 5, b"five")


async def test_two_users_of_one_ukey_do_not_undo_each_other(folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as agent, DirectoryUkey.open(folder, PIN) as command:
        sequences = await asyncio.gather(*(u.memory.next_sequence() for _ in range(10) for u in (agent, command)))
        assert sorted(sequences) == list(range(1, 21))
        await agent.memory.remember(Seen(1, 1, b"one"))
        await command.memory.next_sequence()
        with DirectoryUkey.open(folder, PIN) as again:
            assert again.memory.seen == Seen(1, 1, b"one")


async def test_a_full_stick_keeps_what_it_had(folder: Path) -> None:
    before = (folder / "checkpoint.json").read_bytes()
    with DirectoryUkey.open(folder, PIN) as ukey, no_file_larger_than(8), pytest.raises(DiskFull):
        await ukey.memory.next_sequence()
    assert (folder / "checkpoint.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == FILES


async def test_a_memory_damaged_meanwhile(folder: Path) -> None:
    with DirectoryUkey.open(folder, PIN) as ukey:
        (folder / "checkpoint.json").write_bytes(b"{}")
        with pytest.raises(UkeyInvalid):
            await ukey.memory.next_sequence()


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk does, for anybody: writing past ``size`` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 30, 100, 600])
def test_disk_full_leaves_nothing(made: Made, tmp_path: Path, size: int) -> None:
    with no_file_larger_than(size), pytest.raises(DiskFull):
        made.write(tmp_path / "ukey")
    assert list(tmp_path.iterdir()) == []
    made.write(tmp_path / "ukey")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_really_full_stick(made: Made, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(stick)], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(DiskFull):
            made.write(stick / "ukey")
        assert list(stick.iterdir()) == []
    finally:
        subprocess.run(["umount", str(stick)], check=True)


def test_an_empty_folder_is_taken(made: Made, tmp_path: Path) -> None:
    (tmp_path / "ukey").mkdir()
    made.write(tmp_path / "ukey")
    DirectoryUkey.open(tmp_path / "ukey", PIN).close()


def _with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "diary.txt").write_text("mine")


def _a_file(path: Path) -> None:
    path.write_text("mine")


def _a_link(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize("occupy", [_with_a_file, _a_file, _a_link])
def test_what_is_there_stays(made: Made, tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    occupy(tmp_path / "ukey")
    with pytest.raises(Exists):
        made.write(tmp_path / "ukey")
    assert [path.name for path in tmp_path.iterdir()] == ["ukey"]


def test_what_comes_in_between_stays(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody fills the folder after it was looked at."""
    monkeypatch.setattr(ukey_module, "check_vacant", lambda folder: _with_a_file(folder))
    with pytest.raises(CipherfleetError):
        made.write(tmp_path / "ukey")
    assert [path.name for path in tmp_path.iterdir()] == ["ukey"]
    assert (tmp_path / "ukey" / "diary.txt").read_text() == "mine"


def test_no_parent_folder(made: Made, tmp_path: Path) -> None:
    with pytest.raises(FileProblem):
        made.write(tmp_path / "none" / "ukey")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem):
        made.write(tmp_path / "file" / "ukey")


def test_the_public_record_needs_no_pin(made: Made, folder: Path) -> None:
    assert read_record(folder) == made.record


def test_killed_between_two_sequences_none_comes_twice(folder: Path) -> None:
    """A process that dies right after it got a number, before it used it."""
    script = (
        "import asyncio, os, sys\n"
        "from cipherfleet.terminal.ukey import DirectoryUkey\n"
        f"ukey = DirectoryUkey.open({str(folder)!r}, {PIN!r})\n"
        "print(asyncio.run(ukey.memory.next_sequence()), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    numbers = [int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout) for _ in range(2)]
    assert numbers == [1, 2]


def test_a_copy_works_as_the_docs_say(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    DirectoryUkey.open(folder.with_name("copy"), PIN).close()
    assert ukey_module.__doc__ is not None
    assert "can be copied" in ukey_module.__doc__
