"""What every benchmark says: rows, ratios, the machine; on a screen or as one JSON document."""

import os
import platform
import statistics
from typing import Any

from cipherfleet.app import output

Row = dict[str, Any]


def row(operation: str, size: int, where: str, seconds: list[float]) -> Row:
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


COLUMNS = {
    "operation": "operation",
    "size": "bytes",
    "vcms": "VCMs",
    "connections": "connections",
    "where": "where",
    "runs": "runs",
    "rounds": "rounds",
    "ops_s": "ops/s",
    "spread": "quartiles",
    "bytes_s": "MB/s",
    "p50_us": "p50 us",
    "p95_us": "p95 us",
    "p99_us": "p99 us",
    "pss_mib": "PSS MiB",
}


def report(bench: str, measured: tuple[list[Row], list[Row]], *, as_json: bool, about: dict[str, Any] | None = None) -> None:
    """``about``: what else is to be known of the machine."""
    rows, ratios = measured
    if as_json:
        output.document({"bench": bench, "rows": rows, "ratios": ratios, "machine": machine() | (about or {})})
        return
    if ratios:
        columns = ("what", "operation", "bytes", "VCMs", "connections", "ratio", "quartiles")
        names = ("ratio", "operation", "size", "vcms", "connections", "value", "spread")
        kept = [number for number, name in enumerate(names) if any(name in r for r in ratios)]
        output.table("ratios", [columns[n] for n in kept], [[r.get(names[n]) for n in kept] for r in ratios])
    shown = [name for name in COLUMNS if any(name in r for r in rows)]
    output.table(bench, [COLUMNS[n] for n in shown], [[_figure(n, r.get(n)) for n in shown] for r in rows])
    for name, value in (about or {}).items():
        output.screen.print(f"{name}: {value}")


def machine() -> dict[str, Any]:
    return {"processors": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def _figure(name: str, value: Any) -> Any:
    return round(value / 1e6, 1) if name == "bytes_s" else value
