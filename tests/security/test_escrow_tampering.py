"""What the owner of the KMC's database can do to it, and how each is found before a key is used."""

import asyncio
import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from cipherfleet import SyncClient
from cipherfleet.channel.certificates import key_to_pem, new_key, public_key_der, to_pem
from cipherfleet.channel.signing import LocalSigner, sign
from cipherfleet.contract.escrow import LogEntry, extend, statement_digest
from cipherfleet.contract.ids import ApplicationName, ConsumerId
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.statements import ApplicationStatement, Right
from cipherfleet.kmc.certification import domain_label
from cipherfleet.kmc.hsm_keys import HsmPrivateKey
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.pki import leaf_builder
from tests.security.chain import open_hsm
from tests.support import Consumer, TestCloud, eventually, refusal


def database(cloud: TestCloud) -> Path:
    [found] = (cloud.cloud.state / "kmc").glob("*.sqlite")
    return found


@contextlib.contextmanager
def edited(cloud: TestCloud) -> Iterator[sqlite3.Connection]:
    """The KMC's database, while the KMC is down; then everything is up again."""
    cloud.kill("kmc", number=15)
    with contextlib.closing(sqlite3.connect(database(cloud))) as connection:
        yield connection
        connection.commit()
    cloud.up()


@pytest.fixture(scope="module")
def cloud(breakable: TestCloud) -> TestCloud:
    return breakable


@pytest.fixture
def with_keys(cloud: TestCloud, request: pytest.FixtureRequest) -> Iterator[Consumer]:
    """A consumer with three keys, one of them disabled, whose Ukey is in the pocket."""
    consumer = cloud.enrol(hashlib.sha256(request.node.name.encode()).hexdigest()[:12])
    consumer.plug_in()
    with consumer.client() as client:
        keys = [client.create_key("AES-256-GCM") for _ in range(3)]
        client.disable_key(keys[0].id)
    unplug(consumer)
    yield consumer
    unplug(consumer)


def unplug(consumer: Consumer) -> None:
    if consumer.ukey.exists():
        consumer.pull()
    for agent in [p for p in consumer.cloud.processes("terminal") if p.consumer == consumer.name]:
        consumer.cloud.end(agent)
    eventually(lambda: consumer.vcms() == [], what="VCMs are deleted")
    consumer.put_back()


def seen(consumer: Consumer) -> int:
    """How many changes of the escrow the Ukey knows of."""
    with DirectoryUkey.open(consumer.ukey, consumer.pin) as ukey:
        return ukey.memory.seen.sequence


def test_the_untouched_database_serves(with_keys: Consumer) -> None:
    with_keys.plug_in()
    with with_keys.client() as client:
        assert len(client.list_keys()) == 3


