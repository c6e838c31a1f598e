"""Drives ``contract.lifecycle.Run``: each step is timed, bounded, and recorded in the inventory as it happens."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cipherfleet.contract.errors import CipherfleetError, Internal, TimedOut
from cipherfleet.contract.ids import VcmId
from cipherfleet.contract.lifecycle import Actor, Process, Run, Step, TraceEntry
from cipherfleet.management.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

Interrupt = asyncio.Future[CipherfleetError]


class StepFailed(Exception):
    """``error`` is why, ``undo`` what is to be undone, newest first."""

    def __init__(self, error: CipherfleetError, undo: tuple[Step, ...]) -> None:
        super().__init__(error.code)
        self.error, self.undo = error, undo


class StepDriver:
    """One run of one VCM. ``interrupt`` ends the step under way with the error it is given."""

    def __init__(self, store: Store, vcm: VcmId, process: Process, limit_s: float, interrupt: Interrupt) -> None:
        self.run = Run(process)
        self._store, self._vcm, self._limit, self._interrupt = store, vcm, limit_s, interrupt

    @property
    def trace(self) -> tuple[TraceEntry, ...]:
        return tuple(self.run.trace)

    async def step(
        self, number: int, work: Coroutine[Any, Any, T], *, actor: Actor | None = None, judge: Callable[[T], Actor | None] = lambda _: None
    ) -> T:
        """Do step ``number``; ``actor``, or what ``judge`` makes of the result, did it if not the usual one.

        Raises ``StepFailed``; a cancellation leaves the step unrecorded, and the next start finds it so.
        """
        at, begin = time.time(), time.monotonic()
        try:
            result = await bounded(work, self._limit, self._interrupt, what=f"{self.run.process} step {number}")
        except CipherfleetError as exc:
            undo = self.run.fail(number, exc, at=at, ms=(time.monotonic() - begin) * 1000)
            await self._record(self.run.trace[-1])
            log.info("%s of %s failed at step %d: %s", self.run.process, self._vcm, number, exc.code)
            raise StepFailed(exc, undo) from exc
        entry = self.run.complete(number, at=at, ms=(time.monotonic() - begin) * 1000, actor=actor or judge(result))
        try:
            await self._store.add_trace(self._vcm, entry)
        except CipherfleetError as exc:
            # A step that cannot be recorded counts as failed, whatever it did.
            raise StepFailed(exc, tuple(reversed(self.run.steps[:number]))) from exc
        return result

    async def _record(self, entry: TraceEntry) -> None:
        try:
            await self._store.add_trace(self._vcm, entry)
        except CipherfleetError as exc:
            log.error("the trace of %s cannot be written: %s", self._vcm, exc.code)  # noqa: TRY400 - the step's error goes first


async def bounded(work: Coroutine[Any, Any, T], limit_s: float, interrupt: Interrupt | None, *, what: str) -> T:
    """``work`` within ``limit_s`` seconds and before ``interrupt``. Raises its error, ``TimedOut``, or the interrupt's."""
    task = asyncio.ensure_future(work)
    waited: set[asyncio.Future[Any]] = {task} if interrupt is None else {task, interrupt}
    try:
        await asyncio.wait(waited, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if interrupt is not None and interrupt.done():
        if not task.cancelled():
            task.exception()
        raise interrupt.result()
    if task.cancelled():
        raise TimedOut(f"{what} took longer than {limit_s:g} s")
    try:
        return task.result()
    except CipherfleetError:
        raise
    except Exception as exc:
        # The type only: a message could hold what must not be logged.
        log.error("%s met a defect of ours: %s", what, type(exc).__name__)  # noqa: TRY400
        raise Internal(f"something went wrong on our side in {what}") from exc
