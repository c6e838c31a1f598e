"""The decision ring (flow step i): monitor, snapshot, decisions, actions, at a regular interval; and what Ukeys trigger."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.ids import ConsumerId, VcmId
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.management.inventory import Cause, VcmRecord
from cipherfleet.management.lifecycle import Lifecycle
from cipherfleet.management.modules import Modules
from cipherfleet.management.scheduler import Build, ConsumerView, Delete, Sight, VcmView, Withdraw, decide

log = logging.getLogger(__name__)

LONGEST_REST_S = 30.0


class Ring:
    """Knows since when each terminal is away and how long a consumer rests after a failure; all else is in the inventory."""

    def __init__(self, modules: Modules, lifecycle: Lifecycle) -> None:
        self._modules, self._lifecycle = modules, lifecycle
        self._started = time.monotonic()
        self._away: dict[ConsumerId, float] = {}
        self._failures: dict[ConsumerId, int] = {}
        self._rest_until: dict[ConsumerId, float] = {}
        self._tasks: dict[asyncio.Task[None], ConsumerId | None] = {}
        self._clock: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """First what the last life left behind, then the clock. Raises what the inventory raises."""
        interrupted = await self._lifecycle.recover()
        if interrupted:
            log.info("%d interrupted creations will be undone", interrupted)
        self._clock = asyncio.create_task(self._turn())

    async def stop(self) -> None:
        """End at once; what is under way is found in the inventory at the next start."""
        tasks = [*self._tasks, *([self._clock] if self._clock is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- presence: what terminals say ----------------------------------------------------------------------------------

    def inserted(self, consumer: ConsumerId) -> None:
        """Flow step a."""
        self._away.pop(consumer, None)
        self._forget_failures(consumer)
        self._spawn(consumer, partial(self._serve, consumer, inserted=True))

    def removed(self, consumer: ConsumerId) -> None:
        self._away[consumer] = time.monotonic()
        self._spawn(consumer, partial(self._lifecycle.withdraw, consumer))

    def lost(self, consumer: ConsumerId) -> None:
        """The terminal went without a word: it has the lease's time to come back."""
        self._away[consumer] = time.monotonic()

    def absent_s(self, consumer: ConsumerId) -> float | None:
        """Seconds since the consumer's terminal was last there; none while it is."""
        if self._modules.authentication.terminal(consumer) is not None:
            return None
        return time.monotonic() - self._away.get(consumer, self._started)

    # -- the clock -----------------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        interval = self._modules.settings.monitor_s
        following = time.monotonic()
        while True:
            try:
                await self.tick()
            except CipherfleetError as exc:
                log.error("the ring could not turn: %s: %s", exc.code, exc.message)  # noqa: TRY400
            except Exception as exc:
                log.error("the ring met a defect of ours: %s", type(exc).__name__)  # noqa: TRY400
            following = max(following + interval, time.monotonic())
            await asyncio.sleep(following - time.monotonic())

    async def tick(self) -> None:
        """One turn: look, decide, set the actions going."""
        await self._modules.monitor.poll()
        views = await self._views()
        doomed: dict[ConsumerId, list[tuple[VcmId, Cause]]] = {}
        for decision in decide(views, self._modules.settings.lease_s):
            match decision:
                case Withdraw(consumer):
                    log.info("the terminal of %s is away longer than the lease, its service ends", consumer)
                    self._spawn(consumer, partial(self._lifecycle.withdraw, consumer))
                case Delete(consumer, vcm, cause):
                    doomed.setdefault(consumer, []).append((vcm, cause))
                case Build(consumer):
                    self._spawn(consumer, partial(self._replace, consumer, doomed.pop(consumer, [])))
        for consumer, vcms in doomed.items():
            self._spawn(consumer, partial(self._lifecycle.sweep, consumer, vcms))
        await self._clear_strangers()

    async def _views(self) -> tuple[ConsumerView, ...]:
        modules, now = self._modules, time.monotonic()
        working = set(self._tasks.values())
        domains = await modules.store.domains()
        before = {d.consumer: self._lifecycle.moves(d.consumer) for d in domains}
        vcms = await modules.store.vcms()
        return tuple(
            ConsumerView(
                consumer=domain.consumer,
                wanted=domain.wanted,
                absent_s=self.absent_s(domain.consumer),
                # A run that ended since would make a finished creation look like an interrupted one.
                busy=domain.consumer in working
                or self._lifecycle.busy(domain.consumer)
                or self._lifecycle.moves(domain.consumer) != before[domain.consumer],
                resting=now < self._rest_until.get(domain.consumer, 0.0),
                vcms=tuple(self._view(v) for v in vcms if v.consumer == domain.consumer),
            )
            for domain in domains
        )

    def _view(self, vcm: VcmRecord) -> VcmView:
        sight = self._modules.monitor.sight(vcm) if vcm.state is VcmState.SERVING else Sight.UNKNOWN
        return VcmView(vcm.id, vcm.state, sight, vcm.cause)

    async def _clear_strangers(self) -> None:
        """Instances that a machine has and the inventory does not: a build order that arrived after its undoing."""
        machines = self._modules.monitor.machines  # before the inventory is read: no instance is older than its record
        known = {v.id for v in await self._modules.store.vcms()}
        for machine in machines:
            for report in machine.vcms:
                if report.id not in known:
                    log.warning("%s runs %s, which is not in the inventory: it is deleted", machine.id, report.id)
                    self._spawn(None, partial(self._modules.images.delete, machine.id, report.id))

    # -- actions -------------------------------------------------------------------------------------------------------

    async def _serve(self, consumer: ConsumerId, *, inserted: bool) -> None:
        try:
            await self._lifecycle.serve(consumer, inserted=inserted)
        except CipherfleetError:
            count = self._failures[consumer] = self._failures.get(consumer, 0) + 1
            rest = min(LONGEST_REST_S, self._modules.settings.monitor_s * 2 ** min(count, 10))
            self._rest_until[consumer] = time.monotonic() + rest
            raise
        self._forget_failures(consumer)

    async def _replace(self, consumer: ConsumerId, doomed: list[tuple[VcmId, Cause]]) -> None:
        if doomed:
            await self._lifecycle.sweep(consumer, doomed)
        await self._serve(consumer, inserted=False)

    def _forget_failures(self, consumer: ConsumerId) -> None:
        self._failures.pop(consumer, None)
        self._rest_until.pop(consumer, None)

    def _spawn(self, consumer: ConsumerId | None, work: Callable[[], Awaitable[object]]) -> None:
        async def act() -> None:
            try:
                await work()
            except CipherfleetError as exc:
                log.warning("%s: %s: %s", consumer or "the ring", exc.code, exc.message)
            except Exception as exc:
                log.error("an action met a defect of ours: %s", type(exc).__name__)  # noqa: TRY400

        task = asyncio.create_task(act())
        self._tasks[task] = consumer
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
