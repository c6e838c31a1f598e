"""The vCC over a socket: many requests under way, many vCCs, and whatever a hostile VCM may send."""

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator, Callable
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherfleet.channel import codec
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.card_server import QUEUE_REQUESTS, CardServer
from cipherfleet.computing.vcc_socket import DONE, FAILED, Frame, FrameReader, SocketCard, encode_completion
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import (
    CardUnavailable,
    CertificateInvalid,
    CipherfleetError,
    ErrorBody,
    Exists,
    Internal,
    LeaseExpired,
    Malformed,
    OutOfOrder,
    TooLarge,
)
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import MachineId, VcmId, new_key_id, new_vcm_id
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.vcc import (
    CHUNK_BYTES,
    DESCRIPTOR,
    MAX_DATA_BYTES,
    MAX_PARAMETER_BYTES,
    CardDescription,
    Operation,
    RandomRequest,
    RowRequest,
    StreamRequest,
    Verb,
    encode_request,
)
from tests.pki import Authority
from tests.unit.computing.card.consumer import KMC_SPKI, Consumer


def reply_for(card: Card, *, identity: Identity | None = None) -> CardReply:
    root = Authority("root")
    chain = root.certify(identity or Identity(Role.CARD, card.id), card.transport.rsa.public_key())
    return CardReply(Chain(chain, root.pem), KMC_SPKI)


@cache
def card() -> Card:
    made = Card(MachineId("m1"))
    made.certify(reply_for(made))
    return made


SOCKETS: list[socket.socket] = []
"""The VCMs' ends that a test took, closed after it."""


@pytest.fixture
async def server() -> AsyncIterator[CardServer]:
    running = CardServer(card())
    yield running
    running.close()
    assert not list(card().functions)
    while SOCKETS:
        SOCKETS.pop().close()


async def attach(server: CardServer, consumer: Consumer | None = None, vcm: VcmId | None = None) -> tuple[socket.socket, VirtualFunction]:
    ours, theirs = socket.socketpair()
    SOCKETS.append(ours)
    name = vcm or new_vcm_id()
    await server.attach(name, (consumer or Consumer()).name, theirs)
    return ours, next(f for f in card().functions if f.vcm == name)


async def connect(server: CardServer, consumer: Consumer | None = None) -> SocketCard:
    sock, _ = await attach(server, consumer)
    client = SocketCard(sock)
    await client.start()
    return client


async def load(client: SocketCard, consumer: Consumer, lease_ms: int = 60_000) -> None:
    vcm = msgspec.json.decode((await client.submit(Operation.DESCRIBE)).parameters, type=CardDescription).vcm
    public = card().transport
    delivery = consumer.delivery(consumer.share(card().id, vcm), rsa_public=public.rsa.public_key(), hpke_public=public.hpke_public_key)
    await client.submit(Operation.LOAD_CMK, parameters=codec.encode(delivery))
    nonce = (await client.submit(Operation.LEASE_NONCE)).data
    await client.submit(Operation.LEASE, parameters=codec.encode(consumer.lease(nonce, lease_ms, card=card().id, vcm=vcm)))


async def generate(client: SocketCard, name: str = "AES-256-GCM") -> int:
    request = RowRequest(new_key_id(), 1, codec.encode(VersionAttributes(name, 1.0)))
    done = await client.submit(Operation.GENERATE, parameters=codec.encode(request))
    assert msgspec.json.decode(done.parameters, type=EscrowRow).wrapped
    return done.value


@pytest.fixture
async def alice(server: CardServer) -> AsyncIterator[SocketCard]:
    client = await connect(server)
    await load(client, Consumer())
    yield client
    await client.close()


def stream(verb: Verb, **more: object) -> bytes:
    return codec.encode(StreamRequest(verb, **more))  # type: ignore[arg-type]


# -- the way it should go ----------------------------------------------------------------------------------------------


