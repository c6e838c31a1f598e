"""Benchmarks: ratios measured side by side in one run on a temporary cloud, absolute numbers second."""

from pathlib import Path
from typing import Annotated

import typer

from cipherfleet.app import output
from cipherfleet.app.bench import figure8 as figure
from cipherfleet.app.bench import isolation as beside
from cipherfleet.app.bench import picture, samples
from cipherfleet.app.bench.lifecycle import lifecycle as measure_lifecycle
from cipherfleet.app.bench.network import network as measure_network
from cipherfleet.app.bench.report import machine, report
from cipherfleet.app.bench.rig import on_a_cloud
from cipherfleet.app.options import Json, run
from cipherfleet.channel import codec
from cipherfleet.contract.errors import FileProblem

app = typer.Typer(help="Benchmarks on a temporary cloud or card: network, lifecycle, figure8, isolation.", no_args_is_help=True)

Quick = Annotated[bool, typer.Option("--quick", help="Less of everything; under a minute.")]


@app.command()
def network(quick: Quick = False, json: Json = False) -> None:
    """A client over mutual TLS against the same job done by a direct library call, interleaved in one run."""
    report("network", run(on_a_cloud(lambda cloud, folder: measure_network(folder, rounds=3 if quick else 9))), as_json=json)


@app.command()
def lifecycle(quick: Quick = False, json: Json = False) -> None:
    """How long a VCM's creation and deletion take, and from the Ukey's pull to the refusal."""
    report("lifecycle", run(on_a_cloud(lambda cloud, folder: measure_lifecycle(cloud, folder, runs=5 if quick else 100))), as_json=json)


@app.command()
def figure8(
    quick: Quick = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for figure8.png, figure8.svg and figure8.json.")] = Path("bench-figure8"),
    json: Json = False,
) -> None:
    """The paper's Figure 8: one VCM, and many in sum, against the host, openssl and a library call, by operation and block size.

    Null, AES-256-GCM and SHA-256; AES-256-CBC is left out, as the card does not offer it. Pictures need the extra "bench".
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
