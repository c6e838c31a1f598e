"""The Python client of Cipherfleet.

::

    async with Client("shop.json") as client:
        key = await client.create_key("AES-256-GCM")
        await client.encrypt_file(key.id, "report.pdf", "report.pdf.cf")

``SyncClient`` has the same methods without ``await``.
"""

from cipherfleet.services.middleware.client import Client
from cipherfleet.services.middleware.sources import Progress, Source
from cipherfleet.services.middleware.sync import SyncClient

__all__ = ["Client", "Progress", "Source", "SyncClient"]
