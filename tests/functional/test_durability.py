"""No acknowledged key is ever lost, and nothing is half made, whoever is killed when."""

import contextlib
import signal
import threading
import time
from pathlib import Path

import pytest

from cipherfleet import SyncClient
from cipherfleet.channel.process import ProcessEntry
from cipherfleet.contract.errors import CipherfleetError
from tests.support import Consumer, TestCloud, eventually, refusal

ROLES = ("vcm", "card", "machine", "management", "kmc", "hsm", "terminal")


def half_made(cloud: TestCloud) -> str:
    """What is not whole: every VCM of the inventory serves, on exactly the instances that the machines hold."""
    vcms = {str(v.id): str(v.state) for v in cloud.vcms()}
    folders = {p.name for p in Path(cloud.cloud.state, "machines").glob("*/vcm/vcm-*")}
    running = {p.id for p in cloud.processes("vcm")}
    if set(vcms.values()) <= {"serving"} and set(vcms) == folders == running:
        return ""
    return f"inventory {vcms}, folders {folders}, processes {running}"


def whole(cloud: TestCloud, consumer: Consumer, vcms: int) -> None:
    """Waits until nothing is half made and the consumer has so many VCMs."""
    end = time.monotonic() + 40
    while (wrong := half_made(cloud)) or len(consumer.vcms()) != vcms:
        assert time.monotonic() < end, wrong or f"{consumer.vcms()}"
        time.sleep(0.05)


def served(consumer: Consumer, client: SyncClient) -> bool:
    return not refusal(lambda: client.random(1))


def bring_back(cloud: TestCloud, consumer: Consumer, client: SyncClient) -> None:
    """What an operator and a consumer do after any failure: ``up``, and the Ukey is in."""
    cloud.up()
    if not [p for p in cloud.processes("terminal") if p.consumer == consumer.name]:
        consumer.plug_in()
    eventually(lambda: served(consumer, client), within=40.0, what="service is back")
    whole(cloud, consumer, 1)


def test_acknowledged_keys_survive_the_death_of_every_process(own_cloud: TestCloud) -> None:
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    profile = consumer.sign_in()
    acknowledged: dict[str, bytes] = {}
    stop = threading.Event()

    def make_keys() -> None:
        with SyncClient(profile) as client:
            while not stop.is_set():
                try:
                    key = client.create_key("AES-256-GCM")
                    acknowledged[key.id] = b""
                    acknowledged[key.id] = client.encrypt(key.id, key.id.encode())
                except CipherfleetError:
                    time.sleep(0.02)

    maker = threading.Thread(target=make_keys, daemon=True)
    maker.start()
    with SyncClient(profile) as client:
        for role in ROLES:
            count = len(acknowledged)
            eventually(lambda: len(acknowledged) > count + 2, what="keys are made")  # noqa: B023
            own_cloud.kill(role)
            bring_back(own_cloud, consumer, client)
        eventually(lambda: len(acknowledged) > 20, what="keys are made")
        own_cloud.kill()  # power cut: everything at once
        stop.set()
        maker.join(15)
        bring_back(own_cloud, consumer, client)
        present = {key.id for key in client.list_keys()}
        assert set(acknowledged) <= present
        for key, ciphertext in acknowledged.items():
            if ciphertext:
                assert client.decrypt(ciphertext) == key.encode()
    print(f"{len(acknowledged)} acknowledged keys, none lost")  # noqa: T201


@pytest.mark.parametrize(
    ("role", "step"),
    [
        ("management", 1),
        ("kmc", 2),
        ("management", 3),
        ("management", 4),
        ("machine", 5),
        ("hsm", 5),
        ("vcm", 6),
        ("card", 6),
        ("kmc", 6),
        ("terminal", 7),
        ("machine", 8),
        ("management", 8),
        ("vcm", 9),
    ],
)
def test_a_kill_at_any_step_of_a_creation_leaves_nothing_half_made(breakable: TestCloud, role: str, step: int) -> None:
    consumer = breakable.enrol(f"{role}-{step}")
    plugging = threading.Thread(target=_plug, args=(consumer,), daemon=True)
    plugging.start()
    _wait_step(breakable, consumer, step)
    for entry in _victims(breakable, consumer, role):
        breakable.end(entry, signal.SIGKILL)
    breakable.up()
    plugging.join(60)
    if not [p for p in breakable.processes("terminal") if p.consumer == consumer.name]:
        whole(breakable, consumer, 0)
        consumer.plug_in()
    eventually(lambda: consumer.service == "on", within=40, what="service on")
    whole(breakable, consumer, 1)
    with consumer.client() as client:
        key = client.create_key("AES-256-GCM")
        assert client.decrypt(client.encrypt(key.id, b"whole")) == b"whole"
    consumer.pull()
    whole(breakable, consumer, 0)
    for entry in [p for p in breakable.processes("terminal") if p.consumer == consumer.name]:
        breakable.end(entry)


def _plug(consumer: Consumer) -> None:
    with contextlib.suppress(CipherfleetError):
        consumer.plug_in()


def _wait_step(cloud: TestCloud, consumer: Consumer, step: int) -> None:
    """Until the creation has done ``step`` (or as near as can be seen from outside)."""

    def reached() -> bool:
        with contextlib.suppress(CipherfleetError):
            for vcm in cloud.vcms(everything=True):
                if vcm.consumer == consumer.name:
                    return len(cloud.vcm(vcm.id).trace) >= step or step < 5
            return step < 4 and bool(cloud.processes("terminal"))
        return False

    eventually(reached, within=30.0, what=f"step {step}")


def _victims(cloud: TestCloud, consumer: Consumer, role: str) -> list[ProcessEntry]:
    entries = cloud.processes(role)
    if role in ("vcm", "terminal"):
        return [p for p in entries if p.consumer == consumer.name]
    return entries[:1]
