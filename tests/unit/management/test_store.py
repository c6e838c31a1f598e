"""The inventory: what is written stays, and a state that cannot be used is refused in one clear line."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from cipherfleet.contract.errors import (
    ConsumerUnknown,
    DiskFull,
    FileProblem,
    LimitReached,
    StateConflict,
    StateNewer,
    StateNotWritable,
    VcmUnknown,
)
from cipherfleet.contract.ids import ConsumerId, MachineId, TokenId, VcmId, new_vcm_id
from cipherfleet.contract.lifecycle import Process, TraceEntry
from cipherfleet.contract.machine_api import Isolation, VcmState
from cipherfleet.management.inventory import Cause, MachineRecord
from cipherfleet.management.schema import FILE, metadata
from cipherfleet.management.store import Store

ACME = ConsumerId("acme")
M1 = MachineId("m1")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await asyncio.to_thread(Store.open, tmp_path / "state")
    yield store
    await store.close()


async def reopened(store: Store, tmp_path: Path) -> Store:
    await store.close()
    return await asyncio.to_thread(Store.open, tmp_path / "state")


async def test_everything_is_there_after_a_restart(store: Store, tmp_path: Path) -> None:
    await store.put_machine(MachineRecord(M1, "https://127.0.0.1:1"))
    domain = await store.allot_domain(ACME)
    vcm = (await store.add_vcm(new_vcm_id(), ACME)).id
    placed = await store.place_vcm(vcm, ACME, M1)
    isolation = Isolation("process", "none", ("net",), limits={"cpu": 1})
    record = await store.change_vcm(vcm, state=VcmState.SERVING, created=True, isolation=isolation, cause=Cause.REMOVAL)
    entry = TraceEntry(Process.CREATE, 1, "terminal", "asks", 1.5, 2.5)
    await store.add_trace(vcm, entry)
    await store.save_token(vcm, TokenId("00" * 8), b"\x00\x01" * 16)
    again = await reopened(store, tmp_path)
    try:
        assert await again.machines() == [MachineRecord(M1, "https://127.0.0.1:1")]
        assert await again.domains() == [domain]
        assert await again.vcm(vcm) == record
        assert record.slot == placed.slot == 10
        assert await again.trace(vcm) == (entry,)
        assert await again.ports() == {ACME: {10: vcm}}
        assert await again.count_tokens() == 1
    finally:
        await again.close()


async def test_machines_are_in_order_and_can_move(store: Store) -> None:
    for number in (10, 2, 1):
        await store.put_machine(MachineRecord(MachineId(f"m{number}"), "https://a"))
    await store.put_machine(MachineRecord(MachineId("m2"), "https://b"))
    assert [(m.id, m.url) for m in await store.machines()] == [("m1", "https://a"), ("m2", "https://b"), ("m10", "https://a")]


async def test_a_domain_is_kept_for_ever(store: Store) -> None:
    first = await store.allot_domain(ACME)
    assert await store.allot_domain(ACME) == first
    assert (await store.allot_domain(ConsumerId("bolt"))).index == 2
    vcm = (await store.add_vcm(new_vcm_id(), ACME)).id
    with pytest.raises(StateConflict):
        await store.remove_domain(ACME)
    await store.change_vcm(vcm, state=VcmState.DELETED)
    await store.remove_domain(ACME)
    with pytest.raises(ConsumerUnknown):
        await store.domain(ACME)
    assert (await store.allot_domain(ConsumerId("cane"))).index == 3
    assert await store.allot_domain(ACME) == first


async def test_an_enrolment_that_failed_gives_its_index_back(store: Store) -> None:
    await store.allot_domain(ACME)
    await store.remove_domain(ACME)
    await store.remove_domain(ACME)
    assert (await store.allot_domain(ConsumerId("bolt"))).index == 1


async def test_there_are_250_domains(store: Store) -> None:
    for number in range(250):
        await store.allot_domain(ConsumerId(f"c{number}"))
    with pytest.raises(LimitReached):
        await store.allot_domain(ACME)


async def test_ports_are_allotted_lowest_first_and_released(store: Store) -> None:
    await store.put_machine(MachineRecord(M1, "https://a"))
    await store.allot_domain(ACME)
    made = [(await store.add_vcm(new_vcm_id(), ACME)).id for _ in range(9)]
    for vcm in made[:8]:
        await store.place_vcm(vcm, ACME, M1)
    with pytest.raises(LimitReached):
        await store.place_vcm(made[8], ACME, M1)
    await store.release_port(made[3])
    await store.release_port(made[3])
    assert (await store.place_vcm(made[8], ACME, M1)).slot == 13
    assert (await store.vcm(made[3])).slot == 13  # history knows where it was


async def test_a_deletion_that_is_repeated_is_traced_anew(store: Store) -> None:
    await store.allot_domain(ACME)
    vcm = (await store.add_vcm(new_vcm_id(), ACME)).id
    create = TraceEntry(Process.CREATE, 1, "terminal", "asks", 1.0, 1.0)
    steps = [TraceEntry(Process.DELETE, n, "kmc", "does", float(n), 1.0, "timed-out" if n == 3 else "") for n in (1, 2, 3)]
    for entry in (create, *steps, *steps[:1]):
        await store.add_trace(vcm, entry)
    assert await store.trace(vcm) == (create, steps[0])


async def test_the_history_of_deleted_vcms_stays(store: Store) -> None:
    await store.allot_domain(ACME)
    vcm = (await store.add_vcm(new_vcm_id(), ACME)).id
    await store.change_vcm(vcm, state=VcmState.DELETED)
    assert await store.vcms() == []
    assert [v.id for v in await store.vcms(deleted=True, consumer=ACME)] == [vcm]
    with pytest.raises(VcmUnknown):
        await store.vcm(VcmId("vcm-000000000000"))
    with pytest.raises(VcmUnknown):
        await store.change_vcm(VcmId("vcm-000000000000"), error="x")


async def test_who_is_cancelled_knows_what_was_written(store: Store) -> None:
    await store.allot_domain(ACME)
    for _ in range(10):
        vcm = new_vcm_id()
        task = asyncio.create_task(store.add_vcm(vcm, ACME))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await store.vcm(vcm)  # it was begun, so it is there


async def test_the_migrations_make_the_tables_of_the_schema(store: Store, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'state' / FILE}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


async def test_files_are_the_operators_alone(store: Store, tmp_path: Path) -> None:
    await store.allot_domain(ACME)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "state").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


# -- states that cannot be used ------------------------------------------------------------------------------------------


def edit(folder: Path, statement: str) -> str:
    connection = sqlite3.connect(folder / FILE)
    with connection:
        found = connection.execute(statement).fetchone()
    connection.close()
    return "" if found is None else str(found[0])


async def test_a_newer_state_is_refused_and_not_touched(store: Store, tmp_path: Path) -> None:
    await store.close()
    known = edit(tmp_path / "state", "SELECT version_num FROM alembic_version")
    edit(tmp_path / "state", "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StateNewer, match="9999"):
        Store.open(tmp_path / "state")
    edit(tmp_path / "state", f"UPDATE alembic_version SET version_num = '{known}'")  # noqa: S608 - as it was
    await Store.open(tmp_path / "state").close()


def test_a_state_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StateNotWritable) as caught:
        Store.open(tmp_path / "state")
    assert "--state" in caught.value.hint


def test_a_database_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state" / FILE).mkdir(parents=True)
    with pytest.raises(StateNotWritable):
        Store.open(tmp_path / "state")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / FILE).write_bytes(b"not a database " * 100)
    with pytest.raises(FileProblem, match="damaged"):
        Store.open(tmp_path / "state")


async def test_a_full_disk_is_said_so_and_loses_nothing(store: Store, tmp_path: Path) -> None:
    before = await store.allot_domain(ACME)

    def fill(connection: object) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count=1")  # type: ignore[attr-defined]

    await store._database.read(fill)  # SQLite's own way to have no space left
    with pytest.raises(DiskFull):
        for number in range(2000):
            await store.put_machine(MachineRecord(MachineId(f"m{number}"), "https://" + "a" * 200))
    again = await reopened(store, tmp_path)
    try:
        assert await again.domain(ACME) == before
    finally:
        await again.close()


async def test_a_database_that_became_read_only_is_said_so(store: Store) -> None:
    await store._database.read(lambda c: c.exec_driver_sql("PRAGMA query_only=1").close())
    with pytest.raises(StateNotWritable):
        await store.allot_domain(ACME)


async def test_what_the_schema_forbids_is_our_error(store: Store) -> None:
    with pytest.raises(FileProblem, match="IntegrityError"):
        await store.add_vcm(new_vcm_id(), ConsumerId("nobody"))
