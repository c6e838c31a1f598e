"""Connections that cost a server a descriptor and say nothing: they are cut off, and hinder nobody meanwhile."""

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import pytest

from cipherfleet.channel import tls
from cipherfleet.channel.client import Caller
from cipherfleet.channel.process import raise_file_limit
from cipherfleet.channel.server import Call, Server
from cipherfleet.contract.errors import KmcUnavailable
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.kmc_api import Challenge, KmcToVcm, Revoked, Serving, VcmToKmc
from tests.pki import Authority

KMC, M1 = Identity(Role.KMC, "kmc"), Identity(Role.MACHINE, "m1")
SHORT_S, LONG_S = 0.3, 30.0
CHALLENGE = Challenge(b"nonce", 1.0)


class World:
    """Servers with an echo, and who calls them."""

    def __init__(self) -> None:
        self.platform = Authority("root").subordinate("platform")
        self.address = ("", 0)
        self.server = self.make()

    def make(self, handshake: float = LONG_S, header: float = LONG_S, connections: int = 100) -> Server:
        server = Server(self.platform.credentials(KMC), handshake_timeout=handshake, header_timeout=header, max_connections=connections)
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

    async def open(self, *, handshake: bool = True) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not handshake:
            return await asyncio.open_connection(*self.address)
        context = tls.client_context(self.platform.credentials(M1))
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
        async with asyncio.timeout(5):
            while True:
                with suppress(KmcUnavailable):
                    assert await third.call("POST", "/v1/echo", CHALLENGE, reply=Challenge) == CHALLENGE
                    break


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
