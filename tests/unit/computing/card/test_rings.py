"""The vCC over a socket: many requests under way, many vCCs, and whatever a hostile VCM may send."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from functools import cache

import msgspec
import pytest

from cipherfleet.channel import codec
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.card_server import CardServer
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import (
    CardUnavailable,
    CertificateInvalid,
    Exists,
    Internal,
    LeaseExpired,
    TooLarge,
)
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import MachineId, VcmId, new_key_id, new_vcm_id
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.vcc import (
    CHUNK_BYTES,
    MAX_DATA_BYTES,
    MAX_PARAMETER_BYTES,
    CardDescription,
    Operation,
    RandomRequest,
    RowRequest,
    StreamRequest,
    Verb,
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


@pytest.fixture(params=[0, 2], ids=["alone", "threads"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[CardServer]:
    running = CardServer(card(), request.param)
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


async def connect(server: CardServer, consumer: Consumer | None = None) -> RingCard:
    sock, _ = await attach(server, consumer)
    client = RingCard(sock)
    await client.start()
    return client


async def load(client: RingCard, consumer: Consumer, lease_ms: int = 60_000) -> None:
    vcm = msgspec.json.decode((await client.submit(Operation.DESCRIBE)).parameters, type=CardDescription).vcm
    public = card().transport
    delivery = consumer.delivery(consumer.share(card().id, vcm), rsa_public=public.rsa.public_key(), hpke_public=public.hpke_public_key)
    await client.submit(Operation.LOAD_CMK, parameters=codec.encode(delivery))
    nonce = (await client.submit(Operation.LEASE_NONCE)).data
    await client.submit(Operation.LEASE, parameters=codec.encode(consumer.lease(nonce, lease_ms, card=card().id, vcm=vcm)))


async def generate(client: RingCard, name: str = "AES-256-GCM") -> int:
    request = RowRequest(new_key_id(), 1, codec.encode(VersionAttributes(name, 1.0)))
    done = await client.submit(Operation.GENERATE, parameters=codec.encode(request))
    assert msgspec.json.decode(done.parameters, type=EscrowRow).wrapped
    return done.value


@pytest.fixture
async def alice(server: CardServer) -> AsyncIterator[RingCard]:
    client = await connect(server)
    await load(client, Consumer(), 3_600_000)
    yield client
    await client.close()


def stream(verb: Verb, **more: object) -> bytes:
    return codec.encode(StreamRequest(verb, **more))  # type: ignore[arg-type]


# -- the way it should go ----------------------------------------------------------------------------------------------


async def test_a_file_through_the_socket(alice: RingCard) -> None:
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


async def test_many_requests_are_answered_each_with_its_own(alice: RingCard) -> None:
    handle = await generate(alice, "HMAC-SHA-256")
    messages = [str(n).encode() * 50 for n in range(600)]
    macs = await asyncio.gather(*(alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.MAC), data=m) for m in messages))
    for message, mac in zip(messages, macs, strict=True):
        await alice.submit(Operation.RUN, handle=handle, parameters=stream(Verb.VERIFY_MAC, signature=mac.data), data=message)


async def test_requests_that_wait_for_room_keep_their_order(alice: RingCard) -> None:
    """A stream far longer than the region, all of it asked for at once."""
    handle = await generate(alice)
    plaintext = os.urandom(40 * 16 * CHUNK_BYTES)
    begun = await alice.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.ENCRYPT))
    view = memoryview(plaintext)
    pieces = [view[i : i + 16 * CHUNK_BYTES] for i in range(0, len(plaintext), 16 * CHUNK_BYTES)]
    calls = [asyncio.create_task(alice.submit(Operation.UPDATE, handle=begun.value, data=p)) for p in pieces]
    calls.append(asyncio.create_task(alice.submit(Operation.FINISH, handle=begun.value, data=b"end")))
    calls[7].cancel()
    sealed = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(sealed[7], asyncio.CancelledError)
    del pieces[7], sealed[7]
    opened = await alice.submit(Operation.BEGIN, handle=handle, parameters=stream(Verb.DECRYPT, header=begun.data))
    back = []
    for answer in sealed:
        assert not isinstance(answer, BaseException)
        operation = Operation.UPDATE if answer is not sealed[-1] else Operation.FINISH
        back.append((await alice.submit(operation, handle=opened.value, data=answer.data)).data)
    assert b"".join(back) == b"".join(pieces) + b"end"


async def test_the_largest_request(alice: RingCard) -> None:
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


async def test_making_an_rsa_key_holds_nobody_up(server: CardServer, alice: RingCard) -> None:
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
    client = RingCard(sock)
    await client.start()
    await load(client, consumer, 150)
    await generate(client)
    async with asyncio.timeout(20):
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
    client = RingCard(sock)
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


async def test_a_vcm_that_goes_takes_its_keys_with_it(server: CardServer, alice: RingCard) -> None:
    await generate(alice)
    (function,) = card().functions
    chain = function._chain
    assert chain is not None
    before = card().operations
    await alice.close()
    async with asyncio.timeout(20):
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
    client = RingCard(ours)
    await client.close()
    with pytest.raises(CardUnavailable):
        await client.submit(Operation.NULL)
    with pytest.raises(CardUnavailable):
        await RingCard(ours).start()


async def test_a_cancelled_call_gives_back_what_it_opened(server: CardServer, alice: RingCard) -> None:
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


async def test_a_defect_of_ours_tells_nothing(alice: RingCard, caplog: pytest.LogCaptureFixture) -> None:
    (function,) = card().functions

    def broken(_: object) -> None:
        raise ValueError("the secret is 4711")

    function._under_lease[Operation.RANDOM] = broken  # type: ignore[assignment]
    with pytest.raises(Internal) as refused:
        await alice.submit(Operation.RANDOM)
    assert "4711" not in refused.value.message + caplog.text
    assert "ValueError" in caplog.text
