"""The chain of an audit log: every change shows, by the number of the first entry that is wrong."""

import hashlib
from urllib.parse import parse_qsl

import pytest
from msgspec import structs

from cipherfleet.contract.audit import AuditChain, AuditEntry, AuditPoint, AuditQuery, digest_of, genesis, verify_audit
from cipherfleet.contract.errors import AuditBroken


def chain(consumer: str, count: int) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for sequence in range(1, count + 1):
        entry = AuditEntry(sequence, 0.5, consumer, "actor", "event", "subject", "ok", "")
        previous = entries[-1].digest if entries else genesis(consumer)
        entries.append(structs.replace(entry, digest=digest_of(previous, entry)))
    return entries


def test_a_whole_chain_verifies() -> None:
    verify_audit([])
    verify_audit(chain("", 3) + chain("alice", 5) + chain("bob", 2), {"bob": (2, chain("bob", 2)[-1].digest)})


def test_the_encoding_is_the_one_that_is_documented() -> None:
    """Computed by hand from the module's words, so that another program may check a log."""
    previous = hashlib.sha256(b"cipherfleet audit v2 alice").digest()
    text = '["cipherfleet audit v2",1,1700000000.25,"alice","é \\"x\\"","key-create","k","ok",3]'
    entry = AuditEntry(1, 1700000000.25, "alice", 'é "x"', "key-create", "k", "ok", "", 3)
    assert digest_of(genesis("alice"), entry) == hashlib.sha256(previous + text.encode()).hexdigest()


@pytest.mark.parametrize("field", ["at", "actor", "event", "subject", "outcome", "digest", "count"])
def test_a_changed_field_shows(field: str) -> None:
    entries = chain("alice", 3)
    value = 0.25 if field == "at" else 2 if field == "count" else "0" * 64
    entries[1] = structs.replace(entries[1], **{field: value})
    with pytest.raises(AuditBroken, match="entry 2 "):
        verify_audit(entries)


def test_removed_reordered_repeated_foreign_and_cut_entries_show() -> None:
    good = chain("alice", 4)
    broken = [
        (good[1:], 1),
        (good[:1] + good[2:], 2),
        ([good[1], good[0], *good[2:]], 1),
        ([good[0], *good], 2),
        ([structs.replace(e, consumer="bob") for e in good], 1),
    ]
    for entries, first in broken:
        with pytest.raises(AuditBroken, match=f"entry {first}\\b"):
            verify_audit(entries)
    for cut in (good[:3], []):
        with pytest.raises(AuditBroken, match=f"lacks entry {len(cut) + 1}"):
            verify_audit(cut, {"alice": (4, good[-1].digest)})


def test_points_that_contradict_each_other() -> None:
    log = AuditChain("alice", [AuditPoint(2, "aa")])
    with pytest.raises(AuditBroken):
        log.expect(AuditPoint(2, "bb"))


def test_a_question_survives_its_way() -> None:
    asked = AuditQuery("alice", 7, 1.5, "key-create", "k", newest=True, limit=3)
    assert AuditQuery.parse(dict(parse_qsl(asked.path.partition("?")[2]))) == asked
    assert AuditQuery().path == "/v1/audit"
