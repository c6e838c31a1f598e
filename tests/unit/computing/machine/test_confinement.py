"""Each layer of the confinement by itself. Filters, rights and namespaces are a thread's own, so a thread that ends is the cell."""

import ctypes
import errno
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from cipherfleet.computing import confinement, confinement_landlock, confinement_seccomp
from cipherfleet.computing.confinement import Confinement, capabilities, confine, look, look_outside, process_status
from cipherfleet.contract.errors import IsolationUnavailable
from cipherfleet.contract.machine_api import Isolation
from tests.unit.computing.machine.prisoner import call

T = TypeVar("T")
WANTED = Confinement("process", "none", 512, 64)


def in_cell(work: Callable[[], T]) -> T:
    results: list[T | BaseException] = []

    def run() -> None:
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # no new privileges
        try:
            results.append(work())
        except BaseException as exc:
            results.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result = results[0]
    if isinstance(result, BaseException):
        raise result
    return result


def close_pair() -> None:
    for end in socket.socketpair():
        end.close()


def refusal(work: Callable[[], object]) -> int:
    try:
        work()
    except OSError as exc:
        return exc.errno or -1
    return 0


def test_landlock_leaves_what_is_listed_to_be_read_and_nothing_to_be_written(tmp_path: Path) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    allowed.mkdir()
    (allowed / "file").write_text("x")
    secret.write_text("x")
    before = os.open(secret, os.O_RDONLY)
    os.close(before)

    def work() -> tuple[int, list[int]]:
        version = confinement_landlock.restrict((str(allowed), "/not/there", str(allowed / "file")))
        return version, [
            refusal((allowed / "file").read_text),
            refusal(lambda: list(allowed.iterdir())),
            refusal(secret.read_text),
            refusal(lambda: (allowed / "new").write_text("x")),
            refusal(lambda: (tmp_path / "new").mkdir()),
            refusal(lambda: socket.create_connection(("127.0.0.1", 1))),
            refusal(lambda: socket.create_server(("127.0.0.1", 0))),
        ]

    version, refusals = in_cell(work)
    assert version == confinement_landlock.abi() >= 1
    assert refusals[:5] == [0, 0, errno.EACCES, errno.EACCES, errno.EACCES]
    if version >= 4:
        assert refusals[5:] == [errno.EACCES, errno.EACCES]


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_an_older_landlock_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int) -> None:
    if confinement_landlock.abi() < version:
        pytest.skip("the kernel's Landlock is older")
    monkeypatch.setattr(confinement_landlock, "abi", lambda: version)

    def work() -> tuple[int, int]:
        return confinement_landlock.restrict(("/usr",)), refusal(lambda: list(tmp_path.iterdir()))

    assert in_cell(work) == (version, errno.EACCES)


def test_without_landlock_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement_landlock, "abi", lambda: 0)
    assert in_cell(lambda: confinement_landlock.restrict(("/usr",))) == 0

    def no_such_call(*_: object) -> int:
        raise OSError(errno.ENOSYS, "none")

    monkeypatch.undo()
    monkeypatch.setattr(confinement_landlock, "_call", no_such_call)
    assert confinement_landlock.abi() == 0


def test_seccomp_refuses_what_is_not_listed() -> None:
    def work() -> list[int]:
        confinement_seccomp.restrict()
        return [
            refusal(lambda: socket.socket(socket.AF_UNIX).close()),
            refusal(close_pair),
            refusal(lambda: socket.socket(socket.AF_INET).close()),
            refusal(lambda: os.kill(os.getpid(), 0)),
            refusal(lambda: os.sched_setaffinity(0, {0})),
            refusal(lambda: os.close(os.memfd_create("x"))),
        ]

    assert in_cell(work) == [0, 0, errno.EPERM, errno.EPERM, errno.EPERM, 0]


