"""Two consumers on one cloud know nothing of each other, and cannot reach each other's VCMs."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from cipherfleet import SyncClient
from cipherfleet.channel import tls
from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.client import Caller
from cipherfleet.contract.audit import AuditLog
from cipherfleet.contract.errors import CipherfleetError, ServiceUnavailable
from cipherfleet.contract.profile import Profile
from cipherfleet.terminal.callers import KMC, MANAGEMENT
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.support import Consumer, TestCloud, cloud_in, command, profile_file, refusal


@pytest.fixture
def pair(plugged: Consumer, new_consumer: Callable[[], Consumer]) -> tuple[Consumer, Consumer]:
    other = new_consumer()
    other.plug_in()
    return plugged, other


def credentials(own: Profile, trust: str) -> Credentials:
    return Credentials(own.key.encode(), own.chain.encode(), trust.encode())


def knock(own: Profile, at: Consumer, trust: str) -> bytes:
    """What the VCM of ``at`` answers to an application that trusts whatever it meets; empty when it cuts the connection."""
    context = tls.client_context(credentials(own, trust))
    context.check_hostname = False
    host, port = at.vcms()[0].endpoint.removeprefix("https://").split(":")
    # TLS 1.3 lets the client finish first; the server's refusal is the first thing that can be read.
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        try:
            with context.wrap_socket(plain) as connection:
                connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
                return connection.recv(100)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_a_foreign_application_fails_in_the_handshake(pair: tuple[Consumer, Consumer]) -> None:
    """Whatever the foreign application trusts: the VCM does not trust it, and never reads a byte of its request."""
    a, b = pair
    own, foreign = a.sign_in(), b.sign_in()
    assert knock(own, a, own.trust).startswith(b"HTTP/1.1 200 "), "positive control"
    assert knock(foreign, a, own.trust) == b""


def test_our_client_refuses_a_foreign_vcm(pair: tuple[Consumer, Consumer]) -> None:
    a, b = (c.sign_in() for c in pair)
    with SyncClient(msgspec.structs.replace(b, endpoints=a.endpoints)) as client:
        assert refusal(lambda: client.random(1)) == "certificate-invalid"


def test_keys_and_audit_lines_of_others_are_invisible(pair: tuple[Consumer, Consumer]) -> None:
    a, b = pair
    with a.client() as mine, b.client() as theirs:
        key = mine.create_key("AES-256-GCM")
        ciphertext = mine.encrypt(key.id, b"mine")
        assert key.id not in {k.id for k in theirs.list_keys()}
        for attempt in (
            lambda: theirs.describe_key(key.id),
            lambda: theirs.encrypt(key.id, b"x"),
            lambda: theirs.decrypt(ciphertext),
            lambda: theirs.rotate_key(key.id),
            lambda: theirs.delete_key(key.id),
        ):
            assert refusal(attempt) == "key-unknown"
        assert {line.consumer for line in theirs.audit()} == {b.name}
        assert mine.decrypt(ciphertext) == b"mine"


def test_tokens_and_traces_of_others_are_invisible(shared_cloud: TestCloud, pair: tuple[Consumer, Consumer]) -> None:
    """Who has a certificate of this cloud gets through the platform's handshake, and no further."""
    a, b = pair
    profile, theirs = a.sign_in(), b.vcms()[0].id
    with DirectoryUkey.open(a.ukey, a.pin) as ukey:
        terminal = ukey.channel(ukey.record.root)
    cloud = shared_cloud.cloud
    doors = {
        (cloud.management_url, MANAGEMENT.dns_name): ("/v1/vcms", f"/v1/vcms/{theirs}", "/v1/status"),
        (cloud.kmc_url, KMC.dns_name): (f"/v1/vcms/{theirs}", "/v1/escrow", "/v1/audit", f"/v1/audit?consumer={b.name}"),
    }

    async def refusals(own: Credentials) -> dict[str, str]:
        found: dict[str, str] = {}
        for (url, name), paths in doors.items():
            async with Caller(url, name, own, ServiceUnavailable) as caller:
                for path in paths:
                    try:
                        await caller.call("GET", path)
                    except CipherfleetError as error:
                        found[url + path] = error.code
        return found

    expected = {url + path: "not-permitted" for (url, _), paths in doors.items() for path in paths}
    assert asyncio.run(refusals(credentials(profile, profile.root))) == expected
    of_its_own = {url: code for url, code in expected.items() if "/v1/escrow" not in url and "/v1/audit" not in url}
    assert asyncio.run(refusals(terminal)) == of_its_own, "a terminal reads its own consumer's escrow and audit log"

    async def asked_for_theirs() -> AuditLog:
        async with Caller(cloud.kmc_url, KMC.dns_name, terminal, ServiceUnavailable) as caller:
            return await caller.call("GET", f"/v1/audit?consumer={b.name}", reply=AuditLog)

    assert {entry.consumer for entry in asyncio.run(asked_for_theirs()).entries} == {a.name}
    assert shared_cloud.vcm(theirs).trace, "positive control: there is something to see"


