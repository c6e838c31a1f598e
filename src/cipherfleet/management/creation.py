"""Creation of a VCM in nine steps (the paper; steps a to h of the flow)."""

import asyncio
import contextlib

from cipherfleet.contract.audit import Decider
from cipherfleet.contract.errors import CipherfleetError, MachineUnavailable, PeerError, UkeyAbsent
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId, new_vcm_id, token_id_of
from cipherfleet.contract.kmc_api import IdentityReply, VcmAuthorisation
from cipherfleet.contract.lifecycle import Process
from cipherfleet.contract.machine_api import BuildOrder, MachineReport, VcmReport, VcmSize, VcmState
from cipherfleet.contract.management_api import LoginPermit, ServiceOn
from cipherfleet.contract.statements import Purpose, Signed
from cipherfleet.management.authentication import TerminalChannel
from cipherfleet.management.inventory import DomainRecord, VcmRecord
from cipherfleet.management.modules import Modules
from cipherfleet.management.outbox import Decision
from cipherfleet.management.scheduler import MachineView, Snapshot, plan
from cipherfleet.management.steps import Interrupt, StepDriver, StepFailed
from cipherfleet.management.undo import undo

LOOK_S = 0.05  # how often step 9 looks
WATCH_S = 0.5  # how often step 8 looks whether the VCM still lives
TOKEN_BYTES = 32


