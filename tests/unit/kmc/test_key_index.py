"""Keys by label, state and algorithm: what is found, in which order, page by page."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine

from cipherfleet.contract.errors import Malformed, ServiceOff
from cipherfleet.contract.escrow import EscrowRow, KeyAttributes, KeyState, RowWrite, row_digest
from cipherfleet.contract.ids import ConsumerId, KeyId, new_key_id
from cipherfleet.contract.key_life import DUE
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.kmc_api import KeySearch, KeysFound
from cipherfleet.kmc.schema import FILE, MIGRATIONS
from cipherfleet.state.database import Database
from tests.unit.kmc.world import TestConsumer, TestVcm, World, start_vcm


@pytest.fixture
async def alice(world: World) -> TestConsumer:
    return await world.enrol()


@pytest.fixture
async def vcm(world: World, alice: TestConsumer) -> TestVcm:
    return await start_vcm(world, alice, await alice.plug_in())


def attributes(
    label: str, algorithm: str = "AES-256-GCM", state: KeyState = KeyState.ENABLED, *, replaces: EscrowRow | None = None
) -> EscrowRow:
    key = new_key_id() if replaces is None else replaces.key
    previous = b"" if replaces is None else row_digest(replaces)
    of_key = KeyAttributes(algorithm, state, 1, 1, 0.0, label, previous=previous)
    return EscrowRow(ConsumerId("alice"), key, 0, msgspec.json.encode(of_key), b"w" * 60)


async def find(vcm: TestVcm, search: KeySearch) -> Sequence[Sequence[KeyId]]:
    """All pages."""
    pages = []
    while True:
        found = await vcm.caller.call("POST", "/v1/escrow/search", search, reply=KeysFound)
        pages.append(found.keys)
        if found.after is None:
            return pages
        search = msgspec.structs.replace(search, after=found.after)


async def test_what_falls_due_is_found(vcm: TestVcm) -> None:
    def with_(**changes: object) -> EscrowRow:
        row = attributes("")
        of_key = msgspec.structs.replace(msgspec.json.decode(row.attributes, type=KeyAttributes), **changes)
        return msgspec.structs.replace(row, attributes=msgspec.json.encode(of_key))

    to_delete, by_time = with_(state=KeyState.PENDING_DELETION, delete_at=9.0), with_(terms=KeyTerms(rotation_s=60.0))
    by_uses, resting = with_(terms=KeyTerms(rotation_uses=5)), with_(terms=KeyTerms(rotation_s=60.0), state=KeyState.DISABLED)
    await vcm.write(*(RowWrite(row) for row in (attributes(""), to_delete, by_time, by_uses, resting)))
    assert await find(vcm, KeySearch(terms=(DUE,))) == [(to_delete.key, by_time.key, by_uses.key)]


async def test_by_label_state_and_algorithm(vcm: TestVcm) -> None:
    rows = [
        attributes("shop/b"),
        attributes("billing"),
        attributes("shop/a", "Ed25519"),
        attributes("shop/b", state=KeyState.DISABLED),
        attributes("shop\U0010fffe"),
        attributes("", "Ed25519"),
    ]
    await vcm.write(*(RowWrite(row) for row in rows))
    keys = [row.key for row in rows]

    async def found(**search: str) -> list[int]:
        return [keys.index(key) for page in await find(vcm, KeySearch(**search)) for key in page]  # type: ignore[arg-type]

    assert await found() == [0, 1, 2, 3, 4, 5]
    assert await found(label="shop") == [2, 0, 3, 4]
    assert await found(label="shop/") == [2, 0, 3]
    assert await found(label="shop/b", state="disabled") == [3]
    assert await found(algorithm="Ed25519") == [2, 5]
    assert await found(state="enabled", algorithm="AES-256-GCM") == [0, 1, 4]
    assert await found(label="%") == []
    await vcm.write(RowWrite(attributes("renamed", replaces=rows[1]), row_digest(rows[1])))
    assert await found(label="billing") == []
    assert await found(label="renamed") == [1]


async def test_in_pages(vcm: TestVcm) -> None:
    rows = [attributes(f"{number % 3}") for number in range(10)]
    await vcm.write(*(RowWrite(row) for row in rows))
    for search in (KeySearch(limit=3), KeySearch(label="0", limit=2), KeySearch(state="enabled", limit=5)):
        pages = await find(vcm, search)
        assert [len(page) for page in pages[:-1]] == [search.limit] * (len(pages) - 1)
        once = await find(vcm, msgspec.structs.replace(search, limit=1000))
        assert [key for page in pages for key in page] == list(once[0])


@pytest.mark.parametrize("body", [{"limit": 0}, {"limit": 1001}, {"after": [1]}, {"terms": "x"}])
async def test_wrong_searches(vcm: TestVcm, body: object) -> None:
    with pytest.raises(Malformed):
        await vcm.caller.call("POST", "/v1/escrow/search", body, reply=KeysFound)


async def test_only_a_vcm_with_its_cmk_may_search(world: World, alice: TestConsumer) -> None:
    waiting = await start_vcm(world, alice)
    with pytest.raises(ServiceOff):
        await find(waiting, KeySearch())


async def test_the_migration_counts_and_finds_what_there_was(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    config.set_main_option("path_separator", "os")
    engine = create_engine(f"sqlite:///{tmp_path / FILE}")
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        assert MigrationContext.configure(connection).get_current_revision() == "0001"
    engine.dispose()
    row = attributes("old", "Ed25519", KeyState.DISABLED)
    with closing(sqlite3.connect(tmp_path / FILE)) as raw:
        raw.execute("insert into consumers values ('alice', 'enrolled', 0, x'00', 1, 2, x'00', 9, 0)")
        raw.execute("insert into rows values ('alice', ?, 0, ?, ?)", (row.key, row.attributes, row.wrapped))
        raw.execute("insert into rows values ('alice', ?, 1, '{}', x'00')", (row.key,))
        raw.executemany("insert into log values ('alice', ?, ?, x'00')", [(1, f"key/{row.key}/1"), (2, row.subject), (3, row.subject)])
        raw.commit()
    await Database.open(tmp_path, FILE, MIGRATIONS).close()
    with closing(sqlite3.connect(tmp_path / FILE)) as raw:
        assert raw.execute("select * from key_index").fetchall() == [("alice", row.key, 2, "Ed25519", "disabled", "old")]
        assert raw.execute("select keys, row_count from consumers").fetchall() == [(1, 2)]