def test_seccomp_leaves_limits_and_signals_of_its_own_alone() -> None:
    parent, prlimit64, tgkill = os.getppid(), 302, 234  # x86-64

    def work() -> list[int]:
        confinement_seccomp.restrict()
        return [
            refusal(lambda: resource.getrlimit(resource.RLIMIT_NOFILE)),
            refusal(lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE)),
            refusal(call(prlimit64, os.getpid(), resource.RLIMIT_CORE, 0, 0)),
            refusal(call(tgkill, os.getpid(), threading.get_native_id(), 0)),
            refusal(call(tgkill, parent, parent, 0)),
        ]

    assert in_cell(work) == [0, errno.EPERM, errno.EPERM, 0, errno.EPERM]


def test_seccomp_lets_one_socket_listen_and_none_be_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as unbound:

        def work() -> list[int]:
            confinement_seccomp.restrict(ours.fileno())
            return [refusal(ours.listen), refusal(other.listen), refusal(lambda: unbound.bind(("127.0.0.1", 0)))]

        assert in_cell(work) == [0, errno.EPERM, errno.EPERM]


def test_a_network_is_confined_only_where_landlock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_cell(lambda: confinement._restrict(())[1]) == (confinement_landlock.abi() >= 4)
    monkeypatch.setattr(confinement_landlock, "abi", lambda: 3)
    assert in_cell(lambda: confinement._restrict(())) == (3, False)


def test_without_libseccomp_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(OSError, match="not installed"):
        confinement_seccomp.restrict()


def test_what_the_kernel_does_not_give_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "none")

    monkeypatch.setattr(confinement_landlock, "restrict", refuse)
    monkeypatch.setattr(confinement_seccomp, "restrict", refuse)
    assert in_cell(lambda: confinement._restrict(())) == (0, False)


def test_capabilities_are_gone_for_good() -> None:
    def work() -> tuple[str, int]:
        confinement._drop_capabilities(ctypes.CDLL(None, use_errno=True))
        status = process_status("thread-self")
        return capabilities(status), int(status["CapBnd"], 16)

    assert in_cell(work) == ("0", 0)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a thread cannot make a user namespace, so this needs root")
def test_a_process_leaves_the_hosts_namespaces_itself(tmp_path: Path) -> None:
    def work() -> dict[str, bool]:
        confinement.leave_host(ctypes.CDLL(None, use_errno=True))
        left = {
            name: Path(f"/proc/thread-self/ns/{name}").readlink() != Path(f"/proc/{os.getpid()}/ns/{name}").readlink()
            for name in ("net", "ipc", "uts", "mnt")
        }
        return {**left, "read-only": refusal(lambda: (tmp_path / "x").write_text("x")) == errno.EROFS}

    assert all(in_cell(work).values())


def test_the_limits_are_those_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", lambda kind, value: set_limits.update({kind: value}))
    monkeypatch.setattr(confinement, "_in_user_namespace", lambda: True)
    processor = min(os.sched_getaffinity(0))

    def work() -> set[int]:
        confinement._limit(Confinement("process", "none", 256, 64, (processor, 99999)))
        return os.sched_getaffinity(0)

    assert in_cell(work) == {processor}
    assert set_limits[resource.RLIMIT_AS] == (256 * 1024 * 1024,) * 2
    assert set_limits[resource.RLIMIT_NOFILE] == (64, 64)
    assert set_limits[resource.RLIMIT_CORE] == (0, 0)
    assert set_limits[resource.RLIMIT_NPROC] == (confinement.THREADS,) * 2


def test_looking_finds_what_is_not_there() -> None:
    found = look(WANTED, 7, False)
    assert (found.landlock_abi, found.seccomp, found.no_new_privileges) == (0, False, False)
    assert look_outside(os.getpid(), found).namespaces == ()


def test_what_only_the_inside_claims_does_not_count() -> None:
    claimed = Isolation("process", "bubblewrap", (), True, True, 7, "0")
    seen = look_outside(os.getpid(), claimed)
    assert (seen.no_new_privileges, seen.seccomp) == (False, False)
    assert seen.capabilities == ("0" if capabilities(process_status("self")) == "0" else "?")
    gone = look_outside(2**22 + 1, claimed)
    assert (gone.namespaces, gone.no_new_privileges, gone.capabilities) == ((), False, "?")


def test_a_process_with_threads_cannot_be_confined() -> None:
    with pytest.raises(IsolationUnavailable):
        in_cell(lambda: confine(WANTED))
