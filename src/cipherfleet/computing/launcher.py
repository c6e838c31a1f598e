"""Starts a VCM's process confined: under bubblewrap where that works, else into namespaces that the process enters itself.

Under bubblewrap the file system is a new one, of what Python needs to run and the socket to the KMC, all read-only. So it is for
a child of the zygote, if that is asked for.
"""

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import cipherfleet
from cipherfleet.channel import codec
from cipherfleet.channel.process import read_report, start_child
from cipherfleet.computing.confinement import Confinement, own_namespaces
from cipherfleet.computing.confinement_root import INSIDE_RELAY, UID
from cipherfleet.computing.relay import SOCKET_NAME
from cipherfleet.computing.zygote_keeper import Forked, ZygoteKeeper
from cipherfleet.contract.errors import CipherfleetError, Internal, TimedOut

log = logging.getLogger(__name__)

PROBE_S = 10.0
REAP_S = 2.0
_TEMPORARY_BYTES = 1024 * 1024
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/openssl.cnf")
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "2",  # an arena for each thread would eat up the address space
}

VCM_COMMAND = (sys.executable, "-I", "-B", "-m", "cipherfleet.app.roles", "vcm")
ZYGOTE_COMMAND = (*VCM_COMMAND[:-1], "zygote")


def readable_paths() -> tuple[str, ...]:
    """What Python and this package need to run, and nothing else."""
    package = Path(cipherfleet.__file__).parent
    wanted = [Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), package]
    kept: list[Path] = []
    for path in wanted:
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return (*map(str, kept), *_library_folders(), *(path for path in _SYSTEM_FILES if Path(path).is_file()))


def _library_folders() -> list[str]:
    return [path for path in ("/lib", "/lib32", "/lib64", "/libx32", "/sbin") if Path(path).is_dir()]


def bubblewrap_command(
    program: str,
    readable: Iterable[str],
    relay: Path | None,
    command: Sequence[str],
    *,
    hostname: str = "vcm",
    status_fd: int | None = None,
) -> list[str]:
    """``command`` in a new, read-only root and namespaces of its own, as their first process, without any capability."""
    arguments = [program, "--unshare-user", "--uid", str(UID), "--gid", str(UID), "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    arguments += ["--unshare-uts", "--hostname", hostname, "--unshare-cgroup-try", "--cap-drop", "ALL"]
    arguments += ["--die-with-parent", "--new-session", "--as-pid-1"]
    if status_fd is not None:
        arguments += ["--json-status-fd", str(status_fd)]
    arguments += ["--size", str(_TEMPORARY_BYTES), "--tmpfs", "/tmp"]  # noqa: S108 - first, as what is readable may lie below it
    for path in readable:
        if Path(path).is_symlink() and path in _library_folders():
            arguments += ["--symlink", str(Path(path).readlink()), path]
        else:
            arguments += ["--ro-bind", path, path]
    if relay is not None:
        arguments += ["--ro-bind", str(relay), INSIDE_RELAY]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*arguments, "--remount-ro", "/", "--chdir", "/", "--", *command]


