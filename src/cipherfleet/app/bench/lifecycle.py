"""How long a VCM's creation and deletion take, and from the Ukey's pull to the refusal."""

import asyncio
import time
from pathlib import Path

from cipherfleet.app.bench.report import Row, row
from cipherfleet.app.commands.demo import refused, served, sign_in_on
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import Internal
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.management_api import PlatformStatus, VcmCreateRequest, VcmDetail


async def lifecycle(cloud: Cloud, folder: Path, runs: int) -> tuple[list[Row], list[Row]]:
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
    return [row(operation, 0, "vcm", seconds) for operation, seconds in taken.items()], []
