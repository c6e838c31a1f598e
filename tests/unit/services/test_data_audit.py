"""What the audit log learns of operations on data, in each of its modes."""

import msgspec
import pytest

from cipherfleet import Client
from cipherfleet.channel import codec
from cipherfleet.computing.vcm_data_audit import MAX_KINDS, DataAudit
from cipherfleet.contract.audit import KeyUsage
from cipherfleet.contract.errors import KmcUnavailable, SignatureInvalid
from cipherfleet.contract.settings import AuditData, Settings
from cipherfleet.contract.vcc import CHUNK_BYTES, Verb
from cipherfleet.services.wire import BatchAskItem
from tests.unit.services.stage import Ledger, Stage


def mode(stage: Stage, data: AuditData, rate: float = 0.5) -> Ledger:
    stage.host.data_audit = DataAudit(stage.host.ledger, msgspec.structs.replace(Settings(), audit_data=data, audit_sample_rate=rate))
    return stage.host.ledger


async def told(stage: Stage) -> dict[tuple[str, str, int, str], int]:
    """(operation, key, version, outcome) -> how often, of the next report's entries."""
    await stage.host.data_audit.flush()
    report = stage.host.ledger.told[-1]
    assert {use.application for use in report.recorded} <= {"shop"}
    return {(use.operation, use.key, use.version, use.outcome): use.count for use in report.recorded}


async def test_alike_operations_are_one_entry(client: Client, stage: Stage) -> None:
    mode(stage, "counted")
    key, signer = await client.create_key(), await client.create_key("Ed25519")
    ciphertexts = [await client.encrypt(key.id, b"x") for _ in range(5)]
    await client.rotate_key(key.id)
    await client.encrypt(key.id, bytes(10 * CHUNK_BYTES))
    await client.decrypt(ciphertexts[0])
    with pytest.raises(SignatureInvalid):
        await client.verify(signer.id, b"m", b"no signature")
    await client.digest("SHA-256", b"d")
    await client.random(8)
    await client.describe_key(key.id)  # nothing is done with data
    assert await told(stage) == {
        ("encrypt", key.id, 1, "ok"): 5,
        ("encrypt", key.id, 2, "ok"): 1,
        ("decrypt", key.id, 1, "ok"): 1,
        ("verify", signer.id, 1, "signature-invalid"): 1,
        ("digest", "", 0, "ok"): 1,
        ("random", "", 0, "ok"): 1,
    }
    await stage.host.data_audit.flush()
    assert len(stage.host.ledger.told) == 1  # no news, no report


async def test_each_item_of_a_batch_counts(client: Client, stage: Stage) -> None:
    mode(stage, "counted")
    key = await client.create_key("HMAC-SHA-256")
    items = [BatchAskItem(Verb.MAC, key.id, data=b"%d" % n) for n in range(7)]
    await client.batch([*items, BatchAskItem(Verb.SIGN, key.id), BatchAskItem(Verb.VERIFY_MAC, key.id, signature=bytes(32))])
    assert await told(stage) == {
        ("mac", key.id, 1, "ok"): 7,
        ("sign", "", 0, "wrong-key-type"): 1,
        ("verify-mac", key.id, 1, "mac-invalid"): 1,
    }


async def test_what_could_not_be_told_is_told_later(client: Client, stage: Stage) -> None:
    ledger = mode(stage, "counted")
    key = await client.create_key()
    await client.encrypt(key.id, b"x")
    ledger.gone = True
    with pytest.raises(KmcUnavailable):
        await stage.host.data_audit.flush()
    await client.encrypt(key.id, b"x")
    ledger.gone = False
    assert await told(stage) == {("encrypt", key.id, 1, "ok"): 1}
    assert [report.number for report in ledger.told] == [1, 2]  # what may have arrived comes with its number again
    assert sum(use.count for report in ledger.told for use in report.recorded) == 2


async def test_in_full_mode_nothing_is_done_without_its_entry(client: Client, stage: Stage) -> None:
    ledger = mode(stage, "full")
    key = await client.create_key()
    ciphertext = await client.encrypt(key.id, b"x")
    assert [(use.operation, use.key, use.outcome) for report in ledger.told for use in report.recorded] == [("encrypt", key.id, "asked")]
    ledger.gone = True
    before = list(stage.host.card.operations)
    for work in (client.encrypt(key.id, b"y"), client.decrypt(ciphertext), client.digest("SHA-256", b"d"), client.random(8)):
        with pytest.raises(KmcUnavailable):
            await work
    assert stage.host.card.operations == before
    ledger.gone = False
    assert await client.decrypt(ciphertext) == b"x"
    reports = len(ledger.told)
    await client.batch([BatchAskItem(Verb.ENCRYPT, key.id, data=b"%d" % n) for n in range(9)])
    assert [len(report.recorded) for report in ledger.told[reports:]] == [9]  # one word for all of a batch
    assert await told(stage) == {  # what was refused has an entry now, what was done had one
        ("encrypt", key.id, 1, "kmc-unavailable"): 1,
        ("decrypt", key.id, 1, "kmc-unavailable"): 1,
        ("digest", "", 0, "kmc-unavailable"): 1,
        ("random", "", 0, "kmc-unavailable"): 1,
    }
    assert sum(use.count for use in ledger.told[-1].counted) == 11


async def test_a_sample_has_entries_and_all_count(client: Client, stage: Stage) -> None:
    ledger = mode(stage, "sampled")
    key = await client.create_key("HMAC-SHA-256")
    for _ in range(100):
        await client.mac(key.id, b"m")
    await stage.host.data_audit.flush()
    recorded, counted = (sum(use.count for use in uses) for uses in (ledger.told[-1].recorded, ledger.told[-1].counted))
    assert recorded + counted == 100
    assert 10 < recorded < 90


async def test_memory_is_bounded() -> None:
    ledger = Ledger()
    audit = DataAudit(ledger, Settings())
    for number in range(2 * MAX_KINDS):
        audit.note("shop", "encrypt", f"{number:032x}", 1, "ok")
    await audit.flush()
    uses = [use for report in ledger.told for use in report.recorded]
    assert len(uses) <= MAX_KINDS
    assert sum(use.count for use in uses) == 2 * MAX_KINDS
    assert max(len(codec.encode(report)) for report in ledger.told) < codec.MAX_CALL_BYTES


async def test_last_words_are_what_the_kmc_may_not_have_with_the_numbers_it_may_know() -> None:
    ledger = Ledger()
    audit = DataAudit(ledger, Settings())
    audit.note("shop", "encrypt", "0" * 32, 1, "ok")
    ledger.gone = True
    with pytest.raises(KmcUnavailable):
        await audit.flush()
    audit.note("shop", "encrypt", "0" * 32, 1, "ok")
    audit.note("shop", "decrypt", "0" * 32, 1, "ok")
    words = audit.last_words()
    assert [(report.number, [(use.operation, use.count) for use in report.recorded]) for report in words] == [
        (1, [("encrypt", 1)]),
        (2, [("encrypt", 1), ("decrypt", 1)]),
    ]


async def test_a_key_shows_its_last_use(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    assert (await client.describe_key(key.id)).last_used_at is None  # nobody knows
    stage.host.used = KeyUsage(7, 1234.5)
    described = await client.describe_key(key.id)
    assert (described.uses_counted, described.last_used_at) == (7, 1234.5)
