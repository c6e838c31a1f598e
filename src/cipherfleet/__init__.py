"""Cipherfleet: a cryptography cloud, with the consumer's hand on the key.

::

    from cipherfleet import Client

    async with Client("shop.json") as client:
        key = await client.create_key("AES-256-GCM")
        ciphertext = await client.encrypt(key.id, b"a secret")
        assert await client.decrypt(ciphertext) == b"a secret"

``SyncClient`` is the same without ``await``. Names are loaded when they are first used (PEP 562), so that a process which
only needs a part of the package (the card, a VCM) loads nothing else. Their types stand in ``__init__.pyi``.
"""

from importlib import import_module

_HOMES = {
    "CipherfleetError": "cipherfleet.contract.errors",
    "Client": "cipherfleet.services.middleware",
    "SyncClient": "cipherfleet.services.middleware",
}

__all__ = ["CipherfleetError", "Client", "SyncClient", "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = import_module("importlib.metadata").version("cipherfleet")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
