"""Benchmarks: ratios measured side by side in one run on a temporary cloud, absolute numbers second."""

from pathlib import Path
from typing import Annotated

import typer

from cipherfleet.app import output
from cipherfleet.app.bench import figure8 as figure
from cipherfleet.app.bench import isolation as beside
from cipherfleet.app.bench import keys as many
from cipherfleet.app.bench import network as over
from cipherfleet.app.bench import picture, samples
from cipherfleet.app.bench.lifecycle import LAUNCHERS, cost
from cipherfleet.app.bench.lifecycle import lifecycle as measure_lifecycle
from cipherfleet.app.bench.report import Row, machine, report
from cipherfleet.app.bench.rig import Say, on_a_cloud
from cipherfleet.app.options import Json, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.channel import codec
from cipherfleet.contract.errors import FileProblem

app = typer.Typer(help="Benchmarks on a temporary cloud or card: network, lifecycle, keys, figure8, isolation.", no_args_is_help=True)

MACHINE_VCMS = 60

Quick = Annotated[bool, typer.Option("--quick", help="Less of everything; under a minute.")]


@app.command()
def network(
    quick: Quick = False,
    peers: Annotated[
        Path | None, typer.Option("--peers", help="Python of the environment that `make peers` makes.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """A client over mutual TLS against a VCM, by operation, size and connections.

    Beside it, in the same run: a null handler on the same server stack, a bare TLS echo on blocking sockets, the library alone, and
    with --peers SoftHSM2 behind p11-kit, moto's KMS and PyKMIP, as far as they do the same.
    """
    plan = over.QUICK if quick else over.FULL
    if peers is not None and not peers.is_file():
        raise FileProblem(f"there is no Python at {peers}", "make it with: make peers")
    rows, ratios, about = run(on_a_cloud(lambda _cloud, folder, say: over.network(folder, plan, say, peers)))
    report("network", (rows, ratios), as_json=json, about=about)


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


@app.command()
def keys(quick: Quick = False, json: Json = False) -> None:
    """Lists, lookups and encryption in a consumer of 100,000 keys (--quick: 3,000) against one of 100, in the same run."""
    plan = many.QUICK if quick else many.FULL
    report("keys", run(on_a_cloud(lambda cloud, folder, say: many.keys(cloud, folder, plan, say))), as_json=json)


@app.command()
def figure8(
    quick: Quick = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for figure8.png, figure8.svg and figure8.json.")] = Path("bench-figure8"),
    json: Json = False,
) -> None:
    """The paper's Figure 8: one VCM, and many in sum, against the host, openssl and a library call, by operation and block size.

    Null, AES-256-GCM, AES-256-CBC and SHA-256. Pictures need the extra "bench".
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise FileProblem(f"cannot make the folder {out}: {exc.strerror}") from exc
    taken, about = run(figure.figure8(figure.QUICK if quick else figure.FULL, quiet=json))
    rows, ratios, here = samples.rows(taken), figure.ratios(taken), machine() | about
    document = {"bench": "figure8", "measurements": taken, "rows": rows, "ratios": ratios, "machine": here}
    written = [out / "figure8.json"]
    try:
        written[0].write_bytes(codec.encode(document))
        written += picture.draw(rows, ratios, here, out)
    except OSError as exc:
        raise FileProblem(f"cannot write into {out}: {exc.strerror}") from exc
    except ImportError:
        output.errors.print("no pictures without matplotlib: pip install 'cipherfleet[bench]'", markup=False)
    report("figure8", (rows, ratios), as_json=json, about=about)
    if not json:
        output.screen.print("written:", *written)


@app.command()
def isolation(quick: Quick = False, json: Json = False) -> None:
    """What a VCM that floods the card costs a quiet one, and how two that flood share it."""
    taken, about = run(beside.isolation(beside.QUICK if quick else beside.FULL, quiet=json))
    report("isolation", (samples.rows(taken), beside.ratios(taken)), as_json=json, about=about)
