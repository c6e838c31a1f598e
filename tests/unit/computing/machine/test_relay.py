"""The relay: bytes, many connections, a KMC that is gone."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from cipherfleet.computing.relay import MAX_CONNECTIONS, SOCKET_NAME, Relay


@asynccontextmanager
async def echo() -> AsyncIterator[tuple[tuple[str, int], list[asyncio.StreamWriter]]]:
    """Answers with what it got, until the other side has no more to say."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname(), writers
    server.close()
    for writer in writers:
        writer.transport.abort()


async def say(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


async def test_bytes_go_both_ways_whole_for_many_at_once(tmp_path: Path) -> None:
    async with echo() as (address, _):
        relay = Relay(tmp_path / "relay", address)
        await relay.start()
        messages = [secrets.token_bytes(1 + 100_000 * i) for i in range(16)]
        answers = await asyncio.gather(*(say(tmp_path / "relay" / SOCKET_NAME, m) for m in messages))
        assert answers == messages
        assert relay.connections == 0
        await relay.close()


async def test_only_its_owner_may_enter_its_folder(tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay", ("127.0.0.1", 1))
    await relay.start()
    assert (tmp_path / "relay").stat().st_mode & 0o777 == 0o700
    await relay.close()


async def test_a_path_too_long_for_a_sockets_address_serves(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 60) / ("y" * 60)
    folder.mkdir(parents=True)
    async with echo() as (address, _):
        relay = Relay(folder / "relay", address)
        await relay.start()
        short = tmp_path / "short"
        short.symlink_to(folder / "relay")
        assert await say(short / SOCKET_NAME, b"hello") == b"hello"
        await relay.close()


async def test_when_the_kmc_is_gone_the_connection_ends_and_the_next_one_may_succeed(tmp_path: Path) -> None:
    async with echo() as (address, _):
        pass
    relay = Relay(tmp_path / "relay", address)
    await relay.start()
    with suppress(ConnectionError):
        assert await say(tmp_path / "relay" / SOCKET_NAME, b"hello") == b""
    server = await asyncio.start_server(lambda r, w: w.close(), *address)
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "relay" / SOCKET_NAME))
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    server.close()
    await relay.close()


async def test_one_vcm_cannot_use_up_the_machines_connections(tmp_path: Path) -> None:
    async with echo() as (address, _):
        relay = Relay(tmp_path / "relay", address)
        await relay.start()
        path = str(tmp_path / "relay" / SOCKET_NAME)
        held = [await asyncio.open_unix_connection(path) for _ in range(MAX_CONNECTIONS)]
        for _, writer in held:
            writer.write(b"x")
        for reader, _ in held:
            assert await reader.readexactly(1) == b"x"
        reader, writer = await asyncio.open_unix_connection(path)
        with pytest.raises(ConnectionError):
            writer.write(b"x")
            assert await asyncio.wait_for(reader.read(), 5) == b""
            raise ConnectionResetError
        for _, other in held:
            other.close()
        writer.close()
        await relay.close()


async def test_closing_cuts_what_is_open_and_refuses_what_comes(tmp_path: Path) -> None:
    async with echo() as (address, _):
        relay = Relay(tmp_path / "relay", address)
        await relay.start()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "relay" / SOCKET_NAME))
        writer.write(b"x")
        await reader.readexactly(1)
        await relay.close()
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        with pytest.raises(OSError, match=r".+"):
            await asyncio.open_unix_connection(str(tmp_path / "relay" / SOCKET_NAME))
        await relay.close()
