"""Fixtures of all tests that need a running cloud."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cipherfleet.app import record
from tests.support import Consumer, TestCloud, cloud_in

_numbers = itertools.count(1)

WORKER, WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


@pytest.fixture(scope="session", autouse=True)
def _networks_of_this_worker() -> Iterator[None]:
    """A cloud that is down for a moment keeps its addresses: another worker's new cloud must not come upon them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(record, "NETWORKS", record.NETWORKS[WORKER::WORKERS])
        yield


@pytest.fixture(scope="session")
def shared_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCloud]:
    """One cloud for all tests that leave it as they found it."""
    with cloud_in(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture
def own_cloud(tmp_path: Path) -> Iterator[TestCloud]:
    """A cloud for a test that breaks it."""
    with cloud_in(tmp_path) as cloud:
        yield cloud


@pytest.fixture
def new_consumer(shared_cloud: TestCloud) -> Iterator[Callable[[], Consumer]]:
    """Makes consumers of the shared cloud; their Ukeys are pulled at the end."""
    made: list[Consumer] = []

    def make() -> Consumer:
        made.append(shared_cloud.enrol(f"consumer-{next(_numbers)}"))
        return made[-1]

    yield make
    for consumer in made:
        if consumer.ukey.exists():
            consumer.pull()
        agents = [p for p in shared_cloud.processes("terminal") if p.consumer == consumer.name]
        for agent in agents:
            shared_cloud.end(agent)


@pytest.fixture
def consumer(new_consumer: Callable[[], Consumer]) -> Consumer:
    """A consumer whose Ukey is not plugged in yet."""
    return new_consumer()


@pytest.fixture(scope="session")
def _resident(shared_cloud: TestCloud) -> Iterator[Consumer]:
    """A consumer that stays plugged in for the whole session."""
    resident = shared_cloud.enrol("resident")
    resident.plug_in()
    yield resident
    if resident.ukey.exists():
        resident.pull()


@pytest.fixture
def plugged(_resident: Consumer) -> Consumer:
    """A consumer with its service on, which tests leave so."""
    if _resident.service != "on":
        _resident.plug_in()
    return _resident


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCloud]:
    """One cloud for a module's tests that kill its processes and bring it back."""
    with cloud_in(tmp_path_factory.mktemp("breakable")) as cloud:
        yield cloud
