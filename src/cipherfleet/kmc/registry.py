"""Every certificate this CA has issued that is still of interest, in memory: the door looks here at each request."""

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from cipherfleet.contract.errors import CertificateInvalid, CertificateRevoked
from cipherfleet.contract.identities import Identity, Peer, Role
from cipherfleet.contract.ids import ConsumerId, Serial


class Issued(msgspec.Struct, frozen=True):
    """One certificate. ``not_after``: unix seconds; ``pem``: the leaf alone."""

    serial: Serial
    identity: Identity
    public_key_sha256: bytes
    not_after: float
    pem: bytes


class Registry:
    """Follows the database, except that a revocation stands here first."""

    def __init__(self) -> None:
        self._issued: dict[Serial, Issued] = {}
        self._revoked: set[Serial] = set()
        self._active: defaultdict[tuple[Role, ConsumerId], dict[Serial, Issued]] = defaultdict(dict)

    def add(self, issued: Issued) -> None:
        self._issued[issued.serial] = issued
        if issued.serial not in self._revoked:
            self._active[_holders(issued.identity)][issued.serial] = issued

    def revoke(self, serials: Iterable[Serial]) -> None:
        for serial in serials:
            self._revoked.add(serial)
            issued = self._issued.get(serial)
            if issued is not None:
                self._active[_holders(issued.identity)].pop(serial, None)

    def check(self, peer: Peer) -> None:
        """That the peer shows a certificate of ours. Raises ``CertificateRevoked`` or ``CertificateInvalid``."""
        issued = self._issued.get(peer.serial)
        if issued is None or issued.identity != peer.identity or issued.public_key_sha256 != peer.public_key_sha256:
            raise CertificateInvalid("this certificate was not issued by this CA, or long ago")
        if peer.serial in self._revoked:
            raise CertificateRevoked(f"the certificate of {peer.identity.uri} is revoked")

    def active(self, identity: Identity) -> tuple[Issued, ...]:
        """The certificates of an identity that are not revoked, newest end first."""
        found = [issued for issued in self._active[_holders(identity)].values() if issued.identity == identity]
        return tuple(sorted(found, key=lambda issued: -issued.not_after))

    def serials(self, role: Role, consumer: ConsumerId, *, id_: str | None = None) -> tuple[Serial, ...]:
        """The certificates of a role of a consumer (of one holder) that are not revoked."""
        return tuple(s for s, issued in self._active[role, consumer].items() if id_ is None or issued.identity.id == id_)

    def by_consumer(self, serials: Iterable[Serial]) -> dict[ConsumerId, tuple[Serial, ...]]:
        """Whose these certificates are."""
        found: defaultdict[ConsumerId, list[Serial]] = defaultdict(list)
        for serial in serials:
            issued = self._issued.get(serial)
            if issued is not None:
                found[issued.identity.consumer].append(serial)
        return {consumer: tuple(sorted(theirs)) for consumer, theirs in found.items()}

    def revoked_of(self, consumer: ConsumerId) -> tuple[Serial, ...]:
        """What a VCM of this consumer shall refuse."""
        return tuple(s for s in self._revoked if s in self._issued and self._issued[s].identity.consumer == consumer)

    def forget_expired(self, now: float) -> None:
        """A certificate that has expired needs no entry: TLS refuses it (an hour of grace for clocks)."""
        for serial in [s for s, i in self._issued.items() if i.not_after < now - 3600]:
            self._active[_holders(self._issued.pop(serial).identity)].pop(serial, None)
            self._revoked.discard(serial)


def _holders(identity: Identity) -> tuple[Role, ConsumerId]:
    """Under what an identity is found."""
    return identity.role, identity.consumer
