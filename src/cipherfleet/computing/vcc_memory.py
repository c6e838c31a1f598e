"""The memory of one vCC, as both of its ends see it: counters, rings, region. Nothing here knows a key.

Each end reads what the other wrote once, into memory of its own, before it looks at it.
"""

import fcntl
import mmap
import os
import threading
from contextlib import suppress

from cipherfleet.contract.errors import CardUnavailable
from cipherfleet.contract.vcc import (
    COMPLETION,
    COMPLETIONS_AT,
    COUNTERS_BYTES,
    DESCRIPTOR,
    MEMORY_BYTES,
    REGION_AT,
    RING_ENTRIES,
    SUBMISSIONS_AT,
    Counter,
)

WORD = 0xFFFFFFFF


def create() -> int:
    """A descriptor of fresh memory that nobody can shrink or grow: a page that went away would be the end of who touches it."""
    descriptor = os.memfd_create("cipherfleet-vcc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, MEMORY_BYTES)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Memory:
    """A mapping of it. ``region`` is writable; views into it must be gone before ``close``."""

    def __init__(self, descriptor: int) -> None:
        """Raises ``CardUnavailable`` when it is not such memory."""
        try:
            if os.fstat(descriptor).st_size != MEMORY_BYTES:
                raise CardUnavailable("the crypto card gave memory of another size")
            self._map = mmap.mmap(descriptor, MEMORY_BYTES)
        except (OSError, ValueError) as exc:
            raise CardUnavailable("the crypto card's memory cannot be mapped") from exc
        view = memoryview(self._map)
        self.counters = view[:COUNTERS_BYTES].cast("I")
        self.submissions = view[SUBMISSIONS_AT:COMPLETIONS_AT]
        self.completions = view[COMPLETIONS_AT:REGION_AT]
        self.region = view[REGION_AT:]
        view.release()
        self._barrier = threading.Lock()

    def publish(self, counter: Counter, value: int) -> None:
        """Let the other end see everything written so far, then the counter; what is read next is read after that.

        Taking a lock is an atomic operation, and so a barrier for compiler and processor on every machine that CPython runs on.
        """
        with self._barrier:
            self.counters[counter] = value & WORD
        with self._barrier:
            return

    def close(self) -> None:
        for view in (self.counters, self.submissions, self.completions, self.region):
            view.release()
        with suppress(BufferError):  # a view that an error's traceback still holds; the memory goes with it
            self._map.close()


def submission(index: int) -> slice:
    """Where the entry of a submission counter's value is."""
    at = index % RING_ENTRIES * DESCRIPTOR.size
    return slice(at, at + DESCRIPTOR.size)


def completion(index: int) -> slice:
    at = index % RING_ENTRIES * COMPLETION.size
    return slice(at, at + COMPLETION.size)
