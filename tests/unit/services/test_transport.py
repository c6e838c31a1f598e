"""HTTP as it should not be: stalled, cut, pipelined, greedy or hostile callers, and answers that break off."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest

from cipherfleet import Client
from cipherfleet.channel import tls
from cipherfleet.channel.certificates import Credentials, leaf, serial_of
from cipherfleet.contract.ciphertext import sealed_length
from cipherfleet.contract.errors import CertificateRevoked, CipherfleetError, Internal, LeaseExpired, PeerError, ServiceOff
from cipherfleet.contract.vcc import CHUNK_BYTES, Operation
from tests.pki import Authority
from tests.unit.services.stage import ALL_RIGHTS, Stage

MIB = 1024 * 1024
NAME = "0123456789abcdef" * 2


class Wire:
    """One TLS connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def answer(self) -> tuple[int, bytes]:
        """The next answer, whole. Raises ``IncompleteReadError`` when it is not."""
        status, headers = await self.head()
        if "content-length" in headers:
            return status, await self.reader.readexactly(int(headers["content-length"]))
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        return status, body


@asynccontextmanager
async def wire(stage: Stage, credentials: Credentials | None = None) -> AsyncIterator[Wire]:
    context = tls.client_context(credentials or stage.credentials())
    context.check_hostname = False
    address = urlsplit(stage.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, ssl=context)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()


