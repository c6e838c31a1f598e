"""Applications: signed in by the consumer's Ukey, listed and revoked, and run inside the security domain."""

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from cipherfleet.app import output
from cipherfleet.app.grant_text import SHAPE, parse_grant, show_grant
from cipherfleet.app.options import Json, PinFile, State, UkeyFolder, read_file, read_pin, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import ApplicationUnknown, FileProblem, IsolationUnavailable, Malformed
from cipherfleet.contract.ids import ApplicationName, is_slug
from cipherfleet.contract.kmc_api import ApplicationEntry, ApplicationList
from cipherfleet.contract.management_api import DomainInfo
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import Right
from cipherfleet.services.middleware.connection import read_profile
from cipherfleet.state.files import write_private
from cipherfleet.terminal.applications import sign_in, sign_in_anew, sign_out
from cipherfleet.terminal.ukey import DirectoryUkey

app = typer.Typer(help="Applications: add, grant, list, revoke, exec.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The application's name: a-z, 0-9, dash; at most 32.")]
GrantOption = Annotated[list[str] | None, typer.Option("--grant", help=f"For some keys alone, repeatable: {SHAPE}.")]
ConsumerOption = Annotated[str | None, typer.Option(help="Whose (needed when two consumers use the same name).")]


@app.command()
def add(
    name: NameArgument,
    ukey: UkeyFolder,
    out: Annotated[Path, typer.Option(help="Where the profile goes (mode 0600).")],
    pin_file: PinFile = None,
    csr: Annotated[Path | None, typer.Option(help="The application's own certificate request, PEM or DER; its key stays with it.")] = None,
    allow: Annotated[
        str | None, typer.Option(help=f"Rights with every key, comma separated: {', '.join(Right)}; or all (the default without --grant).")
    ] = None,
    grant: GrantOption = None,
    days: Annotated[int, typer.Option(min=1, max=825, help="How long the certificate is valid.")] = Settings().application_days,
    json: Json = False,
) -> None:
    """Sign an application in with the Ukey and write its profile: endpoints, trust, certificate, key."""
    if not is_slug(name):
        raise Malformed(f"{name!r} cannot name an application", "use 1 to 32 of a-z, 0-9 and dash")
    request = read_file(csr) if csr else None
    grants = tuple(parse_grant(text, time.time()) for text in grant or ())
    rights = _rights(allow or ("" if grants else "all"))
    pin = read_pin(pin_file)

    async def work() -> Profile:
        with DirectoryUkey.open(ukey, pin) as opened:
            return await sign_in(opened, ApplicationName(name), rights, days, request, grants=grants)

    _tell_signed_in(run(work()), out, as_json=json)


@app.command("grant")
def grant_(
    ukey: UkeyFolder,
    profile: Annotated[Path, typer.Option(help="The application's profile, with its key; it is written anew.")],
    pin_file: PinFile = None,
    allow: Annotated[str | None, typer.Option(help="Rights with every key, as of `app add` (default: as they are).")] = None,
    grant: GrantOption = None,
    days: Annotated[int, typer.Option(min=1, max=825, help="How long the certificate is valid.")] = Settings().application_days,
    json: Json = False,
) -> None:
    """Give an application other rights and grants in the place of those it has. Its key stays, its certificate is a new one."""
    old = read_profile(profile)
    if not old.key:
        raise Malformed("the profile has no key", "sign the application in anew: cipherfleet app add --csr")
    grants = tuple(parse_grant(text, time.time()) for text in grant or ())
    rights = old.rights if allow is None else _rights(allow)
    pin = read_pin(pin_file)

    async def work() -> Profile:
        with DirectoryUkey.open(ukey, pin) as opened:
            return await sign_in_anew(opened, old, rights, days, grants)

    _tell_signed_in(run(work()), profile, as_json=json)


def _tell_signed_in(profile: Profile, out: Path, *, as_json: bool) -> None:
    try:
        write_private(out, msgspec.json.format(msgspec.json.encode(profile), indent=1))
    except OSError as exc:
        raise FileProblem(f"cannot write {out}: {exc.strerror}") from exc
    if as_json:
        shown = {"application": profile.application, "consumer": profile.consumer, "profile": str(out)}
        output.document(
            {**shown, "rights": profile.rights, "grants": profile.grants, "endpoints": profile.endpoints, "not_after": profile.not_after}
        )
    else:
        output.screen.print(f"{profile.application} of {profile.consumer} is signed in; its profile is {escape(str(out))}")


