"""The HSM's socket: what a hostile, a hasty and a foreign client get, and a client whose HSM goes and comes back."""

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cipherfleet.channel.certificates import public_key_der
from cipherfleet.contract.errors import (
    CmkInvalid,
    Exists,
    HsmUnavailable,
    KeyUnknown,
    LoginRefused,
    PinWrong,
    StateNotWritable,
    TooLarge,
    Truncated,
)
from cipherfleet.kmc import hsm_server, hsm_wire
from cipherfleet.kmc.embedded_hsm import EmbeddedHsm
from cipherfleet.kmc.hsm import KeyHandle, Label, Mechanism
from cipherfleet.kmc.hsm_client import HsmClient
from cipherfleet.kmc.hsm_server import HsmServer
from tests.unit.kmc.world import FAST, OAEP, PASSPHRASE, PIN, transport_key

CA, ROOT = Label("root-ca"), Label("root-key")


@pytest.fixture
def hsm(tmp_path: Path) -> EmbeddedHsm:
    return EmbeddedHsm.open(tmp_path / "state", PASSPHRASE, FAST)


@pytest.fixture
async def path(hsm: EmbeddedHsm, tmp_path: Path) -> AsyncIterator[Path]:
    """A long one: the kernel's socket addresses are shorter than paths may be."""
    path = tmp_path / ("long-" * 20) / "hsm.sock"
    server = HsmServer(hsm, path, PIN)
    await server.start()
    yield path
    await server.stop()
    assert not path.exists()


@pytest.fixture
async def client(path: Path) -> AsyncIterator[HsmClient]:
    client = HsmClient(path, PIN)
    yield client
    await client.close()


async def exchange(path: Path, *raw: bytes, end: bool = False, login: bool = True) -> list[dict[str, object]]:
    """Send bytes as they are, after a login; the replies to them until the HSM hangs up or has answered each."""
    raw = (LOGIN, *raw) if login else raw
    with hsm_wire.reachable(path) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    try:
        replies = []
        for part in raw:
            writer.write(part)
        if end:
            writer.write_eof()
        async with asyncio.timeout(20):
            while head := await reader.read(4):
                replies.append(json.loads(await reader.readexactly(struct.unpack(">I", head)[0])))
                if not end and len(replies) == len(raw):
                    break
        return replies[login:]
    finally:
        writer.close()
        await writer.wait_closed()


def framed(content: object) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack(">I", len(raw)) + raw


LOGIN = framed({"op": "Login", "pin": PIN})


async def test_the_whole_port(client: HsmClient, hsm: EmbeddedHsm) -> None:
    assert await client.mechanisms() == frozenset(Mechanism)
    assert await client.find(CA) is None
    pair, wrap = await client.generate_key_pair(CA), await client.generate_wrap_key(ROOT)
    assert await client.find(CA) == pair
    assert await client.public_key(pair) == await hsm.public_key(pair)
    assert await client.sign(pair, b"data")
    wrapped = await client.generate_wrapped(wrap)
    rewrapped = await client.rewrap(wrap, wrapped, public_key_der(transport_key().public_key()))
    assert len(transport_key().decrypt(rewrapped, OAEP)) == 32
    await client.destroy(pair)
    assert await client.find(CA) is None


async def test_errors_come_through(client: HsmClient) -> None:
    wrap = await client.generate_wrap_key(ROOT)
    with pytest.raises(Exists):
        await client.generate_wrap_key(ROOT)
    with pytest.raises(KeyUnknown):
        await client.sign(wrap, b"")
    with pytest.raises(CmkInvalid):
        await client.rewrap(wrap, bytes(40), public_key_der(transport_key().public_key()))
    with pytest.raises(TooLarge):
        await client.sign(wrap, bytes(64 * 1024))
    assert await client.find(ROOT) == wrap


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "malformed"),
        (b"\xff\xfe garbage", "malformed"),
        (b"[" * 60_000, "malformed"),
        ({"op": "Format"}, "malformed"),
        ({"op": "Find"}, "malformed"),
        ({"op": "Login", "pin": PIN}, "out-of-order"),
        ({"op": "Find", "label": "UPPER"}, "malformed"),
        ({"op": "Find", "label": "a" * 64}, "malformed"),
        ({"op": "Find", "label": "root-ca", "more": 1}, "malformed"),
        ({"op": "Sign", "handle": "short", "data": ""}, "malformed"),
        ({"op": "Sign", "handle": "0" * 32, "data": "not base64!"}, "malformed"),
        ({"op": "Sign", "handle": "0" * 32, "data": ""}, "key-unknown"),
        ({"op": "PublicKey", "handle": "0" * 32}, "key-unknown"),
        ({"op": "GenerateWrapped", "handle": "0" * 32}, "key-unknown"),
        ({"op": "Rewrap", "handle": "0" * 32, "wrapped": "", "recipient": ""}, "key-unknown"),
    ],
)
async def test_hostile_requests(path: Path, content: object, code: str) -> None:
    replies = await exchange(path, framed(content), framed({"op": "Mechanisms"}))
    assert [reply["code"] for reply in replies] == [code, ""]


async def test_a_huge_message_ends_the_connection(path: Path) -> None:
    replies = await exchange(path, struct.pack(">I", 2**32 - 1), end=True)
    assert [reply["code"] for reply in replies] == [TooLarge.code]


