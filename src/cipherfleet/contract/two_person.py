"""The two-person rule: of a key that has it, nothing is destroyed before two different applications wanted the same. Pure.

The first one's word is kept in the key's attributes, which the card seals, until it is a week old.
"""

import msgspec

from cipherfleet.contract.errors import SecondPersonNeeded
from cipherfleet.contract.escrow import NO_CONSENT, Consent, KeyAttributes
from cipherfleet.contract.ids import KeyId

CONSENT_S = 7 * 86400.0


class SecondPerson:
    """One wish to destroy, ``action``, of ``actor``. ``settle`` says what is to be written, ``require`` whether it was enough."""

    def __init__(self, action: str, actor: str, now: float) -> None:
        self._action, self._actor, self._now = action, actor, now
        self._alone = False

    def settle(self, old: KeyAttributes, wanted: KeyAttributes | None) -> KeyAttributes | None:
        """``wanted``, if that is what a second person wants or the key has no such rule; else ``old`` with the first one's word."""
        self._alone = False
        if wanted is None or not old.terms.two_person:
            return wanted
        given = old.consent
        stands = given.action == self._action and self._now < given.until
        if stands and given.by != self._actor:
            return msgspec.structs.replace(wanted, consent=NO_CONSENT)
        self._alone = True
        if stands:
            return None
        return msgspec.structs.replace(old, consent=Consent(self._action, self._actor, self._now + CONSENT_S))

    def event(self, done: str) -> str:
        """What the audit log says of it."""
        return "key-consent" if self._alone else done

    def require(self, key: KeyId) -> None:
        """Raises ``SecondPersonNeeded``."""
        if self._alone:
            raise SecondPersonNeeded(f"key {key} is under the two-person rule: {self._action} waits for another application's consent")
