"""The routes: who may call what, what bad input gets, what the operator sees."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cipherfleet.channel import tls
from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import (
    CipherfleetError,
    ConsumerUnknown,
    IsolationUnavailable,
    Malformed,
    ManagementUnavailable,
    NotPermitted,
    PortTaken,
    StateConflict,
    Unsupported,
    VcmUnknown,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import (
    DomainInfo,
    FlowFailed,
    MachineRegistration,
    MigrateRequest,
    ServiceOffSeen,
    VcmCreateRequest,
    VcmDetail,
)
from cipherfleet.management.process import ManagementConfig, main
from tests.pki import Authority
from tests.unit.management.world import (
    ACME,
    BOLT,
    DOMAINS,
    MANAGEMENT,
    OPERATOR,
    PLATFORM,
    SETTINGS,
    TERMINALS,
    World,
    until,
)

VCM = "vcm-0123456789ab"
ROUTES: dict[tuple[str, str], set[Role]] = {
    ("GET", "/v1/status"): {Role.OPERATOR},
    ("PUT", "/v1/machines/m1"): {Role.OPERATOR},
    ("PUT", "/v1/consumers/acme"): {Role.OPERATOR},
    ("DELETE", "/v1/consumers/acme"): {Role.OPERATOR},
    ("GET", "/v1/vcms"): {Role.OPERATOR},
    ("GET", f"/v1/vcms/{VCM}"): {Role.OPERATOR},
    ("POST", "/v1/vcms"): {Role.OPERATOR},
    ("DELETE", f"/v1/vcms/{VCM}"): {Role.OPERATOR},
    ("POST", f"/v1/vcms/{VCM}/migrate"): {Role.OPERATOR},
    ("GET", "/v1/terminal"): {Role.TERMINAL},
    ("GET", "/v1/domain"): {Role.TERMINAL, Role.APPLICATION},
}


def caller(world: World, role: Role) -> Caller:
    platform = {Role.OPERATOR, Role.KMC, Role.MANAGEMENT, Role.MACHINE, Role.CARD}
    if role in platform:
        credentials = PLATFORM.credentials(Identity(role, "m1"))
    else:
        credentials = DOMAINS[ACME].credentials(Identity(role, "someone", ACME))
    return Caller(world.url, MANAGEMENT.identity.dns_name, credentials, ManagementUnavailable)


async def test_each_route_is_for_its_roles_alone(world: World) -> None:
    for role in Role:
        async with caller(world, role) as peer:
            for (method, path), allowed in ROUTES.items():
                try:
                    await peer.call(method, path)
                except CipherfleetError as exc:
                    refused = isinstance(exc, NotPermitted)
                else:
                    refused = False
                assert refused == (role not in allowed), (role, method, path)


async def test_a_stranger_fails_in_the_handshake(world: World) -> None:

    strangers = Authority("root").subordinate("platform").credentials(Identity(Role.OPERATOR, "operator"), trust=OPERATOR.trust)
    async with Caller(world.url, MANAGEMENT.identity.dns_name, strangers, ManagementUnavailable) as stranger:
        with pytest.raises(CipherfleetError) as caught:
            await stranger.call("GET", "/v1/status")
    assert caught.value.code in ("certificate-invalid", "management-unavailable")


@pytest.mark.parametrize(
    ("method", "path", "body", "error"),
    [
        ("PUT", "/v1/machines/x1", MachineRegistration("https://a"), Malformed),
        ("PUT", "/v1/machines/m3", MachineRegistration("http://a"), Malformed),
        ("PUT", "/v1/machines/m3", MachineRegistration("https://" + "a" * 300), Malformed),
        ("PUT", "/v1/machines/m3", None, Malformed),
        ("PUT", "/v1/consumers/UPPER", None, Malformed),
        ("GET", "/v1/vcms/vcm-1", None, Malformed),
        ("GET", "/v1/vcms?all=yes", None, Malformed),
        ("GET", f"/v1/vcms/{VCM}", None, VcmUnknown),
        ("DELETE", f"/v1/vcms/{VCM}", None, VcmUnknown),
        ("DELETE", f"/v1/vcms/{VCM}?force=1", None, VcmUnknown),
        ("DELETE", f"/v1/vcms/{VCM}?force=2", None, Malformed),
        ("POST", f"/v1/vcms/{VCM}/migrate", MigrateRequest(), VcmUnknown),
        ("POST", "/v1/vcms", VcmCreateRequest(ConsumerId("nobody")), ConsumerUnknown),
        ("POST", "/v1/vcms", {"consumer": "../../etc"}, Malformed),
        ("GET", "/v1/terminal", None, NotPermitted),
    ],
)
async def test_bad_input_gets_its_error(world: World, method: str, path: str, body: Any, error: type[CipherfleetError]) -> None:
    with pytest.raises(error):
        await world.operator.call(method, path, body)


async def test_a_terminal_must_speak_frames(world: World) -> None:
    async with caller(world, Role.TERMINAL) as terminal:
        with pytest.raises(Unsupported):
            await terminal.call("GET", "/v1/terminal")


async def test_a_consumer_without_a_domain_has_no_channel(world: World) -> None:
    await world.operator.call("DELETE", f"/v1/consumers/{ACME}")
    with pytest.raises((ConsumerUnknown, ManagementUnavailable)):
        await world.terminal().plug_in()


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"type":"Nothing"}', b'{"type":"LoggedIn","vcm":"../x"}', b"\xff\xfe", b"[" * 5000])
async def test_a_malformed_frame_ends_the_channel_with_its_error(world: World, raw: bytes) -> None:
    heard = []
    async with aiohttp.ClientSession() as session:
        context = tls.client_context(TERMINALS[ACME])
        name = MANAGEMENT.identity.dns_name
        async with session.ws_connect(world.url + "/v1/terminal", ssl=context, server_hostname=name) as socket:
            await socket.send_bytes(raw)
            async with asyncio.timeout(20):
                heard = [message.data async for message in socket]
    assert len(heard) == 1
    assert b'"malformed"' in heard[0]
    assert (await world.status()).vcms == ()


async def test_a_frame_out_of_turn_has_no_effect(world: World) -> None:
    terminal, vcm = await world.serving()
    assert terminal.frames is not None
    await terminal.frames.send(ServiceOffSeen(vcm))
    assert (await world.detail(vcm)).vcm.state is VcmState.SERVING
    created = await world.operator.call("POST", "/v1/vcms", VcmCreateRequest(ACME), reply=VcmDetail)
    assert created.vcm.state is VcmState.SERVING
    assert not [f for f in terminal.heard if isinstance(f, FlowFailed)]


async def test_a_consumer_sees_its_own_domain_alone_with_serving_endpoints_first(world: World) -> None:
    _, first = await world.serving(ACME)
    second = (await world.operator.call("POST", "/v1/vcms", VcmCreateRequest(ACME), reply=VcmDetail)).vcm
    await world.operator.call("DELETE", f"/v1/vcms/{first}", reply=VcmDetail)
    async with caller(world, Role.APPLICATION) as application:
        mine = await application.call("GET", "/v1/domain", reply=DomainInfo)
    assert (mine.consumer, mine.subnet) == (ACME, "127.99.2.0/24")
    assert mine.endpoints[0] == second.endpoint == "https://127.99.2.11:8443"
    assert sorted(mine.endpoints) == [f"https://127.99.2.{slot}:8443" for slot in range(10, 18)]
    credentials = TERMINALS[BOLT]
    async with Caller(world.url, MANAGEMENT.identity.dns_name, credentials, ManagementUnavailable) as other:
        theirs = await other.call("GET", "/v1/domain", reply=DomainInfo)
    assert (theirs.consumer, theirs.subnet) == (BOLT, "127.99.3.0/24")


async def test_the_status_tells_consumers_machines_and_vcms(world: World) -> None:
    _, vcm = await world.serving()

    async def seen() -> bool:
        return any(v.pid == 4242 for v in (await world.status()).vcms)

    await until(seen)
    status = await world.status()
    assert [(c.name, c.service, c.lease_s) for c in status.consumers] == [(ACME, "on", SETTINGS.lease_s), (BOLT, "off", 0.0)]
    assert [(m.id, m.state, m.capacity) for m in status.machines] == [("m1", "up", 8), ("m2", "up", 8)]
    (entry,) = status.vcms
    assert (entry.id, entry.consumer, entry.state, entry.isolation, entry.operations, entry.bytes) == (
        vcm, ACME, VcmState.SERVING, "process", 7, 70,
    )  # fmt: skip
    detail = await world.detail(vcm)
    assert detail.isolation is not None
    assert detail.isolation.launcher == "none"


async def test_the_history_keeps_the_isolation_that_was_in_force(world: World) -> None:
    _, vcm = await world.serving()
    await world.operator.call("DELETE", f"/v1/vcms/{vcm}", reply=VcmDetail)
    detail = await world.detail(vcm)
    assert detail.isolation is not None
    assert (detail.vcm.pid, detail.vcm.endpoint) == (0, "https://127.99.2.10:8443")


async def test_a_consumer_with_a_vcm_is_not_removed(world: World) -> None:
    terminal, _ = await world.serving()
    with pytest.raises(StateConflict):
        await world.operator.call("DELETE", f"/v1/consumers/{ACME}")
    await terminal.pull()
    await world.clean()
    before = await world.operator.call("PUT", f"/v1/consumers/{ACME}", reply=DomainInfo)
    await world.operator.call("DELETE", f"/v1/consumers/{ACME}")
    assert [c.name for c in (await world.status()).consumers] == [BOLT]
    assert (await world.vcms(everything=True)).vcms != ()
    assert await world.operator.call("PUT", f"/v1/consumers/{ACME}", reply=DomainInfo) == before


async def start(world: World, state: Path, address: str = "127.0.0.1:0", isolation: str = "process") -> None:
    """Start and stop another platform."""
    stop = asyncio.Event()
    stop.set()
    await main(ManagementConfig(str(state), address, MANAGEMENT, world.kmc.url, isolation, 99, SETTINGS), lambda info: None, stop)


async def test_a_start_that_cannot_be_says_why(world: World, tmp_path: Path) -> None:
    taken = world.url.removeprefix("https://")
    with pytest.raises(PortTaken):
        await start(world, tmp_path / "other", address=taken)
    with pytest.raises(IsolationUnavailable):
        await start(world, tmp_path / "other", isolation="magic")
    with pytest.raises(Malformed):
        await start(world, tmp_path / "other", address="nowhere")
    await start(world, tmp_path / "other")


def test_a_configuration_shows_no_key() -> None:
    config = ManagementConfig("/s", "127.0.0.1:1", MANAGEMENT, "https://k", "process", 99)
    assert "PRIVATE" not in repr(config)
