"""Docs cannot drift: the reference is generated, its links resolve, and every command takes --json."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cipherfleet.app.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def commands() -> Iterator[tuple[str, Any]]:
    def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:  # typer brings its own click, whose types are private
        if subcommands := getattr(command, "commands", None):
            for name, found in subcommands.items():
                yield from walk(found, f"{path} {name}".strip())
        else:
            yield path, command

    yield from walk(typer.main.get_command(app), "")


def test_the_reference_is_up_to_date() -> None:
    generated = runpy.run_path(str(ROOT / "scripts" / "reference.py"))["text"]()
    assert (ROOT / "docs" / "reference.md").read_text() == generated, "run: make docs"


@pytest.mark.parametrize(("path", "command"), list(commands()))
def test_every_command_takes_json_and_says_what_it_does(path: str, command: Any) -> None:
    assert command.help
    if path != "app exec":  # it becomes the command it runs
        assert "--json" in {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readmes_commands_exist() -> None:
    known = {path for path, _ in commands()}
    lines = [line for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S) for line in block.splitlines()]
    used = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("cipherfleet ")]
    assert len(used) > 8
    for words in used:
        assert " ".join(words[:1]) in known or " ".join(words[:2]) in known, words


def test_tests_named_in_the_threat_model_exist() -> None:
    for name in re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "threat-model.md").read_text()):
        assert (ROOT / name).exists(), name