async def test_a_file_through_the_socket(alice: SocketCard) -> None:
    handle = await generate(alice)
    plaintext = os.urandom(5 * 1024 * 1024 + 77)
    pieces = [plaintext[i : i + 16 * CHUNK_BYTES] for i in range(0, len(plaintext), 16 * CHUNK_BYTES)]
    begun = await alice.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.ENCRYPT))
    updates = [asyncio.create_task(alice.submit(Operation.UPDATE, handle=begun.value, data=p)) for p in pieces[:-1]]
    last = asyncio.create_task(alice.submit(Operation.FINISH, handle=begun.value, data=memoryview(pieces[-1])))
    sealed = b"".join([(await u).data for u in updates]) + (await last).data
    opening = stream(Verb.DECRYPT, header=begun.data)
    begun = await alice.submit(Operation.BEGIN, handle=handle, parameters=opening)
    size = CHUNK_BYTES + 16
    back = b""
    for i in range(0, len(sealed) - size, size):
        back += (await alice.submit(Operation.UPDATE, handle=begun.value, data=bytearray(sealed[i : i + size]))).data
    back += (await alice.submit(Operation.FINISH, handle=begun.value, data=sealed[i + size :])).data
    assert back == plaintext


async def test_many_requests_are_answered_each_with_its_own(alice: SocketCard) -> None:
    handle = await generate(alice, "HMAC-SHA-256")
    messages = [str(n).encode() * 50 for n in range(600)]
    macs = await asyncio.gather(*(alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.MAC), data=m) for m in messages))
    for message, mac in zip(messages, macs, strict=True):
        await alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.VERIFY_MAC, signature=mac.data), data=message)


async def test_the_largest_request(alice: SocketCard) -> None:
    handle = await generate(alice)
    plaintext = bytes(MAX_DATA_BYTES)
    sealed = (await alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.ENCRYPT), data=plaintext)).data
    header = sealed[:HEADER_BYTES]
    opened = await alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.DECRYPT, header=header), data=sealed[HEADER_BYTES:])
    assert opened.data == plaintext
    with pytest.raises(TooLarge):
        await alice.submit(Operation.RUN, data=bytes(MAX_DATA_BYTES + 65537))
    with pytest.raises(TooLarge):
        await alice.submit(Operation.RUN, parameters=bytes(MAX_PARAMETER_BYTES + 1))
    assert alice.connected


async def test_making_an_rsa_key_holds_nobody_up(server: CardServer, alice: SocketCard) -> None:
    other = await connect(server)
    making = asyncio.create_task(generate(alice, "RSA-3072-PSS"))
    answered = 0
    while not making.done():
        await other.submit(Operation.NULL)
        answered += 1
    handle = await making
    assert answered > 5
    signature = (await alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.SIGN), data=b"x")).data
    await alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.VERIFY, signature=signature), data=b"x")
    await other.close()


async def test_vccs_take_turns(server: CardServer) -> None:
    """A vCC with a long queue does not keep another waiting to the queue's end."""
    flooding, modest = Consumer("flood"), Consumer("modest")
    one, two = await connect(server, flooding), await connect(server, modest)
    await load(one, flooding)
    handle = await generate(one, "SM4-GCM")
    flood = [
        asyncio.create_task(one.submit(Operation.RUN, handle=handle, parameters=stream(Verb.ENCRYPT), data=bytes(MAX_DATA_BYTES)))
        for _ in range(8)
    ]
    await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
    await two.submit(Operation.NULL)
    assert sum(f.done() for f in flood) < len(flood) - 2
    await asyncio.gather(*flood)
    await one.close()
    await two.close()


async def test_the_lease_ends_by_the_cards_own_timer(server: CardServer) -> None:
    consumer = Consumer()
    sock, function = await attach(server, consumer)
    client = SocketCard(sock)
    await client.start()
    await load(client, consumer, 150)
    await generate(client)
    async with asyncio.timeout(5):
        while function.keys:
            await asyncio.sleep(0.01)
    assert function.deadline is None
    with pytest.raises(LeaseExpired):
        await client.submit(Operation.RANDOM, parameters=codec.encode(RandomRequest(1)))
    await client.close()


