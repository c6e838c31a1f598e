"""The operator and a consumer's policy: it can be neither forged, nor set back, nor withheld from a Ukey that saw what followed it."""

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner, sign
from cipherfleet.contract.escrow import LogEntry, extend, statement_digest
from cipherfleet.contract.ids import ConsumerId
from cipherfleet.contract.policy import BUILT_IN, INTERNATIONAL
from cipherfleet.contract.statements import PolicyStatement, Signed
from cipherfleet.terminal.policies import set_policy
from cipherfleet.terminal.spare import write_spare
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.security.test_escrow_tampering import edited, unplug
from tests.support import PIN, Consumer, TestCloud, eventually, refusal


@pytest.fixture
def two(breakable: TestCloud, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Consumer, Consumer]]:
    """A consumer's Ukey, and a spare of it that lies in a drawer."""
    first = breakable.enrol(hashlib.sha256(request.node.name.encode()).hexdigest()[:12])

    async def make() -> None:
        with DirectoryUkey.open(first.ukey, PIN) as ukey:
            await write_spare(ukey, tmp_path / "spare", PIN)

    asyncio.run(make())
    yield first, Consumer(breakable, first.name, tmp_path / "spare", PIN)
    unplug(first)


def put(consumer: Consumer, name: str) -> None:
    async def work() -> None:
        with DirectoryUkey.open(consumer.ukey, PIN) as ukey:
            await set_policy(ukey, BUILT_IN[name])

    asyncio.run(work())


def policy_on(consumer: Consumer) -> str:
    with DirectoryUkey.open(consumer.ukey, PIN) as ukey:
        return ukey.memory.policy.name


def kept(connection: sqlite3.Connection, consumer: Consumer) -> bytes:
    [raw] = connection.execute("select statement from policies where consumer = ?", (consumer.name,)).fetchone()
    return bytes(raw)


def append(connection: sqlite3.Connection, consumer: Consumer, subject: str, signed: Signed) -> None:
    """A log entry that fits; the HSM signs whatever it is given."""
    sequence, head = connection.execute("select sequence, head from consumers where name = ?", (consumer.name,)).fetchone()
    entry = LogEntry(sequence + 1, subject, statement_digest(signed))
    connection.execute("insert into log values (?, ?, ?, ?)", (consumer.name, entry.sequence, entry.subject, entry.digest))
    values = (sequence + 1, extend(head, entry), consumer.name)
    connection.execute("update consumers set sequence = ?, head = ? where name = ?", values)


def forged(connection: sqlite3.Connection, consumer: Consumer) -> None:
    """The operator's own, with a fitting entry of the log."""
    signed = asyncio.run(sign(PolicyStatement(ConsumerId(consumer.name), INTERNATIONAL, 1, 99), LocalSigner(new_key())))
    raw = msgspec.json.encode(signed)
    connection.execute("update policies set statement = ? where consumer = ?", (raw, consumer.name))
    append(connection, consumer, "policy/international@99", signed)


def unnamed(connection: sqlite3.Connection, consumer: Consumer) -> None:
    """The log names it, and the statement is gone."""
    connection.execute("delete from policies where consumer = ?", (consumer.name,))


def other_row(connection: sqlite3.Connection, consumer: Consumer) -> None:
    """Edited, under the same signature."""
    raw = msgspec.json.decode(kept(connection, consumer), type=Signed)
    edited_one = msgspec.structs.replace(raw, payload=raw.payload.replace(b'"sequence":', b'"sequence":1'))
    values = (msgspec.json.encode(edited_one), consumer.name)
    connection.execute("update policies set statement = ? where consumer = ?", values)


@pytest.mark.parametrize(("edit", "code"), [(forged, "statement-forged"), (unnamed, "escrow-rolled-back"), (other_row, "statement-forged")])
def test_what_the_database_says_is_checked_by_the_spare(
    breakable: TestCloud, two: tuple[Consumer, Consumer], edit: Callable[[sqlite3.Connection, Consumer], None], code: str
) -> None:
    first, spare = two
    put(first, "fips")
    with edited(breakable) as connection:
        edit(connection, first)
    assert refusal(lambda: spare.plug_in(timeout=30)) == code
    assert policy_on(spare) == "international", "nothing of it was believed"
    unplug(spare)


def test_an_older_policy_shown_again_sets_no_ukey_back(breakable: TestCloud, two: tuple[Consumer, Consumer]) -> None:
    first, spare = two
    put(first, "international")
    with edited(breakable) as connection:
        lax = kept(connection, first)
    put(spare, "fips")
    with edited(breakable) as connection:
        connection.execute("update policies set statement = ? where consumer = ?", (lax, first.name))
    assert not refusal(lambda: spare.plug_in(timeout=60)), "it knows the newer one: what is shown is no news"
    with spare.client() as client:
        eventually(lambda: client.policy()[0] == "fips", what="the newer policy is in force")
    unplug(spare)
    assert refusal(lambda: first.plug_in(timeout=30)) == "escrow-rolled-back", "its log names the newer one, which is not shown"
    unplug(first)
    with edited(breakable) as connection:  # replayed as if it were set once more
        append(connection, first, "policy/international@2", msgspec.json.decode(lax, type=Signed))
    assert refusal(lambda: spare.plug_in(timeout=30)), "numbers of statements rise in the log: no VCM takes this one"
    assert policy_on(spare) == "fips"
    unplug(spare)
