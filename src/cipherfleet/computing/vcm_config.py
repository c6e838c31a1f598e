"""What a VCM process is told by its machine, on its standard input. Nothing of it is a secret."""

import msgspec

from cipherfleet.computing.confinement import Confinement
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.settings import Settings


class VcmConfig(msgspec.Struct, frozen=True):
    """``listening``, ``vcc``, ``boot``: inherited descriptors. ``relay``: path of the socket to the KMC, as the VCM sees it."""

    id: VcmId
    consumer: ConsumerId
    card: CardId
    address: str
    kmc_url: str
    kmc_signing_key: bytes  # SubjectPublicKeyInfo DER
    root: bytes  # PEM
    relay: str
    listening: int
    vcc: int
    boot: int
    confinement: Confinement
    settings: Settings = Settings()