# -- ends --------------------------------------------------------------------------------------------------------------


async def test_detaching_zeroises_and_ends_what_is_under_way(server: CardServer) -> None:
    consumer = Consumer()
    sock, function = await attach(server, consumer)
    client = SocketCard(sock)
    await client.start()
    await load(client, consumer)
    handle = await generate(client)
    secret = function._keys.get(handle).secret
    waiting = asyncio.create_task(generate(client, "RSA-3072-PSS"))
    await asyncio.sleep(0)
    server.detach(function.vcm)
    assert not any(secret)
    with pytest.raises(CardUnavailable):
        await waiting
    with pytest.raises(CardUnavailable):
        await client.submit(Operation.NULL)
    assert not client.connected
    server.detach(function.vcm)
    await client.close()


async def test_a_vcm_that_goes_takes_its_keys_with_it(server: CardServer, alice: SocketCard) -> None:
    await generate(alice)
    (function,) = card().functions
    chain = function._chain
    assert chain is not None
    before = card().operations
    await alice.close()
    async with asyncio.timeout(5):
        while list(card().functions):
            await asyncio.sleep(0.001)
    assert not any(chain.wrapping)
    assert card().operations >= before > 0
    await alice.close()


async def test_one_vcc_for_each_vcm(server: CardServer) -> None:
    _, function = await attach(server)
    with pytest.raises(Exists):
        await attach(server, vcm=function.vcm)
    server.detach(function.vcm)
    ours, _ = await attach(server, vcm=function.vcm)
    ours.close()


async def test_a_card_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    client = SocketCard(ours)
    await client.close()
    with pytest.raises(CardUnavailable):
        await client.submit(Operation.NULL)
    with pytest.raises(CardUnavailable):
        await SocketCard(ours).start()


async def test_a_cancelled_call_gives_back_what_it_opened(server: CardServer, alice: SocketCard) -> None:
    handle = await generate(alice)
    (function,) = card().functions
    for operation, parameters in (
        (Operation.BEGIN, stream(Verb.ENCRYPT)),
        (Operation.GENERATE, codec.encode(RowRequest(new_key_id(), 1, codec.encode(VersionAttributes("SM4-GCM", 1.0))))),
        (Operation.NULL, b""),
        (Operation.UNLOAD, b""),
    ):
        call = asyncio.create_task(alice.submit(operation, handle=handle, parameters=parameters))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    for _ in range(3):
        await alice.submit(Operation.NULL)
    assert function.keys == 0
    assert len(function._streams) == 0


# -- certificates ------------------------------------------------------------------------------------------------------


def test_a_card_is_certified_once_and_as_itself() -> None:
    made = Card(MachineId("m2"))
    with pytest.raises(CertificateInvalid):
        made.certify(reply_for(card(), identity=Identity(Role.CARD, made.id)))
    with pytest.raises(CertificateInvalid):
        made.certify(reply_for(made, identity=Identity(Role.CARD, card().id)))
    good = reply_for(made)
    with pytest.raises(CertificateInvalid):
        made.certify(msgspec.structs.replace(good, chain=Chain(good.chain.chain, Authority("other").pem)))
    made.certify(good)
    made.certify(good)
    with pytest.raises(Exists):
        made.certify(msgspec.structs.replace(good, kmc_signing_key=b"another"))
    assert made.csr


# -- hostile VCMs ------------------------------------------------------------------------------------------------------


