"""When a log is overdue for its seal: by time, by number, and never for entries that may have been written late."""

import math

import pytest

from cipherfleet.contract.audit import MAX_LATE_S, AuditEntry, Sealing
from cipherfleet.contract.audit_seals import GRACE_S, Tail

RULE = Sealing(3, 60.0, 0.0)


def tail(*entries: tuple[float, str]) -> Tail:
    made = Tail()
    for sequence, (at, event) in enumerate(entries, 1):
        made.add(AuditEntry(sequence, at, "alice", "actor", event, "", "ok", ""), RULE)
    return made


@pytest.mark.parametrize(
    ("entries", "due"),
    [
        ([(100.0, "key-create")], 160.0),
        ([(100.0, "key-create"), (110.0, "key-create")], 160.0),
        ([(100.0, "key-create"), (110.0, "key-create"), (120.0, "key-create")], 120.0),
        ([(100.0, "key-create"), (110.0, "key-create"), (120.0, "key-create"), (130.0, "key-create")], 120.0),
        ([(100.0, "data-encrypt")], 160.0 + MAX_LATE_S),
        ([(100.0, "vcm-ordered")], 160.0 + MAX_LATE_S),
        ([(100.0, "data-encrypt"), (130.0, "key-create")], 190.0),
        ([(100.0, "key-create"), (90.0, "key-create")], 150.0),
    ],
)
def test_when_a_seal_is_due(entries: list[tuple[float, str]], due: float) -> None:
    waiting = tail(*entries)
    assert waiting.late_s(RULE, due) == 0.0
    assert not waiting.overdue(RULE, due + GRACE_S)
    assert waiting.overdue(RULE, due + GRACE_S + 0.1)


def test_nothing_waits() -> None:
    waiting = tail((0.0, "key-create"))
    waiting.clear()
    assert waiting.late_s(RULE, 1e12) == -math.inf
    assert not waiting.overdue(RULE, 1e12)