domain = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("nft") or not shutil.which("ip"), reason="security domains as subnets need root, ip and nft"
)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestCloud, Consumer, Consumer]]:
    with cloud_in(tmp_path_factory.mktemp("domains"), isolation="domain") as cloud:
        pair = cloud.enrol("acme"), cloud.enrol("globex")
        for consumer in pair:
            consumer.plug_in()
        yield cloud, *pair


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2).close()"


def within(cloud: TestCloud, consumer: Consumer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the domain of the consumer's application ``billing``."""
    cipherfleet = [sys.executable, "-c", "from cipherfleet.app.cli import main; main()", "app", "exec", "billing"]
    options = ["--consumer", consumer.name, "--state", str(cloud.cloud.state), "--"]
    return subprocess.run([*cipherfleet, *options, *arguments], capture_output=True, text=True, timeout=60, check=False)


def reaches(cloud: TestCloud, consumer: Consumer, endpoint: str) -> bool:
    host, port = endpoint.removeprefix("https://").split(":")
    return within(cloud, consumer, sys.executable, "-c", CONNECT, host, port).returncode == 0


@pytest.mark.root
@domain
def test_a_domain_is_reached_from_its_own_applications_alone(domains: tuple[TestCloud, Consumer, Consumer], tmp_path: Path) -> None:
    cloud, acme, globex = domains
    endpoints = {c.name: c.vcms()[0].endpoint for c in (acme, globex)}
    profile = profile_file(acme.sign_in(), tmp_path)
    globex.sign_in()
    assert reaches(cloud, acme, endpoints["acme"]), "positive control"
    assert reaches(cloud, globex, endpoints["globex"]), "positive control"
    assert not reaches(cloud, acme, endpoints["globex"])
    assert not reaches(cloud, globex, endpoints["acme"])
    assert not reaches(cloud, acme, cloud.cloud.kmc_url)
    assert not reaches(cloud, acme, cloud.cloud.management_url)
    subnet = f"10.{cloud.cloud.record.network}."
    hosts = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses]
    assert not [a for a in hosts if a.startswith(subnet)], "the host has no leg in a domain"
    cipherfleet = [sys.executable, "-c", "from cipherfleet.app.cli import main; main()"]
    used = within(cloud, acme, *cipherfleet, "random", "--profile", str(profile), "--json")
    assert used.returncode == 0, used.stderr
    assert len(msgspec.json.decode(used.stdout)["result"]) == 44


@pytest.mark.root
@domain
def test_a_domain_goes_with_its_last_vcm(domains: tuple[TestCloud, Consumer, Consumer]) -> None:
    cloud, acme, _ = domains
    third = cloud.enrol("initech")
    vcm = third.plug_in()["vcm"]
    ours = f"cf{cloud.cloud.record.network}d*"
    namespaces = {p.name for p in Path("/run/netns").glob(ours)}
    assert command("vcm", "delete", vcm, "--state", cloud.cloud.state, "--json").status == 0
    gone = namespaces - {p.name for p in Path("/run/netns").glob(ours)}
    assert len(gone) >= 2, gone
    assert acme.service == "on"


@pytest.mark.root
@domain
def test_nothing_of_a_domain_stays_after_down(tmp_path: Path) -> None:
    with cloud_in(tmp_path, isolation="domain", machines=1) as cloud:
        network = cloud.cloud.record.network
        cloud.enrol("acme").plug_in()
        assert list(Path("/run/netns").glob(f"cf{network}d*"))
    assert not list(Path("/run/netns").glob(f"cf{network}d*"))
