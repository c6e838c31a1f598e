"""An application's profile: all that it needs to reach its consumer's VCMs, in one file (mode 0600)."""

import msgspec

from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, ConsumerId
from cipherfleet.contract.statements import Right


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``endpoints``: every address a VCM of this domain may serve on, likely ones first. PEM texts.

    ``key`` is empty when the application brought its own CSR: it then puts its key there, or keeps it elsewhere.
    """

    consumer: ConsumerId
    application: ApplicationName
    endpoints: tuple[str, ...]
    trust: str
    chain: str
    key: str
    rights: tuple[Right, ...]
    not_after: int
    version: int = 1
    grants: tuple[Grant, ...] = ()
    root: str = ""  # the CA that certifies cards, for who brings keys of their own
    kmc_signing_key: bytes = b""  # SubjectPublicKeyInfo, DER, from the Ukey: whose seals on the audit log count

    def __repr__(self) -> str:
        return f"Profile({self.application} of {self.consumer})"
