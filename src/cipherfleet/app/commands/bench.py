"""Benchmarks: ratios measured side by side in one run on a temporary cloud, absolute numbers second."""

from pathlib import Path
from typing import Annotated

import typer

from cipherfleet.app.bench.lifecycle import LAUNCHERS, cost
from cipherfleet.app.bench.lifecycle import lifecycle as measure_lifecycle
from cipherfleet.app.bench.network import network as measure_network
from cipherfleet.app.bench.report import Row, report
from cipherfleet.app.bench.rig import Say, on_a_cloud
from cipherfleet.app.options import Json, run
from cipherfleet.app.wiring import Cloud

app = typer.Typer(help="Benchmarks on a temporary cloud: network, lifecycle.", no_args_is_help=True)

MACHINE_VCMS = 60

Quick = Annotated[bool, typer.Option("--quick", help="Less of everything; under a minute.")]


@app.command()
def network(quick: Quick = False, json: Json = False) -> None:
    """A client over mutual TLS against the same job done by a direct library call, interleaved in one run."""
    report("network", run(on_a_cloud(lambda _cloud, folder, _say: measure_network(folder, rounds=3 if quick else 9))), as_json=json)


@app.command()
def lifecycle(
    quick: Quick = False,
    vcms: Annotated[int | None, typer.Option(min=1, max=200, help="How many VCMs to go up to (default 40).", show_default=False)] = None,
    json: Json = False,
) -> None:
    """How long creation, deletion and the way from the Ukey's pull to the refusal take, and what each VCM more costs; for each launcher."""
    runs, most = (5, vcms or 3) if quick else (100, vcms or 40)
    report("lifecycle", run(_lifecycle(runs, most)), as_json=json)


async def _lifecycle(runs: int, most: int) -> tuple[list[Row], list[Row]]:
    rows: list[Row] = []
    for launcher, where in LAUNCHERS.items():

        async def measure(cloud: Cloud, folder: Path, say: Say, where: str = where) -> list[Row]:
            return [*await measure_lifecycle(cloud, folder, where, runs, say), *await cost(cloud, folder, where, most, say)]

        rows += await on_a_cloud(measure, machines=-(-most // MACHINE_VCMS), launcher=launcher)
    typical = {(r["operation"], r["where"]): r["p50_us"] for r in rows if r["vcms"] == 1 and "p50_us" in r}
    ratios = [
        {"ratio": "zygote/bubblewrap", "operation": operation, "size": 0, "value": round(typical[operation, "zygote"] / value, 4)}
        for (operation, where), value in typical.items()
        if where == "bubblewrap"
    ]
    return rows, ratios
