"""What a backup knows of a consumer: values that KMC and whoever restores exchange."""

import msgspec

from cipherfleet.contract.ids import ConsumerId


class ConsumerPoint(msgspec.Struct, frozen=True):
    """Up to where a consumer's escrow goes. ``head``: 32 bytes, the hash chain over ``sequence`` changes."""

    name: ConsumerId
    state: str
    epoch: int
    sequence: int
    head: bytes
    keys: int
    applications: int