EDITS: dict[str, Callable[[sqlite3.Connection, str], object]] = {
    "wrapped material": lambda c, me: c.execute(
        "update rows set wrapped = zeroblob(length(wrapped)) where consumer = ? and version = 1", (me,)
    ),
    "attributes": lambda c, me: c.execute(
        "update rows set attributes = replace(cast(attributes as text), 'disabled', 'enabled') where consumer = ?", (me,)
    ),
    "swapped keys": lambda c, me: c.execute(
        "update rows set wrapped = (select r.wrapped from rows r where r.consumer = rows.consumer and r.version = rows.version"
        " and r.key <> rows.key limit 1) where consumer = ?",
        (me,),
    ),
    "a row removed": lambda c, me: c.execute(
        "delete from rows where consumer = ? and key = (select max(key) from rows where consumer = ?)", (me, me)
    ),
    "the log cut": lambda c, me: c.execute(
        "delete from log where consumer = ? and sequence = (select max(sequence) from log where consumer = ?)", (me, me)
    ),
    "the log edited": lambda c, me: c.execute("update log set digest = zeroblob(32) where consumer = ? and sequence = 1", (me,)),
}
CODES = {
    "wrapped material": "escrow-row-tampered",
    "attributes": "escrow-row-tampered",
    "swapped keys": "escrow-row-tampered",
    "a row removed": "escrow-rolled-back",
    "the log cut": "escrow-rolled-back",
    "the log edited": "escrow-rolled-back",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_row_is_found_before_service(cloud: TestCloud, with_keys: Consumer, edit: str) -> None:
    with edited(cloud) as connection:
        EDITS[edit](connection, with_keys.name)
        assert connection.total_changes >= 1
    assert refusal(lambda: with_keys.plug_in(timeout=60)) == CODES[edit]
    assert with_keys.service == "off"


def test_a_row_moved_between_consumers_is_found(cloud: TestCloud, with_keys: Consumer) -> None:
    other = cloud.enrol(f"{with_keys.name}-b")
    with edited(cloud) as connection:
        connection.execute("update rows set consumer = ? where consumer = ?", (other.name, with_keys.name))
    assert refusal(lambda: other.plug_in(timeout=60)) == "escrow-row-foreign"
    unplug(other)
    assert refusal(lambda: with_keys.plug_in(timeout=60)) == "escrow-rolled-back"


def test_a_row_set_back_is_found(cloud: TestCloud, with_keys: Consumer) -> None:
    """The disabled key's older row, enabled, was once genuine."""
    with contextlib.closing(sqlite3.connect(database(cloud))) as connection:
        query = "select key, attributes, wrapped from rows where consumer = ? and version = 0"
        before = connection.execute(query, (with_keys.name,)).fetchall()
    with_keys.plug_in()
    with with_keys.client() as client:
        for key in client.list_keys():
            client.disable_key(key.id)
    unplug(with_keys)
    with edited(cloud) as connection:
        for key, attributes, wrapped in before:
            connection.execute(
                "update rows set attributes = ?, wrapped = ? where consumer = ? and key = ? and version = 0",
                (attributes, wrapped, with_keys.name, key),
            )
    assert refusal(lambda: with_keys.plug_in(timeout=60)) == "escrow-rolled-back"


def test_a_database_set_back_as_a_whole_is_found_by_the_ukey(cloud: TestCloud, with_keys: Consumer, tmp_path: Path) -> None:
    cloud.kill("kmc", number=15)
    backup = tmp_path / "backup"
    shutil.copytree(database(cloud).parent, backup)
    cloud.up()
    with_keys.plug_in()
    with with_keys.client() as client:
        remembered = seen(with_keys)
        client.create_key("AES-256-GCM")
    eventually(lambda: seen(with_keys) >= remembered + 2, what="a heartbeat brings the checkpoint")
    unplug(with_keys)
    cloud.kill("kmc", number=15)
    now = tmp_path / "now"
    database(cloud).parent.rename(now)
    shutil.copytree(backup, now.parent / "older")
    shutil.move(now.parent / "older", cloud.cloud.state / "kmc")
    cloud.up()
    try:
        assert refusal(lambda: with_keys.plug_in(timeout=60)) == "escrow-rolled-back"
    finally:
        unplug(with_keys)
        cloud.kill("kmc", number=15)
        shutil.rmtree(cloud.cloud.state / "kmc")
        shutil.move(now, cloud.cloud.state / "kmc")
        cloud.up()


def forged_application(cloud: TestCloud, template: Profile, name: str) -> tuple[Profile, bytes]:
    """A certificate that the operator lets the domain's genuine CA sign, without the Ukey; and its key's SPKI."""
    key = new_key()

    async def issue() -> bytes:
        hsm = open_hsm(cloud)
        handle = await hsm.find(domain_label(template.consumer))
        assert handle is not None
        public = await hsm.public_key(handle)
        signer = HsmPrivateKey(hsm, handle, public, asyncio.get_running_loop())
        authority = x509.load_pem_x509_certificates(template.chain.encode())[1]
        issuer_key = load_der_public_key(public)
        assert isinstance(issuer_key, ec.EllipticCurvePublicKey)
        builder = leaf_builder(f"cipherfleet:application/{template.consumer}/{name}", key.public_key(), authority.subject, issuer_key)
        leaf = await asyncio.to_thread(builder.sign, signer, hashes.SHA256())
        return to_pem([leaf, authority])

    chain = asyncio.run(issue())
    forged = msgspec.structs.replace(template, application=ApplicationName(name), key=key_to_pem(key).decode(), chain=chain.decode())
    return forged, public_key_der(key.public_key())


def test_the_operator_cannot_let_an_application_in(cloud: TestCloud, with_keys: Consumer) -> None:
    with_keys.plug_in()
    forged, _ = forged_application(cloud, with_keys.sign_in(), "intruder")
    with SyncClient(forged) as client:
        assert refusal(lambda: client.random(1)) == "application-unknown"
        assert refusal(lambda: client.list_keys()) == "application-unknown"
    forged, _ = forged_application(cloud, with_keys.sign_in(), "billing")  # the name of one that is signed in, another key
    with SyncClient(forged) as client:
        assert refusal(lambda: client.random(1)) == "application-unknown"


def test_the_operator_cannot_forge_a_grant(cloud: TestCloud, with_keys: Consumer) -> None:
    """A statement signed by a key of the operator's, slipped into the database with a log entry and a checkpoint that fit."""
    template = with_keys.sign_in()
    forged, spki = forged_application(cloud, template, "intruder")
    statement = ApplicationStatement(
        ConsumerId(with_keys.name), ApplicationName("intruder"), hashlib.sha256(spki).digest(), tuple(Right), 2**33, 99
    )
    signed = asyncio.run(sign(statement, LocalSigner(new_key())))
    raw = msgspec.json.encode(signed)
    with edited(cloud) as connection:
        connection.execute("insert into statements values (?, 'intruder', ?, '', 0)", (with_keys.name, raw))
        sequence, head = connection.execute("select sequence, head from consumers where name = ?", (with_keys.name,)).fetchone()
        entry = LogEntry(sequence + 1, "application/intruder@99", statement_digest(signed))
        connection.execute("insert into log values (?, ?, ?, ?)", (with_keys.name, entry.sequence, entry.subject, entry.digest))
        forged_head = extend(head, entry)
        connection.execute("update consumers set sequence = ?, head = ? where name = ?", (sequence + 1, forged_head, with_keys.name))
    assert not refusal(with_keys.plug_in), "the log itself is consistent: the operator's HSM signs whatever it is given"
    with SyncClient(forged) as client:
        assert refusal(lambda: client.random(1)) == "statement-forged"
