"""Writes docs/reference.md from the code: commands, settings, routes, error codes, algorithms."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import typer

from cipherfleet.app.cli import app
from cipherfleet.contract import kmc_api, machine_api, management_api
from cipherfleet.contract.algorithms import REGISTRY
from cipherfleet.contract.audit_events import KEY_EVENTS, MANAGEMENT_EVENTS, PLATFORM_EVENTS
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.settings import Settings
from cipherfleet.services import components

TARGET = Path(__file__).parent.parent / "docs" / "reference.md"


def commands() -> list[str]:
    lines = ["## Commands", ""]

    def walk(command: Any, path: str) -> None:  # typer brings its own click, whose types are private
        if subcommands := getattr(command, "commands", None):
            for name, found in subcommands.items():
                walk(found, f"{path} {name}")
            return
        context = command.context_class(command, info_name=path, max_content_width=120, terminal_width=120)
        usage = " ".join(command.collect_usage_pieces(context))
        lines.extend([f"### `{path}`", "", command.help or "", "", "```", f"{path} {usage}", "```", ""])
        rows = [p.get_help_record(context) for p in command.params]
        options = [row for row in rows if row is not None and row[0] != "--help"]
        if options:
            lines.extend(["| option | |", "|---|---|"])
            lines.extend(f"| `{name.replace('|', '/')}` | {' '.join(text.split())} |" for name, text in options)
            lines.append("")

    walk(typer.main.get_command(app), "cipherfleet")
    return lines


def settings() -> list[str]:
    lines = ["## Settings", "", "| setting | default | |", "|---|---|---|"]
    for field in msgspec.structs.fields(Settings):
        described = msgspec.json.schema(Settings)["$defs"]["Settings"]["properties"][field.encode_name]
        lines.append(f"| `{field.name}` | {field.default} | {described.get('description', '')} |")
    return [*lines, ""]


def routes() -> list[str]:
    lines = ["## Routes", ""]
    modules = (kmc_api, management_api, machine_api, components)
    for title, module in zip(("KMC", "Management platform", "Cipher machine", "VCM"), modules, strict=True):
        text = (module.__doc__ or "").partition("::")[2].strip("\n")
        block = "\n".join(line.removeprefix("    ") for line in text.splitlines())
        lines.extend([f"### {title}", "", "```", block.rstrip(), "```", ""])
    return lines


def error_codes() -> list[str]:
    lines = ["## Error codes", "", "| code | HTTP | what to do |", "|---|---|---|"]
    for code, kind in sorted(CipherfleetError.codes().items()):
        lines.append(f"| `{code}` | {kind.status} | {kind.default_hint} |")
    return [*lines, ""]


def algorithms() -> list[str]:
    lines = ["## Algorithms", "", "| name | standard | kind | uses | profiles |", "|---|---|---|---|---|"]
    rows = (f"| {a.name} | {a.standard} | {a.kind} | {', '.join(a.uses)} | {', '.join(a.profiles)} |" for a in REGISTRY.values())
    return [*lines, *rows, ""]


def audit_events() -> list[str]:
    lines = ["## Audit events", "", "| event | what happened |", "|---|---|"]
    lines.extend(f"| `{name}` | {what} |" for name, what in {**PLATFORM_EVENTS, **MANAGEMENT_EVENTS, **KEY_EVENTS}.items())
    return [
        *lines,
        "",
        "An attempt at the KMC that was refused is called by its route, as `POST /v1/escrow`; its outcome is the error's code.",
        "",
    ]


def text() -> str:
    head = ["# Reference", "", "Generated from the code by `make docs`; a test fails when it is out of date.", ""]
    return "\n".join([*head, *commands(), *settings(), *routes(), *error_codes(), *algorithms(), *audit_events()])


if __name__ == "__main__":
    TARGET.write_text(text())
    sys.stdout.write(f"wrote {TARGET}\n")
