"""Other systems that do the same job, from packages, started for the measurement: SoftHSM2 behind p11-kit, moto's KMS, PyKMIP.

Their Python libraries live in an environment of their own (``make peers``); SoftHSM2 and p11-kit are packages of the system.
"""

import asyncio
import json
import os
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from cipherfleet.app.bench import peer_load
from cipherfleet.app.bench.limits import authority
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import ConsumerId, VcmId

START_S, ANSWER_S = 20.0, 30.0
LINE_BYTES = 16 * 1024 * 1024
SLOW_S = 0.05
"""Where one operation takes longer than this, larger ones are not asked for: PyKMIP's parser takes minutes for a megabyte."""
SYSTEM = "set up with: apt install softhsm2 p11-kit p11-kit-modules"


class Unfit(Exception):
    """A peer that cannot be started here, and why."""


class Load:
    """A process of ``peer_load``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Raises ``Unfit``."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - both are pipes
        assert stdout is not None  # noqa: S101
        try:
            stdin.write(json.dumps(question).encode() + b"\n")
            await stdin.drain()
            async with asyncio.timeout(ANSWER_S + question.get("seconds", 0)):
                line = await stdout.readline()
        except (TimeoutError, ConnectionError):
            line = b""
        if not line:
            raise Unfit("its client gave no answer")
        found: dict[str, Any] = json.loads(line)
        return found


class Peer:
    """A running peer and the load on it; ``refused``: what it does not do, and why."""

    def __init__(self, name: str, loads: list[Load]) -> None:
        self.name = name
        self.refused: dict[tuple[str, int], str] = {}
        self._loads = loads

    async def measure(self, operation: str, size: int, connections: int, seconds: float) -> list[float] | None:
        """What each operation took, seconds; None where the peer does not do it."""
        if any(what == operation and least <= size for what, least in self.refused):
            return None
        question = {"operation": operation, "size": size, "seconds": seconds, "connections": connections}
        if len(self._loads) > 1:  # a process for each connection
            asked = [load.ask({**question, "connections": 1}) for load in self._loads[:connections]]
        else:
            asked = [self._loads[0].ask(question)]
        try:
            answers = await asyncio.gather(*asked)
        except Unfit as exc:
            self.refused[operation, size] = str(exc)
            return None
        if wrong := next((a["error"] for a in answers if "error" in a), None):
            self.refused[operation, size] = wrong
            return None
        taken = [seconds for answer in answers for seconds in answer["taken"]]
        if not taken or sorted(taken)[len(taken) // 2] / connections > SLOW_S:
            self.refused[operation, size + 1] = f"not asked, as {size} bytes take so long already"
        return taken


@asynccontextmanager
async def started(python: Path, connections: int) -> AsyncIterator[tuple[list[Peer], dict[str, str]]]:
    """The peers that run, for up to ``connections`` at a time, and why the others do not."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    async with AsyncExitStack() as held:
        # Not below the folder for temporary files, wherever that is: paths of unix sockets have to be short.
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="peers-", dir="/tmp", ignore_cleanup_errors=True))
        for name, start in _STARTS.items():
            place = Path(folder) / name
            place.mkdir()
            try:
                configuration, environment = await start(place, python, held)
                processes = connections if name == "softhsm2" else 1
                command = (str(python), "-I", "-W", "ignore", peer_load.__file__)
                loads = [Load(await _process(held, command, place / "load.log", environment, piped=True)) for _ in range(processes)]
                ready = {"peer": name, "connections": connections // processes, **configuration}
                for load in loads:  # one after the other: SoftHSM2 fails where several processes begin at once
                    answer = await load.ask(ready)
                    if "error" in answer:
                        raise Unfit(answer["error"])
            except Unfit as exc:
                missing[name] = str(exc)
            else:
                found.append(Peer(name, loads))
        yield found, missing


async def _process(
    held: AsyncExitStack, command: tuple[str, ...], log_file: Path, environment: Mapping[str, str], *, piped: bool = False
) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE if piped else asyncio.subprocess.DEVNULL
    with log_file.open("ab") as log:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=pipe,
                stdout=pipe if piped else log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(log_file.parent), **environment},  # what they leave goes with the measurement
                start_new_session=True,
                limit=LINE_BYTES,
            )
        except OSError as exc:
            raise Unfit(f"{command[0]} cannot be started: {exc.strerror}") from exc

    async def end() -> None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 2)
        except TimeoutError:
            process.kill()
            await process.wait()

    held.push_async_callback(end)
    return process


