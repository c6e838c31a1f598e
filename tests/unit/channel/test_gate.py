"""Connections that cost a server a descriptor and say nothing: they are cut off, and hinder nobody meanwhile."""

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import pytest

from cipherfleet.channel import client, tls
from cipherfleet.channel.certificates import Credentials, leaf, serial_of
from cipherfleet.channel.client import Caller
from cipherfleet.channel.gate import KEEPALIVE_TIMEOUT_S, MAX_PER_CERTIFICATE
from cipherfleet.channel.process import raise_file_limit
from cipherfleet.channel.server import Call, Server
from cipherfleet.computing import vcm_process
from cipherfleet.contract.errors import KmcUnavailable
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.kmc_api import Challenge, KmcToVcm, Revoked, Serving, VcmToKmc
from cipherfleet.services.middleware import connection
from tests.pki import Authority

KMC, M1 = Identity(Role.KMC, "kmc"), Identity(Role.MACHINE, "m1")
SHORT_S, LONG_S = 0.3, 30.0
CHALLENGE = Challenge(b"nonce", 1.0)
GET = b"GET %s HTTP/1.1\r\nHost: kmc\r\n\r\n"


class World:
    """Servers with an echo, and who calls them."""

    def __init__(self) -> None:
        self.platform = Authority("root").subordinate("platform")
        self.address = ("", 0)
        self.server = self.make()

    def make(
        self, handshake: float = LONG_S, header: float = LONG_S, keepalive: float = LONG_S, connections: int = 100, each: int = 100
    ) -> Server:
        server = Server(
            self.platform.credentials(KMC),
            handshake_timeout=handshake,
            header_timeout=header,
            keepalive_timeout=keepalive,
            max_connections=connections,
            max_per_certificate=each,
        )
        server.route("POST", "/v1/echo", [Role.MACHINE], lambda call: call.body(Challenge))
        server.route("POST", "/v1/slow", [Role.MACHINE], self.slow)
        server.route("GET", "/v1/frames", [Role.MACHINE], self.frames)
        return server

    async def slow(self, call: Call) -> Challenge:
        await asyncio.sleep(2 * SHORT_S)
        return await call.body(Challenge)

    async def frames(self, call: Call) -> object:
        channel = await call.frames(VcmToKmc)
        async for _ in channel:
            await channel.send(Revoked("because"))
        return channel.response

    async def start(self, **options: float) -> None:
        self.server = self.make(**options)  # type: ignore[arg-type]
        self.address = await self.server.start(("127.0.0.1", 0))

    def caller(self) -> Caller:
        return Caller(f"https://127.0.0.1:{self.address[1]}", KMC.dns_name, self.platform.credentials(M1), KmcUnavailable)

    async def open(
        self, *, handshake: bool = True, credentials: Credentials | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not handshake:
            return await asyncio.open_connection(*self.address)
        context = tls.client_context(credentials or self.platform.credentials(M1))
        return await asyncio.open_connection(*self.address, ssl=context, server_hostname=KMC.dns_name)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.server.stop()


async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, within: float = 7.0) -> None:
    """Wait until the server has hung up. Raises ``TimeoutError``."""
    async with asyncio.timeout(within):
        with suppress(ConnectionError):
            assert await reader.read() == b""
    writer.transport.abort()


async def test_who_does_not_finish_the_handshake_is_cut_off_while_others_are_served(world: World) -> None:
    await world.start(handshake=SHORT_S)
    silent, half = await world.open(handshake=False), await world.open(handshake=False)
    half[1].write(b"\x16\x03\x01\x02\x00\x01")
    async with world.caller() as caller:
        assert await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE
    await cut_off(*silent)
    await cut_off(*half)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/echo HTTP/1.1\r\n", b"POST /v1/echo HTTP/1.1\r\nHost: kmc\r\nContent-Le"])
async def test_who_sends_no_whole_header_is_cut_off_while_others_are_served(world: World, sent: bytes) -> None:
    await world.start(header=SHORT_S)
    reader, writer = await world.open()
    writer.write(sent)
    async with world.caller() as caller:
        assert await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE
    await cut_off(reader, writer)


async def test_who_has_asked_is_not_cut_off(world: World) -> None:
    await world.start(header=SHORT_S)
    async with world.caller() as caller, caller.frames("/v1/frames", KmcToVcm) as channel:
        assert await caller.call("POST", "/v1/slow", CHALLENGE, reply=Challenge) == CHALLENGE
        await asyncio.sleep(2 * SHORT_S)
        await channel.send(Serving())
        async for frame in channel:
            assert frame == Revoked("because")
            break
        assert await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE


