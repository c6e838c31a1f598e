"""A process's database: opened, brought to this program's revision, its faults mapped to our errors.

SQLite in WAL mode with full synchronisation: what was committed survives a power cut. Everything particular to SQLite
stands in this file.
"""

import asyncio
import errno
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from cipherfleet.contract.errors import CipherfleetError, DiskFull, FileProblem, StateNewer, StateNotWritable

T = TypeVar("T")

BUSY_S = 10.0
THREADS = 4


class Database:
    """Runs functions of a ``Connection`` in transactions, each in a thread, each waited for to its end."""

    def __init__(self, engine: Engine, where: Path) -> None:
        self._engine, self._where = engine, where
        self._writing = asyncio.Lock()
        # Threads of its own: those that wait for the HSM must not keep a revocation from the disk.
        self._threads = ThreadPoolExecutor(THREADS, "database")

    @staticmethod
    def open(folder: Path, file: str, migrations: str) -> "Database":
        """The database ``file`` of ``folder``, brought up to date by the Alembic scripts in ``migrations`` (``package:folder``).

        Blocking. Raises ``StateNewer``, ``StateNotWritable``, ``DiskFull`` or ``FileProblem``.
        """
        path = folder / file
        with _seam(path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_S})
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        try:
            with _seam(path):
                _migrate(engine, path, migrations)
        except BaseException:
            engine.dispose()
            raise
        return Database(engine, path)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """``work`` sees one state of the database, whatever is written meanwhile."""
        return await _to_its_end(self._in_thread(work, "BEGIN"))

    async def write(self, work: Callable[[Connection], T], committed: Callable[[T], object] = lambda _: None) -> T:
        """All of ``work`` is committed to disk, or none of it.

        ``committed`` (in the loop) brings what is in memory up to date before any other write begins, so that memory and
        database change in the same order.
        """

        async def in_order() -> T:
            async with self._writing:
                result = await self._in_thread(work, "BEGIN IMMEDIATE")
                committed(result)
                return result

        return await _to_its_end(in_order())

    async def forget_deleted(self) -> None:
        """What was deleted is overwritten; after this it is not in the write-ahead log either, unless somebody reads just now."""
        async with self._writing:
            await _to_its_end(asyncio.get_running_loop().run_in_executor(self._threads, self._empty_log))

    def _empty_log(self) -> None:
        with _seam(self._where), closing(self._engine.raw_connection()) as connection:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        self._engine.dispose()

    async def _in_thread(self, work: Callable[[Connection], T], begin: str) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._transact, work, begin)

    def _transact(self, work: Callable[[Connection], T], begin: str) -> T:
        with _seam(self._where), self._engine.connect().execution_options(begin=begin) as connection, connection.begin():
            return work(connection)


async def _to_its_end(work: Awaitable[T]) -> T:
    """A thread cannot be stopped: whoever was cancelled goes on only when it is known what was written."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _configure(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's "begin" event below says when a transaction begins, and of which kind
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN IMMEDIATE"))


def _migrate(engine: Engine, path: Path, migrations: str) -> None:
    config = Config()
    config.set_main_option("script_location", migrations)
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in script.walk_revisions()}
    with engine.connect() as connection, connection.begin():
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise StateNewer(f"{path} has revision {current[:40]}, which this program does not know")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _seam(path: Path) -> Iterator[None]:
    try:
        yield
    except CipherfleetError:
        raise
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left for {path}") from exc
        raise StateNotWritable(f"cannot write {path}: {os.strerror(exc.errno or 0)}", "choose another folder with --state") from exc
    except DBAPIError as exc:
        raise _fault(exc, path) from exc


def _fault(exc: DBAPIError, path: Path) -> CipherfleetError:
    code = getattr(exc.orig, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return DiskFull(f"no space left for {path}", "free some space; nothing that was acknowledged is lost")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
        return StateNotWritable(f"cannot write {path}", "check the folder's owner and mode")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return FileProblem(f"{path} is not a database of ours, or is damaged", "restore it from a backup")
    return FileProblem(f"the database in {path} refused: {type(exc.orig).__name__}")
