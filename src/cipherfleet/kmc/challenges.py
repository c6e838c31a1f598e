"""Challenges of the identity check: 32 bytes, each answered once, within its time. In memory, so a restart voids all."""

import secrets
import time
from collections.abc import Callable

from cipherfleet.contract.errors import ChallengeReplayed, ChallengeUnknown, LimitReached
from cipherfleet.contract.ids import ConsumerId

NONCE_BYTES = 32
MAX_PER_CONSUMER = 16
MAX_ALL = 4096


class _Open:
    def __init__(self, consumer: ConsumerId, expires: float) -> None:
        self.consumer, self.expires, self.used = consumer, expires, False


class Challenges:
    """``lifetime_s`` by the monotonic ``clock``."""

    def __init__(self, lifetime_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifetime_s, self._clock = lifetime_s, clock
        self._open: dict[bytes, _Open] = {}

    def new(self, consumer: ConsumerId) -> bytes:
        """A nonce; the oldest of this consumer goes when it has too many. Raises ``LimitReached``."""
        self._forget()
        theirs = [nonce for nonce, challenge in self._open.items() if challenge.consumer == consumer]
        if len(theirs) >= MAX_PER_CONSUMER:
            del self._open[theirs[0]]
        if len(self._open) >= MAX_ALL:
            raise LimitReached("too many challenges are open", "try again in a moment")
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._open[nonce] = _Open(consumer, self._clock() + self._lifetime_s)
        return nonce

    def redeem(self, nonce: bytes, consumer: ConsumerId) -> None:
        """Use a nonce up. Raises ``ChallengeUnknown`` (also when it came too late) or ``ChallengeReplayed``."""
        self._forget()
        challenge = self._open.get(nonce)
        if challenge is None or challenge.consumer != consumer:
            raise ChallengeUnknown("this challenge was never given to this consumer, or its time is over")
        if challenge.used:
            raise ChallengeReplayed("this challenge was answered before")
        challenge.used = True

    def _forget(self) -> None:
        now = self._clock()
        while self._open:
            oldest = next(iter(self._open))
            if self._open[oldest].expires > now:
                break
            del self._open[oldest]
