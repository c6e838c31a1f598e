"""The whole story on a temporary cloud, step by step, in under a minute."""

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cipherfleet import Client
from cipherfleet.app import output
from cipherfleet.app.commands.key import to_pem
from cipherfleet.app.options import Json, run
from cipherfleet.app.wiring import Cloud
from cipherfleet.contract.errors import CipherfleetError, Internal
from cipherfleet.contract.ids import ApplicationName, ConsumerId
from cipherfleet.contract.management_api import VcmDetail
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.statements import Right
from cipherfleet.state.files import write_private
from cipherfleet.terminal.applications import sign_in
from cipherfleet.terminal.enrol import enrol
from cipherfleet.terminal.ukey import DirectoryUkey

PIN = "2468-demo"


class Story:
    """Prints each step with its time, and keeps them for ``--json``."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.steps: list[dict[str, Any]] = []

    @asynccontextmanager
    async def step(self, title: str, command: str = "") -> AsyncIterator[dict[str, Any]]:
        facts: dict[str, Any] = {}
        started = time.monotonic()
        if not self.quiet:
            output.screen.print(f"\n[bold]{len(self.steps) + 1}. {title}[/]" + (f"\n   [dim]$ {command}[/]" if command else ""))
        with output.working(title, quiet=self.quiet):
            yield facts
        elapsed = time.monotonic() - started
        self.steps.append({"title": title, "s": round(elapsed, 3), **facts})
        if not self.quiet:
            said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if name != "trace")
            output.screen.print(f"   [green]✓[/] {said or 'done'} [dim]({elapsed:.2f} s)[/]")
            if "trace" in facts:
                rows = [(t["step"], t["actor"], t["action"], f"{t['ms']:.0f}") for t in facts["trace"]]
                output.table("   the nine steps", ("   #", "actor", "action", "ms"), [(f"   {r[0]}", *r[1:]) for r in rows])


def demo(
    megabytes: Annotated[int, typer.Option(min=1, max=10000, help="Size of the file that is encrypted, MB.")] = 100,
    json: Json = False,
) -> None:
    """The whole story on a temporary cloud, in under a minute; leaves nothing behind."""
    story = Story(quiet=json)
    with tempfile.TemporaryDirectory(prefix="cipherfleet-demo-") as folder:
        run(_tell(story, Path(folder), megabytes))
    total = round(sum(step["s"] for step in story.steps), 3)
    if json:
        output.document({"steps": story.steps, "s": total})
    else:
        output.screen.print(f"\nThat was the whole story, in {total:.1f} s. Next: cipherfleet up --help")


async def _tell(story: Story, folder: Path, megabytes: int) -> None:
    cloud = Cloud(folder / "state")
    try:
        async with story.step("The cloud comes up", "cipherfleet up --detach") as facts:
            await cloud.up()
            facts["processes"] = len(cloud.processes())
        async with story.step("Two consumers are enrolled; each gets a Ukey", "cipherfleet consumer enroll acme --ukey ukey-acme"):
            for name in ("acme", "globex"):
                await enrol_on(cloud, name, folder / f"ukey-{name}")
        async with story.step("acme plugs its Ukey in", "cipherfleet terminal --ukey ukey-acme --detach") as facts:
            info = msgspec.json.decode(await cloud.start_terminal(folder / "ukey-acme", PIN))
            async with cloud.management() as management:
                detail = await management.call("GET", f"/v1/vcms/{info['vcm']}", reply=VcmDetail)
            facts.update(service="ON", vcm=detail.vcm.id, machine=detail.vcm.machine)
            facts["trace"] = msgspec.to_builtins(detail.trace)
        async with story.step("The Ukey signs an application in", "cipherfleet app add billing --ukey ukey-acme --out billing.json"):
            billing = await sign_in_on(folder, "acme", "billing")
        await _use(story, folder, billing, megabytes)
        async with story.step("A second consumer knocks at acme's VCM with its own certificate") as facts:
            foreign = await sign_in_on(folder, "globex", "spy")
            facts["refused"] = await refused(msgspec.structs.replace(foreign, endpoints=billing.endpoints))
        async with story.step("acme pulls its Ukey", "mv ukey-acme pocket") as facts:
            pulled = time.monotonic()
            (folder / "ukey-acme").rename(folder / "pocket")
            facts["refused"] = await refused(billing, patience=8.0)
            facts["after_ms"] = round((time.monotonic() - pulled) * 1000)
        async with story.step("The Ukey is back: the service too, and old ciphertexts decrypt", "mv pocket ukey-acme") as facts:
            (folder / "pocket").rename(folder / "ukey-acme")
            await served(billing)
            await _decrypt(folder, billing)
            facts["decrypted"] = "equal"
    finally:
        async with story.step("The cloud goes down", "cipherfleet down") as facts:
            facts["stopped"] = await cloud.down()


async def _use(story: Story, folder: Path, billing: Profile, megabytes: int) -> None:
    """Keys, a real file, a signature that somebody else checks."""
    plain, sealed = folder / "ledger.bin", folder / "ledger.cf"
    await asyncio.to_thread(_fill, plain, megabytes)
    async with Client(billing) as client:
        async with story.step("A key is made in the card", "cipherfleet key create AES-256-GCM --profile billing.json") as facts:
            key = await client.create_key("AES-256-GCM", label="ledger")
            facts["key"] = key.id
        async with story.step(
            f"A file of {megabytes} MB is encrypted", "cipherfleet encrypt --key ID --in ledger.bin --out ledger.cf"
        ) as facts:
            facts["speed"] = await _timed(client.encrypt_file(key.id, plain, sealed), megabytes)
        async with story.step("It is decrypted and compared", "cipherfleet decrypt --in ledger.cf --out ledger.out") as facts:
            facts["speed"] = await _timed(client.decrypt_file(sealed, folder / "ledger.out"), megabytes)
            if await asyncio.to_thread(_sha256, plain) != await asyncio.to_thread(_sha256, folder / "ledger.out"):
                raise Internal("the decrypted file differs")
            facts["compared"] = "equal"
        async with story.step(
            "A signature is made, and checked by openssl", "openssl dgst -sha256 -verify ledger.pem -signature s ledger.bin"
        ) as facts:
            signing = await client.create_key("ECDSA-P-256", label="seal")
            with plain.open("rb") as file:
                signature = await client.sign(signing.id, file)
            (folder / "signature").write_bytes(signature)
            (folder / "public.pem").write_bytes(to_pem(signing.public_key))
            facts["openssl"] = await _openssl(folder, plain)


async def _openssl(folder: Path, plain: Path) -> str:
    """What the ``openssl`` command says of the signature."""
    if shutil.which("openssl") is None:
        return "not installed, so not checked"
    arguments = ("dgst", "-sha256", "-verify", str(folder / "public.pem"), "-signature", str(folder / "signature"), str(plain))
    process = await asyncio.create_subprocess_exec("openssl", *arguments, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise Internal("openssl refuses the signature")
    return said.decode().strip()


async def enrol_on(cloud: Cloud, name: str, folder: Path) -> None:
    """Enrol a consumer, its Ukey in ``folder``."""
    async with cloud.kmc() as kmc, cloud.management() as management:
        await enrol(
            kmc,
            management,
            ConsumerId(name),
            folder,
            PIN,
            kmc_url=cloud.kmc_url,
            management_url=cloud.management_url,
            settings=cloud.record.settings,
        )


async def sign_in_on(folder: Path, consumer: str, name: str) -> Profile:
    """Sign an application in with the Ukey ``ukey-CONSUMER`` of ``folder``."""
    with DirectoryUkey.open(folder / f"ukey-{consumer}", PIN) as ukey:
        profile = await sign_in(ukey, ApplicationName(name), tuple(Right), 1)
    write_private(folder / f"{name}.json", msgspec.json.encode(profile))
    return profile


async def refused(profile: Profile, *, patience: float = 0.0) -> str:
    """The code with which the service refuses; asks again for at most ``patience`` seconds while it still serves."""
    end = time.monotonic() + patience
    while True:
        try:
            async with Client(profile) as client:
                await client.random(16)
        except CipherfleetError as error:
            return error.code
        if time.monotonic() > end:
            raise Internal("the service was not refused")
        await asyncio.sleep(0.02)


async def served(profile: Profile) -> None:
    """Waits until the service is on, 20 s at most."""
    end = time.monotonic() + 20
    while True:
        try:
            async with Client(profile) as client:
                await client.random(16)
            return
        except CipherfleetError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)


async def _decrypt(folder: Path, profile: Profile) -> None:
    again = folder / "ledger.again"
    async with Client(profile) as client:
        await client.decrypt_file(folder / "ledger.cf", again)
    if await asyncio.to_thread(_sha256, again) != await asyncio.to_thread(_sha256, folder / "ledger.bin"):
        raise Internal("the file decrypted after the Ukey's return differs")


async def _timed(work: Any, megabytes: int) -> str:
    started = time.monotonic()
    await work
    return f"{megabytes / (time.monotonic() - started):.0f} MB/s"


def _fill(path: Path, megabytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1_000_000))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
