"""A client over mutual TLS against the same job done by a direct library call, interleaved in one run."""

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cipherfleet import Client
from cipherfleet.app.bench.report import Row, row
from cipherfleet.app.commands.demo import sign_in_on

SIZES = (64, 16 * 1024, 1024 * 1024)

Operation = Callable[[], Awaitable[object]]


async def network(folder: Path, rounds: int) -> tuple[list[Row], list[Row]]:
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
    rows = [row(operation, size, where, taken) for (operation, size, where), taken in seconds.items()]
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
