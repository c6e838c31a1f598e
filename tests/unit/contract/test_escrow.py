"""The escrow's log finds what a database's owner could do to it."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipherfleet.contract.errors import CipherfleetError, EscrowRolledBack, EscrowRowForeign, EscrowRowTampered, Malformed
from cipherfleet.contract.escrow import (
    EscrowRow,
    KeyAttributes,
    KeyState,
    LogEntry,
    Seen,
    StatementEntry,
    VersionAttributes,
    associated_data,
    decode_attributes,
    genesis,
    replay,
    row_digest,
    statement_digest,
)
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.statements import Signature, Signed
from tests.escrow import check_whole

ACME, GLOBEX = ConsumerId("acme"), ConsumerId("globex")


def row(key: int, version: int, content: bytes = b"w", consumer: ConsumerId = ACME) -> EscrowRow:
    return EscrowRow(consumer, KeyId(f"{key:032x}"), version, b"{}", content)


def attributes(key: int, content: bytes, replaces: EscrowRow | None = None) -> EscrowRow:
    previous = b"" if replaces is None else row_digest(replaces)
    of_key = KeyAttributes("AES-256-GCM", KeyState.ENABLED, 1, 1, 0.0, previous=previous)
    return EscrowRow(ACME, KeyId(f"{key:032x}"), 0, msgspec.json.encode(of_key), content)


@dataclass
class Database:
    """An escrow in memory, as an operator holds it."""

    rows: dict[str, EscrowRow] = field(default_factory=dict)
    statements: dict[str, StatementEntry] = field(default_factory=dict)
    log: list[LogEntry] = field(default_factory=list)

    def write(self, new: EscrowRow) -> None:
        self.rows[new.subject] = new
        self.log.append(LogEntry(len(self.log) + 1, new.subject, row_digest(new)))

    def sign_in(self, name: str, payload: bytes, sequence: int) -> None:
        entry = StatementEntry(ApplicationName(name), Signed("s", payload), sequence)
        self.statements[name] = entry
        self.log.append(LogEntry(len(self.log) + 1, entry.subject, statement_digest(entry.statement)))

    def point(self) -> Seen:
        return replay(Seen(0, 0, genesis(ACME, 0)), tuple(self.log))

    def check(self, seen: Seen | None = None, checkpoint: Seen | None = None) -> None:
        check_whole(ACME, self.log, self.rows.values(), self.statements.values(), checkpoint or self.point(), seen)


@pytest.fixture
def database() -> Database:
    made = Database()
    for key in (1, 2):
        made.write(attributes(key, b"enabled"))
        made.write(row(key, 1, b"material"))
    made.sign_in("billing", b"first", 1)
    made.write(attributes(1, b"disabled", attributes(1, b"enabled")))
    made.sign_in("billing", b"second", 3)
    made.sign_in("shop", b"third", 4)
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
    database.rows[row(1, 0).subject] = attributes(1, b"enabled")
    with pytest.raises(EscrowRolledBack):
        database.check()


def test_a_statement_set_back_is_found(database: Database) -> None:
    for sequence in (1, 3):
        database.statements["billing"] = StatementEntry(ApplicationName("billing"), Signed("s", b"first"), sequence)
        with pytest.raises(EscrowRowTampered):
            database.check()


@pytest.mark.parametrize("sequence", [0, 1, 2, 3, 4])
def test_a_statement_that_was_kept_back_cannot_be_written_later(database: Database, sequence: int) -> None:
    """Whoever runs the HSM appends entries; the consumer's next statement has a higher number than all before."""
    database.sign_in("billing", b"kept back", sequence)
    with pytest.raises(EscrowRolledBack):
        database.check()


@pytest.mark.parametrize("label", ["application/billing", "application/billing@", "application/billing@05", "application/billing@-5"])
def test_a_statement_has_its_number_in_the_log(database: Database, label: str) -> None:
    database.log.append(LogEntry(len(database.log) + 1, label, b"d" * 32))
    with pytest.raises(EscrowRolledBack):
        database.check()


def test_a_signature_written_in_another_way_is_no_other_statement() -> None:
    signed = Signed("s", b"payload", (Signature("k", b"one way"),))
    assert statement_digest(signed) == statement_digest(msgspec.structs.replace(signed, signatures=(Signature("k", b"another"),)))
    assert len({statement_digest(s) for s in (signed, Signed("t", b"payload"), Signed("s", b"other"))}) == 3


def test_a_row_written_again_by_who_runs_the_hsm_is_found(database: Database) -> None:
    database.write(attributes(1, b"enabled"))
    with pytest.raises(EscrowRolledBack):
        database.check()


def test_a_row_that_was_kept_back_cannot_be_written_later(database: Database) -> None:
    first, second = attributes(1, b"enabled"), attributes(1, b"disabled", attributes(1, b"enabled"))
    kept_back = attributes(1, b"enabled again", second)
    database.write(attributes(1, b"still disabled", second))
    database.check()
    for appended in ((kept_back,), (second, kept_back), (first, second, kept_back)):
        forged = Database(dict(database.rows), dict(database.statements), list(database.log))
        for each in appended:
            forged.write(each)
        with pytest.raises(EscrowRolledBack):
            forged.check()


def test_material_is_written_once(database: Database) -> None:
    """A sibling that a card sealed, and that was kept back, is no less authentic than the one that was committed."""
    seen = database.point()
    database.write(row(1, 1, b"sibling"))
    for known in (None, seen):
        with pytest.raises(EscrowRolledBack):
            database.check(known)


def test_attributes_that_cannot_be_read_are_found(database: Database) -> None:
    database.write(row(3, 0))
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
    for entry in (attributes(1, b"enabled"), row(1, 1, b"material")):
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