async def answer_to(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    status, _, number, _, parameter_bytes, data_bytes = DESCRIPTOR.unpack(await reader.readexactly(DESCRIPTOR.size))
    body = await reader.readexactly(parameter_bytes + data_bytes)
    return status, number, body[:parameter_bytes]


CLOSING = {
    "garbage": b"\xff" * 64,
    "http": b"GET / HTTP/1.1\r\nHost: card\r\n\r\n",
    "flags": DESCRIPTOR.pack(0, 1, 1, 0, 0, 0),
    "too many parameters": DESCRIPTOR.pack(0, 0, 1, 0, MAX_PARAMETER_BYTES + 1, 0),
    "too much data": DESCRIPTOR.pack(0, 0, 1, 0, 0, 2**32 - 1),
    "good, then garbage": encode_request(Operation.NULL, 1, 0, b"", 0) + b"\xee" * 24,
}


@pytest.mark.parametrize("name", sorted(CLOSING))
async def test_what_is_no_frame_ends_that_vcc_alone(server: CardServer, alice: SocketCard, name: str) -> None:
    sock, function = await attach(server)
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    writer.write(CLOSING[name])
    async with asyncio.timeout(5):
        while await reader.read(4096):
            pass
    assert function not in list(card().functions)
    await alice.submit(Operation.NULL)
    writer.close()


@pytest.mark.parametrize("cut", [1, 23, 24, 30])
async def test_a_frame_that_stays_unfinished(server: CardServer, alice: SocketCard, cut: int) -> None:
    sock, _ = await attach(server)
    sock.send((encode_request(Operation.RUN, 1, 0, b"{}", 1000) + bytes(1000))[:cut])
    await alice.submit(Operation.NULL)
    sock.close()
    async with asyncio.timeout(5):
        while len(list(card().functions)) > 1:
            await asyncio.sleep(0.001)
    await alice.submit(Operation.NULL)


REFUSED: list[tuple[int, int, bytes, bytes, str]] = [
    (999, 0, b"", b"", "unsupported"),
    (Operation.LOAD_CMK, 0, b"", b"", "malformed"),
    (Operation.LOAD_CMK, 0, b"\xff\xfe", b"", "malformed"),
    (Operation.LEASE, 0, b"[" * 10_000, b"", "service-off"),
    (Operation.RUN, 2**64 - 1, b'{"verb":"encrypt"}', b"x", "service-off"),
]


async def test_refusals_keep_the_vcc_open(server: CardServer) -> None:
    sock, _ = await attach(server)
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    for number, (operation, handle, parameters, data, code) in enumerate(REFUSED):
        writer.write(DESCRIPTOR.pack(operation, 0, number, handle, len(parameters), len(data)) + parameters + data)
        status, echoed, body = await answer_to(reader)
        assert (status, echoed) == (FAILED, number)
        assert codec.decode(body, ErrorBody).code == code
    writer.write(encode_request(Operation.NULL, 77, 0, b"", 0))
    assert await answer_to(reader) == (DONE, 77, b"")
    writer.close()


async def test_a_defect_of_ours_tells_nothing(alice: SocketCard, caplog: pytest.LogCaptureFixture) -> None:
    (function,) = card().functions

    def broken(_: object) -> None:
        raise ValueError("the secret is 4711")

    function._under_lease[Operation.RANDOM] = broken  # type: ignore[assignment]
    with pytest.raises(Internal) as refused:
        await alice.submit(Operation.RANDOM)
    assert "4711" not in refused.value.message + caplog.text
    assert "ValueError" in caplog.text


async def test_a_vcm_that_takes_no_answers_is_not_read_from(server: CardServer, alice: SocketCard) -> None:
    """Its requests stay in its own socket: the card's memory does not grow, and others are served."""
    sock, function = await attach(server)
    sock.setblocking(False)
    flood = encode_request(Operation.DESCRIBE, 1, 0, b"", 0) * 1000
    sent = 0
    with pytest.raises(BlockingIOError):
        for _ in itertools.count():
            for _ in range(10):
                await asyncio.sleep(0)
            sent += sock.send(flood)
            assert sent < 100_000_000
    for _ in range(20):
        await alice.submit(Operation.NULL)
    served = function.operations
    connection = server._connections[function.vcm]
    assert len(connection._queue) <= QUEUE_REQUESTS + 65536 // DESCRIPTOR.size
    for _ in range(20):
        await alice.submit(Operation.NULL)
    assert function.operations == served
    # Once it takes its answers, it is served again.
    async with asyncio.timeout(10):
        while function.operations < sent // len(flood) * 1000:
            try:
                sock.recv(1024 * 1024)
            except BlockingIOError:
                await asyncio.sleep(0)
    sock.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=6))
