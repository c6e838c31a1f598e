"""The operator's commands on virtual cipher machines."""

from typing import Annotated, Any

import msgspec
import typer

from cipherfleet.app import output
from cipherfleet.app.options import Json, State, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import ConsumerUnknown
from cipherfleet.contract.ids import ConsumerId, MachineId
from cipherfleet.contract.management_api import MigrateRequest, PlatformStatus, VcmCreateRequest, VcmDetail, VcmList

app = typer.Typer(help="Virtual cipher machines: list, show, create, delete, migrate.", no_args_is_help=True)

VcmArgument = Annotated[str, typer.Argument(metavar="ID", help="The VCM's id.")]


@app.command("list")
def list_(
    state: State,
    everything: Annotated[bool, typer.Option("--all", help="Deleted ones too.")] = False,
    json: Json = False,
) -> None:
    """All VCMs of the cloud."""

    async def ask() -> VcmList:
        async with Cloud(state).management() as management:
            return await management.call("GET", f"/v1/vcms?all={int(everything)}", reply=VcmList)

    vcms = run(ask()).vcms
    if json:
        output.document(vcms)
    else:
        rows = [(v.id, v.consumer, v.machine, v.state, v.pid, v.isolation, v.endpoint) for v in vcms]
        output.table("VCMs", ("id", "consumer", "machine", "state", "pid", "isolation", "endpoint"), rows)


@app.command()
def show(
    vcm: VcmArgument,
    state: State,
    trace: Annotated[bool, typer.Option("--trace", help="The steps of its creation and deletion.")] = False,
    json: Json = False,
) -> None:
    """One VCM: where it runs, the isolation really in force, its trace."""
    _show(run(_call(state, "GET", f"/v1/vcms/{vcm}")), trace=trace, as_json=json)


@app.command()
def create(
    state: State,
    consumer: Annotated[str | None, typer.Option(help="For whom (default: the only consumer there is).")] = None,
    machine: Annotated[str | None, typer.Option(help="Where (default: the least loaded machine).")] = None,
    json: Json = False,
) -> None:
    """One VCM more; the consumer's Ukey must be plugged in."""

    async def ask() -> VcmDetail:
        async with Cloud(state).management() as management:
            name = consumer
            if name is None:
                known = (await management.call("GET", "/v1/status", reply=PlatformStatus)).consumers
                if len(known) != 1:
                    raise ConsumerUnknown(f"there are {len(known)} consumers", "say which with --consumer")
                name = known[0].name
            request = VcmCreateRequest(ConsumerId(name), MachineId(machine) if machine else None)
            return await management.call("POST", "/v1/vcms", request, reply=VcmDetail)

    with output.working("creating a VCM", quiet=json):
        detail = run(ask())
    _show(detail, trace=True, as_json=json)


@app.command()
def delete(
    vcm: VcmArgument,
    state: State,
    force: Annotated[bool, typer.Option("--force", help="Without the Ukey, by the operator; audited as such.")] = False,
    json: Json = False,
) -> None:
    """Delete a VCM in eight steps; deleting what is gone succeeds."""
    with output.working("deleting the VCM", quiet=json):
        detail = run(_call(state, "DELETE", f"/v1/vcms/{vcm}?force={int(force)}"))
    _show(detail, trace=True, as_json=json)


@app.command()
def migrate(
    vcm: VcmArgument,
    state: State,
    to: Annotated[str | None, typer.Option(help="The machine to go to (default: the least loaded other one).")] = None,
    json: Json = False,
) -> None:
    """Move a VCM to another machine: the new one serves before the old one goes."""
    with output.working("migrating the VCM", quiet=json):
        detail = run(_call(state, "POST", f"/v1/vcms/{vcm}/migrate", MigrateRequest(MachineId(to) if to else None)))
    _show(detail, trace=True, as_json=json)


async def _call(state: Any, method: str, path: str, body: object | None = None) -> VcmDetail:
    async with Cloud(state).management() as management:
        return await management.call(method, path, body, reply=VcmDetail)


def _show(detail: VcmDetail, *, trace: bool, as_json: bool) -> None:
    vcm = detail.vcm
    if as_json:
        document = {**msgspec.to_builtins(vcm), "isolation": msgspec.to_builtins(detail.isolation)}
        output.document({**document, "trace": msgspec.to_builtins(detail.trace)} if trace else document)
        return
    output.screen.print(f"[bold]{vcm.id}[/] of {vcm.consumer} on {vcm.machine}: {vcm.state}, {vcm.endpoint}, pid {vcm.pid}")
    if detail.isolation is not None:
        facts = msgspec.to_builtins(detail.isolation)
        output.table("isolation in force", ("what", "value"), [(k.replace("_", " "), v) for k, v in facts.items()])
    if trace:
        rows = [(t.process, t.step, t.actor, t.action, f"{t.ms:.1f}", t.error) for t in detail.trace]
        output.table("trace", ("process", "step", "actor", "action", "ms", "error"), rows)
