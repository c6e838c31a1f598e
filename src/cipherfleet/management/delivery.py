"""Brings what was decided into the KMC's audit log, in its order, however often KMC or platform end meanwhile."""

import asyncio
import logging

from cipherfleet.contract.errors import CipherfleetError, KmcUnavailable, OutOfOrder
from cipherfleet.management.authority import Authority
from cipherfleet.management.store import Store

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


class Delivery:
    def __init__(self, store: Store, authority: Authority) -> None:
        self._store, self._authority = store, authority
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """What waits from before goes first."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """What waits is told at the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            self._store.decided.clear()
            try:
                more = await self._deliver()
            except CipherfleetError as exc:
                if not isinstance(exc, KmcUnavailable):
                    log.warning("the KMC does not take what was decided, it is told again: %s: %s", exc.code, exc.message)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            pause = FIRST_PAUSE_S
            if not more:
                await self._store.decided.wait()

    async def _deliver(self) -> bool:
        """The oldest events; whether there were any. Marked only after the KMC has them on its disk: a repetition counts once there."""
        batch = await self._store.waiting_events()
        if batch is None:
            return False
        try:
            await self._authority.report(batch)
        except OutOfOrder:
            await self._store.renew_outbox()  # one of the two databases is older than the other
            raise
        await self._store.delivered_events(batch.events[-1].number)
        return True
