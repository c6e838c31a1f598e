"""SIGKILL of any one process at any step of a creation or deletion leaves nothing half made.

The real management process is held right after a step was written down, so that the kill hits just there.
"""

import contextlib
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cipherfleet.app import wiring
from cipherfleet.channel.process import ProcessEntry
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.lifecycle import CREATION, DELETION, Process
from tests.functional.test_durability import ROLES, half_made
from tests.support import Consumer, TestCloud, cloud_in, eventually, persistently

HOLDING = """
import asyncio, runpy, sys
from pathlib import Path
from cipherfleet.management.store import Store
folder, real = Path(sys.argv[1]), Store.add_trace
async def add_trace(self, vcm, entry):
    await real(self, vcm, entry)
    hold = folder / f"hold-{entry.process}-{entry.step}"
    if hold.exists() and not entry.error:
        (folder / "reached").write_text(vcm)
        while hold.exists():
            await asyncio.sleep(0.01)
Store.add_trace = add_trace
sys.argv = ["roles", "management"]
runpy.run_module("cipherfleet.app.roles", run_name="__main__")
"""


class Held:
    """A cloud whose management can be held after a step."""

    def __init__(self, cloud: TestCloud, folder: Path) -> None:
        self.cloud, self._folder = cloud, folder

    def hold(self, process: Process, step: int) -> None:
        (self._folder / "reached").unlink(missing_ok=True)
        (self._folder / f"hold-{process}-{step}").touch()

    def reached(self) -> str:
        """The VCM whose step was done: it waits now."""
        file = self._folder / "reached"
        eventually(lambda: file.exists() and file.read_text(), within=30.0, what="the step is done")
        return file.read_text()

    def release(self) -> None:
        for file in self._folder.glob("hold-*"):
            file.unlink()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    folder = tmp_path_factory.mktemp("held")
    (folder / "holding.py").write_text(HOLDING)
    plain = wiring._command
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            wiring,
            "_command",
            lambda role: [sys.executable, str(folder / "holding.py"), str(folder)] if role == "management" else plain(role),
        )
        with cloud_in(folder) as cloud:
            yield Held(cloud, folder)


@pytest.fixture
def agent(held: Held, request: pytest.FixtureRequest) -> Iterator[Consumer]:
    """A consumer; at the end nothing of it runs."""
    name = request.node.callspec.id.replace("_", "-") if hasattr(request.node, "callspec") else request.node.name
    consumer = held.cloud.enrol(name)
    yield consumer
    held.release()
    if consumer.ukey.exists():
        consumer.pull()
    for entry in [p for p in held.cloud.processes("terminal") if p.consumer == consumer.name]:
        held.cloud.end(entry)


def victims(cloud: TestCloud, consumer: Consumer, vcm: str, role: str) -> list[ProcessEntry]:
    """The processes of ``role`` that have to do with this VCM."""
    entries = cloud.processes(role)
    machine = str(cloud.vcm(vcm).vcm.machine or "m1")
    match role:
        case "vcm":
            return [p for p in entries if p.id == vcm]
        case "terminal":
            return [p for p in entries if p.consumer == consumer.name]
        case "machine":
            return [p for p in entries if p.id == machine]
        case "card":
            return [p for p in entries if f"-{machine}-" in p.id]
    return entries


def has_victim(process: Process, step: int, role: str) -> bool | None:
    """A VCM's process is there from step 6 of its creation to step 1 of its deletion, and gone from step 6 of that.

    None: between these it knows that it is revoked, and may have ended by itself.
    """
    if role != "vcm":
        return True
    if process is Process.CREATE:
        return step >= 6
    return {1: True, 2: None, 3: None, 4: None, 5: None}.get(step, False)


def rows(cloud: TestCloud, place: str, table: str) -> int:
    [file] = (Path(cloud.cloud.state) / place).glob("*.sqlite")
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        found: int = connection.execute(f"select count(*) from {table}").fetchone()[0]  # noqa: S608 - names of ours
        return found


def left_over(cloud: TestCloud) -> str:
    """What is there beyond the VCMs that serve: tokens, ports, authorisations, vCCs; empty when all agree."""
    if wrong := half_made(cloud):
        return wrong
    vcms = len(cloud.vcms())
    counts = {
        "management's tokens": rows(cloud, "management", "tokens"),
        "ports": rows(cloud, "management", "ports"),
        "the KMC's tokens": rows(cloud, "kmc", "tokens"),
        "authorisations": rows(cloud, "kmc", "vcms"),
        "vCCs": sum(m.card.vccs for m in cloud.platform().machines if m.card is not None),
    }
    return "" if set(counts.values()) == {vcms} else f"{vcms} VCMs, {counts}"


def settle(cloud: TestCloud, consumer: Consumer, vcms: int | None) -> None:
    """Waits until nothing is half made, and (if that is certain) the consumer has so many VCMs."""
    eventually(
        lambda: not left_over(cloud) and (vcms is None or len(consumer.vcms()) == vcms),
        within=40.0,
        what=f"all is whole with {vcms} VCMs",
    )


def kill(held: Held, consumer: Consumer, vcm: str, role: str, *, expected: bool | None) -> None:
    found = victims(held.cloud, consumer, vcm, role)
    assert expected is None or bool(found) is expected, found
    for entry in found:
        held.cloud.end(entry, signal.SIGKILL)
    held.release()
    held.cloud.up()


