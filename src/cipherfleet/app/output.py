"""How commands speak: tables and progress to a person, one JSON document to a program."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from cipherfleet.contract.errors import CipherfleetError

screen = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
errors = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 200)


def document(value: object) -> None:
    """One JSON document on standard output; bytes as base64."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=None) + "\n")
    sys.stdout.flush()


def failure(error: CipherfleetError, *, as_json: bool) -> None:
    """An error: the document on standard output, and always one line on standard error."""
    if as_json:
        document(error.to_reply())
    hint = f" ({error.hint})" if error.hint else ""
    errors.print(f"[bold red]cipherfleet:[/] {error.code}: {escape(error.message + hint)}", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table, or a line that says there is nothing."""
    listed = [[_cell(value) for value in row] for row in rows]
    if not listed:
        screen.print(f"no {title}")
        return
    drawn = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in listed:
        drawn.add_row(*row)
    screen.print(drawn)


def _cell(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{name.replace('_', ' ')} {_cell(item)}" for name, item in value.items())
        case list() | tuple():
            return ", ".join(map(_cell, value))
        case None:
            return ""
    return escape(str(value))


def moment(seconds: float) -> str:
    """A time for people, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds").removesuffix("+00:00") + " UTC"


@contextmanager
def working(text: str, *, quiet: bool) -> Iterator[Any]:
    """A spinner while something takes its time; ``update(text)`` says what it is at."""
    if quiet or not errors.is_terminal:
        yield lambda _text: None
        return
    with errors.status(text) as status:
        yield lambda now: status.update(f"{text}: {now}")


@contextmanager
def transfer(text: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar over bytes; ``moved(done, total)`` moves it."""
    if quiet or not errors.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done, _total: bar.update(task, completed=done)


@contextmanager
def steps(text: str, total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar over steps; ``step(what)`` says which one begins."""
    if quiet or not errors.is_terminal:
        yield lambda _what: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda what: bar.update(task, advance=1, description=f"{text}: {what}")


@contextmanager
def counting(text: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over things; ``done(count)`` says how many there are now."""
    if quiet or not errors.is_terminal:
        yield lambda _count: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.update(task, completed=count)
