"""The escrow's log finds what a database's owner could do to it."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipherfleet.contract.errors import CipherfleetError, EscrowRolledBack, EscrowRowForeign, EscrowRowTampered, Malformed
from cipherfleet.contract.escrow import (
    EscrowRow,
    EscrowView,
    KeyAttributes,
    KeyState,
    LogEntry,
    Seen,
    StatementEntry,
    VersionAttributes,
    associated_data,
    check_view,
    decode_attributes,
    genesis,
    replay,
    row_digest,
    statement_digest,
)
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.statements import Signed

ACME, GLOBEX = ConsumerId("acme"), ConsumerId("globex")
EMPTY = Signed("none", b"")


def row(key: int, version: int, content: bytes = b"w", consumer: ConsumerId = ACME) -> EscrowRow:
    return EscrowRow(consumer, KeyId(f"{key:032x}"), version, b"{}", content)


@dataclass
class Database:
    """An escrow in memory, as an operator holds it."""

    rows: dict[str, EscrowRow] = field(default_factory=dict)
    statements: dict[str, StatementEntry] = field(default_factory=dict)
    log: list[LogEntry] = field(default_factory=list)

    def write(self, new: EscrowRow) -> None:
        self.rows[new.subject] = new
        self.log.append(LogEntry(len(self.log) + 1, new.subject, row_digest(new)))

    def sign_in(self, name: str, payload: bytes) -> None:
        entry = StatementEntry(ApplicationName(name), Signed("s", payload))
        self.statements[entry.subject] = entry
        self.log.append(LogEntry(len(self.log) + 1, entry.subject, statement_digest(entry.statement)))

    def point(self) -> Seen:
        return replay(Seen(0, 0, genesis(ACME, 0)), tuple(self.log))

    def view(self) -> EscrowView:
        return EscrowView(tuple(self.rows.values()), tuple(self.statements.values()), tuple(self.log), EMPTY)

    def check(self, seen: Seen | None = None, checkpoint: Seen | None = None) -> None:
        check_view(ACME, self.view(), checkpoint or self.point(), seen)


@pytest.fixture
def database() -> Database:
    made = Database()
    for key in (1, 2):
        made.write(row(key, 0, b"attributes"))
        made.write(row(key, 1, b"material"))
    made.sign_in("billing", b"first")
    made.write(row(1, 0, b"disabled"))
    made.sign_in("billing", b"second")
    return made


def test_a_true_view_passes_from_any_point_seen_before(database: Database) -> None:
    database.check()
    for length in range(len(database.log) + 1):
        database.check(replay(Seen(0, 0, genesis(ACME, 0)), tuple(database.log[:length])))


def test_a_changed_row_is_found(database: Database) -> None:
    database.rows[row(2, 1).subject] = row(2, 1, b"other material")
    with pytest.raises(EscrowRowTampered):
        database.check()


def test_a_row_set_back_is_found(database: Database) -> None:
    database.rows[row(1, 0).subject] = row(1, 0, b"attributes")
    with pytest.raises(EscrowRowTampered):
        database.check()


def test_a_statement_set_back_is_found(database: Database) -> None:
    database.statements["application/billing"] = StatementEntry(ApplicationName("billing"), Signed("s", b"first"))
    with pytest.raises(EscrowRowTampered):
        database.check()


def test_a_row_of_another_consumer_is_found(database: Database) -> None:
    database.rows["moved"] = row(9, 1, consumer=GLOBEX)
    with pytest.raises(EscrowRowForeign):
        database.check()


def test_a_row_nobody_wrote_is_found(database: Database) -> None:
    database.rows["new"] = row(9, 1)
    with pytest.raises(EscrowRowForeign):
        database.check()


def test_a_missing_row_is_found(database: Database) -> None:
    del database.rows[row(2, 1).subject]
    with pytest.raises(EscrowRolledBack):
        database.check()


def test_a_database_set_back_as_a_whole_is_found_by_who_saw_more(database: Database) -> None:
    seen = database.point()
    older = Database()
    for entry in (row(1, 0, b"attributes"), row(1, 1, b"material")):
        older.write(entry)
    older.check()  # consistent in itself
    with pytest.raises(EscrowRolledBack):
        older.check(seen)


def test_a_rewritten_history_is_found(database: Database) -> None:
    seen = database.point()
    forged = Database()
    for number in range(len(database.log)):
        forged.write(row(number + 100, 1))
    with pytest.raises(EscrowRolledBack):
        forged.check(seen)


def test_a_log_that_does_not_lead_to_its_checkpoint_is_found(database: Database) -> None:
    checkpoint = database.point()
    database.log.pop()
    with pytest.raises(EscrowRolledBack):
        database.check(checkpoint=checkpoint)


def test_another_epoch_needs_the_ukeys_word(database: Database) -> None:
    with pytest.raises(EscrowRolledBack):
        database.check(Seen(1, 0, genesis(ACME, 1)))


@given(st.data())
def test_any_edit_of_the_log_is_found(data: st.DataObject) -> None:
    database = Database()
    for key in range(6):
        database.write(row(key, 1, bytes([key])))
    checkpoint = database.point()
    edit = data.draw(st.sampled_from(["swap", "drop", "digest", "subject"]))
    index = data.draw(st.integers(0, 4))
    entry = database.log[index]
    if edit == "swap":
        database.log[index], database.log[index + 1] = database.log[index + 1], database.log[index]
    elif edit == "drop":
        database.log.pop(index)
    elif edit == "digest":
        database.log[index] = msgspec.structs.replace(entry, digest=b"x" * 32)
    else:
        database.log[index] = msgspec.structs.replace(entry, subject="key/other/1")
    with pytest.raises(CipherfleetError):
        database.check(checkpoint=checkpoint)


def test_associated_data_tells_every_part_apart() -> None:
    parts = [(ACME, KeyId("1" * 32), 1, b"{}"), (GLOBEX, KeyId("1" * 32), 1, b"{}"), (ACME, KeyId("2" * 32), 1, b"{}")]
    parts += [(ACME, KeyId("1" * 32), 2, b"{}"), (ACME, KeyId("1" * 32), 1, b"{} ")]
    assert len({associated_data(*p) for p in parts}) == len(parts)


def test_attributes_are_read_by_version() -> None:
    key = KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 0.0)
    version = VersionAttributes("AES-256-GCM", 0.0)
    assert decode_attributes(EscrowRow(ACME, KeyId("1" * 32), 0, msgspec.json.encode(key), b"")) == key
    assert decode_attributes(EscrowRow(ACME, KeyId("1" * 32), 1, msgspec.json.encode(version), b"")) == version
    with pytest.raises(Malformed):
        decode_attributes(row(1, 0))
