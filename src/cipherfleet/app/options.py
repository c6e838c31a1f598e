"""Options that many commands share, and where their values come from."""

import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import uvloop

from cipherfleet.app.record import default_state
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import FileProblem, PassphraseWrong, PinWrong, TooLarge

T = TypeVar("T")

PIN_BYTES = 4 * 64 + 2
PASSPHRASE_BYTES = 1024
SMALL_BYTES = 64 * 1024


class Wish:
    """What the user asked of the output; set while options are parsed, so that errors obey it too."""

    json = False


def _remember_json(value: bool) -> bool:
    Wish.json = Wish.json or value
    return value


Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.", callback=_remember_json, is_eager=True)]
KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id, or alias/NAME.")]
State = Annotated[
    Path,
    typer.Option(
        "--state",
        help="The cloud's folder (default: $CIPHERFLEET_STATE, else ~/.local/state/cipherfleet).",
        default_factory=default_state,
        show_default=False,
    ),
]
ProfileFile = Annotated[
    Path, typer.Option("--profile", envvar="CIPHERFLEET_PROFILE", help="The application's profile, from `cipherfleet app add`.")
]
UkeyFolder = Annotated[Path, typer.Option("--ukey", help="The Ukey: a folder that stands for the USB key.")]
In = Annotated[Path | None, typer.Option("--in", help="Input file (default: standard input).", show_default=False)]
PinFile = Annotated[
    Path | None,
    typer.Option("--pin-file", help="File whose first line is the PIN ('-': standard input); default: ask.", show_default=False),
]


def cloud(state: Path) -> Cloud:
    return Cloud(state)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run one command's coroutine."""
    return uvloop.run(work)


def read_pin(file: Path | None, *, confirm: bool = False, what: str = "PIN") -> str:
    """The PIN from a file, a descriptor (``/dev/fd/N``), standard input, or a prompt; never from argv or the environment.

    Raises ``PinWrong`` or ``FileProblem``.
    """
    if file is None:
        if not sys.stdin.isatty():
            raise PinWrong("no PIN was given and there is nobody to ask", "give it with --pin-file")
        typed: str = typer.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True)
        return typed
    try:
        if str(file) == "-":
            raw = sys.stdin.buffer.readline(PIN_BYTES)
        else:
            with file.open("rb") as source:
                raw = source.readline(PIN_BYTES)
        return raw.decode().rstrip("\r\n")
    except OSError as exc:
        raise FileProblem(f"cannot read the PIN from {file}: {os.strerror(exc.errno or 0)}") from exc
    except UnicodeDecodeError as exc:
        raise PinWrong(f"the PIN in {file} is not text") from exc


def read_passphrase(file: Path | None, *, confirm: bool = False) -> bytearray:
    """A passphrase (first line, UTF-8) in a buffer that can be wiped; from a file, a descriptor, standard input, or a prompt.

    Raises ``PassphraseWrong`` or ``FileProblem``.
    """
    if file is None:
        if not sys.stdin.isatty():
            raise PassphraseWrong("no passphrase was given and there is nobody to ask", "give it with --passphrase-file")
        typed: str = typer.prompt("passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
        return bytearray(typed.encode())
    try:
        if str(file) == "-":
            raw = sys.stdin.buffer.readline(PASSPHRASE_BYTES)
        else:
            with file.open("rb") as source:
                raw = source.readline(PASSPHRASE_BYTES)
    except OSError as exc:
        raise FileProblem(f"cannot read the passphrase from {file}: {os.strerror(exc.errno or 0)}") from exc
    if len(raw) == PASSPHRASE_BYTES and not raw.endswith(b"\n"):
        raise PassphraseWrong(f"the passphrase in {file} has more than {PASSPHRASE_BYTES} bytes")
    return bytearray(raw.rstrip(b"\r\n"))


def read_file(path: Path) -> bytes:
    """A small input file, whole. Raises ``FileProblem``."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise FileProblem(f"cannot read {path}: {exc.strerror}") from exc


def read_small(path: Path | None, most: int = SMALL_BYTES) -> bytes:
    """A file, or standard input, of at most ``most`` bytes. Raises ``FileProblem`` or ``TooLarge``."""
    raw = sys.stdin.buffer.read(most + 1) if path is None else read_file(path)
    if len(raw) > most:
        raise TooLarge(f"{path or 'standard input'} has more than {most} bytes")
    return raw