async def _until(true: Callable[[], bool], process: asyncio.subprocess.Process, what: str) -> None:
    end = time.monotonic() + START_S
    while not true():
        if process.returncode is not None or time.monotonic() > end:
            raise Unfit(f"{what} did not start")
        await asyncio.sleep(0.05)


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(address: int | str) -> bool:
    """Whether somebody listens: on a port, or on a unix socket."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address if isinstance(address, str) else ("127.0.0.1", address))
        except OSError:
            return False
    return True


# -- the peers ---------------------------------------------------------------------------------------------------------


async def _softhsm2(folder: Path, _python: Path, held: AsyncExitStack) -> tuple[dict[str, Any], dict[str, str]]:
    library = Path("/usr/lib/softhsm/libsofthsm2.so")
    modules = sorted(Path("/usr/lib").glob("*/pkcs11/p11-kit-client.so"))
    tools = [shutil.which(tool) for tool in ("softhsm2-util", "p11-kit")]
    if not library.exists() or not modules or None in tools:
        raise Unfit(SYSTEM)
    settings = folder / "softhsm2.conf"
    (folder / "tokens").mkdir()
    settings.write_text(f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n")
    environment = {"SOFTHSM2_CONF": str(settings), "P11_KIT_SERVER_ADDRESS": f"unix:path={folder / 'socket'}"}
    token = (str(tools[0]), "--init-token", "--free", "--label", "bench", "--so-pin", "bench-so", "--pin", "bench")
    async with AsyncExitStack() as once:
        made = await (await _process(once, token, folder / "token.log", environment)).wait()
    if made:
        raise Unfit("softhsm2-util made no token")
    command = (str(tools[1]), "server", "-f", "--provider", str(library), "--name", str(folder / "socket"), "pkcs11:token=bench")
    server = await _process(held, command, folder / "server.log", environment)
    await _until(lambda: _answers(str(folder / "socket")), server, "p11-kit server")
    return {"module": str(modules[0]), "label": "bench", "pin": "bench"}, environment


async def _moto(folder: Path, python: Path, held: AsyncExitStack) -> tuple[dict[str, Any], dict[str, str]]:
    port = _port()
    server = python.parent / "moto_server"
    process = await _process(held, (str(server), "-H", "127.0.0.1", "-p", str(port), "-s"), folder / "server.log", {})
    await _until(lambda: _answers(port), process, "moto_server")
    return {"url": f"https://127.0.0.1:{port}"}, {"AWS_EC2_METADATA_DISABLED": "true"}


async def _pykmip(folder: Path, python: Path, held: AsyncExitStack) -> tuple[dict[str, Any], dict[str, str]]:
    if not ssl.HAS_TLSv1_2:
        raise Unfit("it speaks TLS 1.2")
    certify, consumer, port = authority(), ConsumerId("acme"), _port()
    identities = {
        "server": Identity(Role.VCM, VcmId("vcm-000000000000"), consumer),
        "client": Identity(Role.APPLICATION, "bench", consumer),
    }
    for name, identity in identities.items():
        made = certify(identity)
        for suffix, content in (("pem", made.chain), ("key", made.key), ("ca", made.trust)):
            path = folder / f"{name}.{suffix}"
            path.touch(mode=0o600)
            path.write_bytes(content)
    (folder / "policy").mkdir()
    lines = {
        "hostname": "127.0.0.1",
        "port": port,
        "certificate_path": folder / "server.pem",
        "key_path": folder / "server.key",
        "ca_path": folder / "client.ca",
        "auth_suite": "TLS1.2",
        "policy_path": folder / "policy",
        "enable_tls_client_auth": False,
        "database_path": folder / "database",
    }
    settings = folder / "server.conf"
    settings.write_text("\n".join(["[server]", *(f"{name}={value}" for name, value in lines.items())]) + "\n")
    command = (str(python.parent / "pykmip-server"), "-f", str(settings), "-l", str(folder / "log"), "-i")
    process = await _process(held, command, folder / "server.log", {"HOME": str(folder)})
    await _until(lambda: _answers(port), process, "pykmip-server")
    files = {"cert": folder / "client.pem", "key": folder / "client.key", "ca": folder / "server.ca"}
    return {"port": port, **{name: str(path) for name, path in files.items()}}, {"HOME": str(folder)}


_STARTS = {"softhsm2": _softhsm2, "moto": _moto, "pykmip": _pykmip}
