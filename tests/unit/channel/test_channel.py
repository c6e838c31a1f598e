"""Real mutual TLS on loopback: who gets in, who does not, and what they are told."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cipherfleet.channel import codec, server, tls
from cipherfleet.channel.certificates import Credentials, check_chain, identity_of, leaf
from cipherfleet.channel.client import Caller
from cipherfleet.channel.server import Call, Server
from cipherfleet.contract.errors import (
    CertificateExpired,
    CertificateInvalid,
    CertificateRevoked,
    CipherfleetError,
    Internal,
    KeyUnknown,
    KmcUnavailable,
    Malformed,
    NotPermitted,
    PeerError,
    PortTaken,
    RouteUnknown,
    TimedOut,
    TooLarge,
    Unsupported,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.kmc_api import Challenge, KmcToVcm, LeaseWanted, Revoked, Serving, VcmToKmc
from tests.pki import Authority, refused_in_handshake

KMC, M1, OPERATOR = Identity(Role.KMC, "kmc"), Identity(Role.MACHINE, "m1"), Identity(Role.OPERATOR, "operator")


class World:
    """A server with a few routes, and callers with certificates of all kinds."""

    def __init__(self) -> None:
        self.root = Authority("root")
        self.platform = self.root.subordinate("platform")
        self.now = 0.0
        self.calls = 0
        self.server = Server(self.platform.credentials(KMC), wall_clock=lambda: self.now)
        self.url = ""
        self.secret_in_error = "hunter2"
        self.received: list[Any] = []
        for path, handler in {
            "/v1/echo": self.echo,
            "/v1/large": lambda call: call.body(Challenge, limit=2 * codec.MAX_CALL_BYTES),
            "/v1/fail": self.fail,
            "/v1/crash": self.crash,
            "/v1/hang": self.hang,
            "/v1/raw": self.raw,
        }.items():
            self.server.route("POST", path, [Role.MACHINE], handler)
        self.server.route("GET", "/v1/vcms/{vcm}", [Role.MACHINE], self.show)
        self.server.route("GET", "/v1/frames", [Role.MACHINE], self.frames)

    async def echo(self, call: Call) -> Challenge:
        self.calls += 1
        return await call.body(Challenge)

    async def fail(self, call: Call) -> None:
        raise KeyUnknown("no such key", "list them")

    async def crash(self, call: Call) -> None:
        raise ValueError(self.secret_in_error)

    async def hang(self, call: Call) -> None:
        await asyncio.Event().wait()

    async def raw(self, call: Call) -> web.Response:
        return web.Response(status=418, body=b"not json")

    async def show(self, call: Call) -> Challenge:
        return Challenge(call.path("vcm", VcmId).encode(), float(call.query("n", "0")))

    async def frames(self, call: Call) -> web.StreamResponse:
        channel = await call.frames(VcmToKmc)
        try:
            async for frame in channel:
                self.received.append(frame)
                if isinstance(frame, Serving):
                    await channel.send(Revoked("because"))
        except Malformed as error:
            self.received.append(error.code)
        return channel.response

    def caller(self, credentials: Credentials | None = None, name: str = KMC.dns_name, **options: Any) -> Caller:
        return Caller(self.url, name, credentials or self.platform.credentials(M1), KmcUnavailable, **options)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    host, port = await made.server.start(("127.0.0.1", 0))
    made.url = f"https://{host}:{port}"
    yield made
    await made.server.stop()


async def code_of(caller: Caller, method: str = "POST", path: str = "/v1/echo", body: object = None) -> type[CipherfleetError]:
    async with caller:
        with pytest.raises(CipherfleetError) as caught:
            await caller.call(method, path, body, reply=Challenge)
    return type(caught.value)


CHALLENGE = Challenge(b"nonce", 1.0)


async def test_a_peer_of_the_right_role_is_served(world: World) -> None:
    async with world.caller() as caller:
        assert await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE
        shown = await caller.call("GET", "/v1/vcms/vcm-00000000000a?n=3", reply=Challenge)
        assert shown == Challenge(b"vcm-00000000000a", 3.0)


async def test_another_role_is_refused(world: World) -> None:
    assert await code_of(world.caller(world.platform.credentials(OPERATOR)), body=CHALLENGE) is NotPermitted


async def test_a_foreign_ca_fails_in_the_handshake(world: World) -> None:
    foreign = Authority("foreign").credentials(M1, trust=world.root.pem)
    assert await code_of(world.caller(foreign), body=CHALLENGE) is KmcUnavailable
    assert world.calls == 0


async def test_a_server_of_a_foreign_ca_is_refused(world: World) -> None:
    mine = world.platform.credentials(M1)
    distrusting = Credentials(mine.key, mine.chain, Authority("foreign").pem)
    assert await code_of(world.caller(distrusting), body=CHALLENGE) is CertificateInvalid


async def test_a_server_of_another_name_is_refused(world: World) -> None:
    assert await code_of(world.caller(name=M1.dns_name), body=CHALLENGE) is CertificateInvalid


async def test_an_expired_certificate_is_refused_in_the_handshake(world: World) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    expired = world.platform.credentials(M1, not_before=past)
    assert await code_of(world.caller(expired), body=CHALLENGE) is CertificateExpired  # we know it ourselves
    assert await refused_in_handshake(world.url, expired)  # and so does the server
    assert not await refused_in_handshake(world.url, world.platform.credentials(M1))
    assert world.calls == 0


async def test_a_certificate_that_expires_while_connected_is_refused(world: World) -> None:
    async with world.caller() as caller:
        await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)
        world.now = datetime.now(UTC).timestamp() + 86400
        with pytest.raises(CertificateExpired):
            await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)


async def test_revoking_closes_the_connection_and_refuses_the_next(world: World) -> None:
    credentials = world.platform.credentials(M1)
    async with world.caller(credentials) as caller:
        await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)
        hanging = asyncio.create_task(caller.call("POST", "/v1/hang", CHALLENGE, reply=Challenge))
        await asyncio.sleep(0.05)
        serial = f"{leaf(credentials.chain).serial_number:x}"
        assert world.server.revoke([serial]) == 1  # type: ignore[list-item]
        with pytest.raises(KmcUnavailable):
            await hanging
        with pytest.raises(CertificateRevoked):
            await caller.call("POST", "/v1/echo", CHALLENGE)


async def test_tls_1_2_is_refused_among_ourselves(world: World) -> None:
    context = tls.client_context(world.platform.credentials(M1), minimum=ssl.TLSVersion.TLSv1_2)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.post(world.url + "/v1/echo", ssl=context, server_hostname=KMC.dns_name)


async def test_no_certificate_no_service(world: World) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=world.root.pem.decode())
    async with aiohttp.ClientSession() as session:
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await session.post(world.url + "/v1/echo", ssl=context, server_hostname=KMC.dns_name)


async def test_errors_travel_as_themselves(world: World) -> None:
    async with world.caller() as caller:
        with pytest.raises(KeyUnknown) as caught:
            await caller.call("POST", "/v1/fail", CHALLENGE)
    assert (caught.value.message, caught.value.hint) == ("no such key", "list them")


async def test_a_defect_says_nothing_of_itself(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with world.caller() as caller:
        with pytest.raises(Internal) as caught:
            await caller.call("POST", "/v1/crash", CHALLENGE)
    assert world.secret_in_error not in caught.value.message + caplog.text
    assert "ValueError" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/v1/none", RouteUnknown),
        ("DELETE", "/v1/echo", RouteUnknown),
        ("GET", "/v1/vcms/nonsense", Malformed),
        ("GET", "/v1/frames", Unsupported),
    ],
)
async def test_wrong_paths(world: World, method: str, path: str, kind: type[CipherfleetError]) -> None:
    assert await code_of(world.caller(), method, path) is kind


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"nonce": 5}', b"\xff\xfe"])
async def test_malformed_bodies(world: World, body: bytes) -> None:
    context = tls.client_context(world.platform.credentials(M1))
    async with aiohttp.ClientSession() as session:
        request = session.post(world.url + "/v1/echo", data=body, ssl=context, server_hostname=KMC.dns_name)
        async with request as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "malformed"


def test_what_cannot_be_decoded_quotes_nothing_but_names() -> None:
    for raw in (b'{"nonce": "hunter2!", "expires_s": 1}', b'{"nonce": "aHVudGVyMg==", "expires_s": "hunter2"}', b'{"nonce": hunter2}'):
        with pytest.raises(Malformed) as refused:
            codec.decode(raw, Challenge)
        assert "hunter" not in refused.value.message
    with pytest.raises(Malformed, match="Nonsense"):
        codec.decode(b'{"type": "Nonsense"}', Serving | LeaseWanted)  # type: ignore[arg-type]


async def test_an_oversized_body_is_refused(world: World) -> None:
    fits, too_large = Challenge(b"x" * (codec.MAX_CALL_BYTES // 2), 0.0), Challenge(b"x" * codec.MAX_CALL_BYTES, 0.0)
    async with world.caller() as caller:
        assert await caller.call("POST", "/v1/echo", fits, reply=Challenge) == fits
        assert await caller.call("POST", "/v1/large", too_large, reply=Challenge) == too_large
    assert await code_of(world.caller(), body=too_large) is TooLarge
    assert await code_of(world.caller(), path="/v1/large", body=Challenge(b"x" * 2 * codec.MAX_CALL_BYTES, 0.0)) is TooLarge
    with pytest.raises(TooLarge):
        codec.decode(b"x" * 11, Challenge, limit=10)


async def test_a_body_that_does_not_come_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_TIMEOUT_S", 0.1)

    async def stalls() -> AsyncIterator[bytes]:
        yield b'{"nonce": "'
        await answered.wait()

    answered = asyncio.Event()
    context = tls.client_context(world.platform.credentials(M1))
    async with aiohttp.ClientSession() as session, asyncio.timeout(20):
        request = session.post(world.url + "/v1/echo", data=stalls(), ssl=context, server_hostname=KMC.dns_name)
        async with request as response:
            assert response.status == 504
            assert (await response.json())["error"]["code"] == "timed-out"
        answered.set()


async def test_an_oversized_frame_ends_its_channel(world: World) -> None:
    async with world.caller() as caller, caller.frames("/v1/frames", KmcToVcm) as channel:
        await channel.send(LeaseWanted("card-m1-00000000", b"n" * codec.MAX_CALL_BYTES))  # type: ignore[arg-type]
        assert [frame async for frame in channel] == []
    assert world.received == []


async def test_a_peer_that_is_not_there(world: World) -> None:
    await world.server.stop()
    assert await code_of(world.caller(), body=CHALLENGE) is KmcUnavailable


async def test_a_peer_that_does_not_answer(world: World) -> None:
    assert await code_of(world.caller(timeout=0.2), path="/v1/hang", body=CHALLENGE) is TimedOut


async def test_a_reply_without_a_reason(world: World) -> None:
    assert await code_of(world.caller(), path="/v1/raw", body=CHALLENGE) is PeerError


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_nobody_sends_us_elsewhere(world: World, scheme: str) -> None:
    reached: list[str] = []

    def reach(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(scheme)
        writer.transport.abort()

    elsewhere = await asyncio.start_server(reach, "127.0.0.1", 0)
    port = elsewhere.sockets[0].getsockname()[1]

    async def away(call: Call) -> web.Response:
        return web.Response(status=307, headers={"Location": f"{scheme}://127.0.0.1:{port}/v1/echo"})

    other = Server(world.platform.credentials(KMC))
    for method in ("GET", "POST"):
        other.route(method, "/v1/away", [Role.MACHINE], away)
    async with elsewhere:
        host, own_port = await other.start(("127.0.0.1", 0))
        world.url = f"https://{host}:{own_port}"
        assert await code_of(world.caller(), path="/v1/away", body=CHALLENGE) is PeerError
        async with world.caller() as caller:
            with pytest.raises(PeerError):
                async with caller.frames("/v1/away", KmcToVcm):
                    pass
        await other.stop()
    assert reached == []


async def test_a_taken_port_is_said(world: World) -> None:
    port = int(world.url.rsplit(":", 1)[1])
    with pytest.raises(PortTaken):
        await Server(world.platform.credentials(KMC)).start(("127.0.0.1", port))


async def test_a_renewed_certificate_is_shown(world: World) -> None:
    renewed = world.platform.credentials(Identity(Role.KMC, "second"))
    world.server.renew(renewed)
    async with world.caller(name=Identity(Role.KMC, "second").dns_name) as caller:
        caller.renew(world.platform.credentials(M1))
        assert await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE


async def test_frames_travel_both_ways_and_end(world: World) -> None:
    async with world.caller() as caller, caller.frames("/v1/frames", KmcToVcm) as channel:
        await channel.send(LeaseWanted("card-m1-00000000", b"n" * 16))  # type: ignore[arg-type]
        await channel.send(Serving())
        async for frame in channel:
            assert frame == Revoked("because")
            await channel.close()
    assert world.received == [LeaseWanted("card-m1-00000000", b"n" * 16), Serving()]  # type: ignore[arg-type]


async def test_a_malformed_frame_is_refused(world: World) -> None:
    async with world.caller() as caller, caller.frames("/v1/frames", KmcToVcm) as channel:
        await channel.socket.send_bytes(b'{"type": "Nonsense"}')
        assert [frame async for frame in channel] == []
    assert world.received == ["malformed"]


async def test_sending_to_nobody_is_an_error(world: World) -> None:
    async with world.caller() as caller, caller.frames("/v1/frames", KmcToVcm) as channel:
        await channel.close()
        with pytest.raises(ConnectionError):
            await channel.send(Serving())


def test_credentials_survive_the_disk_and_hide_their_key(tmp_path: Path) -> None:
    credentials = Authority("root").credentials(M1)
    credentials.save(tmp_path / "c")
    assert Credentials.load(tmp_path / "c") == credentials
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "c").iterdir()} == {0o600}
    assert credentials.identity == M1
    assert "PRIVATE" not in repr(credentials)


def test_chains_outside_a_handshake() -> None:
    root = Authority("root")
    middle = root.subordinate("platform")
    chain = middle.credentials(M1).chain
    assert identity_of(check_chain(chain, root.pem)) == M1
    assert identity_of(check_chain(chain, middle.pem)) == M1
    with pytest.raises(CertificateInvalid):
        check_chain(chain, Authority("root").pem)  # same name, another key
    with pytest.raises(CertificateInvalid):
        check_chain(chain, Authority("other").pem)
    with pytest.raises(CertificateExpired):
        check_chain(chain, root.pem, now=datetime.now(UTC).timestamp() + 7200)
    with pytest.raises(CertificateInvalid):
        check_chain(b"nonsense", root.pem)
    leaf_as_ca = root.credentials(M1)
    with pytest.raises(CertificateInvalid):
        check_chain(chain[: chain.index(b"-----END") + 26] + leaf_as_ca.chain, root.pem)


def test_a_certificate_names_one_identity() -> None:
    root = Authority("root")
    with pytest.raises(CertificateInvalid):
        identity_of(root.certificate)
    with pytest.raises(CertificateInvalid):
        root.credentials(M1, addresses=("not an address",))


def test_consumers_do_not_trust_each_other() -> None:
    root = Authority("root")
    acme, globex = root.subordinate("acme domain"), root.subordinate("globex domain")
    chain = globex.credentials(Identity(Role.APPLICATION, "spy", ConsumerId("globex"))).chain
    with pytest.raises(CertificateInvalid):
        check_chain(chain, acme.pem)
