"""The same confinement without root: as nobody, with the system's Python."""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

import cipherfleet
from cipherfleet.channel import codec
from cipherfleet.channel.process import ReadyLine
from cipherfleet.computing.confinement import Confinement, look_outside
from cipherfleet.computing.confinement_root import INSIDE_RELAY
from cipherfleet.computing.launcher import bubblewrap_command
from cipherfleet.computing.relay import SOCKET_NAME, Relay
from cipherfleet.computing.zygote import ForkNotice, ForkOrder
from cipherfleet.contract.machine_api import Isolation
from tests.unit.computing.machine.prisoner import Findings, Orders
from tests.unit.computing.machine.test_launcher import ALLOWED, SOURCE, echo

NOBODY = 65534
PYTHON = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes nobody, which needs root"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"needs {PYTHON}, which nobody may run"),
]


async def started_by_nobody(command: list[str], orders: Orders) -> tuple[Findings, Isolation]:
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=(orders.listening,),
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        env={"LANG": "C.UTF-8"},
        limit=1024 * 1024,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(codec.encode(orders))
    child.stdin.close()
    line = codec.decode(await asyncio.wait_for(child.stdout.readline(), 20), ReadyLine)
    findings = codec.decode(bytes(line.info), Findings)
    outside = look_outside(child.pid, findings.isolation)
    child.kill()
    await child.wait()
    return findings, outside


def forked_by_nobody(command: list[str], orders: Orders) -> tuple[Findings, Isolation]:
    """The machine's side of the zygote's socket, by hand: the whole machine cannot be nobody here."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stdin, to_child = os.pipe()
    from_child, stdout = os.pipe()
    with ours, os.fdopen(from_child, "rb") as said:
        ours.settimeout(20)
        with (
            theirs,
            subprocess.Popen(command, stdin=theirs.fileno(), user=NOBODY, group=NOBODY, extra_groups=[], env={"LANG": "C.UTF-8"}) as zygote,
        ):
            theirs.close()
            order = ForkOrder(1, (orders.listening,))
            socket.send_fds(ours, [codec.encode(order)], [stdin, stdout, 2, orders.listening])
            raw, (pidfd,), _, _ = socket.recv_fds(ours, 1000, 1)
            os.close(stdin)
            os.close(stdout)
            os.write(to_child, codec.encode(orders))
            os.close(to_child)
            findings = codec.decode(bytes(codec.decode(said.readline(), ReadyLine).info), Findings)
            outside = look_outside(codec.decode(raw, ForkNotice).pid, findings.isolation)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            assert codec.decode(ours.recv(1000), ForkNotice).status == -signal.SIGKILL
            ours.close()
            assert zygote.wait(20) == 0
    return findings, outside


@pytest.mark.parametrize("kind", ["bubblewrap", "zygote", "unshare"])
async def test_nobody_is_confined_as_root_is(kind: str) -> None:
    packages, source = sysconfig.get_path("platlib"), str(Path(cipherfleet.__file__).parent.parent)
    readable = ("/usr", "/lib", "/lib64", packages, source, "/etc/ld.so.cache")
    program = f"import sys; sys.path[:0] = [{packages!r}, {source!r}]\n" + SOURCE
    server = await echo()
    folder = Path(tempfile.mkdtemp(prefix="cf-nobody-"))
    relay = Relay(folder / "relay", server.sockets[0].getsockname())
    await relay.start()
    for path in (folder, folder / "relay", folder / "relay" / SOCKET_NAME):
        os.chown(path, NOBODY, NOBODY)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            caller = socket.create_connection(listening.getsockname())
            own = "" if kind == "bubblewrap" else str(folder)
            orders = Orders(
                Confinement("process", kind, 512, 64, (), readable, own),
                f"{'relay' if kind == 'unshare' else INSIDE_RELAY}/{SOCKET_NAME}",
                listening.fileno(),
                ["/etc/passwd", "/var"],
                server.sockets[0].getsockname()[1],
                f"nobody-{secrets.token_hex(4)}",
                os.getpid(),
            )
            command = [PYTHON, "-I", "-B", "-c", program]
            if kind == "bubblewrap":
                command = bubblewrap_command("bwrap", readable, folder / "relay", command)
            if kind == "zygote":
                findings, outside = await asyncio.to_thread(forked_by_nobody, [*command, "zygote"], orders)
            else:
                findings, outside = await started_by_nobody(command, orders)
            caller.close()
    finally:
        await relay.close()
        server.close()
        shutil.rmtree(folder)
    assert {name for name, error in findings.attempts.items() if error == ""} == ALLOWED, findings.attempts
    inside = findings.isolation
    assert (inside.no_new_privileges, inside.seccomp, inside.capabilities, inside.read_only_root) == (True, True, "0", True)
    assert inside.landlock_abi >= 1
    assert inside.launcher == kind
    if kind != "bubblewrap":
        assert {"net", "ipc", "mnt", "user", "uts"} <= set(outside.namespaces)
    if kind != "unshare":
        assert findings.pid == 1
