"""How long a VCM's creation and deletion take, from the Ukey's pull to the refusal, and what each VCM more costs."""

import asyncio
import time
from pathlib import Path

import psutil

from cipherfleet.app.bench.report import Row, row
from cipherfleet.app.bench.rig import Say
from cipherfleet.app.commands.demo import PIN, enrol_on, refused, served, sign_in_on
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import Internal
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.management_api import PlatformStatus, VcmCreateRequest, VcmDetail
from cipherfleet.contract.settings import LauncherChoice

DOMAIN_VCMS = 8
"""A security domain holds no more, so many VCMs are of many consumers."""
COUNTS = (1, 2, 5, 10, 20, 40, 100, 200)

LAUNCHERS: dict[LauncherChoice, str] = {"zygote": "zygote", "auto": "bubblewrap"}


async def lifecycle(cloud: Cloud, folder: Path, where: str, runs: int, say: Say) -> list[Row]:
    profile = await sign_in_on(folder, "acme", "bench")
    taken: dict[str, list[float]] = {"create": [], "delete": [], "pull-to-refusal": [], "return-to-service": []}
    async with cloud.management() as management:
        first = (await management.call("GET", "/v1/status", reply=PlatformStatus)).vcms[0].id
        for number in range(runs):
            say(f"{where}: creation and deletion {number + 1} of {runs}")
            began = time.perf_counter()
            made = await _create(cloud, "acme")
            taken["create"].append(time.perf_counter() - began)
            if made == first:
                raise Internal("no VCM was made")
            began = time.perf_counter()
            await management.call("DELETE", f"/v1/vcms/{made}", reply=VcmDetail)
            taken["delete"].append(time.perf_counter() - began)
    for number in range(runs):
        say(f"{where}: pull {number + 1} of {runs}")
        began = time.perf_counter()
        (folder / "ukey-acme").rename(folder / "pocket")
        await refused(profile, patience=10.0)
        taken["pull-to-refusal"].append(time.perf_counter() - began)
        await asyncio.sleep(0.5)  # a hand is not faster
        began = time.perf_counter()
        (folder / "pocket").rename(folder / "ukey-acme")
        await served(profile)
        taken["return-to-service"].append(time.perf_counter() - began)
    return [{**row(operation, 0, where, seconds), "pss_mib": _memory(cloud, 1)} for operation, seconds in taken.items()]


async def cost(cloud: Cloud, folder: Path, where: str, most: int, say: Say) -> list[Row]:
    """From the one VCM there is to ``most``: how long each more took to serve, and the memory (PSS) of each, by number of VCMs."""
    rows: list[Row] = []
    taken: list[float] = []
    count, consumer = 1, "acme"
    for number in range(2, most + 1):
        say(f"{where}: VCM {number} of {most}")
        if count % DOMAIN_VCMS == 0:
            consumer = f"bench-{number}"
            await enrol_on(cloud, consumer, folder / f"ukey-{consumer}")
            await cloud.start_terminal(folder / f"ukey-{consumer}", PIN)  # with the first VCM of this consumer
        else:
            began = time.perf_counter()
            await _create(cloud, consumer)
            taken.append(time.perf_counter() - began)
        count += 1
        if taken and (count in COUNTS or count == most):
            rows.append({**row("create-one-more", 0, where, taken), "vcms": count, "pss_mib": _memory(cloud, count)})
            taken = []
    return rows


async def _create(cloud: Cloud, consumer: str) -> VcmId:
    """A VCM more, ready for its first operation."""
    async with cloud.management() as management:
        return (await management.call("POST", "/v1/vcms", VcmCreateRequest(ConsumerId(consumer)), reply=VcmDetail)).vcm.id


def _memory(cloud: Cloud, count: int) -> float | None:
    """Proportional set size of a VCM, MiB, with its share of a zygote; None where this user may not look."""
    entries = cloud.processes()
    pids = [p.pid for p in entries if p.role == "vcm"]
    if len(pids) != count:
        raise Internal(f"{len(pids)} VCMs run, not {count}")
    machines = [psutil.Process(p.pid) for p in entries if p.role == "machine"]
    zygotes = [child.pid for machine in machines for child in machine.children() if "zygote" in child.cmdline()]
    try:
        whole = sum(psutil.Process(pid).memory_full_info().pss for pid in (*pids, *zygotes))
    except psutil.AccessDenied:
        return None
    return round(float(whole) / count / 2**20, 2)
