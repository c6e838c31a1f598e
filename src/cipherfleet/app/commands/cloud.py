"""The operator's commands on the cloud itself: up, down, status."""

import asyncio
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape

from cipherfleet.app import output
from cipherfleet.app.options import Json, State, run
from cipherfleet.app.wiring import Cloud, CloudStatus
from cipherfleet.contract.errors import CipherfleetError, NotRunning
from cipherfleet.contract.settings import LauncherChoice


class IsolationMode(StrEnum):
    PROCESS = "process"
    DOMAIN = "domain"


def up(
    state: State,
    machines: Annotated[int | None, typer.Option(min=1, max=250, help="How many cipher machines (default 2).", show_default=False)] = None,
    isolation: Annotated[
        IsolationMode | None, typer.Option(help="process: no root needed (default); domain: real subnets, needs root.", show_default=False)
    ] = None,
    launcher: Annotated[
        LauncherChoice | None,
        typer.Option(
            help="How VCMs start: auto (default): bubblewrap, the strongest there is; zygote: forked, faster and smaller.",
            show_default=False,
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="File with the HSM's passphrase (default: one is made inside the state folder).")
    ] = None,
    ask_passphrase: Annotated[bool, typer.Option("--ask-passphrase", help="Type the HSM's passphrase; it is stored nowhere.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return once everything runs.")] = False,
    json: Json = False,
) -> None:
    """Start a whole crypto cloud on this machine; what runs already is left alone."""
    cloud = Cloud(state)
    first = not (cloud.state / "cloud.json").exists()
    passphrase = typer.prompt("HSM passphrase", hide_input=True, confirmation_prompt=first, err=True) if ask_passphrase else ""

    async def start() -> CloudStatus:
        with output.working("starting", quiet=json) as say:
            await cloud.up(
                machines=machines,
                isolation=isolation,
                launcher=launcher,
                passphrase_file=passphrase_file,
                passphrase=passphrase,
                progress=say,
            )
        return await cloud.status()

    status = run(start())
    show(status, as_json=json)
    if not detach:
        run(_watch(cloud, passphrase, quiet=json))


async def _watch(cloud: Cloud, passphrase: str, *, quiet: bool) -> None:
    """In the foreground: restart what dies, until Ctrl-C; then everything ends."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if not quiet:
        output.errors.print("running; Ctrl-C ends it")
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), 1.0)
        except TimeoutError:
            try:
                await cloud.up(passphrase=passphrase)
            except CipherfleetError as exc:
                output.failure(exc, as_json=False)
    await cloud.down()


def down(state: State, json: Json = False) -> None:
    """Stop every process of the cloud; its state stays."""
    cloud = Cloud(state)
    stopped = run(cloud.down())
    if json:
        output.document({"state": str(cloud.state), "stopped": stopped})
    else:
        output.screen.print(f"stopped {stopped} processes")


def status(state: State, json: Json = False) -> None:
    """What runs, and for whom."""
    cloud = Cloud(state)
    found = run(cloud.status())
    if not found.processes and not json:
        raise NotRunning(f"nothing runs in {cloud.state}")
    show(found, as_json=json)


def show(status: CloudStatus, *, as_json: bool) -> None:
    """The cloud as JSON or as tables."""
    platform = status.platform
    if as_json:
        output.document(to_document(status))
        return
    output.screen.print(f"[bold]{escape(status.state)}[/]  {'[green]ready[/]' if status.ready else '[red]not ready[/]'}")
    output.table("processes", ("role", "id", "pid", "consumer"), [(p.role, p.id, p.pid, p.consumer) for p in status.processes])
    if platform is None:
        return
    output.table("consumers", ("name", "service", "lease s"), [(c.name, c.service, c.lease_s) for c in platform.consumers])
    output.table(
        "VCMs",
        ("id", "consumer", "machine", "state", "endpoint"),
        [(v.id, v.consumer, v.machine, v.state, v.endpoint) for v in platform.vcms],
    )


def to_document(status: CloudStatus) -> dict[str, Any]:
    platform = msgspec.to_builtins(status.platform) if status.platform else {"consumers": [], "machines": [], "vcms": []}
    processes = [{"role": p.role, "pid": p.pid, "id": p.id, "consumer": p.consumer or None} for p in status.processes]
    return {"state": status.state, "ready": status.ready, "processes": processes, **platform}
