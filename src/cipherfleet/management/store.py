"""The inventory: machines, security domains, VCMs with their history, tokens, ports and traces."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from cipherfleet.contract.audit import Decider, ManagementEvents
from cipherfleet.contract.errors import ConsumerUnknown, LimitReached, StateConflict, VcmUnknown
from cipherfleet.contract.ids import ConsumerId, MachineId, TokenId, VcmId
from cipherfleet.contract.lifecycle import Process, TraceEntry
from cipherfleet.contract.machine_api import Isolation, VcmState
from cipherfleet.contract.vcc import VccLimits
from cipherfleet.management import outbox
from cipherfleet.management.inventory import FIRST_SLOT, LAST_DOMAIN, LAST_SLOT, DomainRecord, MachineRecord, VcmRecord
from cipherfleet.management.outbox import Decision
from cipherfleet.management.schema import FILE, MIGRATIONS, domains, machines, ports, tokens, trace, vcms
from cipherfleet.state.database import Database

T = TypeVar("T")


class Store:
    """Every method is one transaction; what it wrote is on disk when it returns, and with it what the audit log is to say of it.

    ``decided`` is set whenever there is something for the audit log.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.decided = asyncio.Event()

    @staticmethod
    def open(folder: Path) -> "Store":
        """Blocking. Raises as ``Database.open``."""
        return Store(Database.open(folder, FILE, MIGRATIONS))

    async def close(self) -> None:
        await self._database.close()

    # -- machines ------------------------------------------------------------------------------------------------------

    async def put_machine(self, machine: MachineRecord) -> None:
        def work(connection: Connection) -> None:
            known = connection.execute(select(machines.c.url).where(machines.c.id == machine.id)).scalar_one_or_none()
            changed = connection.execute(update(machines).where(machines.c.id == machine.id).values(url=machine.url))
            if changed.rowcount == 0:
                connection.execute(insert(machines).values(id=machine.id, url=machine.url))
            if known != machine.url:
                outbox.enqueue(connection, Decision("machine-registered", "", "operator", f"{machine.id} at {machine.url}"))

        await self._decide(work)

    async def machines(self) -> list[MachineRecord]:
        rows = await self._database.read(lambda c: c.execute(select(machines)).all())
        return sorted((msgspec.convert(_fields(row), MachineRecord) for row in rows), key=lambda m: (len(m.id), m.id))

    # -- security domains ----------------------------------------------------------------------------------------------

    async def allot_domain(self, consumer: ConsumerId) -> DomainRecord:
        """The consumer's domain, allotted at the first call. Raises ``LimitReached``."""

        def work(connection: Connection) -> DomainRecord:
            row = connection.execute(select(domains).where(domains.c.consumer == consumer)).one_or_none()
            if row is None:
                used = set(connection.execute(select(domains.c.index)).scalars())
                free = next((i for i in range(1, LAST_DOMAIN + 1) if i not in used), None)
                if free is None:
                    raise LimitReached(f"all {LAST_DOMAIN} security domains of this cloud are allotted")
                connection.execute(insert(domains).values(consumer=consumer, index=free, wanted=False, removed=False))
                outbox.enqueue(connection, Decision("domain-allotted", consumer, "operator", f"domain {free}"))
                return DomainRecord(consumer, free, wanted=False, removed=False)
            if row.removed:
                outbox.enqueue(connection, Decision("domain-allotted", consumer, "operator", f"domain {row._mapping['index']}"))
                connection.execute(update(domains).where(domains.c.consumer == consumer).values(removed=False))
            return DomainRecord(consumer, row._mapping["index"], wanted=row.wanted, removed=False)

        return await self._decide(work)

    async def domain(self, consumer: ConsumerId) -> DomainRecord:
        """Raises ``ConsumerUnknown``."""
        found = [domain for domain in await self.domains() if domain.consumer == consumer]
        if not found:
            raise ConsumerUnknown(f"there is no consumer {consumer}", "enrol it with: cipherfleet consumer enroll")
        return found[0]

    async def domains(self) -> list[DomainRecord]:
        query = select(domains).where(domains.c.removed.is_(False)).order_by(domains.c.index)
        rows = await self._database.read(lambda c: c.execute(query).all())
        return [msgspec.convert(_fields(row), DomainRecord, strict=False) for row in rows]

    async def remove_domain(self, consumer: ConsumerId) -> None:
        """The consumer goes; its index stays its own once a VCM has served on it. Raises ``StateConflict``."""

        def work(connection: Connection) -> None:
            states = set(connection.execute(select(vcms.c.state).where(vcms.c.consumer == consumer)).scalars())
            if states - {VcmState.DELETED}:
                raise StateConflict(f"{consumer} still has a VCM", "delete it first: cipherfleet vcm delete")
            there = (domains.c.consumer == consumer) & domains.c.removed.is_(False)
            index = connection.execute(select(domains.c.index).where(there)).scalar_one_or_none()
            if index is not None:
                outbox.enqueue(connection, Decision("domain-removed", consumer, "operator", f"domain {index}"))
            if states:
                connection.execute(update(domains).where(domains.c.consumer == consumer).values(removed=True, wanted=False))
            else:
                connection.execute(delete(domains).where(domains.c.consumer == consumer))

        await self._decide(work)

    async def set_wanted(self, consumer: ConsumerId, wanted: bool) -> None:
        """Whether the consumer wants service."""
        query = update(domains).where(domains.c.consumer == consumer).values(wanted=wanted)
        await self._database.write(lambda c: c.execute(query))

    # -- VCMs ----------------------------------------------------------------------------------------------------------

    async def add_vcm(self, vcm: VcmId, consumer: ConsumerId, *, by: Decider = "management", like: VcmId | None = None) -> VcmRecord:
        """A VCM to be built ``by`` whose will, with the limits of ``like``, or else those last set for any VCM of its consumer."""
        source = select(domains.c.limits).where(domains.c.consumer == consumer)
        if like is not None:
            source = select(vcms.c.limits).where(vcms.c.id == like)

        def work(connection: Connection) -> VcmRecord:
            now = time.time()
            limits = _limits(connection.execute(source).scalar_one_or_none())
            record = VcmRecord(vcm, consumer, VcmState.BUILDING, now, now, limits=limits)
            connection.execute(insert(vcms).values(**_columns(record)))
            ordered = Decision("vcm-ordered", consumer, by, vcm)
            if like is not None:
                ordered = Decision("vcm-migration-ordered", consumer, by, f"{vcm} in the place of {like}")
            outbox.enqueue(connection, ordered)
            return record

        return await self._decide(work)

    async def set_limits(self, vcm: VcmId, limits: VccLimits) -> None:
        """A VCM's limits, and what its consumer's next one begins with. Raises ``VcmUnknown``."""

        def work(connection: Connection) -> None:
            consumer = connection.execute(select(vcms.c.consumer).where(vcms.c.id == vcm)).scalar_one_or_none()
            if consumer is None:
                raise VcmUnknown(f"there is no VCM {vcm}")
            text = msgspec.json.encode(limits).decode()
            connection.execute(update(vcms).where(vcms.c.id == vcm).values(limits=text))
            connection.execute(update(domains).where(domains.c.consumer == consumer).values(limits=text))
            limits_said = ", ".join(f"{name} {value:g}" for name, value in msgspec.structs.asdict(limits).items())
            outbox.enqueue(connection, Decision("vcm-limits-set", consumer, "operator", f"{vcm}: {limits_said}"))

        await self._decide(work)

    async def vcm(self, vcm: VcmId) -> VcmRecord:
        """Raises ``VcmUnknown``."""
        row = await self._database.read(lambda c: c.execute(select(vcms).where(vcms.c.id == vcm)).one_or_none())
        if row is None:
            raise VcmUnknown(f"there is no VCM {vcm}", "see: cipherfleet vcm list --all")
        return _record(row)

    async def vcms(self, *, consumer: ConsumerId | None = None, deleted: bool = False) -> list[VcmRecord]:
        """VCMs, oldest first; those that are only history too if ``deleted``."""
        query = select(vcms).order_by(vcms.c.created_at, vcms.c.id)
        if not deleted:
            query = query.where(vcms.c.state != VcmState.DELETED)
        if consumer is not None:
            query = query.where(vcms.c.consumer == consumer)
        return [_record(row) for row in await self._database.read(lambda c: c.execute(query).all())]

    async def change_vcm(self, vcm: VcmId, decision: Decision | None = None, **changes: Any) -> VcmRecord:
        """Change fields of a ``VcmRecord``, which is ``decision``. Raises ``VcmUnknown``."""

        def work(connection: Connection) -> VcmRecord:
            row = connection.execute(select(vcms).where(vcms.c.id == vcm)).one_or_none()
            if row is None:
                raise VcmUnknown(f"there is no VCM {vcm}")
            record = msgspec.structs.replace(_record(row), changed_at=time.time(), **changes)
            connection.execute(update(vcms).where(vcms.c.id == vcm).values(**_columns(record)))
            if decision is not None:
                outbox.enqueue(connection, decision)
            return record

        return await self._decide(work)

    async def place_vcm(self, vcm: VcmId, consumer: ConsumerId, machine: MachineId) -> VcmRecord:
        """Creation step 4: the machine, and the lowest free slot of the domain. Raises ``LimitReached``."""

        def work(connection: Connection) -> VcmRecord:
            used = set(connection.execute(select(ports.c.slot).where(ports.c.consumer == consumer)).scalars())
            free = next((s for s in range(FIRST_SLOT, LAST_SLOT + 1) if s not in used), None)
            if free is None:
                raise LimitReached(f"{consumer} has {len(used)} VCMs, more do not fit into its security domain")
            connection.execute(insert(ports).values(consumer=consumer, slot=free, vcm=vcm))
            row = connection.execute(select(vcms).where(vcms.c.id == vcm)).one()
            record = msgspec.structs.replace(_record(row), machine=machine, slot=free, changed_at=time.time())
            connection.execute(update(vcms).where(vcms.c.id == vcm).values(**_columns(record)))
            return record

        return await self._database.write(work)

    # -- ports and tokens ----------------------------------------------------------------------------------------------

    async def release_port(self, vcm: VcmId) -> None:
        await self._database.write(lambda c: c.execute(delete(ports).where(ports.c.vcm == vcm)))

    async def ports(self) -> dict[ConsumerId, dict[int, VcmId]]:
        """The slots in use, by consumer."""
        rows = await self._database.read(lambda c: c.execute(select(ports)).all())
        found: dict[ConsumerId, dict[int, VcmId]] = {}
        for row in rows:
            found.setdefault(row.consumer, {})[row.slot] = row.vcm
        return found

    async def save_token(self, vcm: VcmId, token_id: TokenId, token: bytes) -> None:
        await self._database.write(lambda c: c.execute(insert(tokens).values(vcm=vcm, token_id=token_id, token=token)))

    async def delete_token(self, vcm: VcmId) -> None:
        await self._database.write(lambda c: c.execute(delete(tokens).where(tokens.c.vcm == vcm)))

    async def count_tokens(self) -> int:
        return await self._database.read(lambda c: c.execute(select(func.count()).select_from(tokens)).scalar_one())

    # -- what the audit log is to say ----------------------------------------------------------------------------------

    async def waiting_events(self) -> ManagementEvents | None:
        return await self._database.read(outbox.waiting)

    async def delivered_events(self, last: int) -> None:
        await self._database.write(lambda c: outbox.delivered(c, last))

    async def renew_outbox(self) -> None:
        await self._database.write(outbox.renew)

    async def _decide(self, work: Callable[[Connection], T]) -> T:
        return await self._database.write(work, lambda _: self.decided.set())

    # -- traces --------------------------------------------------------------------------------------------------------

    async def add_trace(self, vcm: VcmId, entry: TraceEntry) -> None:
        """Record a step; step 1 begins the trace of its process anew (a deletion is repeated until it is through)."""
        same = (trace.c.vcm == vcm) & (trace.c.process == entry.process)

        def work(connection: Connection) -> None:
            connection.execute(delete(trace).where(same & (trace.c.step >= entry.step)))
            connection.execute(insert(trace).values(vcm=vcm, **msgspec.structs.asdict(entry)))

        await self._database.write(work)

    async def trace(self, vcm: VcmId) -> tuple[TraceEntry, ...]:
        """The creation's steps, then the deletion's."""
        query = select(trace).where(trace.c.vcm == vcm).order_by(trace.c.step)
        rows = await self._database.read(lambda c: c.execute(query).all())
        entries = [msgspec.convert(_fields(row), TraceEntry) for row in rows]
        return tuple(e for process in Process for e in entries if e.process is process)


def _columns(record: VcmRecord) -> dict[str, Any]:
    columns = msgspec.structs.asdict(record)
    columns["isolation"] = None if record.isolation is None else msgspec.json.encode(record.isolation).decode()
    columns["limits"] = msgspec.json.encode(record.limits).decode()
    return columns


def _limits(text: str | None) -> VccLimits:
    return VccLimits() if text is None else msgspec.json.decode(text, type=VccLimits)


def _fields(row: Row[Any]) -> dict[str, Any]:
    """A row by its columns' names (SQLAlchemy's own kind of string made plain)."""
    return {str(name): value for name, value in row._mapping.items()}


def _record(row: Row[Any]) -> VcmRecord:
    columns = _fields(row)
    if columns["isolation"] is not None:
        columns["isolation"] = msgspec.json.decode(columns["isolation"], type=Isolation)
    columns["limits"] = _limits(columns["limits"])
    return msgspec.convert(columns, VcmRecord)
