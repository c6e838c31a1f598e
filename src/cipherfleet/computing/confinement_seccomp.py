"""The system calls of a VCM: a list of what it needs, found by running it; the rest is refused with ``EPERM``.

It needs files (read), memory, threads of its own, time, and sockets that it was given; no program, no process, no socket but unix sockets.
"""

import ctypes.util
import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_CLONE_THREAD = 0x00010000
_MSG_FASTOPEN = 0x20000000
_PR_GET_DUMPABLE, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 3, 15, 16, 0x53564D41
_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451

ALLOWED = frozenset(
    """
    read readv write writev pread64 preadv pwrite64 lseek close fstat newfstatat stat lstat statx statfs fstatfs access faccessat faccessat2
    open openat readlink readlinkat getdents64 getcwd fcntl dup dup2 dup3 pipe pipe2 ftruncate memfd_create
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
    timerfd_create timerfd_settime timerfd_gettime
    mmap munmap mremap mprotect madvise brk
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack
    futex futex_waitv set_robust_list get_robust_list set_tid_address rseq membarrier
    gettid getpid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid
    uname sysinfo getrusage times getrlimit sched_yield sched_getaffinity sched_getparam sched_getscheduler getcpu
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrandom restart_syscall arch_prctl exit exit_group
    socketpair connect accept accept4 getsockname getpeername getsockopt setsockopt shutdown recvfrom recvmsg recvmmsg
    """.split()  # noqa: SIM905 - one name a line would hide what belongs together
)

NOT_THERE = ("clone3", "io_uring_setup", "map_shadow_stack", "mseal")
"""Calls whose users fall back to another one when the kernel has none of that name."""


def restrict(listening: int = -1) -> None:
    """Filter this thread's system calls, and those of all it starts, for good. Raises ``OSError`` where there is no seccomp.

    ``listening``: the only descriptor that may be made to listen, as a server does once more with a socket that listens already.
    """
    pyseccomp = _pyseccomp()
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in ALLOWED:
        _try(rules.add_rule, pyseccomp.ALLOW, name)
    for name in NOT_THERE:
        _try(rules.add_rule, pyseccomp.ERRNO(errno.ENOSYS), name)
    rules.add_rule(pyseccomp.ALLOW, "socket", pyseccomp.Arg(0, pyseccomp.EQ, socket.AF_UNIX))
    rules.add_rule(pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD))
    # Limits of its own and signals to its own threads: other processes of this user may be in the same pid namespace.
    rules.add_rule(pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(0, pyseccomp.EQ, 0))
    rules.add_rule(pyseccomp.ALLOW, "tgkill", pyseccomp.Arg(0, pyseccomp.EQ, os.getpid()))
    if listening >= 0:
        rules.add_rule(pyseccomp.ALLOW, "listen", pyseccomp.Arg(0, pyseccomp.EQ, listening))
    # Fast Open would be a way to connect a socket that came from outside, past every check of connect().
    for name, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(flags, pyseccomp.MASKED_EQ, _MSG_FASTOPEN, 0))
    for request in (_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX):
        rules.add_rule(pyseccomp.ALLOW, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, request))
    for option in (_PR_GET_DUMPABLE, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA):
        rules.add_rule(pyseccomp.ALLOW, "prctl", pyseccomp.Arg(0, pyseccomp.EQ, option))
    rules.load()


def preload() -> None:
    """Load what ``restrict`` needs, if it is there: a process that forks does it once for all its children."""
    with suppress(OSError):
        _pyseccomp()


def _pyseccomp() -> Any:
    """The module; it would ask ldconfig and a compiler where its library is, and in a sandbox there is neither."""
    original = ctypes.util.find_library
    ctypes.util.find_library = lambda name: {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}.get(name)
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as exc:
        raise OSError(errno.ENOSYS, "libseccomp is not installed") from exc
    finally:
        ctypes.util.find_library = original
    return pyseccomp


def _try(add: Callable[..., object], *rule: object) -> None:
    """A call that this architecture does not have needs no rule."""
    with suppress(OSError, ValueError, RuntimeError):
        add(*rule)