async def test_there_is_a_number_of_connections(world: World) -> None:
    await world.start(connections=2)
    async with AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(world.caller()) for _ in range(3)]
        for caller in (first, second):
            await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)
        with pytest.raises(KmcUnavailable):
            await third.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)
        await first.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)
        world.server.close_connections()
        async with asyncio.timeout(20):
            while True:
                with suppress(KmcUnavailable):
                    assert await third.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE
                    break


async def test_a_certificate_has_a_number_of_connections(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The silent count as well, and others are not hindered."""
    await world.start(each=2)
    greedy = world.platform.credentials(M1)
    held = [await world.open(credentials=greedy) for _ in range(2)]
    for _ in range(2):
        await cut_off(*await world.open(credentials=greedy))
    async with world.caller() as caller:  # the same machine with its next certificate
        assert await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE
    assert caplog.text.count("are refused") == 1
    for _, writer in held:
        writer.transport.abort()
    async with asyncio.timeout(20):
        answer = b""
        while not answer:
            reader, writer = await world.open(credentials=greedy)
            writer.write(GET % b"/v1/none")
            with suppress(ConnectionError):
                answer = await reader.read(12)
            writer.transport.abort()
    assert answer == b"HTTP/1.1 404"


@pytest.mark.parametrize(("path", "role"), [("/v1/frames", Role.OPERATOR), ("/v1/none", Role.MACHINE), ("/v1/frames", Role.MACHINE)])
async def test_who_was_refused_at_the_door_keeps_no_connection(world: World, path: str, role: Role) -> None:
    await world.start()
    credentials = world.platform.credentials(Identity(role, "one"))
    if (path, role) == ("/v1/frames", Role.MACHINE):
        world.server.revoke([serial_of(leaf(credentials.chain))])
    reader, writer = await world.open(credentials=credentials)
    writer.write(GET % path.encode())
    async with asyncio.timeout(20):  # there are 30 s between two requests
        assert b"Connection: close" in await reader.read()
    writer.transport.abort()


async def test_who_asks_nothing_more_is_cut_off(world: World) -> None:
    await world.start(keepalive=SHORT_S)
    reader, writer = await world.open()
    writer.write(GET % b"/v1/frames")  # is no WebSocket
    async with asyncio.timeout(20):
        assert b'"unsupported"' in await reader.readuntil(b"}}")
    writer.write(b"GET /v1/fra")  # half a header is nothing
    await cut_off(reader, writer)


def test_the_caller_gives_up_a_kept_connection_first() -> None:
    """A call must not meet a connection that the server is closing: one that changes something could not be repeated."""
    assert client.KEEP_S < KEEPALIVE_TIMEOUT_S
    assert connection.KEEP_S < vcm_process.KEEPALIVE_TIMEOUT_S
    assert client.MAX_CONNECTIONS < MAX_PER_CERTIFICATE


async def test_a_caller_waits_rather_than_asks_for_too_many(world: World) -> None:
    await world.start(each=client.MAX_CONNECTIONS)
    async with world.caller() as caller:
        calls = (caller.call("POST", "/v1/slow", CHALLENGE, reply=Challenge) for _ in range(client.MAX_CONNECTIONS + 1))
        assert await asyncio.gather(*calls) == [CHALLENGE] * (client.MAX_CONNECTIONS + 1)


async def test_stopping_does_not_wait_for_the_silent(world: World) -> None:
    await world.start()
    reader, writer = await world.open()
    writer.write(b"POST")
    async with world.caller() as caller:
        await caller.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)
    await world.server.stop()
    await cut_off(reader, writer, within=2)


async def test_open_connections_go_on_when_nobody_else_is_let_in(world: World) -> None:
    await world.start()
    async with world.caller() as inside, world.caller() as outside:
        await inside.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)
        world.server.stop_listening()
        world.server.stop_listening()
        assert await inside.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE
        with pytest.raises(KmcUnavailable):
            await outside.call("POST", "/v1/echo", CHALLENGE, reply=Challenge)


async def test_some_descriptors_are_left_for_the_rest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    await world.start()
    assert world.server._gate is not None
    assert world.server._gate._max_connections == 30


def test_a_process_takes_the_descriptors_that_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 5000))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, value: taken.append((kind, value)))
    raise_file_limit()
    assert taken == [(resource.RLIMIT_NOFILE, (5000, 5000))]
