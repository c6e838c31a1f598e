"""A VCM that keeps to nothing: its end of a vCC, raw."""

import asyncio
import os
import random
import socket

from cipherfleet.computing.vcc_memory import Memory, submission
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.contract.vcc import REGION_BYTES, Counter, Descriptor, Operation

_EDGES = (0, 1, 63, 64, 65536, REGION_BYTES - 1, REGION_BYTES, 2**31, 2**32 - 1)


class HostileVcm:
    """What a VCM gets, and may write to as it likes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(5)
        _, (descriptor, *bells), _, _ = socket.recv_fds(sock, 1, 3)
        self.memory = Memory(descriptor)
        os.close(descriptor)
        self.card_bell, self.own_bell = bells
        self.socket = sock
        self.submitted = 0
        self.handles: list[int] = [0, 1]

    @classmethod
    def take_over(cls, client: RingCard, handles: list[int]) -> "HostileVcm":
        """A VCM that turned hostile while it served, with handles of its own."""
        made = cls.__new__(cls)
        parts = client._parts
        assert parts is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(parts.own_bell)
        loop.remove_reader(client._socket)
        made.memory, made.card_bell, made.own_bell, made.socket = parts.memory, parts.card_bell, parts.own_bell, client._socket
        made.submitted, made.handles = parts.driver._submitted, handles
        return made

    def write(self, raw: bytes) -> None:
        """A request, whatever it is."""
        self.memory.submissions[submission(self.submitted)] = raw.ljust(64, b"\0")[:64]
        self.submitted = (self.submitted + 1) & 0xFFFFFFFF
        self.count(Counter.SUBMITTED, self.submitted)

    def count(self, counter: Counter, value: int) -> None:
        self.memory.publish(counter, value)
        os.eventfd_write(self.card_bell, 1)

    def take_answers(self) -> None:
        """Pretend to have seen all."""
        self.memory.publish(Counter.SEEN, self.memory.counters[Counter.COMPLETED])

    def completed(self) -> int:
        return int(self.memory.counters[Counter.COMPLETED])

    def close(self) -> None:
        self.memory.close()
        os.close(self.card_bell)
        os.close(self.own_bell)
        self.socket.close()


_TEXTS = (
    b'{"verb":"encrypt"}',
    b'{"verb":"mac"}',
    b'{"verb":"sign"}',
    b'{"verb":"digest","digest":"SHA-256"}',
    b'{"length":32}',
    b'{"length":32,"plaintext":true}',
    b"{}",
    b"[" * 18,
)
_LENGTHS = (0, *map(len, _TEXTS))


_OPERATIONS = (*(o for o in Operation if o is not Operation.DROP), 999, 65535)


def strange(chance: random.Random, handles: list[int]) -> bytes:
    """A descriptor that is good, bad or noise; one in a few hundred reaches out of bounds."""
    if chance.random() < 0.001:
        return chance.randbytes(64)

    def number(limit: int) -> int:
        return chance.choice(_EDGES) if chance.random() < 0.0005 else chance.randrange(limit)

    return Descriptor(
        operation=chance.choice(_OPERATIONS) if chance.random() < 0.999 else chance.randrange(65536),
        number=chance.randrange(2**32),
        handle=chance.randrange(2**64) if chance.random() < 0.1 else chance.choice(handles),
        parameters_at=chance.randrange(64) * 4096 if chance.random() < 0.8 else number(REGION_BYTES // 2),
        parameter_bytes=chance.choice(_LENGTHS) if chance.random() < 0.8 else number(300),
        data_at=number(REGION_BYTES // 2),
        data_bytes=number(70_000) if chance.random() < 0.05 else number(200),
        room_at=number(REGION_BYTES // 2),
        room_bytes=number(4096),
    ).encode()


def fill(vcm: HostileVcm, chance: random.Random) -> None:
    """Parameters and data for requests to point at: some good JSON, much noise."""
    for page in range(64):
        text = chance.choice(_TEXTS) if chance.random() < 0.8 else chance.randbytes(18)
        vcm.memory.region[page * 4096 : page * 4096 + len(text)] = text
