"""Leases: which of them the KMC countersigns. Pure but for the clock that is handed in."""

from collections import deque

from cipherfleet.channel import signing
from cipherfleet.contract.errors import LeaseForeign, LeaseForged, LeaseReplayed, LeaseStale, Malformed, StatementForged
from cipherfleet.contract.ids import CardId, ConsumerId
from cipherfleet.contract.statements import LeaseStatement, Signed

NONCE_BYTES = 16
MAX_PENDING = 8
MAX_REDEEMED = 64


class Nonces:
    """The nonces of one VCM's card that wait for the Ukey, newest last; each is good for one lease."""

    def __init__(self) -> None:
        self._pending: dict[bytes, float] = {}
        self._redeemed: deque[bytes] = deque(maxlen=MAX_REDEEMED)

    @property
    def newest(self) -> bytes | None:
        return next(reversed(self._pending), None)

    def offer(self, nonce: bytes, now: float) -> None:
        """A card's fresh nonce; the oldest one goes when there are too many. Raises ``Malformed`` or ``LeaseReplayed``."""
        if len(nonce) != NONCE_BYTES:
            raise Malformed(f"a lease nonce has {NONCE_BYTES} bytes")
        if nonce in self._redeemed:
            raise LeaseReplayed("this lease nonce was used before")
        self._pending.setdefault(nonce, now)  # a VCM that came back may ask again
        while len(self._pending) > MAX_PENDING:
            del self._pending[next(iter(self._pending))]

    def redeem(self, nonce: bytes) -> float:
        """Use a nonce up; when it was offered. Raises ``LeaseReplayed`` or ``LeaseStale``."""
        if nonce in self._redeemed:
            raise LeaseReplayed("this lease was signed and countersigned before")
        offered = self._pending.pop(nonce, None)
        if offered is None:
            raise LeaseStale("no card waits for this lease (any more)")
        self._redeemed.append(nonce)
        return offered

    def give_back(self, nonce: bytes, offered: float) -> None:
        """The countersignature could not be made; the nonce may be redeemed after all."""
        self._redeemed.remove(nonce)
        self._pending = {nonce: offered, **self._pending}


def read_lease(signed: Signed, consumer: ConsumerId, ukey: bytes, *, limit_ms: int) -> LeaseStatement:
    """The lease, if this consumer's Ukey, and nobody else, signed it and it lasts no longer than agreed.

    Raises ``LeaseForged`` or ``LeaseForeign``.
    """
    try:
        statement = signing.verify(signed, LeaseStatement, [ukey])
    except (StatementForged, Malformed) as exc:
        raise LeaseForged("the lease is not signed by the consumer's Ukey") from exc
    if len(signed.signatures) != 1:
        raise LeaseForged("the lease carries signatures of others")
    if statement.consumer != consumer:
        raise LeaseForeign("the lease is another consumer's")
    if not 0 < statement.duration_ms <= limit_ms:
        raise LeaseForged(f"a lease lasts up to {limit_ms} ms, not {statement.duration_ms}")
    return statement


def check_card(statement: LeaseStatement, card: CardId) -> None:
    """Raises ``LeaseForeign`` when the lease is for another card than the VCM's."""
    if statement.card != card:
        raise LeaseForeign(f"the lease is for another card than {card}")
