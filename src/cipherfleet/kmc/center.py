"""What every room of the KMC stands on: database, CA, registry, signing key, clocks; and the one way to revoke."""

import time
from collections.abc import Callable, Iterable
from functools import partial

from sqlalchemy import Connection

from cipherfleet.contract.errors import HsmUnavailable
from cipherfleet.contract.ids import ConsumerId, Serial, VcmId
from cipherfleet.contract.settings import Settings
from cipherfleet.kmc import audit, store
from cipherfleet.kmc.certification import PLATFORM, ROOT, Certification
from cipherfleet.kmc.hsm import Hsm, KeyHandle, Label, Mechanism, ensure_key_pair, ensure_wrap_key
from cipherfleet.kmc.hsm_keys import HsmSigner
from cipherfleet.kmc.refusals import Refusals
from cipherfleet.kmc.registry import Issued, Registry
from cipherfleet.state.database import Database

ROOT_KEY, SIGNING_KEY = Label("root-key"), Label("kmc-signing")
KEEP_EXPIRED_S = 30 * 86400


class Center:
    """Made by ``open``; nothing else makes keys of the platform."""

    def __init__(
        self,
        database: Database,
        hsm: Hsm,
        certification: Certification,
        signer: HsmSigner,
        root_key: KeyHandle,
        settings: Settings,
        wall_clock: Callable[[], float],
    ) -> None:
        self.database, self.hsm, self.certification, self.signer, self.root_key = database, hsm, certification, signer, root_key
        self.settings, self.wall_clock = settings, wall_clock
        self.registry = Registry()
        self.on_revoked: list[Callable[[tuple[Serial, ...]], object]] = []
        self._refusals = Refusals()

    @staticmethod
    async def open(database: Database, hsm: Hsm, settings: Settings, *, wall_clock: Callable[[], float] = time.time) -> "Center":
        """The KMC's keys and CAs: found, or made at the first start.

        Raises ``HsmUnavailable`` (also for an HSM that lacks a mechanism), or ``FileProblem`` for a foreign HSM.
        """
        missing = frozenset(Mechanism) - await hsm.mechanisms()
        if missing:
            raise HsmUnavailable(f"the HSM does not offer {', '.join(sorted(missing))}")
        certification = Certification(hsm, wall_clock=wall_clock)
        known = await database.read(store.read_authorities)
        for name in (ROOT, PLATFORM):
            if name not in known:
                pem = await certification.make(name)
                await database.write(partial(store.add_authority, name=name, certificate=pem))
                known[name] = pem
            await certification.add(name, known.pop(name))
        for name, pem in known.items():
            await certification.add(name, pem)
        signing = await ensure_key_pair(hsm, SIGNING_KEY)
        signer = HsmSigner(hsm, signing, await hsm.public_key(signing))
        center = Center(database, hsm, certification, signer, await ensure_wrap_key(hsm, ROOT_KEY), settings, wall_clock)
        for issued, revoked in await database.read(lambda connection: store.read_certificates(connection, wall_clock())):
            center.registry.add(issued)
            if revoked:
                center.registry.revoke([issued.serial])
        return center

    async def forget_expired(self, now: float) -> None:
        """Certificates that nobody can show any more."""
        self.registry.forget_expired(now)
        await self.database.write(partial(store.forget_vcm_certificates, before=now - KEEP_EXPIRED_S))
        await self.database.write(store.forget_usage_reports)

    def recorded(self, issued: Issued, superseded: Iterable[Serial] = ()) -> None:
        """A certificate was committed, and others revoked with it."""
        self.registry.add(issued)
        self.revoked(superseded)

    def revoked(self, serials: Iterable[Serial]) -> None:
        """These certificates count no more, from now on: refused at the door, connections closed, VCMs told."""
        gone = tuple(serials)
        self.registry.revoke(gone)
        if gone:
            for tell in self.on_revoked:
                tell(gone)

    async def audit(self, consumer: str, actor: str, event: str, subject: str, outcome: str = "ok") -> None:
        """A line for something that changed nothing else in the database."""
        at = self.wall_clock()
        await self.database.write(
            lambda connection: audit.append(connection, consumer, at=at, actor=actor, event=event, subject=subject, outcome=outcome)
        )

    async def progress(self, consumer: ConsumerId, vcm: VcmId, event: str, subject: str, *, actor: str = "", **reached: bool) -> None:
        """What a VCM has reached, on disk."""
        at = self.wall_clock()

        def commit(connection: Connection) -> None:
            store.change_vcm(connection, vcm, **reached)
            audit.append(connection, consumer, at=at, actor=actor or vcm, event=event, subject=f"{vcm} on {subject}")

        await self.database.write(commit)

    async def audit_refusal(self, consumer: str, actor: str, event: str, subject: str, outcome: str) -> None:
        """A refused attempt; of a flood the first of each minute are written, and how many more there were."""
        if self._refusals.take(consumer, actor, event, outcome):
            await self.audit(consumer, actor, event, subject, outcome)

    async def write_suppressed(self, *, everything: bool = False) -> None:
        """How many refused attempts were not written one by one, of minutes that are over."""
        for consumer, lines in self._refusals.due(self.wall_clock(), everything=everything).items():
            await self.database.write(partial(audit.append_all, consumer=consumer, lines=lines))
