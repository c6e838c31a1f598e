"""The card as a process of its own: what it gave up, what it answers to its machine, and how it ends."""

import asyncio
import os
import re
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from cipherfleet.channel import codec
from cipherfleet.channel.process import running
from cipherfleet.computing import card_confinement, card_process
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_confinement import Protection
from cipherfleet.computing.card_control import Attach, CardConfig, ControlChannel, Detach, FromCard, StatusWanted
from cipherfleet.computing.card_handle import CardHandle
from cipherfleet.computing.engine_wrap import combine, unwrap
from cipherfleet.computing.vcc_ring import RingCard
from cipherfleet.contract.errors import CardUnavailable, CertificateInvalid, Exists, TimedOut
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, VcmId, new_key_id
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.messages import Chain
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcc import CardDescription, Operation, RandomRequest, RowRequest, StreamRequest, Verb
from tests.pki import Authority
from tests.unit.computing.card.consumer import KMC_SPKI, Consumer

M1 = MachineId("m1")
VCM = VcmId("vcm-0000000000aa")
OPEN = Protection(False, False, False, False, False, "0")


@pytest.fixture
async def handle(tmp_path: Path) -> AsyncIterator[CardHandle]:
    (tmp_path / "run").mkdir()
    started = await CardHandle.start(M1, tmp_path, Settings(), tmp_path / "run")
    yield started
    await started.stop()
    assert not psutil.pid_exists(started.pid)


def certificate_for(handle: CardHandle, card: CardId | None = None) -> CardReply:
    request = x509.load_der_x509_csr(handle.csr)
    assert request.is_signature_valid
    root = Authority("root")
    chain = root.certify(Identity(Role.CARD, card or handle.id), request.public_key())  # type: ignore[arg-type]
    return CardReply(Chain(chain, root.pem), KMC_SPKI)


async def serve(client: RingCard, consumer: Consumer, handle: CardHandle) -> None:
    """step f, with the terminal's and the KMC's part played here."""
    rsa_public = x509.load_der_x509_csr(handle.csr).public_key()
    delivery = consumer.delivery(consumer.share(handle.id, VCM), rsa_public=rsa_public, hpke_public=handle.hpke_public_key)  # type: ignore[arg-type]
    await client.submit(Operation.LOAD_CMK, parameters=codec.encode(delivery))
    nonce = (await client.submit(Operation.LEASE_NONCE)).data
    lease = consumer.lease(nonce, 60_000, card=handle.id, vcm=VCM)
    await client.submit(Operation.LEASE, parameters=codec.encode(lease))


async def in_service(handle: CardHandle) -> tuple[RingCard, Consumer]:
    """A certified card with one vCC that serves."""
    await handle.certify(certificate_for(handle))
    consumer = Consumer()
    client = RingCard(await handle.attach(VCM, consumer.name))
    await client.start()
    await serve(client, consumer, handle)
    return client, consumer


async def test_service_over_a_real_process(handle: CardHandle, tmp_path: Path) -> None:
    assert [(e.role, e.id, e.pid) for e in running(tmp_path / "run")] == [("card", handle.id, handle.pid)]
    assert len(handle.hpke_public_key) == 1184 + 32
    with pytest.raises(CertificateInvalid):
        await handle.certify(certificate_for(handle, CardId("card-m1-00000000")))
    await handle.certify(certificate_for(handle))
    consumer = Consumer()
    client = RingCard(await handle.attach(VCM, consumer.name))
    await client.start()
    described = msgspec.json.decode((await client.submit(Operation.DESCRIBE)).parameters, type=CardDescription)
    assert (described.card, described.vcm, described.consumer, described.loaded) == (handle.id, VCM, consumer.name, False)
    await serve(client, consumer, handle)
    assert len((await client.submit(Operation.RANDOM, parameters=codec.encode(RandomRequest(99)))).data) == 99
    with pytest.raises(Exists):
        await handle.attach(VCM, consumer.name)
    status = await handle.status()
    assert (status.report.id, status.report.pid, status.report.vccs, status.report.operations) == (handle.id, handle.pid, 1, 5)
    assert [(v.vcm, v.consumer, v.serving, v.operations) for v in status.vccs] == [(VCM, consumer.name, True, 5)]
    await handle.detach(VCM)
    with pytest.raises(CardUnavailable):
        await client.submit(Operation.NULL)
    await handle.detach(VCM)
    assert (await handle.status()).report.vccs == 0
    await client.close()


