"""A KMC's database of an earlier revision, with keys in it, brought up to date."""

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Connection, text

from cipherfleet.channel import codec
from cipherfleet.contract.escrow import KeyAttributes, KeyState
from cipherfleet.contract.key_life import terms_of
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.kmc.schema import FILE, MIGRATIONS
from cipherfleet.state.database import Database

DAY = 86400.0
KEYS = [
    KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 1.0),
    KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 1.0, aliases=("orders", "bills"), tags={"stage": "test", "team": "a"}),
    KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 1.0, terms=KeyTerms(rotation_s=90 * DAY)),
    KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 1.0, terms=KeyTerms(rotation_uses=9), tags={"stage": "live"}),
    KeyAttributes("AES-256-GCM", KeyState.DISABLED, 1, 1, 1.0, terms=KeyTerms(rotation_s=90 * DAY)),
    KeyAttributes("AES-256-GCM", KeyState.PENDING_DELETION, 1, 1, 1.0, delete_at=2.0),
]


async def open_at(folder: Path, revision: str, monkeypatch: pytest.MonkeyPatch) -> Database:
    """As the program of that revision left it."""
    upgrade = command.upgrade
    with monkeypatch.context() as patched:
        patched.setattr(command, "upgrade", lambda config, _: upgrade(config, revision))
        return Database.open(folder, FILE, MIGRATIONS)


async def test_names_are_counted_and_what_falls_due_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await open_at(tmp_path, "0007", monkeypatch)

    def fill(connection: Connection) -> None:
        for consumer in ("acme", "bolt"):
            connection.execute(
                text(
                    "INSERT INTO consumers (name, state, enrolled_at, ukey, epoch, sequence, head, row_bytes, statement_sequence)"
                    " VALUES (:name, 'enrolled', 1.0, x'', 1, 0, x'', 0, 0)"
                ),
                {"name": consumer},
            )
        for number, attributes in enumerate(KEYS):
            row = {"key": f"{number:032x}", "attributes": codec.encode(attributes)}
            connection.execute(text("INSERT INTO rows VALUES ('acme', :key, 0, :attributes, x'')"), row)

    await old.write(fill)
    await old.close()
    database = Database.open(tmp_path, FILE, MIGRATIONS)

    def look(connection: Connection) -> tuple[dict[str, tuple[int, int]], set[str]]:
        counts = {name: (aliases, tags) for name, aliases, tags in connection.execute(text("SELECT name, aliases, tags FROM consumers"))}
        return counts, set(connection.scalars(text("SELECT key FROM key_terms WHERE consumer = 'acme' AND term = 'due:'")))

    counts, due = await database.read(look)
    await database.close()
    assert counts == {"acme": (2, 3), "bolt": (0, 0)}
    assert due == {f"{number:032x}" for number, attributes in enumerate(KEYS) if "due:" in terms_of(attributes)} != set()