@pytest.mark.parametrize("raw", [b"\0", b"\0\0\0", struct.pack(">I", 10) + b"{"])
async def test_a_truncated_message_ends_the_connection(path: Path, raw: bytes) -> None:
    replies = await exchange(path, raw, end=True)
    assert [reply["code"] for reply in replies] == [Truncated.code]


async def test_who_does_not_go_on_is_cut_off_and_hinders_nobody(path: Path, client: HsmClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hsm_server, "BODY_TIMEOUT_S", 0.05)
    with hsm_wire.reachable(path) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    writer.write(LOGIN)
    assert await hsm_wire.read_message(reader, body_timeout=5)
    writer.write(struct.pack(">I", 100))
    assert await client.mechanisms()
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "content", [{"op": "Mechanisms"}, {"op": "Find", "label": "root-ca"}, {"op": "Login"}, {"op": "Login", "pin": 1}, b"", b"garbage"]
)
async def test_before_a_login_nothing_is_done(path: Path, content: object) -> None:
    replies = await exchange(path, framed(content), LOGIN, framed({"op": "Mechanisms"}), login=False)
    assert [reply["code"] for reply in replies] == [LoginRefused.code]


@pytest.mark.parametrize("pin", ["", "wrong", PIN[:-1], PIN + " ", "\u00e4"])
async def test_a_wrong_pin_ends_the_connection_late(path: Path, pin: str) -> None:
    before = asyncio.get_running_loop().time()
    replies = await exchange(path, framed({"op": "Login", "pin": pin}), framed({"op": "Mechanisms"}), login=False)
    assert [reply["code"] for reply in replies] == [PinWrong.code]
    assert asyncio.get_running_loop().time() - before >= hsm_server.WRONG_PIN_DELAY_S


async def test_a_client_with_a_wrong_pin_is_told(path: Path, client: HsmClient) -> None:
    stranger = HsmClient(path, "wrong")
    for _ in range(2):
        with pytest.raises(PinWrong):
            await stranger.mechanisms()
    assert await client.mechanisms()
    await stranger.close()


async def test_who_does_not_log_in_is_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hsm_server, "LOGIN_TIMEOUT_S", 0.05)
    assert await exchange(path, login=False) == []
    assert await exchange(path, login=False, end=True) == []


def test_a_login_does_not_show_its_pin() -> None:
    assert PIN not in repr(hsm_wire.Login(PIN))


def test_an_hsm_needs_a_pin(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        HsmServer(hsm, tmp_path / "hsm.sock", "")


async def test_too_many_connections(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hsm_server, "MAX_CONNECTIONS", 1)
    with hsm_wire.reachable(path) as address:
        first = await asyncio.open_unix_connection(address)
        second = await asyncio.open_unix_connection(address)
    assert await second[0].read() == b""
    for _, writer in (first, second):
        writer.close()
        await writer.wait_closed()


async def test_another_users_process_is_refused(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    server = HsmServer(hsm, tmp_path / "other" / "hsm.sock", PIN, uid=os.geteuid() + 1)
    await server.start()
    client = HsmClient(tmp_path / "other" / "hsm.sock", PIN)
    with pytest.raises(HsmUnavailable):
        await client.mechanisms()
    await server.stop()


async def test_modes(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_a_defect_says_nothing(hsm: EmbeddedHsm, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(label: str) -> KeyHandle:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr(hsm, "find", broken)
    (reply,) = await exchange(path, framed({"op": "Find", "label": "x"}))
    assert reply["code"] == "internal"
    assert "42" not in str(reply)


async def test_no_hsm(tmp_path: Path) -> None:
    client = HsmClient(tmp_path / "hsm.sock", PIN)
    with pytest.raises(HsmUnavailable):
        await client.mechanisms()


async def test_a_restarted_hsm_is_found_again(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    path = tmp_path / "hsm.sock"
    first = HsmServer(hsm, path, PIN)
    await first.start()
    client = HsmClient(path, PIN)
    handle = await client.generate_key_pair(CA)
    await first.stop()
    with pytest.raises(HsmUnavailable):
        await client.sign(handle, b"data")
    second = HsmServer(hsm, path, PIN)
    await second.start()
    assert await client.sign(handle, b"data")
    await second.stop()
    third = HsmServer(hsm, path, PIN)
    await third.start()
    assert await client.sign(handle, b"data")  # on a connection that had died unnoticed
    await third.stop()
    await client.close()


async def test_a_cancelled_call_does_not_mix_up_replies(client: HsmClient, hsm: EmbeddedHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await client.generate_key_pair(CA)
    asked, answer = asyncio.Event(), asyncio.Event()
    find = hsm.find

    async def slow(label: Label) -> KeyHandle | None:
        asked.set()
        await answer.wait()
        return await find(label)

    monkeypatch.setattr(hsm, "find", slow)
    call = asyncio.ensure_future(client.find(CA))
    await asked.wait()
    call.cancel()
    await asyncio.wait({call})
    answer.set()
    assert await client.public_key(handle) == await hsm.public_key(handle)


async def test_an_hsm_that_talks_nonsense(tmp_path: Path) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack(">I", 2**31))
        writer.close()

    server = await asyncio.start_unix_server(nonsense, tmp_path / "hsm.sock")
    client = HsmClient(tmp_path / "hsm.sock", PIN)
    with pytest.raises(HsmUnavailable):
        await client.mechanisms()
    server.close()
    await server.wait_closed()


async def test_a_folder_that_cannot_be_made(hsm: EmbeddedHsm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateNotWritable):
        await HsmServer(hsm, tmp_path / "file" / "run" / "hsm.sock", PIN).start()
