from cipherfleet.contract.errors import CipherfleetError as CipherfleetError
from cipherfleet.services.middleware import Client as Client
from cipherfleet.services.middleware import SyncClient as SyncClient

__all__ = ["CipherfleetError", "Client", "SyncClient", "__version__"]

__version__: str