@app.command("list")
def list_(state: State, json: Json = False) -> None:
    """All applications of all consumers."""
    entries = run(_entries(Cloud(state)))
    if json:
        output.document(entries)
    else:
        rows = [
            (
                a.name,
                a.consumer,
                a.state,
                ", ".join(a.rights),
                "\n".join(map(show_grant, a.grants)),
                datetime.fromtimestamp(a.not_after, UTC).date(),
            )
            for a in entries
        ]
        output.table("applications", ("name", "consumer", "state", "rights", "grants", "until"), rows)


@app.command()
def revoke(
    name: NameArgument,
    state: State,
    consumer: ConsumerOption = None,
    ukey: Annotated[Path | None, typer.Option("--ukey", help="The consumer's Ukey, to sign the application out with.")] = None,
    pin_file: PinFile = None,
    json: Json = False,
) -> None:
    """Revoke an application's certificate, at once and for open connections too.

    With --ukey the consumer signs the application out, and nobody but the consumer lets it in again; without, the operator revokes it.
    """
    pin = read_pin(pin_file) if ukey else None

    async def work() -> tuple[str, str]:
        if ukey is not None and pin is not None:
            with DirectoryUkey.open(ukey, pin) as opened:
                await sign_out(opened, ApplicationName(name))
                return name, opened.record.consumer
        cloud = Cloud(state)
        entry = await _one(cloud, name, consumer)
        async with cloud.kmc() as kmc:
            await kmc.call("POST", f"/v1/applications/{entry.consumer}/{entry.name}/revoke")
        return entry.name, entry.consumer

    revoked, owner = run(work())
    if json:
        output.document({"application": revoked, "consumer": owner, "state": "revoked"})
    else:
        output.screen.print(f"{revoked} of {owner} is {'signed out' if ukey else 'revoked'}")


@app.command("exec", context_settings={"allow_extra_args": True})
def exec_(
    context: typer.Context,
    name: NameArgument,
    state: State,
    consumer: ConsumerOption = None,
) -> None:
    """Run a command inside the application's security domain (cloud with --isolation domain, as root)."""
    command = context.args
    if not command:
        raise Malformed("there is no command to run", "cipherfleet app exec NAME -- CMD")
    cloud = Cloud(state)
    record = cloud.record
    if record.isolation != "domain":
        raise IsolationUnavailable("this cloud has no security domains of its own", "start it with --isolation domain")

    async def find() -> DomainInfo:
        entry = await _one(cloud, name, consumer)
        async with cloud.management() as management:
            return await management.call("PUT", f"/v1/consumers/{entry.consumer}", reply=DomainInfo)

    index = int(run(find()).subnet.split(".")[2]) - 1
    namespace = f"cf{record.network}d{index}a"
    if not Path("/run/netns", namespace).exists():
        raise IsolationUnavailable(f"the security domain of {name} is not there now", "it exists while the consumer has a VCM")
    os.execvp("ip", ["ip", "netns", "exec", namespace, *command])


def _until(entry: ApplicationEntry) -> str:
    return str(datetime.fromtimestamp(entry.not_after, UTC).date())


async def _entries(cloud: Cloud) -> tuple[ApplicationEntry, ...]:
    async with cloud.kmc() as kmc:
        return (await kmc.call("GET", "/v1/applications", reply=ApplicationList)).applications


async def _one(cloud: Cloud, name: str, consumer: str | None) -> ApplicationEntry:
    found = [a for a in await _entries(cloud) if a.name == name and consumer in (None, a.consumer)]
    if len({a.consumer for a in found}) != 1:
        hint = "say whose with --consumer" if found else "see: cipherfleet app list"
        raise ApplicationUnknown(f"{len(found)} applications are called {name!r}", hint)
    return found[-1]


def _rights(text: str) -> tuple[Right, ...]:
    if not text:
        return ()
    if text == "all":
        return tuple(Right)
    try:
        return tuple(Right(part.strip()) for part in text.split(","))
    except ValueError as exc:
        raise Malformed(f"{text!r} names a right that does not exist", f"rights are: {', '.join(Right)}") from exc