class Creation:
    """One creation. ``wished``: the only machine to take; ``avoid``: a machine to take last; ``by``: whose will it is."""

    def __init__(
        self,
        modules: Modules,
        consumer: ConsumerId,
        interrupt: Interrupt,
        *,
        wished: MachineId | None = None,
        avoid: MachineId | None = None,
        like: VcmId | None = None,
        by: Decider,
    ) -> None:
        self._modules, self._consumer, self._interrupt = modules, consumer, interrupt
        self._wished, self._avoid, self._like, self._by = wished, avoid, like, by
        self.vcm: VcmId = new_vcm_id()

    async def run(self) -> VcmRecord:
        """The serving VCM. Raises why there is none; then only its history is left (or ``DELETING``, which the ring ends)."""
        modules = self._modules
        domain = await modules.store.domain(self._consumer)
        await modules.store.add_vcm(self.vcm, self._consumer, by=self._by, like=self._like)
        driver = StepDriver(modules.store, self.vcm, Process.CREATE, modules.settings.step_s, self._interrupt)
        try:
            channel = await self._steps(driver, domain)
            record = await modules.store.change_vcm(self.vcm, state=VcmState.SERVING, created=True)
        except StepFailed as failed:
            await self._fail(failed.error)
            await undo(modules, self.vcm, failed.undo)
            raise failed.error from failed
        except CipherfleetError as exc:
            await self._fail(exc)
            await undo(modules, self.vcm)
            raise
        with contextlib.suppress(UkeyAbsent):  # if it went in this moment, the ring sees that as at any later time
            await channel.send(ServiceOn(self.vcm, driver.trace, modules.network.endpoint(domain, record.slot)))
        return record

    async def _fail(self, error: CipherfleetError) -> None:
        failed = Decision("vcm-failed", self._consumer, "management", self.vcm, error.code)
        await self._modules.store.change_vcm(self.vcm, failed, state=VcmState.FAILED, error=f"{error.code}: {error.message}")

    async def _steps(self, driver: StepDriver, domain: DomainRecord) -> TerminalChannel:
        modules, vcm = self._modules, self.vcm
        channel, request = await driver.step(1, self._identify())  # step a
        identity = await driver.step(2, self._verify(request))  # step b
        assert identity.token_id is not None  # noqa: S101 - _verify saw to it
        await driver.step(3, modules.store.save_token(vcm, identity.token_id, identity.token))  # step c
        record = await driver.step(4, self._place(identity, domain))  # step d
        assert record.machine is not None  # noqa: S101 - it was placed
        assert record.slot is not None  # noqa: S101
        namespace = await driver.step(5, modules.network.create(domain, record.slot))
        await driver.step(6, self._build(record, identity, domain, namespace))  # step e begins in the VCM
        login = modules.authentication.expect_login(channel, vcm)
        try:
            endpoint = modules.network.endpoint(domain, record.slot)
            permit = LoginPermit(vcm, endpoint, identity.mark, modules.network.applications(domain))
            await driver.step(7, channel.send(permit))  # step c: the mark; step f is between KMC, terminal and card
            await driver.step(8, self._log_in(login, record.machine))  # step g in the VCM
        finally:
            login.cancel()
        await driver.step(9, self._serve(record.machine))  # step h
        return channel

    async def _identify(self) -> tuple[TerminalChannel, Signed]:
        modules = self._modules
        patience = min(modules.settings.step_s, modules.settings.heartbeat_s)
        channel = await modules.authentication.wait_terminal(self._consumer, patience)
        nonce = await modules.authentication.challenge(self._consumer)
        # Written down before the token exists, so that one whose reply got lost can be revoked.
        await modules.store.change_vcm(self.vcm, token_id=token_id_of(nonce))
        return channel, await modules.authentication.prove(channel, nonce, Purpose.BUILD_VCM)

    async def _verify(self, request: Signed) -> IdentityReply:
        reply = await self._modules.authentication.verify(self._consumer, request, Purpose.BUILD_VCM)
        if reply.token_id is not None:
            await self._modules.store.change_vcm(self.vcm, token_id=reply.token_id)
        if reply.token_id is None or len(reply.token) != TOKEN_BYTES:
            raise PeerError("the KMC verified the identity and sent no user_vcm_token")
        return reply

    async def _place(self, identity: IdentityReply, domain: DomainRecord) -> VcmRecord:
        modules = self._modules
        async with modules.placing:
            snapshot = await take_snapshot(modules)
            machine = plan(snapshot, self._wished, self._avoid).machine
            record = await modules.store.place_vcm(self.vcm, self._consumer, machine)
        assert record.slot is not None  # noqa: S101 - it was placed
        assert identity.token_id is not None  # noqa: S101
        address = modules.network.address(domain, record.slot)
        await modules.authority.authorise(self.vcm, VcmAuthorisation(self._consumer, machine, identity.token_id, address))
        return record

    async def _build(self, record: VcmRecord, identity: IdentityReply, domain: DomainRecord, namespace: str) -> VcmReport:
        modules, settings = self._modules, self._modules.settings
        assert record.machine is not None  # noqa: S101 - it was placed
        assert record.slot is not None  # noqa: S101
        order = BuildOrder(
            consumer=self._consumer,
            token=identity.token,
            address=modules.network.address(domain, record.slot),
            isolation=modules.network.isolation,
            size=VcmSize(settings.vcm_cpus, settings.vcm_memory_mib, settings.vcm_files),
            network_namespace=namespace,
            limits=record.limits,
        )
        report = await modules.images.build(record.machine, self.vcm, order)
        await modules.store.change_vcm(self.vcm, state=VcmState.PREPARING, isolation=report.isolation)
        return report

    async def _log_in(self, login: asyncio.Future[bool], machine: MachineId) -> None:
        """The terminal's login; not waited for any longer when the VCM is no more."""
        while not (await asyncio.wait({login}, timeout=WATCH_S))[0]:
            self._check(await self._modules.monitor.look(machine))
        login.result()

    async def _serve(self, machine: MachineId) -> None:
        """Terminal, KMC and VCM answer: the terminal did, the other two are asked."""
        while True:
            report = self._check(await self._modules.monitor.look(machine))
            if report is not None and report.state is VcmState.SERVING and (await self._modules.authority.state(self.vcm)).serving:
                return
            await asyncio.sleep(LOOK_S)

    def _check(self, machine: MachineReport | None) -> VcmReport | None:
        """The VCM's report, none when its machine is silent. Raises when it failed."""
        if machine is None:
            return None
        report = next((v for v in machine.vcms if v.id == self.vcm), None)
        if report is None:
            raise MachineUnavailable(f"{machine.id} no longer knows {self.vcm}")
        if report.state in (VcmState.FAILED, VcmState.DELETED, VcmState.DELETING):
            raise CipherfleetError.from_text(report.error[:500] or f"{self.vcm} is {report.state} on {machine.id} and gave no reason")
        return report


async def take_snapshot(modules: Modules) -> Snapshot:
    """The machines as the monitor sees them, loaded as the inventory says (or they themselves, if that is more)."""
    placed = [record.machine for record in await modules.store.vcms()]
    return Snapshot(
        tuple(
            MachineView(m.id, m.state == "up", m.capacity, max(placed.count(m.id), len(m.vcms)), m.card is not None)
            for m in modules.monitor.machines
        )
    )
