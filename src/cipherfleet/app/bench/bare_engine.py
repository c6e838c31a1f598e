"""The same task queue without a VCM: straight at a card's engine in one process, and straight at the library."""

import asyncio
import itertools
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cipherfleet.app.bench.task_queue import Counted, Slice, Tally
from cipherfleet.app.bench.workload import Request, put_into_service, requests_with, slices
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.computing.vcc_driver import ANSWER_BYTES
from cipherfleet.computing.vcm_boot import BootChannel
from cipherfleet.contract.errors import Internal
from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, VcmId
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.vcc import CmkDelivery, Completion, Operation


class EngineWork(msgspec.Struct, frozen=True):
    """Configuration: the descriptor of the boot socket, and the names that the card's one virtual function has."""

    boot: int
    machine: MachineId
    vcm: VcmId
    consumer: ConsumerId


class CardShown(msgspec.Struct, frozen=True):
    """The transport keys of this process's card: what KMC and terminal need."""

    id: CardId
    csr: bytes
    hpke_public_key: bytes


class CardGiven(msgspec.Struct, frozen=True):
    """What KMC and terminal make of them."""

    reply: CardReply
    delivery: CmkDelivery


class _Buffers(NamedTuple):
    """Memory of one task, as each has its own in a vCC's region."""

    data: memoryview
    room: memoryview


class _Waiting(NamedTuple):
    since: float
    buffers: _Buffers


async def main(work: EngineWork, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    """The card is put into service, then every slice that is told is worked off, until nobody is there to tell."""
    boot = await BootChannel.open(socket.socket(fileno=work.boot))
    try:
        card = Card(work.machine)
        await boot.send(CardShown(card.id, card.csr, card.transport.hpke_public_key))
        given = await boot.receive(CardGiven)
        if given is None:
            raise Internal("nobody certified the card")
        card.certify(given.reply)
        function = card.attach(work.vcm, work.consumer)
        requests = requests_with(await put_into_service(_OwnCard(function), boot, given.delivery))
        ready(None)
        async for wanted in slices(boot, stop):
            counted = by_library(wanted) if wanted.direct else through_a_function(function, requests[wanted.operation], wanted)
            await boot.send(counted)
    finally:
        boot.close()


class _OwnCard:
    """A virtual function as a ``VirtualCryptoCard``: no ring between."""

    def __init__(self, function: VirtualFunction) -> None:
        self._function = function

    async def submit(
        self, operation: Operation, *, handle: int = 0, parameters: bytes = b"", data: bytes | bytearray | memoryview = b""
    ) -> Completion:
        answer = self._function.run(operation, handle, parameters, data)
        return Completion(answer.value, answer.parameters, bytes(answer.data))


def through_a_function(function: VirtualFunction, request: Request, wanted: Slice) -> Counted:
    """The queue is filled up to ``depth``, and its first task done: what a card does, with nothing around it."""
    room_bytes = wanted.size + wanted.size // 256 + ANSWER_BYTES
    buffers = itertools.cycle(
        [_Buffers(memoryview(bytearray(wanted.size)), memoryview(bytearray(room_bytes))) for _ in range(wanted.depth)]
    )
    queue: deque[_Waiting] = deque()
    tally = Tally(wanted)
    due = tally.arrival()
    while due is not None or queue:
        while due is not None and due <= time.monotonic() and len(queue) < wanted.depth:
            queue.append(_Waiting(time.monotonic(), next(buffers)))
            due = tally.arrival()
        if queue:
            task = queue.popleft()
            function.run(request.operation, request.handle, request.parameters, task.buffers.data, task.buffers.room)
            tally.done(task.since)
    return tally.counted()


def by_library(wanted: Slice) -> Counted:
    """One call after the other."""
    tally, call = Tally(wanted), _call(wanted)
    now = time.monotonic()
    while now < wanted.ends:
        call()
        now = tally.done(now)
    return tally.counted()


def _call(wanted: Slice) -> Callable[[], object]:
    data = bytes(wanted.size)
    match wanted.operation:
        case "aes-256-gcm":
            cipher, numbers, into = AESGCM(AESGCM.generate_key(256)), itertools.count(), bytearray(wanted.size + 16)
            return lambda: cipher.encrypt_into(next(numbers).to_bytes(12, "big"), data, None, into)
        case "aes-256-cbc":
            cipher_, vector, room = algorithms.AES(secrets.token_bytes(32)), secrets.token_bytes(16), bytearray(wanted.size + 31)
            return lambda: _cbc(cipher_, vector, data, room)
        case "sha-256":
            return lambda: _digest(data)
        case _:
            return lambda: None


def _cbc(cipher: algorithms.AES, vector: bytes, data: bytes, room: bytearray) -> int:
    """Whole blocks, without the one of padding."""
    encryptor = Cipher(cipher, modes.CBC(vector)).encryptor()
    written = encryptor.update_into(data, room)
    encryptor.finalize()
    return written


def _digest(data: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()