class Child:
    """A launched process. ``pid`` is its own, in the host's pid namespace; ``info`` what it reported when it was ready.

    ``namespaces``: those of its own that were seen before it hid them, empty when it did not have to be looked at so early.
    """

    def __init__(self, outer: asyncio.subprocess.Process | Forked, pid: int, info: bytes, *, namespaces: tuple[str, ...] = ()) -> None:
        self.pid, self.info, self.namespaces = pid, info, namespaces
        self._outer = outer
        self._descriptor = _pidfd(outer, pid)

    async def wait(self) -> int:
        """Until it is gone; its exit status."""
        return await self._outer.wait()

    def send(self, number: signal.Signals) -> None:
        """A signal, never to a process that only got the same pid. Nothing happens when it is gone."""
        if self._descriptor >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    async def end(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after ``grace_s`` seconds. Ending what is gone succeeds."""
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, REAP_S)):
            self.send(number)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), patience_s)
                break
        else:
            with suppress(ProcessLookupError):
                self._outer.kill()
            await self.wait()
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _pidfd(outer: asyncio.subprocess.Process | Forked, pid: int) -> int:
    """-1 when it is gone."""
    if isinstance(outer, Forked):
        return os.dup(outer.descriptor) if outer.descriptor >= 0 else -1
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


class Launcher:
    """One way to launch VCMs. Made by ``find``, or with ``kind`` bubblewrap, zygote, unshare or none."""

    def __init__(self, kind: str, *, program: str = "bwrap", command: Sequence[str] = ()) -> None:
        self.kind = kind
        self.readable = readable_paths()
        self._program, self._command = program, tuple(command) or (ZYGOTE_COMMAND if kind == "zygote" else VCM_COMMAND)
        self._zygote = ZygoteKeeper(self._command, ENVIRONMENT)

    @classmethod
    async def find(cls, wanted: str = "auto", command: Sequence[str] = ()) -> "Launcher":
        """The zygote if it is ``wanted`` and works. Else bubblewrap if it is there and works for us, else the namespaces that the kernel
        gives to the process itself."""
        if wanted == "zygote":
            launcher = cls("zygote")
            if await launcher.works():
                return launcher
            await launcher.close()
        program = shutil.which("bwrap")
        if program is not None and await _works(program):
            return cls("bubblewrap", program=program, command=command)
        log.warning("bubblewrap is not there or does not work here: VCMs share the file system's view and the process ids of this host")
        return cls("unshare", command=command)

    async def works(self) -> bool:
        """Whether a child of the zygote gets its namespaces and its root here."""
        nothing = os.open(os.devnull, os.O_RDWR)
        try:
            child = await asyncio.wait_for(self._zygote.fork((nothing, nothing, 2), (), probe=self.readable), PROBE_S)
            status = await asyncio.wait_for(child.wait(), PROBE_S)
        except (CipherfleetError, TimeoutError) as exc:
            log.warning("the zygote does not work here: %s", exc)
            return False
        finally:
            os.close(nothing)
        return status == 0

    async def close(self) -> None:
        """End the zygote, if there is one; its children end with it."""
        await self._zygote.close()

    def confinement(self, mode: str, memory_mib: int, files: int, processors: tuple[int, ...], folder: Path) -> Confinement:
        """What the launched process has to do itself. ``folder``: the VCM's own, with the relay's in it."""
        own = "" if self.kind == "bubblewrap" else str(folder)
        return Confinement(mode, self.kind, memory_mib, files, processors, self.readable, own)

    def relay_path(self, relay: Path) -> str:
        """Where the launched process finds the relay's socket; short enough for a socket's address."""
        return f"{INSIDE_RELAY if self.kind in ('bubblewrap', 'zygote') else relay.name}/{SOCKET_NAME}"

    async def start(
        self,
        configuration: object,
        *,
        relay: Path,
        log_file: Path,
        descriptors: Sequence[int],
        hostname: str,
        timeout: float,
    ) -> Child:
        """Launch, and wait until it is ready. Raises what the child reported, ``TimedOut`` or ``Internal``; nothing is left then."""
        if self.kind == "zygote":
            try:
                return await asyncio.wait_for(self._fork(configuration, log_file, descriptors), timeout)
            except TimeoutError as exc:
                raise TimedOut(f"a process was not ready within {timeout:.0f} s, see {log_file}") from exc
        if self.kind != "bubblewrap":
            process, info = await start_child(
                self._command, configuration, log_file=log_file, pass_fds=descriptors, timeout=timeout, environment=ENVIRONMENT
            )
            return Child(process, process.pid, info)
        read_end, write_end = os.pipe()
        try:
            command = bubblewrap_command(self._program, self.readable, relay, self._command, hostname=hostname, status_fd=write_end)
            process, info = await start_child(
                command, configuration, log_file=log_file, pass_fds=(*descriptors, write_end), timeout=timeout, environment=ENVIRONMENT
            )
            try:
                return Child(process, _child_pid(read_end), info)
            except BaseException:
                process.kill()
                await process.wait()
                raise
        finally:
            os.close(read_end)
            os.close(write_end)

    async def _fork(self, configuration: object, log_file: Path, descriptors: Sequence[int]) -> Child:
        """As ``start``, without its limit of time."""
        loop = asyncio.get_running_loop()
        stdin, to_child = os.pipe()
        from_child, stdout = os.pipe()
        said = asyncio.StreamReader()
        reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), os.fdopen(from_child, "rb"))
        writing, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(to_child, "wb"))
        try:
            try:
                with log_file.open("ab") as logged:
                    forked = await self._zygote.fork((stdin, stdout, logged.fileno()), descriptors)
            finally:
                os.close(stdin)
                os.close(stdout)
            try:
                namespaces = own_namespaces(forked.pid)  # it has no configuration yet: later it hides them
                writing.write(codec.encode(configuration))
                writing.close()
                return Child(forked, forked.pid, read_report(await said.readline(), log_file), namespaces=namespaces)
            except BaseException:
                forked.kill()
                await forked.wait()
                raise
        finally:
            writing.close()
            reading.close()


def _child_pid(descriptor: int) -> int:
    """What bubblewrap wrote to its status descriptor before the child ran."""
    os.set_blocking(descriptor, False)
    try:
        pid = json.loads(os.read(descriptor, 4096).splitlines()[0])["child-pid"]
    except (BlockingIOError, IndexError, KeyError, ValueError) as exc:
        raise Internal("bubblewrap did not say which process it started") from exc
    return int(pid)


async def _works(program: str) -> bool:
    command = bubblewrap_command(program, readable_paths(), None, (sys.executable, "-I", "-c", "import ssl, ctypes"))
    probe = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT
    )
    try:
        _, said = await asyncio.wait_for(probe.communicate(), PROBE_S)
    except TimeoutError:
        probe.kill()
        await probe.wait()
        return False
    if probe.returncode != 0:
        log.warning("bubblewrap: %s", said.decode(errors="replace").strip()[-300:])
    return probe.returncode == 0
