"""Whole files: they appear when they are whole, or not at all."""

import asyncio
import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cipherfleet import Client
from cipherfleet.contract.ciphertext import HEADER_BYTES, TAG_BYTES, sealed_length
from cipherfleet.contract.errors import CipherfleetError, CiphertextInvalid, CiphertextTruncated, DiskFull, FileProblem, LeaseExpired
from cipherfleet.contract.vcc import CHUNK_BYTES, Operation
from cipherfleet.services.components.streams import IN_FLIGHT
from cipherfleet.services.middleware.targets import WholeFile, file_error
from tests.unit.services.stage import Stage

MIB = 1024 * 1024
SIZES = [0, 1, CHUNK_BYTES, 5 * MIB + 3]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.write_bytes(os.urandom(20_000_000))
    return path


def names(folder: Path) -> list[str]:
    """Everything in the folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("size", SIZES)
async def test_files_come_back(client: Client, tmp_path: Path, size: int) -> None:
    key = await client.create_key()
    (tmp_path / "a").write_bytes(os.urandom(size))
    assert await client.encrypt_file(key.id, tmp_path / "a", str(tmp_path / "b"), context=b"x") == sealed_length(size)
    assert await client.decrypt_file(tmp_path / "b", tmp_path / "c", context=b"x") == size
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    assert names(tmp_path) == ["a", "b", "c"]
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600


async def test_a_file_may_be_replaced_by_its_own_ciphertext(client: Client, plain: Path) -> None:
    key, content = await client.create_key(), plain.read_bytes()
    await client.encrypt_file(key.id, plain, plain)
    assert plain.stat().st_size == sealed_length(len(content))
    await client.reencrypt_file(key.id, plain, plain, target_context=b"moved")
    await client.decrypt_file(plain, plain, context=b"moved")
    assert plain.read_bytes() == content


async def test_progress_of_a_file(client: Client, plain: Path, tmp_path: Path) -> None:
    key = await client.create_key()
    seen: list[tuple[int, int | None]] = []
    await client.encrypt_file(key.id, plain, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20_000_000, 20_000_000)


@pytest.mark.parametrize("existing", [None, b"what was there before"], ids=["new", "replacing"])
@pytest.mark.parametrize("cut", [1, HEADER_BYTES + 100 * (CHUNK_BYTES + TAG_BYTES), 19_000_000, -1], ids=str)
async def test_a_cut_ciphertext_leaves_nothing(client: Client, plain: Path, tmp_path: Path, cut: int, existing: bytes | None) -> None:
    key = await client.create_key()
    sealed, out = tmp_path / "sealed", tmp_path / "out"
    await client.encrypt_file(key.id, plain, sealed)
    sealed.write_bytes(sealed.read_bytes()[:cut])
    if existing is not None:
        out.write_bytes(existing)
    before = names(tmp_path)
    with pytest.raises((CiphertextInvalid, CiphertextTruncated)):
        await client.decrypt_file(sealed, out)
    assert names(tmp_path) == before
    assert existing is None or out.read_bytes() == existing


@pytest.mark.parametrize("operation", [Operation.BEGIN, Operation.UPDATE, Operation.FINISH])
async def test_an_error_at_any_time_leaves_nothing(stage: Stage, client: Client, plain: Path, tmp_path: Path, operation: Operation) -> None:
    key, count = await client.create_key(), 0

    async def look(found: Operation) -> None:
        nonlocal count
        count += found is operation
        if found is operation and count == (10 if operation is Operation.UPDATE else 1):
            raise LeaseExpired("the lease has ended")

    stage.host.card.before = look
    with pytest.raises(LeaseExpired):
        await client.encrypt_file(key.id, plain, tmp_path / "out")
    assert names(tmp_path) == ["plain"]


async def test_the_card_has_several_chunks_of_a_file_at_once(stage: Stage, client: Client, plain: Path, tmp_path: Path) -> None:
    key, under_way, most = await client.create_key(), 0, 0

    async def look(found: Operation) -> None:
        nonlocal under_way, most
        if found is Operation.UPDATE:
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.02)
            under_way -= 1

    stage.host.card.before = look
    await client.encrypt_file(key.id, plain, tmp_path / "sealed")
    assert most == IN_FLIGHT
    await client.decrypt_file(tmp_path / "sealed", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == plain.read_bytes()


async def test_a_vcm_that_goes_away_leaves_nothing(stage: Stage, client: Client, plain: Path, tmp_path: Path) -> None:
    key = await client.create_key()

    def progress(done: int, total: int | None) -> None:
        if done > 10_000_000:
            stage.server.close_connections()

    with pytest.raises(CipherfleetError):
        await client.encrypt_file(key.id, plain, tmp_path / "out", progress=progress)
    assert names(tmp_path) == ["plain"]


async def test_cancelling_leaves_nothing(client: Client, plain: Path, tmp_path: Path) -> None:
    key, started = await client.create_key(), asyncio.Event()

    def progress(done: int, total: int | None) -> None:
        if done > 5_000_000:
            started.set()

    work = asyncio.create_task(client.encrypt_file(key.id, plain, tmp_path / "out", progress=progress))
    await started.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert names(tmp_path) == ["plain"]


async def test_files_that_cannot_be(client: Client, plain: Path, tmp_path: Path) -> None:
    key = await client.create_key()
    for source, target in (
        (tmp_path / "missing", tmp_path / "out"),
        (tmp_path, tmp_path / "out"),
        (plain, tmp_path),
        (plain, tmp_path / "no" / "folder"),
        (plain, Path("/dev/null")),
        (plain, plain / "below a file"),
    ):
        with pytest.raises(FileProblem):
            await client.encrypt_file(key.id, source, target)
    assert names(tmp_path) == ["plain"]
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Nothing may be written beyond ``size``: what a full disk does, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_file_that_cannot_be_written_to_the_end_leaves_nothing(client: Client, plain: Path, tmp_path: Path) -> None:
    key = await client.create_key()
    with largest_file(5_000_000), pytest.raises(FileProblem):
        await client.encrypt_file(key.id, plain, tmp_path / "out")
    with largest_file(300), pytest.raises(FileProblem):
        async with WholeFile(tmp_path / "small", private=True) as file:
            await file.write(bytes(1000))
    assert names(tmp_path) == ["plain"]


def test_a_full_disk_has_its_own_error() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert isinstance(file_error(OSError(number, "full"), "write", Path("x")), DiskFull)
    assert isinstance(file_error(OSError(errno.EACCES, "denied"), "write", Path("x")), FileProblem)


async def test_a_file_has_to_be_open() -> None:
    with pytest.raises(RuntimeError):
        await WholeFile(Path("x"), private=True)._write_out()


async def test_a_target_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(FileProblem):
        async with WholeFile(target, private=False) as file:
            await file.write(b"data")
            target.mkdir()
    assert names(tmp_path) == ["target"]
