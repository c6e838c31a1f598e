"""Every certificate this CA has issued that is still of interest, in memory: the door looks here at each request."""

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

    def add(self, issued: Issued) -> None:
        self._issued[issued.serial] = issued

    def revoke(self, serials: Iterable[Serial]) -> None:
        self._revoked.update(serials)

    def check(self, peer: Peer) -> None:
        """That the peer shows a certificate of ours. Raises ``CertificateRevoked`` or ``CertificateInvalid``."""
        issued = self._issued.get(peer.serial)
        if issued is None or issued.identity != peer.identity or issued.public_key_sha256 != peer.public_key_sha256:
            raise CertificateInvalid("this certificate was not issued by this CA, or long ago")
        if peer.serial in self._revoked:
            raise CertificateRevoked(f"the certificate of {peer.identity.uri} is revoked")

    def active(self, identity: Identity) -> tuple[Issued, ...]:
        """The certificates of an identity that are not revoked, newest end first."""
        found = [i for i in self._issued.values() if i.identity == identity and i.serial not in self._revoked]
        return tuple(sorted(found, key=lambda issued: -issued.not_after))

    def serials(self, role: Role, consumer: ConsumerId, *, id_: str | None = None) -> tuple[Serial, ...]:
        """The certificates of a role of a consumer (of one holder) that are not revoked."""
        return tuple(
            i.serial
            for i in self._issued.values()
            if (i.identity.role, i.identity.consumer) == (role, consumer)
            and (id_ is None or i.identity.id == id_)
            and i.serial not in self._revoked
        )

    def revoked_of(self, consumer: ConsumerId) -> tuple[Serial, ...]:
        """What a VCM of this consumer shall refuse."""
        return tuple(s for s in self._revoked if s in self._issued and self._issued[s].identity.consumer == consumer)

    def forget_expired(self, now: float) -> None:
        """A certificate that has expired needs no entry: TLS refuses it (an hour of grace for clocks)."""
        for serial in [s for s, i in self._issued.items() if i.not_after < now - 3600]:
            del self._issued[serial]
            self._revoked.discard(serial)
