"""What a VCM's network service is held against: a null handler on the same server stack, and a bare TLS echo on blocking sockets.

Each runs in a process of its own, with certificates of a CA that lives as long as the measurement.
"""

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import msgspec
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from cipherfleet.channel import tls
from cipherfleet.channel.certificates import Credentials, alternative_names, key_to_pem, new_key, to_pem
from cipherfleet.channel.server import Call, Server
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.vcm_api import EndpointsReply
from cipherfleet.services.components.bodies import Body

WANTED = struct.Struct(">II")
"""What an echo's request begins with: bytes that follow, bytes to answer."""
LISTEN = ("127.0.0.1", 0)
STALL_S = 30.0


class LimitWork(msgspec.Struct, frozen=True):
    """Configuration of such a process. ``echo``: the bare one."""

    credentials: Credentials
    echo: bool


class Listening(msgspec.Struct, frozen=True):
    port: int


def authority() -> Callable[[Identity], Credentials]:
    """A new CA: a certificate for whom you like."""
    ca_key, name = new_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
    now = datetime.now(UTC)

    def builder() -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().issuer_name(name).serial_number(x509.random_serial_number())
        return made.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=1))

    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    key_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    root = builder().subject_name(name).public_key(ca_key.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(usage, critical=True)
    trust = to_pem([root.add_extension(key_id, critical=False).sign(ca_key, hashes.SHA256())])

    def certify(identity: Identity) -> Credentials:
        key = new_key()
        made = (
            builder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.dns_name[:64])]))
            .public_key(key.public_key())
        )
        made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        made = made.add_extension(alternative_names(identity, ["127.0.0.1"]), critical=True)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False)
        return Credentials(key_to_pem(key), to_pem([made.sign(ca_key, hashes.SHA256())]), trust)

    return certify


async def main(work: LimitWork, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    if work.echo:
        listener = socket.create_server(LISTEN)
        threading.Thread(target=_accept, args=(listener, tls.server_context(work.credentials)), daemon=True).start()
        ready(Listening(listener.getsockname()[1]))
        await stop.wait()
        listener.close()
        return
    server = Server(work.credentials, max_per_certificate=64)
    port = 0

    async def null(call: Call) -> web.Response:
        """Reads as a component does, and answers as many bytes."""
        body = Body(call.request, STALL_S)
        while await body.fill(body.size):
            pass
        return web.Response(body=body.take(body.size), content_type="application/octet-stream")

    async def random(call: Call) -> web.Response:
        return web.Response(body=bytes(int(call.query("bytes"))), content_type="application/octet-stream")

    async def short(call: Call) -> web.Response:
        await null(call)
        return web.Response(body=bytes(32), content_type="application/octet-stream")

    async def endpoints(call: Call) -> EndpointsReply:
        return EndpointsReply((f"https://127.0.0.1:{port}",))

    for method, path, handler in (
        ("POST", "/v1/keys/{key}/encrypt", null),
        ("POST", "/v1/keys/{key}/sign", short),
        ("POST", "/v1/digest/{algorithm}", short),
        ("GET", "/v1/random", random),
        ("GET", "/v1/endpoints", endpoints),
    ):
        server.route(method, path, {Role.APPLICATION}, handler)
    _, port = await server.start(LISTEN)
    ready(Listening(port))
    await stop.wait()
    await server.stop()


def _accept(listener: socket.socket, context: ssl.SSLContext) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_echo, args=(connection, context), daemon=True).start()


def _echo(connection: socket.socket, context: ssl.SSLContext) -> None:
    with suppress(OSError), connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(connection, server_side=True) as channel:
            while head := receive(channel, WANTED.size):
                count, answer = WANTED.unpack(head)
                receive(channel, count)
                channel.sendall(bytes(answer))


def receive(channel: ssl.SSLSocket, count: int) -> bytes:
    """Exactly ``count`` bytes; empty when the other end is gone."""
    buffer = bytearray(count)
    view, have = memoryview(buffer), 0
    while have < count:
        taken = channel.recv_into(view[have:])
        if not taken:
            return b""
        have += taken
    return bytes(buffer)
