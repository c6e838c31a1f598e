"""Between a machine and the VCM it launched: one inherited unix socket, JSON lines. The token never crosses it."""

import asyncio
import socket
from contextlib import suppress
from typing import TypeVar

import msgspec

from cipherfleet.channel import codec
from cipherfleet.contract.errors import CipherfleetError, ErrorBody, Internal
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.messages import Chain

MAX_LINE_BYTES = 256 * 1024

T = TypeVar("T")


class FromVcm(msgspec.Struct, frozen=True, tag_field="type"):
    """What a VCM says."""


class CertificateWanted(FromVcm, frozen=True):
    """step e: ``csr`` is PKCS#10, DER."""

    csr: bytes


class News(FromVcm, frozen=True):
    """Its state changed; ``error`` says why it failed."""

    state: VcmState
    error: str = ""


class CertificateAnswer(msgspec.Struct, frozen=True):
    """What the machine answers: the KMC's chain, or its refusal."""

    chain: Chain | None = None
    error: ErrorBody | None = None


class BootChannel:
    """One end of the socket. Made by ``open``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, sock: socket.socket) -> "BootChannel":
        """Takes ``sock`` over."""
        sock.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE_BYTES))

    async def send(self, message: object) -> None:
        """Nothing happens when the other end is gone."""
        with suppress(OSError):
            self._writer.write(codec.encode(message) + b"\n")
            await self._writer.drain()

    async def receive(self, kind: type[T]) -> T | None:
        """The next message, none when the other end is gone. Raises ``Malformed``."""
        try:
            line = await self._reader.readline()
        except (OSError, ValueError):  # ValueError: longer than MAX_LINE_BYTES
            return None
        return codec.decode(line, kind, what="a boot message") if line.endswith(b"\n") else None

    async def certificate(self, csr: bytes) -> Chain:
        """step e, the VCM's side. Raises the KMC's refusal, or ``Internal`` when the machine is gone."""
        await self.send(CertificateWanted(csr))
        answer = await self.receive(CertificateAnswer)
        if answer is None:
            raise Internal("the machine is gone")
        if answer.error is not None:
            raise CipherfleetError.from_body(answer.error)
        if answer.chain is None:
            raise Internal("the machine answered without a certificate")
        return answer.chain

    async def until_closed(self) -> None:
        """Returns when the other end is gone."""
        with suppress(OSError, ValueError):
            while await self._reader.readline():
                pass

    def close(self) -> None:
        self._writer.transport.abort()
