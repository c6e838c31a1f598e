"""Deletion of a VCM in eight steps. It is run again until it is through: every step succeeds on what is gone."""

import asyncio
import contextlib
import logging

from cipherfleet.contract.audit import Decider
from cipherfleet.contract.errors import CipherfleetError, ServiceUnavailable, UkeyAbsent
from cipherfleet.contract.lifecycle import Actor, Process
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.contract.management_api import DeletePermit
from cipherfleet.contract.statements import Purpose, Signed
from cipherfleet.management.authentication import TerminalChannel
from cipherfleet.management.inventory import Cause, VcmRecord
from cipherfleet.management.modules import Modules
from cipherfleet.management.outbox import Decision
from cipherfleet.management.steps import Interrupt, StepDriver, StepFailed

log = logging.getLogger(__name__)


class Deletion:
    """One deletion. With ``Cause.CONSUMER`` the Ukey signs it; otherwise nobody at the terminal is asked."""

    def __init__(self, modules: Modules, record: VcmRecord, cause: Cause, interrupt: Interrupt) -> None:
        self._modules, self._record, self._cause, self._interrupt = modules, record, cause, interrupt

    async def run(self) -> VcmRecord:
        """The history that is left. Raises why it is not through; the record says ``DELETING`` from step 2 on."""
        try:
            return await (self._signed() if self._cause is Cause.CONSUMER else self._unasked())
        except StepFailed as failed:
            raise failed.error from failed

    async def _signed(self) -> VcmRecord:
        """Asked for by the consumer, with the Ukey in."""
        modules, vcm = self._modules, self._record.id
        driver = self._driver()
        channel, request = await driver.step(1, self._identify())
        await self._mark()
        try:
            await driver.step(2, self._verify(request))
        except StepFailed as failed:
            if not isinstance(failed.error, ServiceUnavailable):
                # A clear no: the VCM stays. When the KMC was not heard, the deletion may have begun there and goes on.
                refused = Decision("vcm-deletion-refused", self._record.consumer, "consumer", vcm, failed.error.code)
                await modules.store.change_vcm(vcm, refused, state=self._record.state, cause=self._record.cause)
            raise
        await self._dismantle(driver, instance=None)
        off = modules.authentication.expect_service_off(channel, vcm)
        try:
            await driver.step(7, self._permit(channel))
            await driver.step(8, self._hear(off), judge=lambda heard: None if heard else Actor.AUTHENTICATION)
        finally:
            off.cancel()
        return await self._finish()

    async def _unasked(self) -> VcmRecord:
        """By the operator's force, after the Ukey's removal, or because the VCM failed."""
        modules, record, actor = self._modules, self._record, self._cause.actor
        await self._mark()
        driver = self._driver()
        # The instance is stopped at once, whatever the KMC says: step 6 then finds it done, or does it again.
        instance = asyncio.create_task(self._stop_instance())
        try:
            await driver.step(1, _nothing(), actor=actor)
            await driver.step(2, self._revoke_token())
            await self._dismantle(driver, instance)
        except asyncio.CancelledError:
            instance.cancel()
            raise
        finally:
            with contextlib.suppress(CipherfleetError, asyncio.CancelledError):
                await instance
        # A failed VCM's consumer still wants service: its terminal hears of the next VCM instead.
        permit = _nothing() if self._cause is Cause.SCHEDULER else modules.authentication.tell(record.consumer, DeletePermit(record.id))
        await driver.step(7, permit)
        await driver.step(8, _nothing(), actor=actor)
        return await self._finish()

    def _driver(self) -> StepDriver:
        return StepDriver(self._modules.store, self._record.id, Process.DELETE, self._modules.settings.step_s, self._interrupt)

    async def _mark(self) -> None:
        """From here on the VCM goes, whatever happens to this process."""
        record, known = self._record, (self._record.state, self._record.cause) == (VcmState.DELETING, self._cause)
        await self._modules.store.change_vcm(
            record.id, None if known else deletion_ordered(record, self._cause), state=VcmState.DELETING, cause=self._cause
        )

    async def _identify(self) -> tuple[TerminalChannel, Signed]:
        modules, consumer = self._modules, self._record.consumer
        patience = min(modules.settings.step_s, modules.settings.heartbeat_s)
        channel = await modules.authentication.wait_terminal(consumer, patience)
        nonce = await modules.authentication.challenge(consumer)
        return channel, await modules.authentication.prove(channel, nonce, Purpose.DELETE_VCM, self._record.id)

    async def _verify(self, request: Signed) -> None:
        await self._modules.authentication.verify(self._record.consumer, request, Purpose.DELETE_VCM, self._record.id)

    async def _revoke_token(self) -> None:
        if self._record.token_id is not None:
            await self._modules.authority.revoke_token(self._record.token_id)

    async def _dismantle(self, driver: StepDriver, instance: asyncio.Task[None] | None) -> None:
        modules, record = self._modules, self._record
        await driver.step(3, modules.store.delete_token(record.id))
        await driver.step(4, modules.authority.revoke_vcm(record.id))
        await driver.step(5, modules.network.delete(record))
        await driver.step(6, self._delete_instance(instance))

    async def _stop_instance(self) -> None:
        if self._record.machine is not None:
            await self._modules.images.delete(self._record.machine, self._record.id)

    async def _delete_instance(self, instance: asyncio.Task[None] | None) -> None:
        await (self._stop_instance() if instance is None else asyncio.shield(instance))
        await self._modules.store.release_port(self._record.id)

    async def _permit(self, channel: TerminalChannel) -> None:
        # From here on there is nothing left to serve: a terminal that went does not hold the deletion up.
        with contextlib.suppress(UkeyAbsent):
            await channel.send(DeletePermit(self._record.id))

    async def _hear(self, off: asyncio.Future[bool]) -> bool:
        """Whether the terminal saw the service go off; one that is silent does not hold the deletion up."""
        await asyncio.wait({off}, timeout=self._modules.settings.lease_s / 2)
        return off.done() and off.exception() is None

    async def _finish(self) -> VcmRecord:
        log.info("%s of %s is deleted (%s)", self._record.id, self._record.consumer, self._cause)
        deleted = Decision("vcm-deleted", self._record.consumer, "management", self._record.id)
        return await self._modules.store.change_vcm(self._record.id, deleted, state=VcmState.DELETED)


def deletion_ordered(record: VcmRecord, cause: Cause) -> Decision:
    by: dict[Cause, Decider] = {Cause.CONSUMER: "consumer", Cause.OPERATOR: "operator", Cause.REMOVAL: "consumer"}
    return Decision("vcm-deletion-ordered", record.consumer, by.get(cause, "scheduler"), f"{record.id}: {cause}")


async def _nothing() -> None:
    return None
