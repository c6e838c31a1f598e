"""No acknowledged key is ever lost, and nothing is half made, whoever is killed when."""

import threading
import time
from functools import partial
from pathlib import Path

from cipherfleet import SyncClient
from cipherfleet.contract.errors import CipherfleetError
from tests.support import Consumer, TestCloud, eventually, persistently, refusal

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
        present = {key.id for key in persistently(client.list_keys)}
        assert set(acknowledged) <= present
        for key, ciphertext in acknowledged.items():
            if ciphertext:
                assert persistently(partial(client.decrypt, ciphertext)) == key.encode()
    print(f"{len(acknowledged)} acknowledged keys, none lost")  # noqa: T201
