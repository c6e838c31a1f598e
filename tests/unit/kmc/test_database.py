"""The database's own faults: each by its error, and nothing half written."""

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from cipherfleet.contract.errors import DiskFull, FileProblem, StateNewer, StateNotWritable
from cipherfleet.kmc import store
from cipherfleet.kmc.schema import FILE, MIGRATIONS
from cipherfleet.state.database import Database


async def test_a_committed_write_is_there_again(tmp_path: Path) -> None:
    database = Database.open(tmp_path, FILE, MIGRATIONS)
    done: list[str] = []

    def commit(connection: Connection) -> str:
        store.add_authority(connection, "root-ca", b"pem")
        return "done"

    assert await database.write(commit, done.append) == "done"
    assert done == ["done"]
    await database.close()
    again = Database.open(tmp_path, FILE, MIGRATIONS)
    assert await again.read(store.read_authorities) == {"root-ca": b"pem"}
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    await again.close()


async def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    database = Database.open(tmp_path, FILE, MIGRATIONS)
    done: list[None] = []

    def fail(connection: Connection) -> None:
        store.add_authority(connection, "root-ca", b"pem")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await database.write(fail, done.append)
    assert done == []
    assert await database.read(store.read_authorities) == {}
    await database.close()


async def test_a_cancelled_caller_knows_what_was_written(tmp_path: Path) -> None:
    database = Database.open(tmp_path, FILE, MIGRATIONS)
    done: list[None] = []
    write = asyncio.ensure_future(database.write(lambda c: store.add_authority(c, "root-ca", b"pem"), done.append))
    await asyncio.sleep(0)
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    assert done == [None]
    assert await database.read(store.read_authorities) == {"root-ca": b"pem"}
    await database.close()


async def test_a_full_disk(tmp_path: Path) -> None:
    database = Database.open(tmp_path, FILE, MIGRATIONS)

    def fill(connection: Connection) -> None:
        connection.execute(text("PRAGMA max_page_count = 1"))
        store.add_authority(connection, "root-ca", bytes(1_000_000))

    with pytest.raises(DiskFull):
        await database.write(fill)
    assert await database.read(store.read_authorities) == {}
    await database.close()


def test_a_newer_database(tmp_path: Path) -> None:
    asyncio.run(Database.open(tmp_path, FILE, MIGRATIONS).close())
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'zzzz'")
    connection.close()
    with pytest.raises(StateNewer):
        Database.open(tmp_path, FILE, MIGRATIONS)


def test_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"garbage" * 1000)
    with pytest.raises(FileProblem):
        Database.open(tmp_path, FILE, MIGRATIONS)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateNotWritable):
        Database.open(tmp_path / "file" / "kmc", FILE, MIGRATIONS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateNotWritable):
        Database.open(tmp_path, FILE, MIGRATIONS)


async def test_a_constraint_is_a_fault_of_the_file(tmp_path: Path) -> None:
    database = Database.open(tmp_path, FILE, MIGRATIONS)
    await database.write(lambda c: store.add_authority(c, "root-ca", b"pem"))
    with pytest.raises(FileProblem):
        await database.write(lambda c: store.add_authority(c, "root-ca", b"pem"))
    await database.close()