def request(path: str, *headers: str, method: str = "POST", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: vcm", *headers, "", ""]).encode()


async def encryption(client: Client) -> str:
    return f"/v1/keys/{(await client.create_key()).id}/encrypt"


class Aborted:
    """Waits until the card was told to abort a stream."""

    def __init__(self, stage: Stage) -> None:
        self.seen = asyncio.Event()
        stage.host.card.before = self._look

    async def _look(self, operation: Operation) -> None:
        if operation is Operation.ABORT:
            self.seen.set()


@pytest.fixture
async def hasty() -> AsyncIterator[Stage]:
    """A VCM that gives up on stalled callers soon."""
    started = await Stage.start(stall_s=0.25)
    yield started
    await started.stop()


# -- plain HTTP that is a little special -------------------------------------------------------------------------------


async def test_expect_is_answered(stage: Stage, client: Client) -> None:
    path = await encryption(client)
    async with wire(stage) as peer:
        await peer.send(request(path, "Content-Length: 5", "Expect: 100-continue"))
        assert (await peer.head())[0] == 100
        await peer.send(b"hello")
        status, ciphertext = await peer.answer()
    assert status == 200
    assert await client.decrypt(ciphertext) == b"hello"
    async with wire(stage) as peer:
        await peer.send(request(path, "Content-Length: 5", "Expect: miracles"))
        assert (await peer.head())[0] == 417


@pytest.mark.parametrize("headers", [("Content-Length: 0",), (), ("Transfer-Encoding: chunked",)], ids=["zero", "none", "chunked"])
async def test_an_empty_body_is_an_empty_message(stage: Stage, client: Client, headers: tuple[str, ...]) -> None:
    async with wire(stage) as peer:
        await peer.send(request(await encryption(client), *headers) + (b"0\r\n\r\n" if headers and "chunked" in headers[0] else b""))
        status, ciphertext = await peer.answer()
    assert status == 200
    assert await client.decrypt(ciphertext) == b""


async def test_chunks_of_any_size_are_put_together(stage: Stage, client: Client) -> None:
    path, plaintext = await encryption(client), os.urandom(3000)
    async with wire(stage) as peer:
        await peer.send(request(path, "Transfer-Encoding: chunked"))
        for byte in plaintext:
            await peer.send(b"1\r\n" + bytes([byte]) + b"\r\n")
        await peer.send(b"0\r\n\r\n")
        status, ciphertext = await peer.answer()
    assert status == 200
    assert await client.decrypt(ciphertext) == plaintext


async def test_pipelined_requests_are_answered_in_order(stage: Stage, client: Client) -> None:
    path = await encryption(client)
    messages = [b"first", b"x" * (10 * CHUNK_BYTES), b"", b"last"]
    async with wire(stage) as peer:
        sending = asyncio.create_task(peer.send(b"".join(request(path, f"Content-Length: {len(m)}") + m for m in messages)))
        for message in messages:
            status, ciphertext = await peer.answer()
            assert status == 200
            assert await client.decrypt(ciphertext) == message
        await sending


async def test_a_connection_is_kept_after_an_error(stage: Stage, client: Client) -> None:
    async with wire(stage) as peer:
        await peer.send(request("/v1/digest/MD5", "Content-Length: 4") + b"data")
        assert (await peer.answer())[0] == 400
        await peer.send(request("/v1/digest/SHA-256", "Content-Length: 4") + b"data")
        assert (await peer.answer())[0] == 200


@pytest.mark.parametrize(
    ("version", "headers"),
    [
        ("1.0", ("Content-Length: 5",)),
        ("1.1", ("Content-Length: 5", "Content-Encoding: gzip")),
        ("1.1", ("Content-Length: 5", "Content-Encoding: br")),
    ],
)
async def test_what_could_be_misread_is_refused(stage: Stage, client: Client, version: str, headers: tuple[str, ...]) -> None:
    path = await encryption(client)
    async with wire(stage) as peer:
        await peer.send(request(path, *headers, version=version) + b"hello")
        status, body = await peer.answer()
    assert status == 400
    assert b'"unsupported"' in body


@pytest.mark.parametrize(
    "head",
    [
        request("/v1/digest/SHA-256", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        request("/v1/digest/SHA-256", "Content-Length: 5", "Content-Length: 6") + b"hello",
        request("/v1/digest/SHA-256", "Content-Length: -5"),
        request("/v1/digest/SHA-256", "Content-Length: 5", "X-Cipherfleet-Context: " + "A" * 20_000) + b"hello",
        b"\x16\x03\x01 this is not HTTP\r\n\r\n",
    ],
    ids=["length and chunked", "two lengths", "negative", "long header", "not HTTP"],
)
async def test_broken_requests_end_the_connection(stage: Stage, head: bytes) -> None:
    async with wire(stage) as peer:
        await peer.send(head)
        status, _ = await peer.answer()
        assert status == 400
        assert await peer.reader.read() == b""


async def test_plaintext_that_is_taken_for_a_request_is_not_logged(stage: Stage, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    path = await encryption(client)
    async with wire(stage) as peer:
        await peer.send(request(path, "Content-Length: 3") + b"the")
        assert (await peer.answer())[0] == 200
        await peer.send(b"hunter2 and more of the secret\r\n\r\n")
        assert (await peer.answer())[0] == 400
    async with wire(stage) as peer:
        await peer.send(request(path, "Transfer-Encoding: chunked") + b"hunter2 is no chunk\r\n")
        assert (await peer.head())[0] == 400
    assert caplog.records
    assert "hunter2" not in caplog.text


# -- callers that stop, leave, or do not listen ------------------------------------------------------------------------


async def test_a_body_that_stands_still_is_given_up(hasty: Stage) -> None:
    async with hasty.client() as client:
        path = await encryption(client)
    async with wire(hasty) as peer:
        await peer.send(request(path, "Content-Length: 100") + b"only this")
        status, body = await peer.answer()
    assert status == 504
    assert b"timed-out" in body


async def test_a_stream_that_stands_still_is_given_up_and_aborted(hasty: Stage) -> None:
    async with hasty.client() as client:
        path = await encryption(client)
    aborted = Aborted(hasty)
    async with wire(hasty) as peer:
        await peer.send(request(path, f"Content-Length: {4 * MIB}") + bytes(3 * MIB))
        with pytest.raises(asyncio.IncompleteReadError):
            await peer.answer()
        await aborted.seen.wait()
    assert not hasty.host.card.open_streams


async def test_who_sends_all_before_reading_blocks_nobody_else(hasty: Stage) -> None:
    async with hasty.client() as client:
        path = await encryption(client)
        aborted = Aborted(hasty)
        async with wire(hasty) as peer:
            peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
            sending = asyncio.create_task(peer.send(request(path, f"Content-Length: {64 * MIB}") + bytes(64 * MIB)))
            assert await client.decrypt(await client.encrypt(path.split("/")[3], b"meanwhile")) == b"meanwhile"
            await aborted.seen.wait()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert not hasty.host.card.open_streams


async def test_who_reads_slowly_but_reads_is_served(hasty: Stage) -> None:
    async with hasty.client() as client:
        path, plaintext = await encryption(client), os.urandom(12 * MIB)
        async with wire(hasty) as peer:
            sending = asyncio.create_task(peer.send(request(path, f"Content-Length: {len(plaintext)}") + plaintext))
            status, headers = await peer.head()
            assert int(headers["content-length"]) == sealed_length(len(plaintext))
            ciphertext = b""
            while len(ciphertext) < sealed_length(len(plaintext)):
                await asyncio.sleep(0.02)  # slower than the VCM, in all longer than it waits for a stalled caller
                ciphertext += await peer.reader.read(256 * 1024)
            await sending
        assert status == 200
        assert await client.decrypt(ciphertext) == plaintext


@pytest.mark.parametrize("headers", ["Content-Length: 9000000", "Transfer-Encoding: chunked"])
async def test_a_caller_that_goes_away_ends_its_stream(stage: Stage, client: Client, headers: str) -> None:
    path = await encryption(client)
    aborted = Aborted(stage)
    async with wire(stage) as peer:
        body = bytes(3 * MIB)
        await peer.send(request(path, headers) + (b"300000\r\n" + body + b"\r\n" if "chunked" in headers else body))
        assert (await peer.head())[0] == 200
    await aborted.seen.wait()
    assert not stage.host.card.open_streams


async def test_a_broken_chunk_in_a_stream_breaks_the_answer(hasty: Stage) -> None:
    async with hasty.client() as client:
        path = await encryption(client)
    aborted = Aborted(hasty)
    async with wire(hasty) as peer:
        await peer.send(request(path, "Transfer-Encoding: chunked") + b"300000\r\n" + bytes(3 * MIB) + b"\r\nnonsense\r\n")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await peer.answer()
        await aborted.seen.wait()
    assert not hasty.host.card.open_streams


# -- answers that break off --------------------------------------------------------------------------------------------


def failing(stage: Stage, on: Operation, times: int, error: Exception) -> Callable[[Operation], object]:
    """Let the card fail at the ``times``-th operation of a kind."""
    count = 0

    async def look(operation: Operation) -> None:
        nonlocal count
        count += operation is on
        if operation is on and count == times:
            raise error

    stage.host.card.before = look
    return look


async def test_an_error_in_mid_stream_shows_as_a_broken_answer_and_tells_its_reason(stage: Stage, client: Client) -> None:
    path, credentials = await encryption(client), stage.credentials()
    failing(stage, Operation.UPDATE, 4, LeaseExpired("the lease has ended"))
    for header in (f"Content-Length: {8 * MIB}", "Transfer-Encoding: chunked"):
        async with wire(stage, credentials) as peer:
            body = bytes(8 * MIB) if "Length" in header else b"800000\r\n" + bytes(8 * MIB) + b"\r\n0\r\n\r\n"
            sending = asyncio.create_task(peer.send(request(path, header, f"X-Cipherfleet-Request: {NAME}") + body))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await peer.answer()
            await asyncio.gather(sending, return_exceptions=True)
        async with wire(stage, credentials) as peer:
            await peer.send(request(f"/v1/requests/{NAME}/error", method="GET"))
            status, reason = await peer.answer()
            assert status == 200
            assert b"lease-expired" in reason
        stage.host.rights["other"] = ALL_RIGHTS
        async with wire(stage, stage.credentials("other")) as peer:
            await peer.send(request(f"/v1/requests/{NAME}/error", method="GET"))
            assert b"lease-expired" not in (await peer.answer())[1]
        failing(stage, Operation.UPDATE, 4, LeaseExpired("the lease has ended"))
    assert not stage.host.card.open_streams


@pytest.mark.parametrize(
    ("error", "expected"),
    [(LeaseExpired("the lease has ended"), LeaseExpired), (ValueError("hunter2"), Internal)],
    ids=["ours", "not ours"],
)
@pytest.mark.parametrize("operation", [Operation.UPDATE, Operation.FINISH])
async def test_the_client_reports_why_an_answer_broke_off(
    stage: Stage, client: Client, operation: Operation, error: Exception, expected: type[CipherfleetError]
) -> None:
    key = await client.create_key()
    failing(stage, operation, 3 if operation is Operation.UPDATE else 1, error)
    received = 0
    with pytest.raises(expected) as caught:
        async for piece in client.encrypt_stream(key.id, bytes(8 * MIB)):
            received += len(piece)
    assert received < sealed_length(8 * MIB)
    assert "hunter2" not in str(caught.value)
    assert not stage.host.card.open_streams


async def test_remembered_reasons_are_bounded(stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cipherfleet.services.components.routes.MAX_REMEMBERED_ERRORS", 1)
    path, credentials = await encryption(client), stage.credentials()
    names = [f"{n:032x}" for n in range(2)]
    for name in names:
        failing(stage, Operation.UPDATE, 3, LeaseExpired("the lease has ended"))
        async with wire(stage, credentials) as peer:
            sending = asyncio.create_task(
                peer.send(request(path, f"Content-Length: {4 * MIB}", f"X-Cipherfleet-Request: {name}") + bytes(4 * MIB))
            )
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await peer.answer()
            await asyncio.gather(sending, return_exceptions=True)
    found = []
    async with wire(stage, credentials) as peer:
        for name in names:
            await peer.send(request(f"/v1/requests/{name}/error", method="GET"))
            found.append(b"lease-expired" in (await peer.answer())[1])
    assert found == [False, True]


async def test_a_connection_cut_in_mid_answer_is_an_error(stage: Stage, client: Client) -> None:
    key = await client.create_key()
    with pytest.raises(PeerError):
        async for _ in client.encrypt_stream(key.id, bytes(64 * MIB)):
            stage.server.close_connections()


async def test_a_vcm_that_is_gone_in_mid_answer_is_service_off(stage: Stage, client: Client) -> None:
    key = await client.create_key()
    with pytest.raises(ServiceOff):
        async for _ in client.encrypt_stream(key.id, bytes(64 * MIB)):
            await stage.server.stop()


async def test_revocation_in_mid_answer_says_so(stage: Stage) -> None:
    credentials = stage.credentials()
    async with Client(stage.profile(credentials=credentials)) as client:
        key = await client.create_key()
        with pytest.raises(CertificateRevoked):
            async for _ in client.encrypt_stream(key.id, bytes(64 * MIB)):
                stage.server.revoke([serial_of(leaf(credentials.chain))])
        with pytest.raises(CertificateRevoked):
            await client.list_keys()


# -- who gets in -------------------------------------------------------------------------------------------------------


async def refused_in_handshake(stage: Stage, credentials: Credentials) -> bool:
    """Whether the server ends the connection with an alert, before it looks at a request."""
    before = list(stage.host.card.operations)
    try:
        async with wire(stage, credentials) as peer:
            await peer.send(request("/v1/random?bytes=8", method="GET"))
            await peer.reader.readexactly(1)
    except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
        return stage.host.card.operations == before
    return False


async def test_only_certificates_of_the_domain_pass_the_handshake(stage: Stage) -> None:
    assert not await refused_in_handshake(stage, stage.credentials())
    rival = Authority("root").subordinate("acme")
    own = stage.credentials()
    foreign = rival.credentials(own.identity, trust=stage.domain.pem)
    assert await refused_in_handshake(stage, foreign)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    expired = stage.domain.credentials(own.identity, trust=stage.domain.pem, not_before=yesterday)
    assert await refused_in_handshake(stage, expired)
    assert stage.domain.parent is not None
    sibling = stage.domain.parent.subordinate("rival").credentials(own.identity, trust=stage.domain.pem)
    assert await refused_in_handshake(stage, sibling)
