"""The engine threads of a card, beside the thread of its loop: they do the cryptography of long requests, and nothing else.

Primitives on long data let go of the interpreter's lock, so threads use as many cores; what is short is done in the loop's
own thread, where it costs no change of threads.
"""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

MAX_THREADS = 8
SWITCH_S = 50e-6
"""How long a thread may keep the interpreter's lock from another: Python's usual 5 ms are the time of a thousand requests."""


class Job(Protocol):
    def run(self) -> None:
        """Must not raise."""
        ...


def helpers() -> int:
    """How many engine threads this host has cores for, beside the loop's and one for the VCMs.

    On two cores none: there, a thread more took the VCMs' core and made everything slower, by half.
    """
    return max(0, min(len(os.sched_getaffinity(0)) - 2, MAX_THREADS - 1))


class Engine:
    """``start`` jobs while there are ``free`` threads; ``finished`` is called in the loop when there are ``done`` ones."""

    def __init__(self, threads: int, finished: Callable[[], None]) -> None:
        self.threads = self.free = threads
        self.awaited = True
        """Whether ``finished`` is to be called; unset while somebody looks for done jobs anyway."""
        self._finished, self._loop = finished, asyncio.get_running_loop()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: deque[Job] = deque()
        if threads:
            sys.setswitchinterval(SWITCH_S)
        for number in range(threads):
            threading.Thread(target=self._work, name=f"engine-{number}", daemon=True).start()

    def start(self, job: Job) -> None:
        self.free -= 1
        self._jobs.put(job)

    def done(self) -> Job | None:
        """A job that is through."""
        if not self._done:
            return None
        self.free += 1
        return self._done.popleft()

    def close(self) -> None:
        """The threads end with what they are at."""
        for _ in range(self.threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            self._done.append(job)
            if self.awaited:
                try:
                    self._loop.call_soon_threadsafe(self._finished)
                except RuntimeError:  # the loop has ended, and the card with it
                    return
