"""Refused attempts: written one by one as long as they are few, counted when they are many, so that nobody fills the disk."""

import time
from collections import defaultdict

from cipherfleet.kmc.audit import Line

REFUSALS_PER_MINUTE = 60
"""Of one actor, written one by one."""
MINUTE_S = 60.0
MOST_COUNTED = 1024
"""How many kinds of refusal are counted apart within a minute; what is more is counted together."""

MANY = ("", "many", "refused", "many")


class Refusals:
    def __init__(self) -> None:
        self._written: dict[str, tuple[float, int]] = {}
        self._counted: dict[tuple[str, str, str, str], tuple[float, int]] = {}  # since when, how many

    def take(self, consumer: str, actor: str, event: str, outcome: str) -> bool:
        """Whether this one is to be written; it is counted otherwise."""
        now = time.monotonic()
        since, count = self._written.get(actor, (now, 0))
        if now - since > MINUTE_S:
            since, count = now, 0
            self._written = {a: (s, c) for a, (s, c) in self._written.items() if now - s <= MINUTE_S}
        self._written[actor] = (since, count + 1)
        if count < REFUSALS_PER_MINUTE:
            return True
        kind = (consumer, actor, event, outcome)
        if kind not in self._counted and len(self._counted) >= MOST_COUNTED:
            kind = MANY
        since, count = self._counted.get(kind, (now, 0))
        self._counted[kind] = (since, count + 1)
        return False

    def due(self, at: float, *, everything: bool = False) -> dict[str, list[Line]]:
        """The lines of each consumer on what was counted for a minute; they are forgotten here."""
        now = time.monotonic()
        lines: defaultdict[str, list[Line]] = defaultdict(list)
        for kind, (since, count) in list(self._counted.items()):
            if everything or now - since > MINUTE_S:
                consumer, actor, event, outcome = kind
                lines[consumer].append(Line(at, actor, event, "", outcome, count))
                del self._counted[kind]
        return dict(lines)
