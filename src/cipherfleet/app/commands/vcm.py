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

app = typer.Typer(help="Virtual cipher machines: list, show, create, delete, migrate, limits.", no_args_is_help=True)

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


@app.command()
def limits(
    vcm: VcmArgument,
    state: State,
    operations: Annotated[float | None, typer.Option(min=0, help="Operations per second; 0: any number.")] = None,
    bytes_: Annotated[float | None, typer.Option("--bytes", min=0, help="Bytes of data per second; 0: any number.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, max=256, help="Requests that the card works on at once.")] = None,
    keys: Annotated[int | None, typer.Option(min=0, max=16384, help="Keys loaded in the card.")] = None,
    weight: Annotated[float | None, typer.Option(min=0.1, max=100, help="Share of the card beside others that wait.")] = None,
    json: Json = False,
) -> None:
    """Show what a VCM may use of its card, or change it from now on: what is not given stays as it is.

    Requests over a rate wait, they are not refused. The limits go with the VCM to another machine, and the consumer's next VCM begins
    with them.
    """
    wished = {"operations_s": operations, "bytes_s": bytes_, "depth": depth, "keys": keys, "weight": weight}
    given = {name: value for name, value in wished.items() if value is not None}

    async def ask() -> VcmDetail:
        async with Cloud(state).management() as management:
            found = await management.call("GET", f"/v1/vcms/{vcm}", reply=VcmDetail)
            if not given:
                return found
            changed = msgspec.structs.replace(found.limits, **given)
            return await management.call("PUT", f"/v1/vcms/{vcm}/limits", changed, reply=VcmDetail)

    found = msgspec.to_builtins(run(ask()).limits)
    if json:
        output.document(found)
    else:
        output.table("limits", ("what", "value"), [(name.replace("_s", " per second"), value) for name, value in found.items()])


async def _call(state: Any, method: str, path: str, body: object | None = None) -> VcmDetail:
    async with Cloud(state).management() as management:
        return await management.call(method, path, body, reply=VcmDetail)


def _show(detail: VcmDetail, *, trace: bool, as_json: bool) -> None:
    vcm = detail.vcm
    if as_json:
        document = {**msgspec.to_builtins(vcm), "isolation": msgspec.to_builtins(detail.isolation)}
        document |= {"limits": msgspec.to_builtins(detail.limits), "statistics": msgspec.to_builtins(detail.statistics)}
        output.document({**document, "trace": msgspec.to_builtins(detail.trace)} if trace else document)
        return
    output.screen.print(f"[bold]{vcm.id}[/] of {vcm.consumer} on {vcm.machine}: {vcm.state}, {vcm.endpoint}, pid {vcm.pid}")
    if detail.isolation is not None:
        facts = msgspec.to_builtins(detail.isolation)
        output.table("isolation in force", ("what", "value"), [(k.replace("_", " "), v) for k, v in facts.items()])
    if detail.statistics.service_us:
        output.table(
            "requests in the card",
            ("time", "p50 us", "p99 us", "longest us"),
            [
                ("waiting", *_quantiles(detail.statistics.queue_us)),
                ("in service", *_quantiles(detail.statistics.service_us)),
            ],
        )
    if trace:
        rows = [(t.process, t.step, t.actor, t.action, f"{t.ms:.1f}", t.error) for t in detail.trace]
        output.table("trace", ("process", "step", "actor", "action", "ms", "error"), rows)


def _quantiles(counts: tuple[int, ...]) -> tuple[str, str, str]:
    """p50, p99 and longest of a histogram by powers of two: each said by its upper bound."""
    total, seen = sum(counts), 0
    found: list[str] = []
    for power, count in enumerate(counts):
        seen += count
        found += [f"< {2**power}"] * (sum(seen >= share * total for share in (0.5, 0.99, 1.0)) - len(found))
    return found[0], found[1], found[2]