def found_in_memory(pid: int, needles: dict[str, bytes]) -> set[str]:
    """Which needles stand somewhere in a process's memory (/proc/PID/mem)."""
    found: set[str] = set()
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, rights = line.split()[:2]
            start, end = (int(part, 16) for part in area.split("-"))
            if not rights.startswith("rw"):
                continue
            with suppress(OSError):
                memory.seek(start)
                content = memory.read(end - start)
                found |= {name for name, needle in needles.items() if needle in content}
    return found


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to read the memory of another process")
async def test_dropped_keys_are_nowhere_in_the_cards_memory(handle: CardHandle) -> None:
    client, consumer = await in_service(handle)
    wrapping = combine(bytearray(consumer.hsm_share), bytearray(consumer.ukey_share), consumer.name)
    shares = {"HSM share": consumer.hsm_share, "Ukey share": consumer.ukey_share}
    keys = {"wrapping key": bytes(wrapping)}
    for name in ("AES-256-GCM", "SM4-GCM", "HMAC-SHA-256", "Ed25519", "RSA-3072-PSS"):
        request = RowRequest(new_key_id(), 1, codec.encode(VersionAttributes(name, 1.0)))
        done = await client.submit(Operation.GENERATE, parameters=codec.encode(request))
        material = bytes(unwrap(wrapping, consumer.name, msgspec.json.decode(done.parameters, type=EscrowRow)))
        if name == "RSA-3072-PSS":
            private = serialization.load_der_private_key(material, None)
            assert isinstance(private, rsa.RSAPrivateKey)
            prime = private.private_numbers().p
            shares["RSA prime in a file's form"] = prime.to_bytes(192, "big")
            keys["RSA prime"] = prime.to_bytes(192, sys.byteorder)
        else:
            keys[name] = material[-32:]
        verb = {"AES-256-GCM": Verb.ENCRYPT, "SM4-GCM": Verb.ENCRYPT, "HMAC-SHA-256": Verb.MAC}.get(name, Verb.SIGN)
        await client.submit(Operation.RUN, handle=done.value, parameters=codec.encode(StreamRequest(verb)), data=bytes(100_000))
    assert found_in_memory(handle.pid, keys | shares) == set(keys)
    await client.submit(Operation.DROP)
    assert found_in_memory(handle.pid, keys | shares) == set()
    await client.close()


async def test_what_a_card_process_gave_up(handle: CardHandle) -> None:
    said = handle.protection
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{handle.pid}/status").read_text().splitlines())
    assert said.undumpable
    assert said.no_new_privileges is (status["NoNewPrivs"].strip() == "1") is True
    assert said.seccomp is (status["Seccomp"].strip() == "2") is True
    assert int(said.capabilities, 16) == int(status["CapEff"], 16)
    assert int(said.capabilities, 16) & ~(1 << 14) == 0
    if said.memory_locked:
        assert int(status["VmLck"].split()[0]) > 0
    if said.network_isolated and os.geteuid() == 0:
        assert Path(f"/proc/{handle.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to read the memory map of another process")
async def test_the_memory_of_a_vcc_is_pinned_where_memory_is(handle: CardHandle) -> None:
    """What the card touched of a region stays in memory: no request waits for a disk, no plaintext gets onto one."""
    client, _ = await in_service(handle)
    await client.submit(Operation.RANDOM, parameters=codec.encode(RandomRequest(1024 * 1024)))
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{handle.pid}/smaps").read_text(), flags=re.MULTILINE)
    (area,) = (area for area in areas if "memfd:cipherfleet-vcc" in area)
    sizes = {name: int(kib) for name, kib in re.findall(r"^(Rss|Locked): +(\d+) kB$", area, flags=re.MULTILINE)}
    assert sizes["Rss"] >= 1024
    assert (sizes["Locked"] > 0) is handle.protection.memory_locked
    assert (" lo" in re.search(r"^VmFlags:.*$", area, flags=re.MULTILINE)[0]) is handle.protection.memory_locked  # type: ignore[index]
    await client.close()


