"""What a key is made to: its cryptoperiod, its rotation, how often it may protect."""

import msgspec


class KeyTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """Times are unix seconds; 0 is no such term. A use protects something new (KMIP 2.1, "Usage Limits"): processing is not counted.

    ``exportable`` is decided once, when the key is made.
    """

    not_before: float = 0.0  # nothing is done with it before
    not_after: float = 0.0  # it protects nothing from then on; what it protected is still read and checked (SP 800-57, "deactivated")
    rotation_s: float = 0.0  # seconds from one version to the next
    rotation_uses: int = 0  # so many uses, about, from one version to the next
    max_uses: int = 0  # of all versions together, on all VCMs
    exportable: bool = False  # may leave the card, wrapped: fixed when it is made
    two_person: bool = False  # nothing of it is destroyed unless two applications want it; for good

    @property
    def counted(self) -> bool:
        return bool(self.max_uses or self.rotation_uses)


NO_TERMS = KeyTerms()
