"""The client: which VCM it trusts and finds, what it repeats, and what a caller sees when something goes wrong."""

import asyncio
import hmac
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

import cipherfleet
from cipherfleet import Client
from cipherfleet.channel import codec
from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.server import Call, Server
from cipherfleet.contract.errors import (
    CardUnavailable,
    CardUntrusted,
    CertificateExpired,
    CertificateInvalid,
    CipherfleetError,
    FileProblem,
    KeyMaterialInvalid,
    Malformed,
    NotPermitted,
    PeerError,
    ServiceOff,
    TimedOut,
    TooLarge,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcc import Operation
from cipherfleet.contract.vcm_api import EndpointsReply, KeyQuery
from cipherfleet.services.middleware import connection as connections
from cipherfleet.services.middleware.endpoints import Endpoints, normal
from tests.pki import Authority
from tests.unit.services.stage import ACME, RIVAL, VCM, Stage

MIB = 1024 * 1024


def closed_port() -> str:
    """An endpoint where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"https://127.0.0.1:{probe.getsockname()[1]}"


class Impostor:
    """A server that notes whether a request ever reached it."""

    def __init__(self, credentials: Credentials, answer: bytes = b"") -> None:
        self.server = Server(credentials)
        self.called = False
        self.url = ""
        self._answer = answer
        self.server.route("GET", "/v1/keys", set(Role), self.note)

    async def note(self, call: Call) -> EndpointsReply:
        self.called = True
        if self._answer:
            assert call.request.transport is not None
            call.request.transport.write(self._answer)
            call.request.protocol.force_close()
        return EndpointsReply(())

    async def __aenter__(self) -> "Impostor":
        host, port = await self.server.start(("127.0.0.1", 0))
        self.url = f"https://{host}:{port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.stop()


# -- whom the client trusts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "identity",
    [
        Identity(Role.TERMINAL, "ukey-1", ACME),
        Identity(Role.APPLICATION, "evil", ACME),
        Identity(Role.VCM, VCM, RIVAL),
        Identity(Role.KMC, "kmc"),
    ],
    ids=lambda i: i.uri,
)
async def test_only_a_vcm_of_the_consumer_hears_a_request(stage: Stage, identity: Identity) -> None:
    async with Impostor(stage.domain.credentials(identity, trust=stage.domain.pem)) as impostor:
        async with Client(stage.profile(endpoints=(impostor.url,))) as client:
            with pytest.raises(CertificateInvalid, match="is not a VCM of acme"):
                await client.list_keys()
        assert not impostor.called
        async with Client(stage.profile(endpoints=(impostor.url, stage.url))) as client:
            for _ in range(3):
                assert await client.list_keys() == ()
        assert not impostor.called


async def test_another_domains_server_is_refused_in_the_handshake(stage: Stage) -> None:
    assert stage.domain.parent is not None
    for authority in (Authority("root").subordinate("acme"), stage.domain.parent.subordinate("rival"), stage.domain.parent):
        async with Impostor(authority.credentials(Identity(Role.VCM, VCM, ACME), trust=stage.domain.pem)) as impostor:
            async with Client(stage.profile(endpoints=(impostor.url,))) as client:
                with pytest.raises(CertificateInvalid):
                    await client.list_keys()
            assert not impostor.called


async def test_a_vcm_whose_certificate_expired_is_refused(stage: Stage) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    old = stage.domain.credentials(Identity(Role.VCM, VCM, ACME), trust=stage.domain.pem, not_before=yesterday)
    async with Impostor(old) as impostor, Client(stage.profile(endpoints=(impostor.url,))) as client:
        with pytest.raises(CertificateExpired):
            await client.list_keys()


async def test_an_application_whose_certificate_expired_is_told_what_to_do(stage: Stage) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    async with Client(stage.profile(credentials=stage.credentials(not_before=yesterday))) as client:
        with pytest.raises(CertificateExpired) as caught:
            await client.list_keys()
    assert "app add" in caught.value.hint


async def test_an_application_that_the_vcm_does_not_know_is_refused_in_the_handshake(stage: Stage) -> None:
    foreign = Authority("root").subordinate("acme").credentials(stage.credentials().identity, trust=stage.domain.pem)
    async with Client(stage.profile(credentials=foreign)) as client:
        with pytest.raises((CertificateInvalid, ServiceOff)):
            await client.list_keys()
    assert not stage.host.card.operations


# -- profiles ----------------------------------------------------------------------------------------------------------


async def test_a_profile_is_a_file_or_a_value(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "shop.json"
    path.write_bytes(codec.encode(stage.profile()))
    for profile in (path, str(path), stage.profile()):
        async with Client(profile) as client:
            assert await client.list_keys() == ()
            assert client.profile.consumer == ACME


def test_profiles_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileProblem):
        Client(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(Malformed):
        Client(tmp_path / "bad.json")


@pytest.mark.parametrize("change", [{"key": ""}, {"key": "nonsense"}, {"chain": "nonsense"}, {"trust": "nonsense"}, {"trust": ""}], ids=str)
async def test_profiles_that_cannot_be_used(stage: Stage, change: dict[str, str]) -> None:
    with pytest.raises(CertificateInvalid):
        await Client(msgspec.structs.replace(stage.profile(), **change)).open()


async def test_key_and_certificate_must_belong_together(stage: Stage) -> None:
    profile = msgspec.structs.replace(stage.profile(), key=stage.credentials().key.decode())
    with pytest.raises(CertificateInvalid):
        await Client(profile).open()


async def test_a_client_that_is_not_open_says_so(stage: Stage) -> None:
    client = stage.client()
    with pytest.raises(RuntimeError, match="not open"):
        await client.list_keys()
    await client.close()


# -- where the VCMs are ------------------------------------------------------------------------------------------------


def test_endpoints_have_one_form() -> None:
    assert normal("127.0.0.1:8443") == normal("https://127.0.0.1:8443/") == "https://127.0.0.1:8443"
    assert normal("https://[::1]") == "https://[::1]:443"
    for bad in (
        "http://127.0.0.1:8443",
        "https://",
        "https://u@h:1",
        "https://h:99999",
        "https://h/x",
        "https://h?x",
        "https://[",
        "file:///etc",
    ):
        with pytest.raises(Malformed):
            normal(bad)


def test_what_a_vcm_tells_comes_first_and_nonsense_is_left_out() -> None:
    endpoints = Endpoints(["h:1", "h:2", "https://h:1"])
    assert list(endpoints.all) == ["https://h:1", "https://h:2"]
    endpoints.learn(["h:3", "http://evil", "h:2"])
    assert list(endpoints.all) == ["https://h:3", "https://h:2", "https://h:1"]


async def test_the_vcm_that_serves_is_found_and_remembered(stage: Stage) -> None:
    dead = [closed_port() for _ in range(3)]
    async with Client(stage.profile(endpoints=(*dead, stage.url))) as client:
        assert await client.list_keys() == ()
        assert client._connection.endpoints.good == stage.url
        for _ in range(5):
            await client.list_keys()
    assert len(stage.server._connections) == 1, "one connection is kept"


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_without_any_vcm_the_service_is_off(stage: Stage, count: int) -> None:
    async with Client(stage.profile(endpoints=tuple(closed_port() for _ in range(count)))) as client:
        with pytest.raises(ServiceOff) as caught:
            await client.list_keys()
        assert "Ukey" in caught.value.hint


async def test_a_listener_that_never_answers_does_not_hold_up_the_others(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_S", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(8)
        silent = f"https://127.0.0.1:{deaf.getsockname()[1]}"
        async with Client(stage.profile(endpoints=(silent, stage.url))) as client:
            assert await client.list_keys() == ()
            assert client._connection.endpoints.good == stage.url
        async with Client(stage.profile(endpoints=(silent,))) as client:
            with pytest.raises(ServiceOff):
                await client.list_keys()


async def test_endpoints_are_learned_again_now_and_then(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REFRESH_S", 0.0)
    stage.host.serves_on = [stage.url, "https://127.0.0.1:1"]
    async with stage.client() as client:
        await client.list_keys()
        refreshing = client._connection._refreshing
        assert refreshing is not None
        await refreshing
        assert client._connection.endpoints.all == (stage.url, "https://127.0.0.1:1")


async def test_when_the_vcm_moves_the_client_follows(stage: Stage) -> None:
    other = await Stage.start(domain=stage.domain)
    try:
        async with Client(stage.profile(endpoints=(stage.url, other.url))) as client:
            await client.list_keys()
            first = client._connection.endpoints.good
            await (stage if first == stage.url else other).server.stop()
            assert await client.digest("SHA-256", b"data")
            assert client._connection.endpoints.good != first
    finally:
        await other.stop()


# -- what is repeated --------------------------------------------------------------------------------------------------


async def test_a_kept_connection_that_was_closed_is_replaced(stage: Stage, client: Client) -> None:
    key = await client.create_key()
    for _ in range(3):
        stage.server.close_connections()
        assert await client.decrypt(await client.encrypt(key.id, bytes(100_000))) == bytes(100_000)
    await stage.server.stop()
    with pytest.raises(ServiceOff):
        await client.encrypt(key.id, b"data")


async def fails_once(stage: Stage, operation: Operation, error: Exception) -> None:
    async def look(found: Operation) -> None:
        if found is operation:
            stage.host.card.before = None
            raise error

    stage.host.card.before = look


async def test_a_card_that_fails_makes_the_client_try_another_vcm(stage: Stage) -> None:
    other = await Stage.start(domain=stage.domain)
    try:
        async with Client(stage.profile(endpoints=(stage.url, other.url))) as client:
            for broken in (stage, other):
                await fails_once(broken, Operation.RUN, CardUnavailable("the card is gone"))
                client._connection.endpoints.good = broken.url
                assert len(await client.digest("SHA-256", b"data")) == 32
                assert client._connection.endpoints.good != broken.url
    finally:
        await other.stop()


async def test_what_is_not_safe_is_not_repeated(stage: Stage) -> None:
    other = await Stage.start(domain=stage.domain)
    try:
        async with Client(stage.profile(endpoints=(stage.url, other.url))) as client:
            client._connection.endpoints.good = stage.url
            await fails_once(stage, Operation.GENERATE, CardUnavailable("the card is gone"))
            with pytest.raises(CardUnavailable):
                await client.create_key()
            assert (await other.host.keys.list_keys(KeyQuery())).keys == ()

            async def once() -> AsyncIterator[bytes]:
                yield b"data"

            await fails_once(stage, Operation.RUN, CardUnavailable("the card is gone"))
            with pytest.raises(CardUnavailable):
                await client.digest("SHA-256", once())
    finally:
        await other.stop()


async def test_a_file_is_read_again_for_a_second_try(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "message"
    path.write_bytes(b"skip" + os.urandom(200_000))
    async with stage.client() as client:
        expected = await client.digest("SHA-256", path.read_bytes()[4:])
        with path.open("rb") as file:
            file.seek(4)
            client._connection.endpoints = Endpoints([stage.url, stage.url.replace("127.0.0.1", "localhost")])
            client._connection.endpoints.good = stage.url
            await fails_once(stage, Operation.RUN, CardUnavailable("the card is gone"))
            assert await client.digest("SHA-256", file) == expected


async def test_all_vcms_failing_is_the_last_word(stage: Stage, client: Client) -> None:
    async def never(operation: Operation) -> None:
        raise CardUnavailable("the card is gone")

    stage.host.card.before = never
    with pytest.raises(CardUnavailable):
        await client.random(8)


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_a_vcm_that_says_nothing_is_given_up(stage: Stage) -> None:
    waiting = asyncio.Event()

    async def hang(operation: Operation) -> None:
        await waiting.wait()

    async with stage.client(timeout=0.2) as client:
        stage.host.card.before = hang
        with pytest.raises(TimedOut):
            await client.digest("SHA-256", b"data")
        with pytest.raises(TimedOut):
            await client.random(8)
        waiting.set()
        assert len(await client.random(8)) == 8


async def test_a_slow_source_that_goes_on_is_no_timeout(stage: Stage) -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in range(8):
            await asyncio.sleep(0.1)
            yield b"x" * 1000

    async with stage.client(timeout=0.4) as client:
        assert len(await client.digest("SHA-256", slow())) == 32


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", (PeerError, ServiceOff)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", (PeerError, ServiceOff)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]", (Malformed,)),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops", (PeerError,)),
        (b"HTTP/1.1 302 Found\r\nLocation: https://evil/\r\nContent-Length: 0\r\n\r\n", (Malformed, PeerError)),
        (b"nonsense\r\n\r\n", (PeerError, ServiceOff)),
    ],
    ids=["length", "chunked", "no JSON", "no error", "redirect", "no HTTP"],
)
async def test_a_server_that_breaks_off_or_talks_nonsense(
    stage: Stage, answer: bytes, expected: tuple[type[CipherfleetError], ...]
) -> None:
    async with Impostor(stage.server_credentials, answer) as server, Client(stage.profile(endpoints=(server.url,))) as client:
        with pytest.raises(expected):
            await client.list_keys()
        assert server.called


# -- sources -----------------------------------------------------------------------------------------------------------


async def test_bytes_come_from_anywhere(client: Client, tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    path = tmp_path / "data"
    path.write_bytes(data)
    read_end, write_end = os.pipe()
    expected = await client.digest("SHA-256", data)

    def generator() -> Iterator[bytes]:
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    async def asynchronous() -> AsyncIterator[bytes]:
        yield b""
        yield data[:10]
        yield data[10:]

    sources: list[Any] = [
        bytearray(data),
        memoryview(data),
        [data],
        [bytearray(data[:5]), memoryview(data)[5:]],
        generator(),
        asynchronous(),
    ]
    for source in sources:
        assert await client.digest("SHA-256", source) == expected
    for buffering in (-1, 0):
        with path.open("rb", buffering=buffering) as file:
            assert await client.digest("SHA-256", file) == expected
    with os.fdopen(read_end, "rb") as pipe, os.fdopen(write_end, "wb") as sink:

        def write() -> None:
            sink.write(data)
            sink.close()

        writing = asyncio.create_task(asyncio.to_thread(write))
        assert await client.digest("SHA-256", pipe) == expected
        await writing


async def test_what_is_not_bytes_is_the_callers_mistake(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    sources: list[Any] = [["text"], [b"x" * MIB, 7], [b"x" * 4 * MIB, None]]
    for source in sources:
        with pytest.raises(TypeError):
            await client.digest("SHA-256", source)
        with pytest.raises(TypeError):
            async for _ in client.encrypt_stream(key.id, source):
                pass
    text: Any = "text"
    with pytest.raises(TypeError):
        await client.encrypt(key.id, text)


async def test_what_a_source_raises_reaches_the_caller_and_ends_the_stream(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    aborted = asyncio.Event()

    async def look(operation: Operation) -> None:
        if operation is Operation.ABORT:
            aborted.set()

    stage.host.card.before = look

    async def breaks(after: int) -> AsyncIterator[bytes]:
        yield bytes(after)
        raise KeyError("of the source")

    with pytest.raises(KeyError, match="of the source"):
        await client.digest("SHA-256", breaks(10))
    with pytest.raises(KeyError, match="of the source"):
        async for _ in client.encrypt_stream(key.id, breaks(4 * MIB)):
            pass
    await aborted.wait()
    assert not stage.host.card.open_streams

    def breaks_too() -> Iterator[bytes]:
        yield bytes(4 * MIB)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        async for _ in client.encrypt_stream(key.id, breaks_too()):
            pass


async def test_an_iteration_that_is_left_ends_the_stream(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    aborted = asyncio.Event()

    async def look(operation: Operation) -> None:
        if operation is Operation.ABORT:
            aborted.set()

    stage.host.card.before = look
    async for piece in client.encrypt_stream(key.id, bytes(64 * MIB)):
        assert piece
        break
    await aborted.wait()
    assert not stage.host.card.open_streams


@pytest.mark.parametrize("change", [MIB, 8 * MIB], ids=["shrinks", "grows"])
async def test_a_file_that_changes_while_it_is_read(client: Client, tmp_path: Path, change: int) -> None:
    key = await client.create_key()
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    with path.open("rb") as file:
        pieces = client.encrypt_stream(key.id, file, progress=lambda done, total: os.truncate(path, change))
        if change < 4 * MIB:
            with pytest.raises(FileProblem):
                async for _ in pieces:
                    pass
        else:
            ciphertext = b"".join([piece async for piece in pieces])
            assert await client.decrypt(ciphertext) == bytes(4 * MIB)


async def test_progress_is_told(client: Client) -> None:
    key = await client.create_key()
    seen: list[tuple[int, int | None]] = []
    async for _ in client.encrypt_stream(key.id, bytes(MIB), progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen[-1] == (MIB, MIB)
    assert seen == sorted(seen)
    seen.clear()
    async for _ in client.encrypt_stream(key.id, [bytes(100)], progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen == [(100, None)]


async def test_early_refusal_does_not_wait_for_the_body(stage: Stage, client: Client) -> None:
    key = await client.create_key()
    stage.host.rights["shop"] = (Right.SHOW,)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += MIB
            yield bytes(MIB)

    async with asyncio.timeout(20):
        with pytest.raises(NotPermitted):
            async for _ in client.encrypt_stream(key.id, endless()):
                pass
    assert sent < 200 * MIB


async def test_many_at_once(client: Client) -> None:
    key = await client.create_key()

    async def one(number: int) -> None:
        plaintext = os.urandom(number * 20_000)
        assert await client.decrypt(await client.encrypt(key.id, plaintext)) == plaintext

    await asyncio.gather(*(one(number) for number in range(60)))


@pytest.mark.parametrize("call", [lambda c: c.encrypt("0" * 32, b"", context=bytes(4097)), lambda c: c.verify("0" * 32, b"", bytes(5121))])
async def test_limits_are_checked_before_anything_is_sent(client: Client, call: Callable[[Client], Awaitable[object]]) -> None:
    with pytest.raises(TooLarge):
        await call(client)


# -- the package -------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing() -> None:
    check = "import cipherfleet, sys; print(sorted(m for m in sys.modules if m.startswith(('cipherfleet.', 'aiohttp', 'cryptography'))))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_types_of_the_package_are_those_it_gives() -> None:
    stub = Path(cipherfleet.__file__).with_suffix(".pyi").read_text()
    assert all(f"import {name} as {name}" in stub or f"{name}: str" in stub for name in cipherfleet.__all__)


def test_the_package_gives_what_it_promises() -> None:
    assert set(cipherfleet.__all__) <= set(dir(cipherfleet))
    assert cipherfleet.Client is Client
    assert issubclass(cipherfleet.CipherfleetError, Exception)
    assert cipherfleet.__version__.count(".") == 2
    with pytest.raises(AttributeError):
        getattr(cipherfleet, "noth" + "ing")


def test_a_profile_does_not_show_its_key(stage: Stage) -> None:
    assert "PRIVATE" not in repr(stage.profile())
    assert isinstance(stage.profile(), Profile)


async def test_a_key_of_ones_own_is_sealed_to_the_card(stage: Stage, client: Client) -> None:
    secret = os.urandom(32)
    made = await client.import_key("HMAC-SHA-256", secret, label="mine")
    assert (made.algorithm, made.imported, made.label) == ("HMAC-SHA-256", True, "mine")
    assert await client.mac(made.id, b"m") == hmac.digest(secret, b"m", "sha256")
    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signer = await client.import_key("ed25519", pem)
    private.public_key().verify(await client.sign(signer.id, b"m"), b"m")


async def test_a_key_is_sealed_to_no_card_that_the_profile_cannot_check(stage: Stage) -> None:
    for root, hint in (("", "app add"), (stage.domain.pem.decode(), "")):
        async with Client(msgspec.structs.replace(stage.profile(), root=root)) as client:
            with pytest.raises(CardUntrusted) as refused:
                await client.import_key("AES-256-GCM", bytes(32))
            assert hint in refused.value.hint
    assert Operation.IMPORT not in stage.host.card.operations


async def test_a_private_key_that_cannot_be_read_stays_here(stage: Stage, client: Client) -> None:
    with pytest.raises(KeyMaterialInvalid):
        await client.import_key("Ed25519", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(KeyMaterialInvalid):
        await client.import_key("AES-256-GCM", bytes(31))
