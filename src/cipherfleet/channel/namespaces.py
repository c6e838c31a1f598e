"""Sockets of another network namespace: a thread enters it, makes what is wanted, and ends."""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cipherfleet.contract.errors import IsolationUnavailable

T = TypeVar("T")

FOLDER = Path("/run/netns")
"""Where ``ip netns`` keeps the namespaces that have names."""

CLONE_NEWNET = 0x40000000


def run_inside(name: str, work: Callable[[], T]) -> T:
    """What ``work`` returns, run inside the namespace ``name``; no thread that lives on ever leaves the host's namespaces.

    Blocking. Raises ``IsolationUnavailable`` when the namespace is not there or not ours to enter.
    """

    def enter() -> T:
        try:
            descriptor = os.open(FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise IsolationUnavailable(f"the network namespace {name} is not there") from exc
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
                raise IsolationUnavailable(f"cannot enter {name}: {os.strerror(ctypes.get_errno())}", "domain isolation needs root")
        finally:
            os.close(descriptor)
        return work()

    return in_thread(enter)


def in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread that ends afterwards, whatever it did to its namespaces."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as exc:  # raised again in the thread that waits
            errors.append(exc)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
