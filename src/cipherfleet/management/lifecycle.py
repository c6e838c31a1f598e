"""The life cycles of all VCMs: one run at a time per consumer, interrupted by the Ukey's removal, finished after a restart."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any

from cipherfleet.contract.audit import Decider
from cipherfleet.contract.errors import (
    CipherfleetError,
    KmcUnavailable,
    MachineUnavailable,
    ManagementUnavailable,
    StateConflict,
    UkeyAbsent,
)
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId
from cipherfleet.contract.lifecycle import CREATION, Process, TraceEntry
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import FlowFailed, LoginPermit, ServiceOn
from cipherfleet.contract.vcc import VccLimits
from cipherfleet.management.creation import Creation
from cipherfleet.management.deletion import Deletion, deletion_ordered
from cipherfleet.management.inventory import BUILDING_STATES, Cause, DomainRecord, VcmRecord
from cipherfleet.management.modules import Modules
from cipherfleet.management.outbox import Decision
from cipherfleet.management.steps import Interrupt, bounded
from cipherfleet.management.undo import undo

log = logging.getLogger(__name__)


class _Running:
    """The run under way for a consumer; ``vcm`` as soon as there is one, ``firm`` when nothing may interrupt it."""

    def __init__(self) -> None:
        self.interrupt: Interrupt = asyncio.get_running_loop().create_future()
        self.vcm: VcmId | None = None
        self.firm = False


class Lifecycle:
    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self._locks: dict[ConsumerId, asyncio.Lock] = {}
        self._running: dict[ConsumerId, _Running] = {}
        self._moves: Counter[ConsumerId] = Counter()
        self._asked: set[asyncio.Task[VcmRecord]] = set()

    async def close(self) -> None:
        """The platform ends: what the operator asked for ends where it is, the next start finds it."""
        for task in self._asked:
            task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)

    async def _own(self, work: Coroutine[Any, Any, VcmRecord]) -> VcmRecord:
        """Run to the end whether or not whoever asked still listens."""
        task = asyncio.create_task(work)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await asyncio.shield(task)

    def busy(self, consumer: ConsumerId) -> bool:
        """Whether a run of this consumer is under way."""
        lock = self._locks.get(consumer)
        return lock is not None and lock.locked()

    def moves(self, consumer: ConsumerId) -> int:
        """How many runs of this consumer began, plus how many ended: what was read between two equal counts was not amid a change."""
        return self._moves[consumer]

    # -- what the operator asks for ------------------------------------------------------------------------------------

    async def create(self, consumer: ConsumerId, wished: MachineId | None = None) -> VcmRecord:
        """One VCM more. Raises ``UkeyAbsent``, ``NoCapacity`` or whatever a step failed with; nothing half-made stays."""
        await self._modules.store.domain(consumer)

        async def work() -> VcmRecord:
            async with self._exclusive(consumer) as running:
                return await self._create(consumer, running, by="operator", wished=wished)

        return await self._own(work())

    async def delete(self, vcm: VcmId, *, force: bool) -> VcmRecord:
        """Delete a VCM: with the Ukey's signature, or by the operator's ``force``. What is gone is gone. Raises ``VcmUnknown``."""
        record = await self._modules.store.vcm(vcm)
        if force:
            log.warning("audit: the operator forces the deletion of %s of %s", vcm, record.consumer)
            self._interrupt(record.consumer, StateConflict(f"the operator deletes {vcm} by force"), vcm)

        async def work() -> VcmRecord:
            async with self._exclusive(record.consumer) as running:
                running.vcm = vcm
                return await self._delete(vcm, Cause.OPERATOR if force else Cause.CONSUMER, running)

        return await self._own(work())

    async def migrate(self, vcm: VcmId, wished: MachineId | None = None) -> VcmRecord:
        """Make before break: the new VCM, after the old one is deleted. Raises ``StateConflict`` unless the old one serves."""
        consumer = (await self._modules.store.vcm(vcm)).consumer

        async def work() -> VcmRecord:
            async with self._exclusive(consumer) as running:
                old = await self._modules.store.vcm(vcm)
                if old.state is not VcmState.SERVING:
                    raise StateConflict(f"{vcm} is {old.state}, only a serving VCM can migrate")
                new = await self._create(consumer, running, by="operator", wished=wished, avoid=old.machine, like=vcm)
                running.vcm = vcm
                await self._delete(vcm, Cause.CONSUMER, running)
                return new

        return await self._own(work())

    async def limit(self, vcm: VcmId, limits: VccLimits) -> VcmRecord:
        """Hold a VCM's vCC, and those of the VCMs that come after it, to ``limits``. Raises ``StateConflict``."""
        consumer = (await self._modules.store.vcm(vcm)).consumer

        async def work() -> VcmRecord:
            async with self._exclusive(consumer):
                record = await self._modules.store.vcm(vcm)
                if record.machine is None or record.state is not VcmState.SERVING:
                    raise StateConflict(f"{vcm} is {record.state}, only a serving VCM has a vCC to limit")
                await self._modules.images.limit(record.machine, vcm, limits)
                await self._modules.store.set_limits(vcm, limits)
                log.info("audit: the operator holds %s of %s to %s", vcm, consumer, limits)
                await self._modules.monitor.look(record.machine)
                return record

        return await self._own(work())

    # -- what the ring decides -----------------------------------------------------------------------------------------

    async def serve(self, consumer: ConsumerId, *, inserted: bool) -> VcmRecord | None:
        """The consumer's one VCM: the one that serves already, else a new one (flow step a; ring).

        ``inserted``: the Ukey was plugged in; otherwise service must still be wanted. None when there is nothing to do.
        """
        async with self._exclusive(consumer) as running:
            if self._modules.authentication.terminal(consumer) is None:
                return None
            domain = await self._modules.store.domain(consumer)
            if inserted and not domain.wanted:
                await self._modules.store.set_wanted(consumer, True)
            elif not inserted and not domain.wanted:
                return None
            serving = [v for v in await self._modules.store.vcms(consumer=consumer) if v.state is VcmState.SERVING]
            adopted = [v for v in serving if await self._well(v) and (not inserted or await self._readmit(v, domain, running))]
            if adopted:
                return adopted[0]
            await self._delete_all(((v.id, Cause.SCHEDULER) for v in serving), running)
            return await self._create(consumer, running, by="consumer" if inserted else "scheduler")

    async def withdraw(self, consumer: ConsumerId) -> None:
        """The Ukey is gone: whatever runs is interrupted and undone, every VCM deleted. Raises nothing; the ring retries."""
        self._interrupt(consumer, UkeyAbsent(f"the Ukey of {consumer} was removed"))
        async with self._exclusive(consumer) as running:
            running.firm = True
            with contextlib.suppress(CipherfleetError):
                await self._modules.store.set_wanted(consumer, False)
            vcms = await self._modules.store.vcms(consumer=consumer)
            await self._delete_all(((v.id, Cause.REMOVAL) for v in vcms), running)

    async def sweep(self, consumer: ConsumerId, doomed: Iterable[tuple[VcmId, Cause]]) -> None:
        """Delete VCMs, all at once. Raises nothing; the ring retries."""
        async with self._exclusive(consumer) as running:
            await self._delete_all(doomed, running)

    async def recover(self) -> int:
        """At the start: creations that were under way when the platform ended are marked, for the ring to undo; how many."""
        interrupted = [v for v in await self._modules.store.vcms() if v.state in BUILDING_STATES]
        for vcm in interrupted:
            trace = await self._modules.store.trace(vcm.id)
            done = len(trace)
            if done < len(CREATION) and not (trace and trace[-1].error):
                step = CREATION[done]
                entry = TraceEntry(Process.CREATE, step.number, step.actor, step.action, vcm.changed_at, 0.0, ManagementUnavailable.code)
                await self._modules.store.add_trace(vcm.id, entry)
            failed = Decision("vcm-failed", vcm.consumer, "management", vcm.id, ManagementUnavailable.code)
            error = "the management platform ended during the creation"
            await self._modules.store.change_vcm(vcm.id, failed, state=VcmState.FAILED, error=error)
        await self._modules.network.sweep()
        return len(interrupted)

    # -- runs ----------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _exclusive(self, consumer: ConsumerId) -> AsyncIterator[_Running]:
        async with self._locks.setdefault(consumer, asyncio.Lock()):
            running = self._running[consumer] = _Running()
            self._moves[consumer] += 1
            try:
                yield running
            finally:
                self._moves[consumer] += 1
                del self._running[consumer]

    def _interrupt(self, consumer: ConsumerId, error: CipherfleetError, vcm: VcmId | None = None) -> None:
        """End the run under way (if ``vcm`` is given: only when it is about that one)."""
        running = self._running.get(consumer)
        if running is not None and not running.firm and not running.interrupt.done() and vcm in (None, running.vcm):
            running.interrupt.set_result(error)

    async def _create(
        self,
        consumer: ConsumerId,
        running: _Running,
        *,
        by: Decider,
        wished: MachineId | None = None,
        avoid: MachineId | None = None,
        like: VcmId | None = None,
    ) -> VcmRecord:
        creation = Creation(self._modules, consumer, running.interrupt, by=by, wished=wished, avoid=avoid, like=like)
        running.vcm = creation.vcm
        try:
            record = await creation.run()
        except CipherfleetError as exc:
            serving = [v for v in await self._modules.store.vcms(consumer=consumer) if v.state is VcmState.SERVING]
            if not serving:  # one that has service keeps it: the failure of a second VCM is the operator's to hear
                await self._modules.authentication.tell(consumer, FlowFailed(exc.code, exc.message, exc.hint))
            raise
        await self._modules.store.set_wanted(consumer, True)
        return record

    async def _delete(self, vcm: VcmId, cause: Cause, running: _Running) -> VcmRecord:
        store = self._modules.store
        record = await store.vcm(vcm)
        if not record.alive:
            return record
        if not record.created:
            # It never came to life: its creation is undone, in no other way than when it failed.
            if cause in (Cause.CONSUMER, Cause.OPERATOR):
                await store.change_vcm(vcm, deletion_ordered(record, cause))
            record = await undo(self._modules, vcm)
            if record.alive:
                raise MachineUnavailable(f"{vcm} is not all gone yet", "it is tried again until it is")
            return record
        if record.state is VcmState.DELETING and cause is Cause.CONSUMER:
            cause = Cause.REMOVAL  # it is signed and under way; what is left needs no second signature
        if cause in (Cause.CONSUMER, Cause.OPERATOR):
            others = [v for v in await store.vcms(consumer=record.consumer) if v.id != vcm and v.state is not VcmState.DELETING]
        else:
            others = [record]
        try:
            return await Deletion(self._modules, record, cause, running.interrupt).run()
        finally:
            if not others and (await store.vcm(vcm)).state in (VcmState.DELETING, VcmState.DELETED):
                await store.set_wanted(record.consumer, False)

    async def _delete_all(self, doomed: Iterable[tuple[VcmId, Cause]], running: _Running) -> None:
        results = await asyncio.gather(*(self._delete(vcm, cause, running) for vcm, cause in doomed), return_exceptions=True)
        for result in results:
            if isinstance(result, CipherfleetError):
                log.warning("a deletion is not through, it is tried again: %s", result.code)
            elif isinstance(result, BaseException):
                raise result

    async def _readmit(self, vcm: VcmRecord, domain: DomainRecord, running: _Running) -> bool:
        """A terminal came back while its VCM serves: it logs in again and service is on; whether it did."""
        modules = self._modules
        channel = modules.authentication.terminal(vcm.consumer)
        if channel is None:
            return False
        login = modules.authentication.expect_login(channel, vcm.id)
        endpoint = modules.network.endpoint(domain, vcm.slot)
        try:
            # No mark: the CMK is in the card already, nothing is to be downloaded.
            await channel.send(LoginPermit(vcm.id, endpoint, b"", modules.network.applications(domain)))
            await bounded(_wait(login), modules.settings.step_s, running.interrupt, what=f"the new login to {vcm.id}")
            await channel.send(ServiceOn(vcm.id, await modules.store.trace(vcm.id), endpoint))
        except CipherfleetError as exc:
            log.info("%s is not taken over: %s", vcm.id, exc.code)
            return False
        finally:
            login.cancel()
        return True

    async def _well(self, vcm: VcmRecord) -> bool:
        """Whether a VCM of the inventory serves: its machine says so, and the KMC does not say otherwise."""
        if vcm.machine is None or (machine := await self._modules.monitor.look(vcm.machine)) is None:
            return False
        if not any(v.id == vcm.id and v.state is VcmState.SERVING for v in machine.vcms):
            return False
        try:
            return (await self._modules.authority.state(vcm.id)).serving
        except KmcUnavailable:
            return True
        except CipherfleetError:
            return False


async def _wait(future: asyncio.Future[bool]) -> bool:
    return await future
