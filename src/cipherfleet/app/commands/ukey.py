"""Spare Ukeys, and the end of one of several."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cipherfleet.app import output
from cipherfleet.app.options import Json, PinFile, State, UkeyFolder, read_file, read_pin, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.ids import UkeyId, is_slug
from cipherfleet.contract.kmc_api import UkeyList
from cipherfleet.terminal import kit as kits
from cipherfleet.terminal import spare as spares
from cipherfleet.terminal.ukey import DirectoryUkey

app = typer.Typer(help="Ukeys of a consumer: spare, split, recover, list, revoke.", no_args_is_help=True)

NewPinFile = Annotated[
    Path | None,
    typer.Option(
        "--new-pin-file", help="File whose first line is the new Ukey's PIN ('-': standard input); default: ask.", show_default=False
    ),
]
OptionalUkey = Annotated[Path | None, typer.Option("--ukey", help="A Ukey of the consumer; without it the operator asks.")]
ConsumerOption = Annotated[str, typer.Option(help="Whose Ukeys, for the operator.", show_default=False)]


@app.command()
def spare(
    ukey: UkeyFolder,
    out: Annotated[Path, typer.Option("--out", help="The folder of the new Ukey; it must not exist yet, or be empty.")],
    pin_file: PinFile = None,
    new_pin_file: NewPinFile = None,
    json: Json = False,
) -> None:
    """Make a second Ukey of the same consumer: keys of its own, the same share of the CMK."""
    pin = read_pin(pin_file)
    new_pin = read_pin(new_pin_file, confirm=True, what="PIN of the new Ukey")

    async def work() -> tuple[str, str]:
        with DirectoryUkey.open(ukey, pin) as opened:
            return opened.record.consumer, await spares.write_spare(opened, out, new_pin)

    with output.working("making a spare Ukey", quiet=json):
        consumer, serial = run(work())
    if json:
        output.document({"consumer": consumer, "ukey": serial, "folder": str(out)})
    else:
        output.screen.print(f"{serial} in {escape(str(out))} is a spare Ukey of {consumer}; keep it away from the first one")


@app.command()
def split(
    ukey: UkeyFolder,
    shares: Annotated[int, typer.Option("--shares", help="How many custodians get a share: 2 to 16.")],
    threshold: Annotated[int, typer.Option("--threshold", help="How many of them are needed: 2 at least.")],
    out: Annotated[Path, typer.Option("--out", help="The folder for the shares; it must not exist yet, or be empty.")],
    pin_file: PinFile = None,
    json: Json = False,
) -> None:
    """Make a recovery kit: a spare Ukey, sealed, its key in shares for custodians. Give each one its file and delete the folder."""
    pin = read_pin(pin_file)

    async def work() -> kits.Kit:
        with DirectoryUkey.open(ukey, pin) as opened:
            return await kits.split(opened, out, shares=shares, threshold=threshold)

    with output.working("making a recovery kit", quiet=json):
        kit = run(work())
    if json:
        output.document(kit)
    else:
        says = kit.header
        output.screen.print(f"kit {says.kit} of {says.consumer}: {threshold} of {shares} shares bring {says.ukey} back")
        output.table("shares", ("file",), [(file,) for file in kit.files])


@app.command()
def recover(
    share: Annotated[list[Path], typer.Option("--share", help="A custodian's file; as many as the kit needs.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the Ukey; it must not exist yet, or be empty.")],
    new_pin_file: NewPinFile = None,
    revoke_lost: Annotated[bool, typer.Option("--revoke-lost", help="Revoke the Ukey that the kit was made with, too.")] = False,
    json: Json = False,
) -> None:
    """Make a working Ukey from custodians' shares of a recovery kit."""
    header, found = kits.recover([(str(path), read_file(path)) for path in share])
    with found:
        new_pin = read_pin(new_pin_file, confirm=True, what="PIN of the new Ukey")
        with output.working("recovering", quiet=json):
            found.write(out.absolute(), new_pin)

    async def work() -> None:
        with DirectoryUkey.open(out, new_pin) as opened:
            await spares.revoke(opened, header.made_by)

    if revoke_lost:
        run(work())
    if json:
        revoked = header.made_by if revoke_lost else None
        output.document({"consumer": header.consumer, "ukey": header.ukey, "folder": str(out), "kit": header.kit, "revoked": revoked})
    else:
        output.screen.print(f"{header.ukey} of {header.consumer} is in {escape(str(out))}")
        if revoke_lost:
            output.screen.print(f"{header.made_by} is revoked")


@app.command("list")
def list_(state: State, ukey: OptionalUkey = None, consumer: ConsumerOption = "", pin_file: PinFile = None, json: Json = False) -> None:
    """The Ukeys of a consumer, or for the operator of all."""
    pin = read_pin(pin_file) if ukey else ""

    async def work() -> UkeyList:
        if ukey is not None:
            with DirectoryUkey.open(ukey, pin) as opened:
                return await spares.list_ukeys(opened)
        async with Cloud(state).kmc() as kmc:
            return await kmc.call("GET", f"/v1/ukeys?consumer={_slug(consumer)}", reply=UkeyList)

    found = run(work()).ukeys
    if json:
        output.document(found)
    else:
        rows = [(u.ukey, u.consumer, u.state, output.moment(u.added_at), u.label, u.revoked_by) for u in found]
        output.table("Ukeys", ("serial", "consumer", "state", "since", "label", "revoked by"), rows)


@app.command()
def revoke(
    serial: Annotated[str, typer.Argument(help="The Ukey that was lost or stolen, from `ukey list`.")],
    state: State,
    ukey: OptionalUkey = None,
    consumer: ConsumerOption = "",
    pin_file: PinFile = None,
    json: Json = False,
) -> None:
    """Revoke one of several Ukeys, at once; the others go on, and what it had signed before stays good.

    With --ukey the consumer signs it, which cards and the other Ukeys check. Without it is the operator's word: the platform takes
    nothing of that Ukey any more.
    """
    pin = read_pin(pin_file) if ukey else ""
    id_ = serial_of(serial)

    async def work() -> str:
        if ukey is not None:
            with DirectoryUkey.open(ukey, pin) as opened:
                await spares.revoke(opened, id_)
                return opened.record.consumer
        if not consumer:
            raise Malformed("say whose Ukey it is with --consumer, or revoke it with --ukey")
        async with Cloud(state).kmc() as kmc:
            await kmc.call("POST", f"/v1/ukeys/{_slug(consumer)}/{id_}/revoke")
        return consumer

    owner = run(work())
    if json:
        output.document({"consumer": owner, "ukey": id_, "state": "revoked"})
    else:
        output.screen.print(f"{id_} of {owner} is revoked")


def serial_of(text: str) -> UkeyId:
    """Raises ``Malformed``."""
    digits = text.removeprefix("ukey-")
    if digits == text or len(digits) != 8 or not set(digits) <= set("0123456789abcdef"):
        raise Malformed(f"{text[:40]!r} is no serial of a Ukey", "see: cipherfleet ukey list")
    return UkeyId(text)


def _slug(consumer: str) -> str:
    if consumer and not is_slug(consumer):
        raise Malformed(f"{consumer!r} cannot name a consumer")
    return consumer
