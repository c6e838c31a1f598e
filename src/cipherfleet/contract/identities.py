"""Who a process or person is: the name that certificates carry and that every handler checks."""

from enum import StrEnum

import msgspec

from cipherfleet.contract.errors import CertificateInvalid
from cipherfleet.contract.ids import ConsumerId, Serial, is_slug

SCHEME = "cipherfleet"
DOMAIN = "cipherfleet.internal"
PLATFORM = "-"


class Role(StrEnum):
    OPERATOR = "operator"
    KMC = "kmc"
    MANAGEMENT = "management"
    MACHINE = "machine"
    CARD = "card"
    VCM = "vcm"
    TERMINAL = "terminal"
    UKEY = "ukey"
    APPLICATION = "application"


CONSUMER_ROLES = frozenset({Role.VCM, Role.TERMINAL, Role.UKEY, Role.APPLICATION})


class Identity(msgspec.Struct, frozen=True):
    """``role/consumer/id``; the consumer is empty for the platform's own processes."""

    role: Role
    id: str
    consumer: ConsumerId = ConsumerId("")

    @property
    def uri(self) -> str:
        """The URI SAN: ``cipherfleet:ROLE/CONSUMER-OR-DASH/ID``."""
        return f"{SCHEME}:{self.role}/{self.consumer or PLATFORM}/{self.id}"

    @property
    def dns_name(self) -> str:
        """The DNS SAN that a client demands in the handshake."""
        return f"{self.id}.{self.consumer or 'platform'}.{self.role}.{DOMAIN}"

    @staticmethod
    def parse(uri: str) -> "Identity":
        """The identity a URI SAN names. Raises ``CertificateInvalid``."""
        scheme, _, rest = uri.partition(":")
        parts = rest.split("/")
        if scheme != SCHEME or len(parts) != 3 or parts[0] not in set(Role) or not is_slug(parts[2]):
            raise CertificateInvalid(f"{uri[:100]!r} is not an identity of this cloud")
        role, consumer = Role(parts[0]), "" if parts[1] == PLATFORM else parts[1]
        if (role in CONSUMER_ROLES) != bool(consumer) or (consumer and not is_slug(consumer)):
            raise CertificateInvalid(f"{uri[:100]!r} is not an identity of this cloud")
        return Identity(role, parts[2], ConsumerId(consumer))


class Peer(msgspec.Struct, frozen=True):
    """Who called, as the handshake and the certificate said. ``serial``: hex; ``not_after``: unix seconds."""

    identity: Identity
    serial: Serial
    public_key_sha256: bytes
    not_after: float
