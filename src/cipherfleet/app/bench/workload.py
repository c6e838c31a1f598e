"""A VCM of a measurement: confined as every VCM (but the one that stands for the host), with a vCC of its own, and nothing in it but a
task queue."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import msgspec

from cipherfleet.app.bench.task_queue import Counted, Slice, Tally
from cipherfleet.channel import codec
from cipherfleet.computing.confinement import Confinement, confine
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.computing.vcm_boot import BootChannel
from cipherfleet.contract.errors import Internal
from cipherfleet.contract.escrow import VersionAttributes
from cipherfleet.contract.ids import new_key_id
from cipherfleet.contract.machine_api import Isolation
from cipherfleet.contract.statements import Signed
from cipherfleet.contract.vcc import CmkDelivery, Operation, RowRequest, StreamRequest, Verb, VirtualCryptoCard

SLEEP_S = 0.001
"""An arrival that is nearer than this is not slept for: a loop's timers are no finer."""


class VcmWork(msgspec.Struct, frozen=True):
    """Configuration of a VCM of a measurement: descriptors of its vCC and its boot socket, what its card is to be given."""

    vcc: int
    boot: int
    delivery: CmkDelivery
    confinement: Confinement | None


class LeaseWanted(msgspec.Struct, frozen=True):
    nonce: bytes


class Confined(NamedTuple):
    """A VCM that has confined itself, and what is in force; nothing where the same work runs on the host."""

    work: VcmWork
    isolation: Isolation | None


class Request(NamedTuple):
    operation: Operation
    handle: int
    parameters: bytes


def confined(work: VcmWork) -> Confined:
    return Confined(work, confine(work.confinement) if work.confinement is not None else None)


async def main(process: Confined, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    """A VCM's life: its card is put into service, then it works off every slice that it is told, until nobody is there to tell."""
    work, isolation = process
    boot = await BootChannel.open(socket.socket(fileno=work.boot))
    card = RingCard(socket.socket(fileno=work.vcc))
    try:
        await card.start()
        requests = requests_with(await put_into_service(card, boot, work.delivery))
        ready(isolation)
        async for wanted in slices(boot, stop):
            await boot.send(await through_a_vcc(card, requests[wanted.operation], wanted))
    finally:
        await card.close()
        boot.close()


async def slices(boot: BootChannel, stop: asyncio.Event) -> AsyncIterator[Slice]:
    """What there is to do, until ``stop``, or until nobody is there to tell."""
    stopping = asyncio.create_task(stop.wait())
    stopping.add_done_callback(lambda _: boot.close())
    try:
        while (wanted := await boot.receive(Slice)) is not None:
            yield wanted
    finally:
        stopping.cancel()


class Handles(NamedTuple):
    """Of the keys of a measurement."""

    gcm: int
    cbc: int


async def put_into_service(card: VirtualCryptoCard, boot: BootChannel, delivery: CmkDelivery) -> Handles:
    """step f, a lease, and the keys."""
    await card.submit(Operation.LOAD_CMK, parameters=codec.encode(delivery))
    await boot.send(LeaseWanted((await card.submit(Operation.LEASE_NONCE)).data))
    lease = await boot.receive(Signed)
    if lease is None:
        raise Internal("nobody signed the lease")
    await card.submit(Operation.LEASE, parameters=codec.encode(lease))
    return Handles(await generate(card, "AES-256-GCM"), await generate(card, "AES-256-CBC"))


async def generate(card: VirtualCryptoCard, algorithm: str) -> int:
    row = RowRequest(new_key_id(), 1, codec.encode(VersionAttributes(algorithm, time.time())))
    return (await card.submit(Operation.GENERATE, parameters=codec.encode(row))).value


async def through_a_vcc(card: VirtualCryptoCard, request: Request, wanted: Slice) -> Counted:
    """``depth`` tasks, each of which takes the next arrival as soon as it is free."""
    tally, data = Tally(wanted), bytes(wanted.size)

    async def task() -> None:
        while (due := tally.arrival()) is not None:
            left = due - time.monotonic()
            if left > SLEEP_S:
                await asyncio.sleep(left)
            since = time.monotonic()
            await card.submit(request.operation, handle=request.handle, parameters=request.parameters, data=data)
            tally.done(since)

    await asyncio.gather(*(task() for _ in range(wanted.depth)))
    return tally.counted()


def requests_with(handles: Handles) -> dict[str, Request]:
    """What each operation of a slice asks the card for."""
    encrypt = codec.encode(StreamRequest(Verb.ENCRYPT))
    return {
        "null": Request(Operation.NULL, 0, b""),
        "aes-256-gcm": Request(Operation.RUN, handles.gcm, encrypt),
        "aes-256-cbc": Request(Operation.RUN, handles.cbc, encrypt),
        "sha-256": Request(Operation.RUN, 0, codec.encode(StreamRequest(Verb.DIGEST, digest="SHA-256"))),
    }
