"""A card process gives up what it does not need: core dumps, network, programs, capabilities, swap.

Each part is done as far as the kernel and our rights allow, and none is fatal: ``Protection`` says what is in force.
"""

import ctypes
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from cipherfleet.channel.process import keep_freed_memory, protect

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_GET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 3, 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_M_PERTURB = -6

_CAP_IPC_LOCK = 1 << 14
_AF_UNIX = 1
_DENIED = (
    "execve",
    "execveat",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "pidfd_getfd",
    "connect",
    "bind",
    "listen",
    "unshare",
    "setns",
    "mount",
    "umount2",
    "pivot_root",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "keyctl",
    "add_key",
    "request_key",
    "init_module",
    "finit_module",
    "kexec_load",
    "kexec_file_load",
    "open_by_handle_at",
    "io_uring_setup",
    "swapon",
)


class Protection(msgspec.Struct, frozen=True):
    """What is in force. ``capabilities``: hex of the effective set; "0", or "4000" where locking memory needs ``CAP_IPC_LOCK``."""

    memory_locked: bool
    undumpable: bool
    network_isolated: bool
    no_new_privileges: bool
    seccomp: bool
    capabilities: str


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def confine() -> Protection:
    """Confine this process. To be called before it has a second thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    may_lock = _effective_capabilities() & _CAP_IPC_LOCK  # asked before a user namespace gives us all of them, of no worth
    network_isolated = _leave_network(libc)
    protect(dumpable=False, die_with_parent=True)
    unlimited = _lift_lock_limit()
    # A lock on future memory under a limit would make an allocation fail one day.
    with suppress(AttributeError):  # glibc alone: memory is overwritten when it is freed, whoever freed it
        libc.mallopt(_M_PERTURB, 0xA5)
    keep_freed_memory(32 * 1024 * 1024)
    memory_locked = bool((unlimited or may_lock) and libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0)
    no_new_privileges = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    _keep_capabilities(libc, may_lock if memory_locked and not unlimited else 0)
    return Protection(
        memory_locked=memory_locked,
        undumpable=libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0,
        network_isolated=network_isolated,
        no_new_privileges=no_new_privileges,
        seccomp=_filter_system_calls(),
        capabilities=f"{_effective_capabilities():x}",
    )


def _leave_network(libc: ctypes.CDLL) -> bool:
    """Into an empty network namespace; as an ordinary user, by way of a user namespace."""
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    with suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _lift_lock_limit() -> bool:
    """Whether any amount of memory may be locked."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


def _keep_capabilities(libc: ctypes.CDLL, kept: int) -> None:
    """Give up all capabilities but ``kept``."""
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable; then their upper halves
    libc.capset(ctypes.byref(_CapabilityHeader(_CAPABILITY_VERSION_3, 0)), sets)


def _effective_capabilities() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def _filter_system_calls() -> bool:
    """No socket but unix sockets, no program, no look into other processes (seccomp)."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError):
        return False
    refuse = pyseccomp.ERRNO(1)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    _try(rules.add_rule, refuse, "socket", pyseccomp.Arg(0, pyseccomp.NE, _AF_UNIX))
    for name in _DENIED:
        _try(rules.add_rule, refuse, name)
    try:
        rules.load()
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def _try(add: Callable[..., object], *rule: object) -> None:
    """A system call that this machine does not have needs no rule."""
    with suppress(OSError, ValueError, RuntimeError):
        add(*rule)
