"""Cipherfleet: a cryptography cloud, with the consumer's hand on the key.

::

    from cipherfleet import Client

    async with Client("shop.json") as client:
        key = await client.create_key("AES-256-GCM")
        ciphertext = await client.encrypt(key.id, b"a secret")
        assert await client.decrypt(ciphertext) == b"a secret"

``SyncClient`` is the same without ``await``. Names are loaded when they are first used, so that a process which only needs
a part of the package (the card, a VCM) loads nothing else.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cipherfleet.contract.errors import CipherfleetError
    from cipherfleet.services.middleware import Client, SyncClient

    __version__: str

__all__ = ["CipherfleetError", "Client", "SyncClient", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("Client", "SyncClient"):
        from cipherfleet.services import middleware

        value: object = getattr(middleware, name)
    elif name == "CipherfleetError":
        from cipherfleet.contract import errors

        value = errors.CipherfleetError
    elif name == "__version__":
        from importlib import metadata

        value = metadata.version("cipherfleet")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
