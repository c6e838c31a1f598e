"""A consistent copy of a database that others may be writing to at the same time."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from cipherfleet.contract.errors import CipherfleetError, DiskFull, FileProblem

PAGES = 256
BUSY_S = 10.0


def snapshot(source: Path, target: Path, moved: Callable[[int, int], object] = lambda _done, _total: None) -> None:
    """Copy the database ``source`` to the new file ``target``: one moment of it, nothing that is not committed, nothing torn.

    SQLite's online backup, inside one read transaction, which pins the moment: writers go on, the copy does not begin anew with
    each of their commits. ``moved(pages done, pages in all)`` hears how far it is. The copy needs no other file beside it.
    Raises ``FileProblem`` or ``DiskFull``.
    """
    if not source.is_file():
        raise FileProblem(f"there is no database {source}")
    try:
        target.touch(mode=0o600, exist_ok=False)
        with closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None)) as reading:
            reading.execute("BEGIN")
            reading.execute("SELECT count(*) FROM sqlite_master").fetchone()  # a read transaction begins with the first read
            with closing(sqlite3.connect(target, isolation_level=None)) as writing:
                reading.backup(writing, pages=PAGES, progress=lambda _status, left, total: moved(total - left, total))
                writing.execute("PRAGMA journal_mode=DELETE").fetchone()
            reading.execute("ROLLBACK")
    except sqlite3.Error as exc:
        raise _fault(exc, source) from exc


def settle(path: Path) -> None:
    """Make one file of a database that nobody uses: nothing beside it, nothing left in it of what was deleted. Raises ``FileProblem``."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None)) as writing:
            writing.execute("PRAGMA journal_mode=DELETE").fetchone()
            writing.execute("VACUUM")
    except sqlite3.Error as exc:
        raise _fault(exc, path) from exc


def check_integrity(path: Path) -> None:
    """That a database is whole: every page and every reference between tables. Raises ``FileProblem``."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)) as reading:
            found = reading.execute("PRAGMA integrity_check(1)").fetchone()
            orphan = reading.execute("PRAGMA foreign_key_check").fetchone()
    except sqlite3.Error as exc:
        raise FileProblem(f"{path} is not a database, or is damaged") from exc
    if found != ("ok",) or orphan is not None:
        raise FileProblem(f"{path} is damaged")


def _fault(exc: sqlite3.Error, path: Path) -> CipherfleetError:
    if getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return DiskFull(f"no space left for a copy of {path}")
    return FileProblem(f"{path} cannot be copied: {getattr(exc, 'sqlite_errorname', type(exc).__name__)}")
