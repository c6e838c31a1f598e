"""A client over mutual TLS against a VCM; beside it a null handler on the same server stack, a bare TLS echo, the library, and peers."""

import asyncio
import os
import socket
import ssl
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cipherfleet import Client
from cipherfleet.app.bench import peers as others
from cipherfleet.app.bench.limits import WANTED, LimitWork, Listening, authority, receive
from cipherfleet.app.bench.peers import Peer
from cipherfleet.app.bench.report import Row, row
from cipherfleet.app.bench.rig import Say
from cipherfleet.app.commands.demo import sign_in_on
from cipherfleet.channel import codec, tls
from cipherfleet.channel.process import start_child
from cipherfleet.contract.ciphertext import sealed_length
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ApplicationName, ConsumerId, VcmId
from cipherfleet.contract.profile import Profile

SIZES = (64, 16 * 1024, 1024 * 1024)
OPERATIONS = ("encrypt", "sign", "digest", "random")
DIGEST_BYTES, SIGNATURE_BYTES = 32, 71
VCM = VcmId("vcm-000000000000")

Job = Callable[[], Awaitable[object]]


class Plan(NamedTuple):
    rounds: int
    slice_s: float
    connections: tuple[int, ...]


FULL = Plan(7, 0.5, (1, 4, 32))
QUICK = Plan(1, 0.15, (1, 8))


class _Places(NamedTuple):
    vcm: Client
    null: Client
    keys: dict[str, str]
    echo_port: int
    echo_context: ssl.SSLContext
    peers: dict[str, Peer]


async def network(folder: Path, plan: Plan, say: Say, python: Path | None = None) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """``python``: the interpreter that has the peers' libraries. Rows, ratios, and what is to be known of the peers."""
    taken: dict[tuple[str, int, str, int], list[float]] = {}
    speeds: dict[tuple[str, int, str, int], list[float]] = {}
    async with AsyncExitStack() as held:
        say("starting peers")
        running, missing = await held.enter_async_context(others.started(python, max(plan.connections))) if python else ([], {})
        places = await held.enter_async_context(_places(folder, running))
        order = ("vcm", "null", "echo", *places.peers)
        for number in range(plan.rounds):
            for operation in OPERATIONS:
                for size in SIZES:
                    for connections in plan.connections:
                        say(f"round {number + 1} of {plan.rounds}: {operation}, {size} bytes, {connections} connections")
                        turn = number % len(order)
                        for where in order[turn:] + order[:turn]:
                            seconds = await _slice(places, operation, size, where, connections, plan.slice_s)
                            if seconds is None:
                                continue
                            taken.setdefault((operation, size, where, connections), []).extend(seconds)
                            speeds.setdefault((operation, size, where, connections), []).append(len(seconds) / plan.slice_s)
                await _alone(places, operation, plan, taken, speeds)
    rows = []
    for (operation, size, where, connections), seconds in taken.items():
        typical = statistics.median(speeds[operation, size, where, connections])
        found = {**row(operation, size, where, seconds or [plan.slice_s]), "connections": connections}
        rows.append({**found, "ops_s": round(typical, 1), "bytes_s": round(typical * size)})
    about = {f"{name}, not there": why for name, why in missing.items()}
    for peer in running:
        about |= {f"{peer.name}, {operation} from {size} bytes up": why for (operation, size), why in sorted(peer.refused.items())}
    return rows, _ratios(speeds), about


def _ratios(speeds: dict[tuple[str, int, str, int], list[float]]) -> list[Row]:
    """The median of the rounds' own ratios."""
    found = []
    for other in dict.fromkeys(where for _, _, where, _ in speeds if where != "vcm"):
        for (operation, size, where, connections), over in speeds.items():
            under = speeds.get((operation, size, other, connections))
            if where != "vcm" or under is None:
                continue
            values = [a / b for a, b in zip(over, under, strict=False) if b]
            if values:
                ratio = {"ratio": f"vcm/{other}", "operation": operation, "size": size, "connections": connections}
                found.append({**ratio, "value": round(statistics.median(values), 4)})
    return found


