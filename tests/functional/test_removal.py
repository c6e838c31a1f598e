"""Ukey out, terminal killed, everything killed: the service stops in time, and comes back with the Ukey.

The gate is the order of events by the card's clock (CLOCK_BOOTTIME is one clock for all processes of a host): no operation
that began after the card's lease ended was done. Times are printed (``pytest -s``).
"""

import os
import re
import signal
import socket
import ssl
import threading
import time
from pathlib import Path

from cipherfleet import SyncClient
from cipherfleet.channel import tls
from cipherfleet.channel.certificates import Credentials
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.profile import Profile
from tests.support import Consumer, TestCloud, boottime, eventually, refusal

DROPPED = re.compile(r"keys of (\S+) dropped at ([0-9.]+), lease until ([0-9.]+)")
TIMER_S = 0.25
"""How late the card's timer may be. What it drops was of no use since the lease's end: every operation asks the lease."""


class Hammer:
    """Asks for encryption without pause, and notes (began, ended, code) by the card's clock."""

    def __init__(self, profile: Profile, key: str) -> None:
        self.events: list[tuple[float, float, str]] = []
        self._stop = threading.Event()
        self._profile, self._key = profile, key
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Hammer":
        self._thread.start()
        eventually(lambda: any(not code for _, _, code in self.events), what="first operation")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        with SyncClient(self._profile) as client:
            while not self._stop.is_set():
                began = boottime()
                code = refusal(lambda: client.encrypt(self._key, b"tick"))
                self.events.append((began, boottime(), code))
                if code:
                    time.sleep(0.005)

    def wait_refused(self, within: float) -> float:
        """When (by the card's clock) the first refusal after the last success ended."""

        def steadily_refused() -> bool:
            return len(self.events) > 20 and all(code for _, _, code in self.events[-20:])

        eventually(steadily_refused, within=within, what="steady refusal")
        last_done = max(end for _, end, code in self.events if not code)
        return min(end for _, end, code in self.events if code and end > last_done)

    def last_began(self) -> float:
        return max(began for began, _, code in self.events if not code)


def lease_ends(cloud: TestCloud, consumer: str) -> list[tuple[float, float]]:
    """(dropped at, lease until) of every drop the cards have logged for a consumer."""
    found = []
    for log in Path(cloud.cloud.state).rglob("card*.log"):
        found += [(float(m[2]), float(m[3])) for m in DROPPED.finditer(log.read_text()) if m[1] == consumer]
    return sorted(found)


def gate(cloud: TestCloud, consumer: Consumer, hammer: Hammer) -> float:
    """No operation that began after the keys were dropped, or after nonce time + duration, was done; when they were dropped."""
    drops: list[tuple[float, float]] = eventually(lambda: lease_ends(cloud, consumer.name), what="the card's word")
    dropped, until = drops[-1]
    assert dropped <= until + TIMER_S, "the card dropped the keys late"
    assert hammer.last_began() <= min(dropped, until), "an operation was accepted after the lease's end or the keys'"
    return dropped


def hammered(consumer: Consumer) -> tuple[Profile, str]:
    profile = consumer.sign_in()
    with SyncClient(profile) as client:
        return profile, client.create_key("AES-256-GCM").id


def test_a_pulled_ukey_is_refused_within_a_second(shared_cloud: TestCloud, consumer: Consumer) -> None:
    consumer.plug_in()
    profile, key = hammered(consumer)
    with Hammer(profile, key) as hammer:
        pulled = boottime()
        consumer.pull()
        refused = hammer.wait_refused(3.0)
    print(f"pulled -> refused {(refused - pulled) * 1000:.0f} ms")  # noqa: T201
    assert refused - pulled < 1.0
    gate(shared_cloud, consumer, hammer)
    eventually(lambda: consumer.vcms() == [], what="VCMs are deleted")
    assert consumer.service == "off"


