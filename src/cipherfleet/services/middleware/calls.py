"""What every call of the client is made with: whom it asks, and how a key and a context are written."""

import os
from typing import TypeAlias
from urllib.parse import quote

from cipherfleet.contract.errors import TooLarge
from cipherfleet.contract.profile import Profile
from cipherfleet.services import wire
from cipherfleet.services.middleware.connection import Connection

FilePath: TypeAlias = str | os.PathLike[str]


class Calls:
    """``profile`` says who asks whom."""

    def __init__(self, profile: Profile, timeout: float) -> None:
        self.profile = profile
        self._connection = Connection(profile, timeout)


def path_of(key: str, verb: str = "") -> str:
    """Of a key, or of what is done with it."""
    return f"/v1/keys/{quote(key, safe='')}" + (f"/{verb}" if verb else "")


def contexts(
    context: bytes, target_context: bytes = b"", *, version: int | None = None, digest: str = "", prehashed: bool = False
) -> dict[str, str]:
    headers = {} if version is None else {wire.KEY_VERSION: str(version)}
    if digest:
        headers[wire.DIGEST] = quote(digest)
    if prehashed:
        headers[wire.PREHASHED] = "true"
    for name, value in ((wire.CONTEXT, context), (wire.TARGET_CONTEXT, target_context)):
        if len(value) > wire.MAX_CONTEXT_BYTES:
            raise TooLarge(f"a context has at most {wire.MAX_CONTEXT_BYTES} bytes")
        if value:
            headers[name] = wire.to_header(value)
    return headers
