"""A VCM in a security domain of its own: the terminal logs in from the domain's network namespace."""

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from cipherfleet.channel.server import Server
from cipherfleet.contract.errors import Malformed, ServiceOff
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import VcmId
from cipherfleet.contract.kmc_api import CmkReleased
from cipherfleet.contract.management_api import Inserted, LoggedIn, LoginFailed, LoginPermit
from cipherfleet.terminal.callers import _socket_in, vcm_caller
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.unit.terminal.platform import ACME, PIN, Platform
from tests.unit.terminal.running import Running

VCM = VcmId("vcm-0123456789ab")


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"cf{os.getpid() % 1000}d999a"
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        pytest.skip("needs root to make a network namespace")
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.root
async def test_the_login_goes_through_the_namespace(enrolled: Platform, terminal: Running, namespace: str) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    vcm = await enrolled.vcm()
    inside = _socket_in(namespace, (socket.AF_INET, socket.SOCK_STREAM, 0))
    inside.bind(("127.0.0.1", 0))
    server = Server(enrolled.kmc.domain(ACME).credentials(Identity(Role.VCM, vcm.id, ACME), trust=enrolled.kmc.domain(ACME).pem))
    server.route("POST", "/v1/login", [Role.TERMINAL], vcm._login)
    host, port = await server.start(inside)
    try:
        await enrolled.management.line.say(LoginPermit(vcm.id, f"https://{host}:{port}", vcm.mark, namespace))
        await enrolled.signal(vcm)
        vcm.share = vcm.card.open((await enrolled.kmc.line.hears(CmkReleased)).sealed_ukey_share, vcm.id).ukey_share
        vcm.serving = True
        assert (await enrolled.management.line.hears(LoggedIn)).vcm == vcm.id
        with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:  # positive control: nobody listens there outside
            async with vcm_caller(ukey, vcm.id, f"https://{host}:{port}") as outside:
                with pytest.raises(ServiceOff):
                    await outside.call("POST", "/v1/login")
    finally:
        await server.stop()


async def test_a_namespace_that_is_not_there(enrolled: Platform, terminal: Running) -> None:
    await enrolled.management.line.hears(Inserted)
    await enrolled.identify()
    await enrolled.management.line.say(LoginPermit(VCM, "https://127.0.0.1:1", os.urandom(32), "cf0d0a"))
    assert (await enrolled.management.line.hears(LoginFailed)).code == "timed-out"


@pytest.mark.parametrize("name", ["../../tmp/x", "cf1d1", "cf1d1v1", "host", "cf1d1a/", "cf1d1a\n"])
async def test_no_other_namespace_is_entered(enrolled: Platform, name: str) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey, pytest.raises(Malformed):
        vcm_caller(ukey, VCM, "https://127.0.0.1:1", name)
