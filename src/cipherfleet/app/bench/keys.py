"""Many keys in one consumer beside few in another: lists, lookups and encryption on the same cloud, turn by turn in the same run.

Each consumer's keys come by batch import; then its VCM is replaced by a new one, which has everything from the escrow. *uniform*: any
of all keys; *working set*: the same hundred; *first time*: keys that this VCM has not seen yet, while it still sweeps the escrow.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from cipherfleet.app.bench.report import Row, row
from cipherfleet.app.bench.rig import Say
from cipherfleet.app.commands.demo import PIN, enrol_on, sign_in_on
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import Internal
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.management_api import PlatformStatus, VcmCreateRequest, VcmDetail
from cipherfleet.services.middleware import Client
from cipherfleet.services.middleware.envelope import NewKey

PAGE, WORKING_SET = 100, 100
MESSAGE = bytes(1024)
ALGORITHM = "AES-256-GCM"
QUIET_S, BUSY = 1.0, 5.0
"""A VCM has swept when it used less than so many percent of a processor for so long."""
PAGES = ("list page", "find by label")
RATIOS = ("list page", "describe", "encrypt", "encrypt, working set", "find by label")


class Plan(NamedTuple):
    few: int
    many: int
    rounds: int
    calls: int
    """Of each operation in a round, of each consumer."""


FULL = Plan(100, 100_000, 20, 100)
QUICK = Plan(100, 3_000, 4, 40)


class Subject:
    """A consumer with ``count`` keys."""

    def __init__(self, name: str, count: int, client: Client) -> None:
        self.name, self.count, self.client = name, count, client
        self.where = f"{count} keys"
        self.keys: list[str] = []
        self.pages: list[str] = [""]
        self.taken: dict[str, list[float]] = {}

    async def walk(self) -> None:
        """Every page once: what there is, and where each page begins."""
        while True:
            page = await self.client.key_page(limit=PAGE, after=self.pages[-1])
            self.keys += [key.id for key in page.keys]
            if not page.next:
                break
            self.pages.append(page.next)
        if len(self.keys) != self.count:
            raise Internal(f"{self.name} has {len(self.keys)} keys, not {self.count}")

    async def time(self, operation: str, call: Awaitable[object]) -> None:
        began = time.perf_counter()
        await call
        self.taken.setdefault(operation, []).append(time.perf_counter() - began)

    def call(self, operation: str) -> Awaitable[object]:
        """One call, of keys chosen at random."""
        client, chosen = self.client, random.randrange(self.count)  # noqa: S311
        match operation:
            case "list page":
                return client.key_page(limit=PAGE, after=random.choice(self.pages))  # noqa: S311
            case "find by label":
                return client.key_page(limit=PAGE, label=f"key {chosen // PAGE}/")
            case "describe":
                return client.describe_key(self.keys[chosen])
            case "encrypt":
                return client.encrypt(self.keys[chosen], MESSAGE)
            case _:
                return client.encrypt(self.keys[chosen % WORKING_SET * (self.count // WORKING_SET)], MESSAGE)


async def keys(cloud: Cloud, folder: Path, plan: Plan, say: Say) -> tuple[list[Row], list[Row]]:
    """On a cloud whose consumer acme is there already."""
    await enrol_on(cloud, "many", folder / "ukey-many")
    await cloud.start_terminal(folder / "ukey-many", PIN)
    rows: list[Row] = []
    async with AsyncExitStack() as held:
        subjects = []
        for name, count in (("acme", plan.few), ("many", plan.many)):
            profile = await sign_in_on(folder, name, "bench")
            async with Client(profile) as client:
                rows.append(await _bring(client, count, say))
            start, pid, endpoint = await _replace(cloud, name, say)
            own = msgspec.structs.replace(profile, endpoints=(endpoint,))
            subject = Subject(name, count, await held.enter_async_context(Client(own)))
            subjects.append(subject)
            began = time.perf_counter()
            page = await subject.client.key_page(limit=PAGE)
            subject.taken["list page, first time"] = [time.perf_counter() - began]
            for key in page.keys:
                await subject.time("encrypt, first time", subject.client.encrypt(key.id, MESSAGE))
            rows.append({**row("start of a VCM", 0, subject.where, [start]), "pss_mib": _pss(pid)})
            say(f"{subject.where}: every row is swept")
            swept = await _swept(pid)
            await subject.walk()
            rows.append({**row("sweep beside the service", 0, subject.where, [swept]), "pss_mib": _pss(pid)})
        for number in range(plan.rounds):
            say(f"round {number + 1} of {plan.rounds}")
            for operation in RATIOS:
                calls = plan.calls if operation not in PAGES else max(1, plan.calls // 4)
                for turn in range(calls):  # call by call, so that what else this machine does meets both
                    for subject in subjects if turn % 2 else subjects[::-1]:
                        await subject.time(operation, subject.call(operation))
    for subject in subjects:
        rows += [row(operation, len(MESSAGE) if "encrypt" in operation else 0, subject.where, s) for operation, s in subject.taken.items()]
    return rows, _ratios(rows, *(subject.where for subject in subjects))


def _ratios(rows: list[Row], few: str, many: str) -> list[Row]:
    found = {(r["operation"], r["where"]): r for r in rows}
    return [
        {"ratio": f"{many}/{few}, {name}", "operation": operation, "size": 0, "value": round(over[name] / under[name], 3)}
        for operation in RATIOS
        for over, under in [(found[operation, many], found[operation, few])]
        for name in ("p50_us", "p99_us")
    ]


async def _bring(client: Client, count: int, say: Say) -> Row:
    """``count`` keys by batch import, a thousand in a request."""
    new = [NewKey(ALGORITHM, os.urandom(32), f"key {number // PAGE}/{number}") for number in range(count)]
    taken: list[float] = []
    began = time.perf_counter()

    def done(so_far: int) -> None:
        nonlocal began
        taken.append(time.perf_counter() - began)
        began = time.perf_counter()
        say(f"{so_far} of {count} keys imported")

    await client.import_keys(new, done=done)
    whole = row("import of a batch", 0, f"{count} keys", taken)
    return {**whole, "ops_s": round(count / sum(taken), 1)}


async def _replace(cloud: Cloud, consumer: str, say: Say) -> tuple[float, int, str]:
    """A new VCM in the place of the consumer's: how long its start took, its process, where it serves."""
    say(f"a new VCM for {consumer}")
    async with cloud.management() as management:
        status = await management.call("GET", "/v1/status", reply=PlatformStatus)
        [old] = [vcm.id for vcm in status.vcms if vcm.consumer == consumer]
        began = time.perf_counter()
        made = (await management.call("POST", "/v1/vcms", VcmCreateRequest(ConsumerId(consumer)), reply=VcmDetail)).vcm
        taken = time.perf_counter() - began
        await management.call("DELETE", f"/v1/vcms/{old}", reply=VcmDetail)
    return taken, made.pid, made.endpoint


async def _swept(pid: int) -> float:
    """Wait until a VCM is done with its sweep; seconds."""
    process, began = psutil.Process(pid), time.perf_counter()
    process.cpu_percent()
    while True:
        await asyncio.sleep(QUIET_S)
        if process.cpu_percent() < BUSY:
            return max(time.perf_counter() - began - QUIET_S, 0.001)


def _pss(pid: int) -> float | None:
    """Proportional set size, MiB; None where this user may not look."""
    try:
        return round(float(psutil.Process(pid).memory_full_info().pss) / 2**20, 1)
    except psutil.AccessDenied:
        return None