async def test_a_killed_card_is_noticed_by_all(handle: CardHandle, tmp_path: Path) -> None:
    client = RingCard(await handle.attach(VCM, ConsumerId("alice")))
    await client.start()
    waiting = asyncio.create_task(handle.wait())
    os.kill(handle.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        await waiting
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(CardUnavailable):
        await client.submit(Operation.NULL)
    with pytest.raises(CardUnavailable):
        await handle.status()
    with pytest.raises(CardUnavailable):
        await handle.attach(VCM, ConsumerId("alice"))
    await handle.detach(VCM)
    await handle.stop()
    await client.close()


async def test_a_card_whose_machine_goes_ends(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cipherfleet.app.roles", "card",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(codec.encode(CardConfig(M1, theirs.fileno())))
    process.stdin.close()
    theirs.close()
    assert b'"ready":true' in await process.stdout.readline()
    ours.close()
    async with asyncio.timeout(10):
        assert await process.wait() == 0


async def test_a_card_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TimedOut):
        await CardHandle.start(M1, tmp_path, Settings(), timeout=0.001)


CONFINED = """
import json, os, pyseccomp, socket
from cipherfleet.computing.card_confinement import confine
import msgspec
BEFORE
protection = msgspec.to_builtins(confine())
def tries(action):
    try:
        action()
    except OSError as exc:
        return exc.errno
    return 0
found = {
    "inet": tries(lambda: socket.socket(socket.AF_INET)),
    "inet6": tries(lambda: socket.socket(socket.AF_INET6)),
    "netlink": tries(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
    "unix": tries(lambda: socket.socket(socket.AF_UNIX).close()),
    "exec": tries(lambda: os.execv("/bin/true", ["true"])),
    "bind": tries(lambda: socket.socket(socket.AF_UNIX).bind("/tmp/never")),
}
blocks = [bytearray(1 << 20) for _ in range(64)]
print(json.dumps([protection, found]))
"""


async def confined(before: str = "") -> tuple[Protection, dict[str, int]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CONFINED.replace("BEFORE", before), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    protection, found = msgspec.json.decode(out)
    return msgspec.convert(protection, Protection), found


async def test_a_confined_process_reaches_nothing() -> None:
    protection, found = await confined()
    assert protection.seccomp
    assert [found[n] for n in ("inet", "inet6", "netlink", "exec", "bind")] == [1] * 5
    assert found["unix"] == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
async def test_an_ordinary_user_is_confined_too() -> None:
    """Without root: what the kernel gives, the rest reported as not in force, and allocations still work."""
    protection, found = await confined("os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)")
    assert protection.undumpable
    assert protection.no_new_privileges
    assert protection.seccomp
    assert protection.capabilities == "0"
    assert found["inet"] == 1


# -- in this process: the control socket without a child ---------------------------------------------------------------


async def test_the_life_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    said: list[object] = []
    stop = asyncio.Event()
    life = asyncio.create_task(card_process.main(card_process.Confined(CardConfig(M1, theirs.detach()), OPEN), said.append, stop))
    channel = ControlChannel(ours)

    async def ask(request: object, *descriptors: int) -> FromCard:
        await channel.send(request, descriptors)
        return codec.decode(await channel.receive(), FromCard)

    status = (await ask(StatusWanted(1))).status
    assert status is not None
    assert status.report.id == codec.decode(codec.encode(said[0]), dict)["id"]
    vcm_end, card_end = socket.socketpair()
    assert await ask(Attach(2, VCM, ConsumerId("alice")), card_end.fileno()) == FromCard(2)
    card_end.close()
    client = RingCard(vcm_end)
    await client.start()
    await client.submit(Operation.NULL)
    no_socket = await ask(Attach(3, VcmId("vcm-0000000000bb"), ConsumerId("alice")))
    assert no_socket.error is not None
    assert no_socket.error.code == "card-unavailable"
    assert await ask(Detach(4, VCM)) == FromCard(4)
    await client.close()
    stop.set()
    await life
    assert await channel.receive() == b""
    with pytest.raises(CardUnavailable):
        for _ in range(3):
            await channel.send(StatusWanted(5))
    channel.close()


async def test_a_defect_does_not_end_the_card(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:

    def broken(_: Card, __: Protection) -> None:
        raise ValueError("the secret is 4711")

    monkeypatch.setattr(card_process, "status", broken)
    ours, theirs = socket.socketpair()
    life = asyncio.create_task(
        card_process.main(card_process.Confined(CardConfig(M1, theirs.detach()), OPEN), lambda _: None, asyncio.Event())
    )
    channel = ControlChannel(ours)
    await channel.send(StatusWanted(1))
    answer = codec.decode(await channel.receive(), FromCard)
    assert answer.error is not None
    assert (answer.error.code, "4711" in answer.error.message + caplog.text) == ("internal", False)
    channel.close()
    await life


async def test_control_messages_of_any_size_and_none_too_large() -> None:
    ours, theirs = socket.socketpair()
    one, two = ControlChannel(ours), ControlChannel(theirs)
    long = "x" * 1_500_000
    sending = asyncio.create_task(one.send({"long": long}))
    assert msgspec.json.decode(await two.receive()) == {"long": long}
    await sending
    await one.send("with a socket nobody takes", (theirs.fileno(),))
    assert await two.receive()
    with suppress(CardUnavailable):
        two.take_socket().detach()
    one._socket.send(struct.pack(">I", 2**31))
    assert await two.receive() == b""
    one.close()
    two.close()


async def test_what_the_machine_cannot_have_meant_ends_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    life = asyncio.create_task(
        card_process.main(card_process.Confined(CardConfig(M1, theirs.detach()), OPEN), lambda _: None, asyncio.Event())
    )
    channel = ControlChannel(ours)
    await channel.send({"type": "Nonsense"})
    await life
    channel.close()


def test_where_the_kernel_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part may be missing, and is reported as missing: never an error."""

    class Refusing:
        def __getattr__(self, name: str) -> object:
            return lambda *_: -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Refusing())
    monkeypatch.setattr(card_confinement, "protect", lambda **_: None)
    monkeypatch.setattr(card_confinement, "_filter_system_calls", lambda: False)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    protection = card_confinement.confine()
    assert not any((protection.memory_locked, protection.undumpable, protection.network_isolated, protection.no_new_privileges))