def serves_and_goes(held: Held, consumer: Consumer) -> None:
    """Whatever happened: plugged in it serves, pulled nothing is left."""
    cloud = held.cloud
    if not [p for p in cloud.processes("terminal") if p.consumer == consumer.name]:
        consumer.plug_in()
    eventually(lambda: consumer.service == "on", within=40.0, what="service on")
    settle(cloud, consumer, 1)
    with consumer.client() as client:
        key = persistently(lambda: client.create_key("AES-256-GCM"))
        assert persistently(lambda: client.decrypt(client.encrypt(key.id, b"whole"))) == b"whole"
    consumer.pull()
    settle(cloud, consumer, 0)
    assert rows(cloud, "kmc", "tokens") == len(cloud.vcms())


def creation(held: Held, consumer: Consumer, step: int, role: str) -> None:
    held.hold(Process.CREATE, step)
    plugging = threading.Thread(target=_quietly, args=(consumer.plug_in,), daemon=True)
    plugging.start()
    vcm = held.reached()
    assert len(held.cloud.vcm(vcm).trace) == step
    kill(held, consumer, vcm, role, expected=has_victim(Process.CREATE, step, role))
    plugging.join(60)
    serves_and_goes(held, consumer)


def deletion(held: Held, consumer: Consumer, step: int, role: str) -> None:
    vcm = consumer.plug_in()["vcm"]
    held.hold(Process.DELETE, step)
    state = held.cloud.cloud.state
    deleting = threading.Thread(target=_quietly, args=(lambda: delete_quietly(state, vcm),), daemon=True)
    deleting.start()
    assert held.reached() == vcm
    assert [t.step for t in held.cloud.vcm(vcm).trace if t.process is Process.DELETE][-1] == step
    kill(held, consumer, vcm, role, expected=has_victim(Process.DELETE, step, role))
    deleting.join(60)
    settle(held.cloud, consumer, None)
    # Deleted, or as before when the kill came before the deletion was decided; what the consumer does next works either way.
    if consumer.service != "on":
        for entry in [p for p in held.cloud.processes("terminal") if p.consumer == consumer.name]:
            held.cloud.end(entry)
    serves_and_goes(held, consumer)


def delete_quietly(state: Path, vcm: str) -> None:
    import asyncio

    from cipherfleet.contract.management_api import VcmDetail

    async def ask() -> None:
        async with wiring.Cloud(state).management() as management:
            await management.call("DELETE", f"/v1/vcms/{vcm}", reply=VcmDetail)

    asyncio.run(ask())


def _quietly(work: object) -> None:
    assert callable(work)
    with contextlib.suppress(CipherfleetError):
        work()


SAMPLE = list(enumerate(("management", "kmc", "hsm", "management", "machine", "card", "terminal", "vcm", "machine"), 1))
SAMPLE_OF_DELETION = list(enumerate(("terminal", "management", "kmc", "machine", "vcm", "hsm", "management", "card"), 1))
MIDDLE = [
    (2, "kmc"),
    (4, "kmc"),
    (4, "management"),
    (6, "management"),
    (6, "machine"),
    (6, "card"),
    (6, "kmc"),
    (6, "hsm"),
    (8, "card"),
    (8, "kmc"),
]
EVERY = [(s.number, r) for s in CREATION for r in ROLES if (s.number, r) not in SAMPLE]
EVERY_OF_DELETION = [(s.number, r) for s in DELETION for r in ROLES if (s.number, r) not in SAMPLE_OF_DELETION]


@pytest.mark.parametrize(("step", "role"), SAMPLE, ids=[f"c{s}-{r}" for s, r in SAMPLE])
def test_a_kill_after_a_step_of_a_creation(held: Held, agent: Consumer, step: int, role: str) -> None:
    creation(held, agent, step, role)


@pytest.mark.parametrize(("step", "role"), SAMPLE_OF_DELETION, ids=[f"d{s}-{r}" for s, r in SAMPLE_OF_DELETION])
def test_a_kill_after_a_step_of_a_deletion(held: Held, agent: Consumer, step: int, role: str) -> None:
    deletion(held, agent, step, role)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "role"), MIDDLE, ids=[f"m{s}-{r}" for s, r in MIDDLE])
def test_a_kill_in_the_middle_of_a_step(held: Held, agent: Consumer, step: int, role: str) -> None:
    """Somewhere in ``step``: the one before is done, this one has begun."""
    held.hold(Process.CREATE, step - 1)
    plugging = threading.Thread(target=_quietly, args=(agent.plug_in,), daemon=True)
    plugging.start()
    found = victims(held.cloud, agent, held.reached(), role)
    held.release()
    time.sleep(0.03)
    for entry in found:
        held.cloud.end(entry, signal.SIGKILL)
    held.cloud.up()
    plugging.join(60)
    serves_and_goes(held, agent)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "role"), EVERY, ids=[f"c{s}-{r}" for s, r in EVERY])
def test_a_kill_after_every_other_step_of_a_creation(held: Held, agent: Consumer, step: int, role: str) -> None:
    creation(held, agent, step, role)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "role"), EVERY_OF_DELETION, ids=[f"d{s}-{r}" for s, r in EVERY_OF_DELETION])
def test_a_kill_after_every_other_step_of_a_deletion(held: Held, agent: Consumer, step: int, role: str) -> None:
    deletion(held, agent, step, role)