def test_open_connections_are_closed(consumer: Consumer) -> None:
    consumer.plug_in()
    profile = consumer.sign_in()
    context = tls.client_context(Credentials(profile.key.encode(), profile.chain.encode(), profile.trust.encode()))
    context.check_hostname = False
    host, port = profile.endpoints[0].removeprefix("https://").split(":")
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as open_connection:
        open_connection.sendall(f"GET /v1/health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert open_connection.recv(4096).startswith(b"HTTP/1.1 200")
        open_connection.settimeout(10.0)
        consumer.pull()
        assert _ended(open_connection)


def _ended(connection: ssl.SSLSocket) -> bool:
    """Whether the connection ends; raises TimeoutError when it stays open for a second."""
    try:
        return connection.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


def test_a_stream_under_way_ends_with_an_error(consumer: Consumer) -> None:
    consumer.plug_in()
    profile, key = hammered(consumer)
    started, failed = threading.Event(), []

    def source() -> object:
        for _ in range(10_000):
            yield b"x" * 65536
            started.set()
            time.sleep(0.01)

    def work() -> None:
        try:
            with SyncClient(profile) as client:
                for _ in client.encrypt_stream(key, source()):  # type: ignore[arg-type]
                    pass
        except CipherfleetError as error:
            failed.append(error.code)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    consumer.pull()
    thread.join(1)
    assert not thread.is_alive()
    assert failed == ["service-off"]


def test_a_killed_terminal_ends_the_service_with_the_lease(shared_cloud: TestCloud, consumer: Consumer) -> None:
    consumer.plug_in()
    profile, key = hammered(consumer)
    [agent] = [p for p in shared_cloud.processes("terminal") if p.consumer == consumer.name]
    with Hammer(profile, key) as hammer:
        shared_cloud.end(agent, 9)
        killed = boottime()
        refused = hammer.wait_refused(shared_cloud.settings.lease_s + 3)
    print(f"terminal killed -> refused {refused - killed:.2f} s")  # noqa: T201
    assert refused - killed < shared_cloud.settings.lease_s + 1
    gate(shared_cloud, consumer, hammer)


def test_terminal_kmc_and_management_killed_the_card_stops_alone(own_cloud: TestCloud) -> None:
    consumer = own_cloud.enrol("acme")
    consumer.plug_in()
    profile, key = hammered(consumer)
    with SyncClient(profile) as client:
        ciphertext = client.encrypt(key, b"before")
    with Hammer(profile, key) as hammer:
        own_cloud.kill("terminal", "kmc", "management")
        killed = boottime()
        refused = hammer.wait_refused(own_cloud.settings.lease_s + 3)
    print(f"terminal, KMC and management killed -> refused {refused - killed:.2f} s")  # noqa: T201
    assert refused - killed < own_cloud.settings.lease_s + 1
    assert gate(own_cloud, consumer, hammer) - killed <= own_cloud.settings.lease_s + TIMER_S
    own_cloud.up()
    consumer.plug_in()
    with SyncClient(profile) as client:
        assert client.decrypt(ciphertext) == b"before"
        assert client.decrypt(client.encrypt(key, b"again")) == b"again"


def test_a_stopped_terminal_ends_the_service_with_the_lease(shared_cloud: TestCloud, consumer: Consumer) -> None:
    """A heartbeat that stops without a word: the process is there, and its connections stay open."""
    consumer.plug_in()
    profile, key = hammered(consumer)
    [agent] = [p for p in shared_cloud.processes("terminal") if p.consumer == consumer.name]
    with SyncClient(profile) as client:
        ciphertext = client.encrypt(key, b"before")
        try:
            with Hammer(profile, key) as hammer:
                os.kill(agent.pid, signal.SIGSTOP)
                stopped = boottime()
                refused = hammer.wait_refused(shared_cloud.settings.lease_s + 3)
            print(f"terminal stopped -> refused {refused - stopped:.2f} s")  # noqa: T201
            assert refused - stopped < shared_cloud.settings.lease_s + 1
            assert gate(shared_cloud, consumer, hammer) - stopped <= shared_cloud.settings.lease_s + TIMER_S
        finally:
            os.kill(agent.pid, signal.SIGCONT)
        eventually(lambda: not refusal(lambda: client.random(1)), within=15.0, what="service on again")
        assert client.decrypt(ciphertext) == b"before"


def test_the_ukey_back_the_service_is_on_again(shared_cloud: TestCloud, consumer: Consumer) -> None:
    consumer.plug_in()
    profile, key = hammered(consumer)
    with SyncClient(profile) as client:
        ciphertext = client.encrypt(key, b"kept")
        for _ in range(2):
            consumer.pull()
            eventually(lambda: refusal(lambda: client.random(1)), within=2.0)
            consumer.put_back()
            back = boottime()
            eventually(lambda: not refusal(lambda: client.random(1)), within=15.0, what="service on again")
            print(f"Ukey back -> service on {boottime() - back:.2f} s")  # noqa: T201
            assert client.decrypt(ciphertext) == b"kept"
    eventually(lambda: consumer.service == "on", what="management says so too")


def test_plugging_in_again_finds_the_agent_that_is_there(shared_cloud: TestCloud, consumer: Consumer) -> None:
    first = consumer.plug_in()
    consumer.pull()
    eventually(lambda: consumer.vcms() == [], what="VCMs are deleted")
    consumer.put_back()
    second = consumer.plug_in()
    assert (second["consumer"], second["endpoint"]) == (consumer.name, first["endpoint"])
    assert second["vcm"] != first["vcm"]
    assert len([p for p in shared_cloud.processes("terminal") if p.consumer == consumer.name]) == 1