# -- places ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _places(folder: Path, peers: list[Peer]) -> AsyncIterator[_Places]:
    certify, consumer = authority(), ConsumerId("acme")
    application = certify(Identity(Role.APPLICATION, "bench", consumer))
    async with AsyncExitStack() as held:
        ports = []
        for echo in (False, True):
            process, said = await start_child(
                (sys.executable, "-m", "cipherfleet.app.roles", "bench-limit"),
                LimitWork(certify(Identity(Role.VCM, VCM, consumer)), echo),
                log_file=folder / "limits.log",
            )
            held.push_async_callback(process.wait)
            held.callback(process.terminate)
            ports.append(codec.decode(said, Listening).port)
        profile = await sign_in_on(folder, consumer, "bench")
        stand_in = Profile(
            consumer,
            ApplicationName("bench"),
            (f"https://127.0.0.1:{ports[0]}",),
            application.trust.decode(),
            application.chain.decode(),
            application.key.decode(),
            profile.rights,
            profile.not_after,
        )
        vcm = await held.enter_async_context(Client(profile))
        null = await held.enter_async_context(Client(stand_in))
        keys = {"encrypt": (await vcm.create_key("AES-256-GCM")).id, "sign": (await vcm.create_key("ECDSA-P-256")).id}
        context = tls.client_context(application)
        yield _Places(vcm, null, dict(keys), ports[1], context, {peer.name: peer for peer in peers})


async def _slice(places: _Places, operation: str, size: int, where: str, connections: int, slice_s: float) -> list[float] | None:
    """What each operation took that ended in this time, seconds; None where a peer does not do it."""
    if where in places.peers:
        return await places.peers[where].measure(operation, size, connections, slice_s)
    if where == "echo":
        return await asyncio.to_thread(_echo, places, operation, size, connections, slice_s)
    job = _job(places.vcm if where == "vcm" else places.null, places.keys, operation, size)
    await asyncio.gather(*(job() for _ in range(connections)))  # connected, and warm
    taken: list[float] = []
    end = time.perf_counter() + slice_s

    async def work() -> None:
        began = time.perf_counter()
        while began < end:
            await job()
            now = time.perf_counter()
            if now <= end:
                taken.append(now - began)
            began = now

    await asyncio.gather(*(work() for _ in range(connections)))
    return taken


def _job(client: Client, keys: dict[str, str], operation: str, size: int) -> Job:
    data = os.urandom(size)
    match operation:
        case "encrypt":
            return lambda: client.encrypt(keys["encrypt"], data)
        case "sign":
            return lambda: client.sign(keys["sign"], data)
        case "digest":
            return lambda: client.digest("SHA-256", data)
        case _:
            return lambda: client.random(size)


def _bytes(operation: str, size: int) -> tuple[int, int]:
    """What goes there and what comes back."""
    answers = {"encrypt": sealed_length(size), "sign": SIGNATURE_BYTES, "digest": DIGEST_BYTES}
    return (size, answers[operation]) if operation in answers else (0, size)


def _echo(places: _Places, operation: str, size: int, connections: int, slice_s: float) -> list[float]:
    """Blocking sockets, a thread for each connection."""
    there, back = _bytes(operation, size)
    request = WANTED.pack(there, back) + bytes(there)
    taken: list[float] = []
    connected = threading.Barrier(connections)

    def work() -> None:
        name = Identity(Role.VCM, VCM, ConsumerId("acme")).dns_name
        with socket.create_connection(("127.0.0.1", places.echo_port)) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with places.echo_context.wrap_socket(plain, server_hostname=name) as channel:
                connected.wait()
                began = time.perf_counter()
                end = began + slice_s
                while began < end:
                    channel.sendall(request)
                    receive(channel, back)
                    now = time.perf_counter()
                    if now <= end:
                        taken.append(now - began)
                    began = now

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


async def _alone(
    places: _Places,
    operation: str,
    plan: Plan,
    taken: dict[tuple[str, int, str, int], list[float]],
    speeds: dict[tuple[str, int, str, int], list[float]],
) -> None:
    """The library in this process, and what has no counterpart: decryption."""
    cipher = AESGCM(AESGCM.generate_key(256))
    for size in SIZES:
        data = os.urandom(size)
        jobs: dict[tuple[str, str], Job] = {}
        if operation == "encrypt":
            sealed = await places.vcm.encrypt(places.keys["encrypt"], data)
            jobs["encrypt", "direct"] = _direct(lambda data=data: cipher.encrypt(os.urandom(12), data, None))  # type: ignore[misc]
            jobs["decrypt", "vcm"] = lambda sealed=sealed: places.vcm.decrypt(sealed)  # type: ignore[misc]
        elif operation == "digest":
            jobs["digest", "direct"] = _direct(lambda data=data: _digest(data))  # type: ignore[misc]
        for (name, where), job in jobs.items():
            seconds: list[float] = []
            end = time.perf_counter() + plan.slice_s
            while (began := time.perf_counter()) < end:
                await job()
                seconds.append(time.perf_counter() - began)
            taken.setdefault((name, size, where, 1), []).extend(seconds)
            speeds.setdefault((name, size, where, 1), []).append(len(seconds) / plan.slice_s)


def _direct(work: Callable[[], object]) -> Job:
    async def call() -> object:
        return work()

    return call


def _digest(data: bytes) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()