def test_any_bytes_at_all(pieces: list[bytes]) -> None:
    """A VCM that sends noise gets errors or is closed; another one goes on."""

    async def play() -> None:
        server = CardServer(card())
        try:
            good = await connect(server)
            sock, _ = await attach(server)
            sock.setblocking(False)
            for piece in pieces:
                try:
                    sock.send(piece)
                except OSError:
                    break
                await good.submit(Operation.NULL)
            await good.submit(Operation.DESCRIBE)
            sock.close()
            await good.close()
        finally:
            server.close()

    asyncio.run(play())


# -- hostile cards, and frames -----------------------------------------------------------------------------------------


async def spoken_to(say: Callable[[int], bytes]) -> CipherfleetError:
    """What a client makes of a card that answers request ``number`` with ``say(number)``."""
    ours, theirs = socket.socketpair()
    client = SocketCard(ours)
    await client.start()
    call = asyncio.create_task(client.submit(Operation.NULL))
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    head = await reader.readexactly(DESCRIPTOR.size)
    writer.write(say(DESCRIPTOR.unpack(head)[2]))
    with pytest.raises(CipherfleetError) as refused:
        await call
    await client.close()
    writer.close()
    return refused.value


async def test_a_client_does_not_trust_what_answers() -> None:
    answers: dict[str, Callable[[int], bytes]] = {
        "another number": lambda n: encode_completion(DONE, n + 1, 0, b"", 0),
        "another status": lambda n: encode_completion(7, n, 0, b"", 0),
        "noise": lambda _: b"\xaa" * 48,
        "no error body": lambda n: encode_completion(FAILED, n, 0, b"}{", 0),
    }
    for say in answers.values():
        assert isinstance(await spoken_to(say), CardUnavailable)
    body = codec.encode(OutOfOrder("no", "do").to_reply().error)
    refused = await spoken_to(lambda n: encode_completion(FAILED, n, 0, body, 0))
    assert (type(refused), refused.message, refused.hint) == (OutOfOrder, "no", "do")


FRAMES = st.lists(
    st.tuples(st.integers(0, 65535), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=60), st.binary(max_size=90))
)


@given(FRAMES, st.lists(st.integers(1, 120), min_size=1))
def test_frames_come_out_however_the_bytes_come_in(frames: list[tuple[int, int, int, bytes, bytes]], cuts: list[int]) -> None:
    raw = b"".join(DESCRIPTOR.pack(o, 0, n, h, len(p), len(d)) + p + d for o, n, h, p, d in frames)
    assert [(f.operation, f.number, f.handle, f.parameters, bytes(f.data)) for f in feed(raw, cuts)] == frames


@given(st.binary(max_size=400), st.lists(st.integers(1, 120), min_size=1))
def test_noise_is_malformed_or_waits_for_more(raw: bytes, cuts: list[int]) -> None:
    try:
        feed(raw, cuts)
    except Malformed:
        return


def feed(raw: bytes, cuts: list[int]) -> list[Frame]:
    frames: list[Frame] = []
    reader, position = FrameReader(), 0
    for size in itertools.cycle(cuts):
        if position >= len(raw):
            return frames
        buffer = reader.buffer()
        piece = raw[position : position + min(size, len(buffer))]
        buffer[: len(piece)] = piece
        frames += reader.received(len(piece))
        position += len(piece)
    return frames


def test_a_long_frame_is_received_in_place() -> None:
    raw = DESCRIPTOR.pack(17, 0, 5, 9, 2, 300_000) + b"{}" + bytes(300_000)
    (frame,) = feed(raw, [65536])
    assert (frame.parameters, len(frame.data)) == (b"{}", 300_000)
