"""The seals on the audit logs: the HSM signs where each of them stands, now and then while there is news.

Nothing is signed that does not continue what was signed before, so who edits the database gets no seal on it.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from sqlalchemy import Connection

from cipherfleet.channel import signing
from cipherfleet.channel.audit_check import read_audit_checkpoint
from cipherfleet.contract.audit import PLATFORM, AuditChain, AuditHeads, AuditPoint, AuditQuery, Sealing
from cipherfleet.contract.audit_seals import written_by
from cipherfleet.contract.errors import AuditBroken, CipherfleetError, HsmUnavailable, Malformed
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.statements import AuditCheckpointStatement, Signed
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.center import Center

log = logging.getLogger(__name__)

LOOK_S = 1.0
FAREWELL_S = 2.0


class AuditSealer:
    """Every ``audit_seal_entries`` entries, or ``audit_seal_s`` seconds after the first that is not sealed.

    Seconds by the loop's clock, or by the times in the log if these say more: those of a life before this one, or of before the
    wall clock was set.
    """

    def __init__(self, center: Center) -> None:
        self._center = center
        self._sealed: dict[str, AuditPoint] = {}
        self._newest: dict[str, tuple[int, Signed]] = {}
        self._waiting: dict[str, float] = {}  # since when (loop time) a log has entries that are not sealed
        self._broken: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def newest(self, consumer: str) -> tuple[int, Signed] | None:
        """The newest seal of a log and the entry it is on; known without the database, as each heartbeat asks."""
        return self._newest.get(consumer)

    def rule(self) -> Sealing:
        """By which rule, and the time it is."""
        settings = self._center.settings
        return Sealing(settings.audit_seal_entries, settings.audit_seal_s, self._center.wall_clock())

    async def start(self) -> None:
        """What was sealed before counts, as far as the database still shows it."""
        kept = await self._center.database.read(audit.newest_checkpoints)
        for consumer, signed in kept.items():
            try:
                statement = read_audit_checkpoint(signed, consumer, self._center.signer.public_key)
                point = AuditPoint(statement.sequence, statement.digest)
                await self._center.database.read(partial(_check_at, consumer=consumer, point=point))
            except AuditBroken as exc:
                self._refuse(consumer, exc)
            else:
                self._sealed[consumer], self._newest[consumer] = point, (point.sequence, signed)
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """What is not sealed yet is, if the HSM is there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._center.write_suppressed(everything=True)
                await self.seal(lambda unsealed, waited: True)
        except (CipherfleetError, TimeoutError) as exc:
            log.warning("the audit logs are sealed at the next start: %s", getattr(exc, "code", "timed-out"))

    async def _keep(self) -> None:
        settings = self._center.settings
        while True:
            await asyncio.sleep(min(LOOK_S, settings.audit_seal_s))
            try:
                await self._center.write_suppressed()
                await self.seal(lambda unsealed, waited: unsealed >= settings.audit_seal_entries or waited >= settings.audit_seal_s)
            except CipherfleetError as exc:
                log.warning("the audit logs wait for their seal: %s", exc.code)

    async def seal(self, due: Callable[[int, float], bool]) -> None:
        """Seal the logs of which ``due`` says so (entries not sealed, seconds they waited). Raises ``HsmUnavailable``."""
        now = asyncio.get_running_loop().time()
        heads: AuditHeads = await self._center.database.read(audit.read_heads)
        for head in heads.heads:
            consumer, sealed = head.consumer, self._sealed.get(head.consumer)
            unsealed = head.sequence - (sealed.sequence if sealed is not None else 0)
            if not unsealed and sealed is not None and sealed.digest == head.digest:
                self._waiting.pop(consumer, None)
                continue
            waited = now - self._waiting.setdefault(consumer, now)
            if consumer not in self._broken and unsealed > 0:
                reading = partial(_waited, consumer=consumer, after=head.sequence - unsealed, now=self._center.wall_clock())
                waited = max(waited, await self._center.database.read(reading))
            if consumer in self._broken or not due(unsealed, waited):
                continue
            try:
                await self._seal(consumer, sealed)
            except AuditBroken as exc:
                self._refuse(consumer, exc)
            else:
                self._waiting.pop(consumer, None)

    async def _seal(self, consumer: str, sealed: AuditPoint | None) -> None:
        point, epoch = await self._center.database.read(partial(_replay, consumer=consumer, sealed=sealed))
        if sealed is not None and point.sequence <= sealed.sequence:
            return
        at = self._center.wall_clock()
        statement = AuditCheckpointStatement(
            consumer, epoch, point.sequence, point.digest, at, sealed.sequence if sealed is not None else 0
        )
        try:
            signed = await signing.sign(statement, self._center.signer)
        except HsmUnavailable:
            log.warning("the seal on the audit log of %s waits for the HSM", consumer or "the platform")
            raise
        await self._center.database.write(
            partial(audit.add_checkpoint, consumer=consumer, sequence=point.sequence, signed=signed),
            lambda _: self._note(consumer, point, signed),
        )

    def _note(self, consumer: str, point: AuditPoint, signed: Signed) -> None:
        self._sealed[consumer], self._newest[consumer] = point, (point.sequence, signed)

    def _refuse(self, consumer: str, broken: AuditBroken) -> None:
        self._broken.add(consumer)
        log.critical("the audit log of %s is not sealed any more: %s", consumer or "the platform", broken.message)


def _replay(connection: Connection, consumer: str, sealed: AuditPoint | None) -> tuple[AuditPoint, int]:
    """Where the log leads from what was sealed, and the consumer's epoch. Raises ``AuditBroken``."""
    chain = AuditChain(consumer, start=sealed)
    while True:
        entries = audit.read(connection, AuditQuery(consumer or PLATFORM, after=chain.point.sequence))
        for entry in entries:
            chain.add(entry)
        if not entries:
            break
    end = audit.head(connection, consumer)
    chain.end(AuditPoint(end.sequence, end.digest))
    found = store.find_consumer(connection, ConsumerId(consumer)) if consumer else None
    return chain.point, found.epoch if found is not None else 0


def _waited(connection: Connection, consumer: str, after: int, now: float) -> float:
    """How long the first entry that is not sealed has waited, by its own time (seconds)."""
    try:
        found = audit.read(connection, AuditQuery(consumer or PLATFORM, after=after, limit=1))
        return now - written_by(found[0]) if found else 0.0
    except (TypeError, Malformed):  # the check before the seal says what is wrong
        return 0.0


def _check_at(connection: Connection, consumer: str, point: AuditPoint) -> None:
    """Raises ``AuditBroken`` unless the log still has this entry."""
    before = AuditQuery(consumer or PLATFORM, after=max(0, point.sequence - 1), limit=1)
    try:
        entries = audit.read(connection, before)
    except (TypeError, Malformed) as exc:
        raise AuditBroken(f"entry {point.sequence} cannot be read") from exc
    if not entries or (entries[0].sequence, entries[0].digest) != (point.sequence, point.digest):
        raise AuditBroken(f"entry {point.sequence}, which was sealed, is not there any more")
