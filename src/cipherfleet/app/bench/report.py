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


def report(bench: str, measured: tuple[list[Row], list[Row]], *, as_json: bool) -> None:
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
