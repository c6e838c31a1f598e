"""Between a machine and its card process: one unix socket, JSON messages, a vCC's socket riding along (``SCM_RIGHTS``)."""

import asyncio
import os
import socket
import struct
from collections import deque
from contextlib import suppress

import msgspec

from cipherfleet.computing.card_confinement import Protection
from cipherfleet.contract.errors import CardUnavailable, ErrorBody
from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, VcmId
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.machine_api import CardReport
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcc import VccLimits, VccStatistics

_LENGTH = struct.Struct(">I")
_MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_MAX_DESCRIPTORS = 4


class CardConfig(msgspec.Struct, frozen=True):
    """``control``: the descriptor of the control socket that the child inherits."""

    machine: MachineId
    control: int
    settings: Settings = Settings()


class CardReady(msgspec.Struct, frozen=True):
    """What a card says once it runs. ``csr`` is over its RSA transport key, DER."""

    id: CardId
    csr: bytes
    hpke_public_key: bytes
    protection: Protection


class VccStatus(msgspec.Struct, frozen=True):
    vcm: VcmId
    consumer: ConsumerId
    serving: bool
    operations: int
    bytes: int
    keys: int
    limits: VccLimits = VccLimits()
    statistics: VccStatistics = VccStatistics()


class CardStatus(msgspec.Struct, frozen=True):
    """The card as a whole, and each of its vCCs."""

    report: CardReport
    vccs: tuple[VccStatus, ...]
    protection: Protection


class ToCard(msgspec.Struct, frozen=True, tag_field="type"):
    """What the machine asks for; the answer carries the same number."""

    number: int


class Certify(ToCard, frozen=True):
    reply: CardReply


class Attach(ToCard, frozen=True):
    """The card's end of the vCC's socket rides along."""

    vcm: VcmId
    consumer: ConsumerId
    limits: VccLimits = VccLimits()


class Detach(ToCard, frozen=True):
    vcm: VcmId


class Limit(ToCard, frozen=True):
    """Hold a vCC to these limits from now on."""

    vcm: VcmId
    limits: VccLimits


class StatusWanted(ToCard, frozen=True):
    pass


CardRequests = Certify | Attach | Detach | Limit | StatusWanted


class FromCard(msgspec.Struct, frozen=True):
    number: int
    error: ErrorBody | None = None
    status: CardStatus | None = None


class ControlChannel:
    """One end. Messages are length (u32) and JSON; descriptors come in the order of the messages that brought them."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._sending = asyncio.Lock()

    async def send(self, message: object, descriptors: tuple[int, ...] = ()) -> None:
        """Raises ``CardUnavailable`` when the other end is gone."""
        body = msgspec.json.encode(message)
        rest = memoryview(_LENGTH.pack(len(body)) + body)
        async with self._sending:
            while rest:
                try:
                    sent = socket.send_fds(self._socket, [rest], list(descriptors)) if descriptors else self._socket.send(rest)
                except BlockingIOError:
                    await self._until(writable=True)
                    continue
                except OSError as exc:
                    raise CardUnavailable("the crypto card's process is gone") from exc
                rest, descriptors = rest[sent:], ()

    async def receive(self) -> bytes:
        """The next message; empty when the other end is gone or sends what is no message."""
        while True:
            if len(self._received) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._received)
                end = _LENGTH.size + length
                if length > _MAX_MESSAGE_BYTES:
                    return b""
                if len(self._received) >= end:
                    message = bytes(self._received[_LENGTH.size : end])
                    del self._received[:end]
                    return message
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 65536, _MAX_DESCRIPTORS)
            except BlockingIOError:
                await self._until(writable=False)
                continue
            except OSError:
                return b""
            self._descriptors += descriptors
            if not data:
                return b""
            self._received += data

    def take_socket(self) -> socket.socket:
        """The socket that came with the message last received. Raises ``CardUnavailable`` when none did."""
        if not self._descriptors:
            raise CardUnavailable("no socket came with the message")
        return socket.socket(fileno=self._descriptors.popleft())

    def close(self) -> None:
        while self._descriptors:
            with suppress(OSError):
                os.close(self._descriptors.popleft())
        self._socket.close()

    async def _until(self, *, writable: bool) -> None:
        loop, descriptor = asyncio.get_running_loop(), self._socket.fileno()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        watch, unwatch = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
        watch(descriptor, wake)
        try:
            await ready
        finally:
            unwatch(descriptor)
