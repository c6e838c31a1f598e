"""Benchmarks: ratios measured side by side in one run on a temporary cloud, absolute numbers second."""

from typing import Annotated

import typer

from cipherfleet.app.bench.lifecycle import lifecycle as measure_lifecycle
from cipherfleet.app.bench.network import network as measure_network
from cipherfleet.app.bench.report import report
from cipherfleet.app.bench.rig import on_a_cloud
from cipherfleet.app.options import Json, run

app = typer.Typer(help="Benchmarks on a temporary cloud: network, lifecycle.", no_args_is_help=True)

Quick = Annotated[bool, typer.Option("--quick", help="Less of everything; under a minute.")]


@app.command()
def network(quick: Quick = False, json: Json = False) -> None:
    """A client over mutual TLS against the same job done by a direct library call, interleaved in one run."""
    report("network", run(on_a_cloud(lambda cloud, folder: measure_network(folder, rounds=3 if quick else 9))), as_json=json)


@app.command()
def lifecycle(quick: Quick = False, json: Json = False) -> None:
    """How long a VCM's creation and deletion take, and from the Ukey's pull to the refusal."""
    report("lifecycle", run(on_a_cloud(lambda cloud, folder: measure_lifecycle(cloud, folder, runs=5 if quick else 100))), as_json=json)
