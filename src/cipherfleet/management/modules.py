"""The platform's modules, as a creation or a deletion needs them all."""

import asyncio
from dataclasses import dataclass, field

from cipherfleet.contract.settings import Settings
from cipherfleet.management.authentication import Authentication
from cipherfleet.management.authority import Authority
from cipherfleet.management.image import ImageStore
from cipherfleet.management.monitor import Monitor
from cipherfleet.management.network import NetworkManager
from cipherfleet.management.store import Store


@dataclass(frozen=True)
class Modules:
    store: Store
    authority: Authority
    authentication: Authentication
    monitor: Monitor
    network: NetworkManager
    images: ImageStore
    settings: Settings
    placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Between a plan and its entry in the inventory no other plan is made."""
