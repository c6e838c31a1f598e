"""Benchmarks: ratios measured side by side in one run on a temporary cloud, absolute numbers second."""

import asyncio
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cipherfleet import Client
from cipherfleet.app import output
from cipherfleet.app.commands.demo import PIN, enrol_on, refused, served, sign_in_on
from cipherfleet.app.options import Json, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import Internal
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.management_api import PlatformStatus, VcmCreateRequest, VcmDetail

app = typer.Typer(help="Benchmarks on a temporary cloud: network, lifecycle.", no_args_is_help=True)

Quick = Annotated[bool, typer.Option("--quick", help="Less of everything; under a minute.")]
SIZES = (64, 16 * 1024, 1024 * 1024)

Row = dict[str, Any]
Operation = Callable[[], Awaitable[object]]


@app.command()
def network(quick: Quick = False, json: Json = False) -> None:
    """A client over mutual TLS against the same job done by a direct library call, interleaved in one run."""
    _report("network", run(_on_a_cloud(lambda cloud, folder: _network(folder, rounds=3 if quick else 9))), as_json=json)


@app.command()
def lifecycle(quick: Quick = False, json: Json = False) -> None:
    """How long a VCM's creation and deletion take, and from the Ukey's pull to the refusal."""
    _report("lifecycle", run(_on_a_cloud(lambda cloud, folder: _lifecycle(cloud, folder, runs=5 if quick else 30))), as_json=json)


async def _on_a_cloud(work: Callable[[Cloud, Path], Awaitable[tuple[list[Row], list[Row]]]]) -> tuple[list[Row], list[Row]]:
    with tempfile.TemporaryDirectory(prefix="cipherfleet-bench-") as name:
        folder = Path(name)
        cloud = Cloud(folder / "state")
        try:
            with output.working("starting a cloud", quiet=False):
                await cloud.up(machines=1)
                await enrol_on(cloud, "acme", folder / "ukey-acme")
                await cloud.start_terminal(folder / "ukey-acme", PIN)
            with output.working("measuring", quiet=False):
                return await work(cloud, folder)
        finally:
            await cloud.down()


async def _network(folder: Path, rounds: int) -> tuple[list[Row], list[Row]]:
    profile = await sign_in_on(folder, "acme", "bench")
    local = AESGCM(AESGCM.generate_key(256))
    seconds: dict[tuple[str, int, str], list[float]] = {}
    async with Client(profile) as client:
        key = (await client.create_key("AES-256-GCM")).id
        for _ in range(rounds):
            for size in SIZES:
                data = os.urandom(size)
                sealed = await client.encrypt(key, data)
                jobs: dict[tuple[str, str], Operation] = {
                    ("encrypt", "vcm"): lambda data=data: client.encrypt(key, data),  # type: ignore[misc]
                    ("encrypt", "direct"): _direct(lambda data=data: local.encrypt(os.urandom(12), data, None)),  # type: ignore[misc]
                    ("decrypt", "vcm"): lambda sealed=sealed: client.decrypt(sealed),  # type: ignore[misc]
                    ("digest", "vcm"): lambda data=data: client.digest("SHA-256", data),  # type: ignore[misc]
                    ("digest", "direct"): _direct(lambda data=data: _digest(data)),  # type: ignore[misc]
                }
                for (operation, where), job in jobs.items():
                    taken = seconds.setdefault((operation, size, where), [])
                    for _ in range(20):
                        began = time.perf_counter()
                        await job()
                        taken.append(time.perf_counter() - began)
    rows = [_row(operation, size, where, taken) for (operation, size, where), taken in seconds.items()]
    speed = {(r["operation"], r["size"], r["where"]): r["ops_s"] for r in rows}
    ratios = [
        {"ratio": "vcm/direct", "operation": operation, "size": size, "value": round(speed[operation, size, "vcm"] / value, 4)}
        for (operation, size, where), value in speed.items()
        if where == "direct"
    ]
    return rows, ratios


def _direct(work: Callable[[], object]) -> Operation:
    async def call() -> object:
        return work()

    return call


def _digest(data: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()


async def _lifecycle(cloud: Cloud, folder: Path, runs: int) -> tuple[list[Row], list[Row]]:
    profile = await sign_in_on(folder, "acme", "bench")
    taken: dict[str, list[float]] = {"create": [], "delete": [], "pull-to-refusal": [], "return-to-service": []}
    async with cloud.management() as management:
        first = (await management.call("GET", "/v1/status", reply=PlatformStatus)).vcms[0].id
        for _ in range(runs):
            began = time.perf_counter()
            made = await management.call("POST", "/v1/vcms", VcmCreateRequest(ConsumerId("acme")), reply=VcmDetail)
            taken["create"].append(time.perf_counter() - began)
            if made.vcm.id == first:
                raise Internal("no VCM was made")
            began = time.perf_counter()
            await management.call("DELETE", f"/v1/vcms/{made.vcm.id}", reply=VcmDetail)
            taken["delete"].append(time.perf_counter() - began)
        for _ in range(runs):
            began = time.perf_counter()
            (folder / "ukey-acme").rename(folder / "pocket")
            await refused(profile, patience=10.0)
            taken["pull-to-refusal"].append(time.perf_counter() - began)
            await asyncio.sleep(0.5)  # a hand is not faster
            began = time.perf_counter()
            (folder / "pocket").rename(folder / "ukey-acme")
            await served(profile)
            taken["return-to-service"].append(time.perf_counter() - began)
    return [_row(operation, 0, "vcm", seconds) for operation, seconds in taken.items()], []


def _row(operation: str, size: int, where: str, seconds: list[float]) -> Row:
    typical = statistics.median(seconds)
    ordered = sorted(seconds)
    return {
        "operation": operation,
        "size": size,
        "vcms": 1,
        "where": where,
        "runs": len(seconds),
        "ops_s": round(1 / typical, 1),
        "bytes_s": round(size / typical),
        "p50_us": round(typical * 1e6, 1),
        "p95_us": round(ordered[int(len(ordered) * 0.95)] * 1e6, 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
    }


def _report(bench: str, measured: tuple[list[Row], list[Row]], *, as_json: bool) -> None:
    rows, ratios = measured
    machine = {"processors": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    if as_json:
        output.document({"bench": bench, "rows": rows, "ratios": ratios, "machine": machine})
        return
    if ratios:
        output.table(
            "ratios", ("what", "operation", "bytes", "ratio"), [(r["ratio"], r["operation"], r["size"], r["value"]) for r in ratios]
        )
    columns = ("operation", "bytes", "where", "runs", "ops/s", "MB/s", "p50 us", "p95 us", "p99 us")
    names = ("operation", "size", "where", "runs", "ops_s", "bytes_s", "p50_us", "p95_us", "p99_us")
    output.table(bench, columns, [[round(r[n] / 1e6, 1) if n == "bytes_s" else r[n] for n in names] for r in rows])
