"""The operator and delegations: what was made up, altered, or taken back gives nobody the use of a key."""

import asyncio
import hashlib
import sqlite3
from collections.abc import Iterator

import msgspec
import pytest

from cipherfleet import SyncClient
from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner, sign
from cipherfleet.contract.errors import NotPermitted
from cipherfleet.contract.escrow import DelegationName, LogEntry, extend, statement_digest
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.statements import DelegationStatement, Right, Signed
from cipherfleet.terminal.applications import sign_in
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.security.test_escrow_tampering import edited, unplug
from tests.support import Consumer, TestCloud, refusal

ENCRYPT = Grant((Right.ENCRYPT,))


class Office:
    """A consumer with a key, an application that may delegate its use, and one that may nothing with it."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        consumer.plug_in()
        with consumer.client("keeper") as keeper:
            self.key = KeyId(keeper.create_key("AES-256-GCM").id)
        self.lead = self.sign_in("lead", Grant((Right.ENCRYPT,), (self.key,), delegate=True))
        self.temp = self.sign_in("temp", Grant((Right.SHOW,), (self.key,)))
        self.name = DelegationName(ApplicationName("lead"), ApplicationName("temp"), self.key)

    def sign_in(self, name: str, grant: Grant) -> Profile:
        async def work() -> Profile:
            with DirectoryUkey.open(self.consumer.ukey, self.consumer.pin) as ukey:
                return await sign_in(ukey, ApplicationName(name), (), 1, grants=(grant,))

        return asyncio.run(work())

    def made_up(self, number: int) -> Signed:
        """By the operator, with a key of its own."""
        signer = LocalSigner(new_key())
        grants = (msgspec.structs.replace(ENCRYPT, keys=(self.key,)),)
        statement = DelegationStatement(
            ConsumerId(self.consumer.name), self.name.delegator, self.name.delegate, self.key, grants, number, signer.public_key
        )
        return asyncio.run(sign(statement, signer))

    def append(self, connection: sqlite3.Connection, number: int, signed: Signed) -> None:
        """Kept, and a log that leads to it: the operator's HSM signs the checkpoint."""
        me = self.consumer.name
        row = (me, self.name.delegator, self.name.delegate, self.key, number, msgspec.json.encode(signed))
        connection.execute("insert or replace into delegations values (?, ?, ?, ?, ?, ?)", row)
        sequence, head = connection.execute("select sequence, head from consumers where name = ?", (me,)).fetchone()
        entry = LogEntry(sequence + 1, self.name.subject(number), statement_digest(signed))
        connection.execute("insert into log values (?, ?, ?, ?)", (me, entry.sequence, entry.subject, entry.digest))
        connection.execute("update consumers set sequence = ?, head = ? where name = ?", (sequence + 1, extend(head, entry), me))

    def kept(self, connection: sqlite3.Connection) -> bytes:
        found = connection.execute("select statement from delegations where consumer = ?", (self.consumer.name,)).fetchone()
        assert isinstance(found[0], bytes)
        return found[0]


@pytest.fixture
def office(breakable: TestCloud, request: pytest.FixtureRequest) -> Iterator[Office]:
    consumer = breakable.enrol(hashlib.sha256(request.node.name.encode()).hexdigest()[:12])
    yield Office(consumer)
    unplug(consumer)


def test_what_the_operator_made_up_gives_nothing(breakable: TestCloud, office: Office) -> None:
    unplug(office.consumer)
    with edited(breakable) as connection:
        office.append(connection, 1, office.made_up(1))
    office.consumer.plug_in()
    with SyncClient(office.temp) as temp, SyncClient(office.lead) as lead:
        assert refusal(lambda: temp.encrypt(office.key, b"data")) == "not-permitted"
        lead.encrypt(office.key, b"data")
        lead.delegate_key(office.key, "temp", [ENCRYPT])  # positive control: the delegator's own word does it
        temp.encrypt(office.key, b"data")


def test_what_was_taken_back_does_not_come_back(breakable: TestCloud, office: Office) -> None:
    with SyncClient(office.lead) as lead, SyncClient(office.temp) as temp:
        lead.delegate_key(office.key, "temp", [ENCRYPT])
        temp.encrypt(office.key, b"data")
        unplug(office.consumer)
        with edited(breakable) as connection:
            given = office.kept(connection)
        office.consumer.plug_in()
        temp.encrypt(office.key, b"data")
        lead.revoke_delegation(office.key, "temp")
        with pytest.raises(NotPermitted):
            temp.encrypt(office.key, b"data")
        unplug(office.consumer)
        with edited(breakable) as connection:
            connection.execute("update delegations set statement = ? where consumer = ?", (given, office.consumer.name))
        office.consumer.plug_in()
        assert refusal(lambda: temp.encrypt(office.key, b"data")) == "escrow-row-tampered"
    unplug(office.consumer)
    with edited(breakable) as connection:
        office.append(connection, 1, msgspec.json.decode(given, type=Signed))
    assert refusal(lambda: office.consumer.plug_in(timeout=60)) == "escrow-rolled-back"
    assert office.consumer.service == "off"
