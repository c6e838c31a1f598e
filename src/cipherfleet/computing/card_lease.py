"""The lease as the card sees it: pure decisions over a clock that never goes back (``CLOCK_BOOTTIME``).

The card makes a nonce and notes its time. A lease over that nonce, signed by the consumer's Ukey and countersigned by the
KMC, permits service until *nonce time* + duration: so however late a lease arrives, it buys nothing.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection

from cipherfleet.channel import signing
from cipherfleet.contract.errors import LeaseExpired, LeaseForeign, LeaseForged, LeaseReplayed, LeaseStale, ServiceOff, StatementForged
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.policy import INTERNATIONAL
from cipherfleet.contract.statements import LeaseStatement, Signed
from cipherfleet.contract.vcc import LeaseState

NONCE_BYTES = 16
MAX_OUTSTANDING = 8
MAX_DURATION_MS = 3600 * 1000


def boottime() -> float:
    """Seconds since the host started, time asleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The lease of one vCC. ``clock`` gives seconds and never goes back."""

    def __init__(self, consumer: ConsumerId, card: CardId, vcm: VcmId, clock: Callable[[], float] = boottime) -> None:
        self._names = (consumer, card, vcm)
        self._clock = clock
        self._outstanding: OrderedDict[bytes, float] = OrderedDict()
        self._newest = float("-inf")
        self._policy_point = (0, 0)  # stays, whatever is forgotten
        self.expires_at: float | None = None
        self.policy = INTERNATIONAL
        """What the lease in force permits."""

    def nonce(self) -> bytes:
        """A fresh nonce (16 bytes); of more than 8 unused ones the oldest is forgotten."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        while len(self._outstanding) >= MAX_OUTSTANDING:
            self._outstanding.popitem(last=False)
        self._outstanding[nonce] = self._clock()
        return nonce

    def accept(self, signed: Signed, *, ukey_keys: Collection[bytes], kmc_key: bytes) -> LeaseState:
        """Take a lease.

        Raises ``LeaseForged``, ``LeaseForeign``, ``LeaseReplayed``, ``LeaseStale``, ``LeaseExpired`` or ``Malformed``; the
        lease in force stays as it is then.
        """
        try:
            statement = signing.verify(signed, LeaseStatement, ukey_keys)
            signing.verify(signed, LeaseStatement, (kmc_key,))
        except StatementForged as exc:
            raise LeaseForged("a lease must be signed by the consumer's Ukey and by the KMC") from exc
        if (statement.consumer, statement.card, statement.vcm) != self._names:
            raise LeaseForeign("the lease is for another consumer, card or VCM")
        if not 0 < statement.duration_ms <= MAX_DURATION_MS:
            raise LeaseForged(f"a lease lasts 1 to {MAX_DURATION_MS} ms")
        made_at = self._outstanding.get(statement.nonce)
        if made_at is None:
            raise LeaseReplayed("the lease was used before, or its nonce is not of this card")
        if made_at < self._newest:
            raise LeaseStale("a newer lease is in force")
        expires_at = made_at + statement.duration_ms / 1000
        now = self._clock()
        if self.expires_at is not None and now >= self.expires_at:
            raise LeaseExpired("the lease before this one has ended, and the keys with it")
        if now >= expires_at:
            raise LeaseStale("the lease arrived after its end")
        policy_point = statement.policy_epoch, statement.policy_sequence
        if policy_point < self._policy_point:
            raise LeaseStale("the lease carries an older policy than the one before", "plug in the Ukey that set the policy last")
        del self._outstanding[statement.nonce]
        self._policy_point = policy_point
        self._newest, self.expires_at = made_at, expires_at
        if statement.policy != self.policy:
            self.policy = statement.policy
        return LeaseState(expires_at, expires_at - now, statement.epoch, statement.sequence, statement.head, self.policy)

    @property
    def serving(self) -> bool:
        return self.expires_at is not None and self._clock() < self.expires_at

    def check(self) -> None:
        """That a lease is in force now. Raises ``ServiceOff`` (none yet) or ``LeaseExpired``."""
        if self.expires_at is None:
            raise ServiceOff("there is no lease yet")
        if self._clock() >= self.expires_at:
            raise LeaseExpired("the lease has ended")

    def forget(self) -> None:
        """Nothing that was asked for or granted so far counts any more."""
        self._outstanding.clear()
        self._newest = float("-inf")
        self.expires_at = None
