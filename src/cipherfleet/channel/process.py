"""How a process of ours starts, says that it is ready, is found again, and ends.

The parent writes the configuration to the child's standard input (so nothing of it shows in argv or the environment) and
reads one line from its standard output: ready, or the error. A running process has a file in the run folder.
"""

import asyncio
import ctypes
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

import msgspec
import psutil

from cipherfleet.channel import codec
from cipherfleet.contract.errors import CipherfleetError, ErrorBody, Internal, TimedOut
from cipherfleet.state.files import write_private

C = TypeVar("C")
P = TypeVar("P")

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class ReadyLine(msgspec.Struct, frozen=True):
    """What a child says once: ``info`` is whatever its parent wants to know."""

    ready: bool
    info: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorBody | None = None


class ProcessEntry(msgspec.Struct, frozen=True):
    """A running process, as its file in the run folder says; ``started`` guards against a reused pid."""

    role: str
    id: str
    pid: int
    started: float
    consumer: str = ""

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False


def register(run_folder: Path, role: str, id_: str, pid: int, consumer: str = "") -> Path:
    """Write the file of a process; the caller removes it when the process has ended."""
    entry = ProcessEntry(role, id_, pid, psutil.Process(pid).create_time(), consumer)
    path = run_folder / f"{role}-{id_}.json"
    write_private(path, codec.encode(entry))
    return path


def running(run_folder: Path) -> list[ProcessEntry]:
    """Every process of the run folder that is alive; files of dead ones are removed."""
    entries = []
    for path in sorted(run_folder.glob("*.json")):
        with suppress(CipherfleetError, FileNotFoundError):
            entry = codec.decode(path.read_bytes(), ProcessEntry)
            if entry.alive:
                entries.append(entry)
            else:
                path.unlink(missing_ok=True)
    return entries


def as_it_is(configuration: C) -> C:
    """For processes that need no preparation."""
    return configuration


def protect(*, dumpable: bool = False, die_with_parent: bool = False) -> None:
    """No core dump and no ptrace by the same user (unless ``dumpable``); end when the parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not dumpable:
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if die_with_parent:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def raise_file_limit() -> None:
    """As many descriptors as may be had: each connection is one, and the usual soft limit of 1024 is for programs with select()."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_freed_memory(most: int = 8 * 1024 * 1024) -> None:
    """Use the memory of long requests and answers again, ``most`` bytes of it, as far as the C library is glibc.

    Fresh pages from the kernel for every one of them cost more than the cryptography.
    """
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)
        libc.mallopt(_M_TRIM_THRESHOLD, most)


def configure_logging() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def run(
    main: Callable[[P, Callable[[object], None], asyncio.Event], Awaitable[object]],
    kind: type[C],
    *,
    prepare: Callable[[C], P],
) -> int:
    """A child's whole life: configuration from stdin, ``main(prepare(configuration), ready, stop)``, exit status.

    ``prepare`` runs before there is an event loop: what confines a process belongs there, as a loop already holds descriptors
    (libuv's io_uring) that no filter reaches. ``ready(info)`` tells the parent; ``stop`` is set by SIGTERM and SIGINT.
    """
    import uvloop  # a process that never runs a loop need not load it

    configure_logging()
    raise_file_limit()
    keep_freed_memory()
    report = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def ready(info: object) -> None:
        _say(report, ReadyLine(ready=True, info=msgspec.Raw(codec.encode(info))))

    async def live(prepared: P) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await main(prepared, ready, stop)

    try:
        configuration = codec.decode(sys.stdin.buffer.read(), kind, what="the configuration")
        uvloop.run(live(prepare(configuration)))
    except CipherfleetError as exc:
        logging.getLogger(__name__).error("%s: %s", exc.code, exc.message)  # noqa: TRY400
        _say(report, ReadyLine(ready=False, error=exc.to_reply().error))
        return 1
    return 0


def _say(report: IO[bytes], line: ReadyLine) -> None:
    with suppress(ValueError, BrokenPipeError):
        report.write(codec.encode(line) + b"\n")
        report.close()


def read_report(line: bytes, log_file: Path) -> bytes:
    """The JSON that a child reported when it was ready. Raises the error that it reported, or ``Internal`` when it said nothing."""
    if not line:
        raise Internal(f"a process ended before it was ready, see {log_file}")
    report = codec.decode(line, ReadyLine, what="a child's report")
    if report.error is not None:
        raise CipherfleetError.from_body(report.error)
    return bytes(report.info)


async def start_child(
    command: Sequence[str],
    configuration: object,
    *,
    log_file: Path,
    pass_fds: Sequence[int] = (),
    new_session: bool = False,
    timeout: float = 30.0,
    environment: dict[str, str] | None = None,
) -> tuple[asyncio.subprocess.Process, bytes]:
    """Start a child and wait until it is ready; the process and the JSON it reported.

    Raises the error the child reported, ``TimedOut``, or ``Internal`` when it ended without a word; no child is left then.
    """
    with log_file.open("ab") as log:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            pass_fds=tuple(pass_fds),
            start_new_session=new_session,
            env=environment,
        )
    assert child.stdin is not None  # noqa: S101 - both were asked for above
    assert child.stdout is not None  # noqa: S101
    try:
        with suppress(BrokenPipeError, ConnectionResetError):
            child.stdin.write(codec.encode(configuration))
            await child.stdin.drain()
        child.stdin.close()
        line = await asyncio.wait_for(child.stdout.readline(), timeout)
        info = read_report(line, log_file)
    except BaseException as exc:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        if isinstance(exc, TimeoutError):
            raise TimedOut(f"a process was not ready within {timeout:.0f} s, see {log_file}") from exc
        raise
    return child, info


def start_daemon(
    command: Sequence[str],
    configuration: object,
    *,
    log_file: Path,
    timeout: float = 30.0,
    spawned: Callable[[int], object] = lambda _: None,
) -> bytes:
    """Start a process of its own session that outlives this one; the JSON it reported once ready.

    ``spawned(pid)`` is called before the child has its configuration, so that no child runs unregistered. Blocking: call it
    through ``asyncio.to_thread``. Raises as ``start_child`` does.
    """
    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        streams = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin_read, stdout_write, log))]
        pid = os.posix_spawn(command[0], list(command), dict(os.environ), file_actions=streams, setsid=True)
    finally:
        for descriptor in (stdin_read, stdout_write, log):
            os.close(descriptor)
    try:
        spawned(pid)
        with os.fdopen(stdin_write, "wb") as stdin, suppress(BrokenPipeError):
            stdin.write(codec.encode(configuration))
        with os.fdopen(stdout_read, "rb") as stdout:
            if not select.select([stdout], [], [], timeout)[0]:
                raise TimedOut(f"a process was not ready within {timeout:.0f} s, see {log_file}")
            line = stdout.readline()
        info = read_report(line, log_file)
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        raise
    return info
