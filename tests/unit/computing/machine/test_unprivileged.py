"""The same confinement without root: as nobody, with the system's Python."""

import asyncio
import os
import secrets
import shutil
import socket
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
from tests.unit.computing.machine.prisoner import Findings, Orders
from tests.unit.computing.machine.test_launcher import ALLOWED, SOURCE, echo

NOBODY = 65534
PYTHON = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes nobody, which needs root"),
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"needs {PYTHON}, which nobody may run"),
]


@pytest.mark.parametrize("kind", ["bubblewrap", "unshare"])
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
                f"{INSIDE_RELAY if kind == 'bubblewrap' else 'relay'}/{SOCKET_NAME}",
                listening.fileno(),
                ["/etc/passwd", "/var"],
                server.sockets[0].getsockname()[1],
                f"nobody-{secrets.token_hex(4)}",
                os.getpid(),
            )
            command = [PYTHON, "-I", "-B", "-c", program]
            if kind == "bubblewrap":
                command = bubblewrap_command("bwrap", readable, folder / "relay", command)
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(listening.fileno(),),
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
    if kind == "unshare":
        assert {"net", "ipc", "mnt", "user", "uts"} <= set(outside.namespaces)
    else:
        assert findings.pid == 1
