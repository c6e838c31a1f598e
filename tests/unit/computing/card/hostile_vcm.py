"""A VCM that keeps to nothing: its end of a vCC, raw."""

import os
import random
import socket

from cipherfleet.computing.vcc_memory import Memory, submission
from cipherfleet.contract.vcc import REGION_BYTES, RING_ENTRIES, Counter, Descriptor, Operation

_EDGES = (0, 1, 63, 64, 65536, REGION_BYTES - 1, REGION_BYTES, 2**31, 2**32 - 1)


class HostileVcm:
    """What a VCM gets, and may write to as it likes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.settimeout(5)
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 3)
        self.descriptor, self.card_bell, self.own_bell = descriptors
        self.memory = Memory(self.descriptor)
        self.socket = sock
        self.submitted = 0

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
        for descriptor in (self.descriptor, self.card_bell, self.own_bell):
            os.close(descriptor)
        self.socket.close()


_TEXTS = (b'{"verb":"encrypt"}', b'{"length":32}', b"{}", b"[" * 64, b'{"verb":"digest","digest":"SHA-256"}')


def strange(chance: random.Random) -> bytes:
    """A descriptor that is good, bad or noise; one in a few hundred reaches out of bounds."""
    if chance.random() < 0.001:
        return chance.randbytes(64)

    def number(limit: int) -> int:
        return chance.choice(_EDGES) if chance.random() < 0.0005 else chance.randrange(limit)

    return Descriptor(
        operation=chance.choice((*Operation, 999, 65535)) if chance.random() < 0.9 else chance.randrange(65536),
        number=chance.randrange(2**32),
        handle=chance.randrange(2**64) if chance.random() < 0.5 else chance.randrange(4),
        parameters_at=number(REGION_BYTES // 2),
        parameter_bytes=number(300),
        data_at=number(REGION_BYTES // 2),
        data_bytes=number(70_000) if chance.random() < 0.05 else number(200),
        room_at=number(REGION_BYTES // 2),
        room_bytes=number(4096),
    ).encode()


def fill(vcm: HostileVcm, chance: random.Random) -> None:
    """Parameters and data for requests to point at: some good JSON, much noise."""
    for _ in range(RING_ENTRIES):
        at = chance.randrange(REGION_BYTES - 4096)
        text = chance.choice((*_TEXTS, chance.randbytes(80)))
        vcm.memory.region[at : at + len(text)] = text
