"""When an audit log must be under a seal, so that one whose seals were deleted shows. Pure: used by who seals and by who checks.

The KMC seals a log when so many entries wait for it, or so many seconds after the first of them. An entry's time is when it was
written, but for what VCMs and the management platform report, which may be written ``MAX_LATE_S`` after its time. So an entry was
written no later than the earliest that any entry from it on allows; and a log is overdue when by then its seal was due.
"""

import math

from cipherfleet.contract.audit import MAX_LATE_S, AuditEntry, Sealing
from cipherfleet.contract.audit_events import DATA_EVENT, MANAGEMENT_EVENTS

GRACE_S = 30.0
"""How much longer than due a seal may take: the KMC looks once a second, and the HSM has other work."""


def written_by(entry: AuditEntry) -> float:
    """The latest that this entry says it was written (unix seconds)."""
    reported = entry.event.startswith(DATA_EVENT) or entry.event in MANAGEMENT_EVENTS
    return entry.at + (MAX_LATE_S if reported else 0.0)


class Tail:
    """Entries that wait for a seal, as they come. ``count``: how many."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self._first = self._full = math.inf  # when the first, and the one that makes it a full load, was written at the latest

    def add(self, entry: AuditEntry, rule: Sealing | None) -> None:
        """The next one. An entry was not written after those that follow it."""
        self.count += 1
        at = written_by(entry)
        self._first = min(self._first, at)
        if rule is not None and self.count >= rule.entries:
            self._full = min(self._full, at)

    def late_s(self, rule: Sealing, at: float) -> float:
        """For how long a seal is due at least (seconds); negative while none is, ``-inf`` while nothing waits."""
        return at - min(self._first + rule.seconds, self._full)

    def overdue(self, rule: Sealing, at: float) -> bool:
        return self.late_s(rule, at) > GRACE_S
