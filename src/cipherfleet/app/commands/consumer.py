"""Enrolling consumers (the operator) and plugging the Ukey in (the consumer)."""

import asyncio
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from cipherfleet.app import output
from cipherfleet.app.options import Json, PinFile, State, UkeyFolder, read_pin, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import ForeignConsumer, Malformed
from cipherfleet.contract.escrow import Seen
from cipherfleet.contract.ids import ConsumerId, is_slug
from cipherfleet.contract.kmc_api import ConsumerList
from cipherfleet.terminal import epoch as epochs
from cipherfleet.terminal.enrol import EnrolResult, enrol
from cipherfleet.terminal.epoch import Restored
from cipherfleet.terminal.insertion import Event
from cipherfleet.terminal.process import main as terminal_main
from cipherfleet.terminal.ukey import DirectoryUkey

app = typer.Typer(help="Consumers: enroll, list, revoke.", no_args_is_help=True)


@app.command()
def enroll(
    name: Annotated[str, typer.Argument(help="The consumer's name: a-z, 0-9, dash; at most 32.")],
    ukey: UkeyFolder,
    state: State,
    pin_file: PinFile = None,
    json: Json = False,
) -> None:
    """Enrol a consumer and write its Ukey."""
    if not is_slug(name):
        raise Malformed(f"{name!r} cannot name a consumer", "use 1 to 32 of a-z, 0-9 and dash")
    cloud = Cloud(state)
    record = cloud.record
    pin = read_pin(pin_file, confirm=True)

    async def work() -> EnrolResult:
        async with cloud.kmc() as kmc, cloud.management() as management:
            return await enrol(
                kmc,
                management,
                ConsumerId(name),
                Path(ukey),
                pin,
                kmc_url=cloud.kmc_url,
                management_url=cloud.management_url,
                settings=record.settings,
            )

    with output.working(f"enrolling {name}", quiet=json):
        result = run(work())
    if json:
        output.document(result)
    else:
        shown = escape(str(ukey))
        output.screen.print(f"{name} is enrolled; its Ukey is {shown}. Plug it in with: cipherfleet terminal --ukey {shown}")


@app.command("list")
def list_(state: State, json: Json = False) -> None:
    """All consumers."""

    async def ask() -> ConsumerList:
        async with Cloud(state).kmc() as kmc:
            return await kmc.call("GET", "/v1/consumers", reply=ConsumerList)

    consumers = run(ask()).consumers
    if json:
        output.document(consumers)
    else:
        rows = [(c.name, c.state, c.keys, c.applications) for c in consumers]
        output.table("consumers", ("name", "state", "keys", "applications"), rows)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The consumer whose Ukey was stolen or lost.")],
    state: State,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Revoke a consumer's Ukey, at once and for good: its service ends and never comes back."""
    if not is_slug(name):
        raise Malformed(f"{name!r} cannot name a consumer", "use 1 to 32 of a-z, 0-9 and dash")
    if not (yes or json):
        typer.confirm(f"Revoke the Ukey of {name}? Its service ends now, and its keys cannot be used again.", abort=True, err=True)

    async def work() -> None:
        async with Cloud(state).kmc() as kmc:
            await kmc.call("POST", f"/v1/consumers/{name}/revoke-ukey")

    run(work())
    if json:
        output.document({"consumer": name, "state": "revoked"})
    else:
        output.screen.print(f"the Ukey of {name} is revoked")


@app.command("accept-restore")
def accept_restore(
    name: Annotated[str, typer.Argument(help="The consumer whose keys were restored from a backup.")],
    ukey: UkeyFolder,
    pin_file: PinFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Accept, as the consumer, that the platform was restored from a backup that is older than what the Ukey has seen.

    What was done after the backup is lost: keys that were made then do not decrypt, applications that were signed out then are in again.
    """
    pin = read_pin(pin_file)

    async def work() -> tuple[Restored, Seen]:
        with DirectoryUkey.open(ukey, pin) as opened:
            if opened.record.consumer != name:
                raise ForeignConsumer(f"this is a Ukey of {opened.record.consumer}, not of {name[:40]!r}")
            restored = await epochs.look(opened)
            if not (yes or json):
                _explain(restored)
                typer.confirm("Go on from there?", abort=True, err=True)
            return restored, await epochs.accept(opened, restored)

    restored, point = run(work())
    if json:
        shown = {"seen": _point(restored.seen), "there": _point(restored.there), "now": _point(point), "lost_changes": restored.lost}
        output.document({"consumer": name, **shown, "by_another": restored.by_another, "revoke_again": restored.revoke_again})
        return
    output.screen.print(f"{name} goes on in epoch {point.epoch}; plug the Ukey in with: cipherfleet terminal")
    for serial in restored.revoke_again:
        output.screen.print(f"revoke {serial} again: the platform forgot that it was revoked")


def _explain(restored: Restored) -> None:
    seen, there = restored.seen, restored.there
    output.errors.print(f"this Ukey has seen epoch {seen.epoch} up to change {seen.sequence}")
    output.errors.print(f"there is now epoch {there.epoch} up to change {there.sequence}")
    if restored.by_another:
        output.errors.print("another Ukey of this consumer has accepted it")
    output.errors.print(f"lost are {restored.lost} changes at least: keys made or changed, applications signed in or out since the backup")


def _point(seen: Seen) -> dict[str, object]:
    return {"epoch": seen.epoch, "sequence": seen.sequence, "head": seen.head.hex()}


def terminal(
    ukey: UkeyFolder,
    state: State,
    pin_file: PinFile = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the service is on.")] = False,
    json: Json = False,
) -> None:
    """Plug the Ukey in: the service is on until it goes."""
    pin = read_pin(pin_file)
    cloud = Cloud(state)

    def on(info: bytes) -> None:
        said = msgspec.json.decode(info)
        if json:
            output.document({"service": "on", **said})
        else:
            output.screen.print(f"service [green]ON[/] for {said['consumer']}: {said['vcm']} at {said['endpoint']}")

    if detach:
        with output.working("asking for service", quiet=json):
            info = run(cloud.start_terminal(Path(ukey), pin))
        on(info)
        return
    if not json:
        output.errors.print("pull the Ukey (rename or remove its folder) or press Ctrl-C to turn the service off")
    run(_hold(cloud, Path(ukey), pin, on, quiet=json))


async def _hold(cloud: Cloud, ukey: Path, pin: str, on: Callable[[bytes], None], *, quiet: bool) -> None:
    """The agent in this process, until Ctrl-C; it says each step as it happens."""

    def say(event: Event) -> None:
        if not quiet:
            output.errors.print(f"[dim]{datetime.fromtimestamp(event.at):%H:%M:%S}[/] {event.step} {event.vcm} {event.detail}".rstrip())

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await terminal_main(cloud.terminal_config(ukey, pin), lambda info: on(msgspec.json.encode(info)), stop, progress=say)
