"""The Python client of a consumer's VCMs."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self, TypeAlias
from urllib.parse import quote

from cipherfleet.contract.algorithms import Algorithm
from cipherfleet.contract.errors import TooLarge
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.kmc_api import AuditEntry, AuditLog
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.vcm_api import (
    DataKeyReply,
    EndpointsReply,
    ImportTarget,
    KeyCreateRequest,
    KeyDescription,
    KeyImportRequest,
    KeyListReply,
    SignatureReply,
)
from cipherfleet.services import wire
from cipherfleet.services.middleware.connection import Connection, read_profile
from cipherfleet.services.middleware.envelope import seal_material
from cipherfleet.services.middleware.sources import Bytes, Progress, Source, Upload
from cipherfleet.services.middleware.targets import WholeFile, open_source

TIMEOUT_S = 60.0
FilePath: TypeAlias = str | os.PathLike[str]


class Client:
    """Cryptography of one consumer, through whichever of its VCMs serves.

    ``profile``: what ``cipherfleet app add`` wrote, or its path. ``timeout``: seconds without any progress until ``TimedOut``.

    A *source* is bytes, a binary file, or an iterable (or asynchronous iterable) of bytes; it is read while it is sent, with
    bounded memory. Every method raises ``CipherfleetError``: ``ServiceOff`` when no VCM serves, ``NotPermitted`` when the
    application lacks the right, ``KeyUnknown``, ``KeyDisabled``, ``WrongKeyType`` and so on. An answer that breaks off
    raises, it never just ends.
    """

    def __init__(self, profile: Profile | FilePath, *, timeout: float = TIMEOUT_S) -> None:
        self.profile = read_profile(profile)
        self._connection = Connection(self.profile, timeout)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Load key and certificate; a VCM is looked for with the first call. Raises ``CertificateInvalid``."""
        await self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    # -- keys ----------------------------------------------------------------------------------------------------------

    async def create_key(self, algorithm: str = "AES-256-GCM", *, label: str = "") -> KeyDescription:
        """A new key; it is in the key escrow when this returns. Raises ``AlgorithmUnknown``."""
        return await self._connection.ask("POST", "/v1/keys", KeyDescription, body=KeyCreateRequest(algorithm, label), safe=False)

    async def import_key(self, algorithm: str, material: bytes, *, label: str = "") -> KeyDescription:
        """A new key of the caller's own ``material``: raw bytes of a symmetric key, PKCS#8 (PEM or DER, unencrypted) of a private one.

        It travels sealed to the card that takes it; the VCM and the key escrow see it wrapped alone. Raises ``CardUntrusted``,
        ``KeyMaterialInvalid`` or ``AlgorithmUnknown``.
        """
        target = await self._connection.ask("GET", "/v1/import", ImportTarget)
        sealed = seal_material(self.profile, target, algorithm, material)
        return await self._connection.ask("POST", "/v1/import", KeyDescription, body=KeyImportRequest(algorithm, sealed, label), safe=False)

    async def list_keys(self) -> tuple[KeyDescription, ...]:
        return (await self._connection.ask("GET", "/v1/keys", KeyListReply)).keys

    async def describe_key(self, key: str) -> KeyDescription:
        return await self._connection.ask("GET", _path(key), KeyDescription)

    async def rotate_key(self, key: str) -> KeyDescription:
        """A new version for new ciphertexts and signatures; the old ones stay readable."""
        return await self._connection.ask("POST", _path(key, "rotate"), KeyDescription, safe=False)

    async def enable_key(self, key: str) -> KeyDescription:
        return await self._connection.ask("POST", _path(key, "enable"), KeyDescription)

    async def disable_key(self, key: str) -> KeyDescription:
        return await self._connection.ask("POST", _path(key, "disable"), KeyDescription)

    async def delete_key(self, key: str) -> KeyDescription:
        """For good: what the key encrypted cannot be read any more."""
        return await self._connection.ask("POST", _path(key, "delete"), KeyDescription)

    # -- encryption ----------------------------------------------------------------------------------------------------

    async def encrypt(self, key: str, data: Bytes, *, context: bytes = b"") -> bytes:
        """A ciphertext that names key and version. ``context`` (at most 4 KiB) is authenticated, not stored, and needed again."""
        return await self._connection.fetch("POST", _path(key, "encrypt"), Upload(data), headers=_contexts(context))

    async def decrypt(self, data: Bytes, *, context: bytes = b"", key: str | None = None) -> bytes:
        """``key``: the only one that the ciphertext may be of (default: any of the consumer's).

        Raises ``CiphertextInvalid``, ``CiphertextTruncated`` or ``CiphertextForeignKey``.
        """
        return await self._connection.fetch("POST", "/v1/decrypt", Upload(data), headers=_contexts(context, key=key))

    async def reencrypt(self, key: str, data: Bytes, *, context: bytes = b"", target_context: bytes = b"") -> bytes:
        """A ciphertext of any key as one of ``key``'s current version; the plaintext stays in the card."""
        return await self._connection.fetch("POST", _path(key, "reencrypt"), Upload(data), headers=_contexts(context, target_context))

    def encrypt_stream(self, key: str, data: Source, *, context: bytes = b"", progress: Progress | None = None) -> AsyncIterator[bytes]:
        """The ciphertext, piece by piece, while ``data`` is still read."""
        return self._connection.stream("POST", _path(key, "encrypt"), Upload(data, progress), headers=_contexts(context))

    def decrypt_stream(
        self, data: Source, *, context: bytes = b"", key: str | None = None, progress: Progress | None = None
    ) -> AsyncIterator[bytes]:
        """The plaintext, piece by piece. What is yielded was verified; only the end of the iteration says that it is whole."""
        return self._connection.stream("POST", "/v1/decrypt", Upload(data, progress), headers=_contexts(context, key=key))

    def reencrypt_stream(
        self, key: str, data: Source, *, context: bytes = b"", target_context: bytes = b"", progress: Progress | None = None
    ) -> AsyncIterator[bytes]:
        headers = _contexts(context, target_context)
        return self._connection.stream("POST", _path(key, "reencrypt"), Upload(data, progress), headers=headers)

    async def encrypt_file(
        self, key: str, source: FilePath, target: FilePath, *, context: bytes = b"", progress: Progress | None = None
    ) -> int:
        """Encrypt a file; the bytes written. ``target`` appears when it is whole and on disk, or not at all.

        Raises ``FileProblem`` or ``DiskFull`` for the files.
        """
        with open_source(Path(source)) as file:
            return await _store(self.encrypt_stream(key, file, context=context, progress=progress), target, private=False)

    async def decrypt_file(
        self, source: FilePath, target: FilePath, *, context: bytes = b"", key: str | None = None, progress: Progress | None = None
    ) -> int:
        """Decrypt a file, as ``encrypt_file``; ``target`` gets mode 0600."""
        with open_source(Path(source)) as file:
            return await _store(self.decrypt_stream(file, context=context, key=key, progress=progress), target, private=True)

    async def reencrypt_file(
        self,
        key: str,
        source: FilePath,
        target: FilePath,
        *,
        context: bytes = b"",
        target_context: bytes = b"",
        progress: Progress | None = None,
    ) -> int:
        """Re-encrypt a file; ``target`` may be ``source``."""
        with open_source(Path(source)) as file:
            pieces = self.reencrypt_stream(key, file, context=context, target_context=target_context, progress=progress)
            return await _store(pieces, target, private=False)

    async def generate_data_key(self, key: str, *, length: int = 32, plaintext: bool = True, context: bytes = b"") -> DataKeyReply:
        """A key of 16 to 64 bytes for the caller's own use, encrypted under ``key`` and, if wanted, in plaintext."""
        ask = wire.DataKeyAsk(length, plaintext)
        return await self._connection.ask("POST", _path(key, "data-key"), DataKeyReply, body=ask, headers=_contexts(context))

    # -- signatures, MACs, digests -------------------------------------------------------------------------------------

    async def sign(self, key: str, data: Source) -> bytes:
        """ECDSA (DER), RSASSA-PSS or Ed25519 over ``data``, as the key's algorithm says."""
        return (await self.sign_with_version(key, data)).signature

    async def sign_with_version(self, key: str, data: Source) -> SignatureReply:
        """As ``sign``, and which version of the key signed."""
        headers: dict[str, str] = {}
        signature = await self._connection.fetch("POST", _path(key, "sign"), Upload(data), answered=headers.update)
        described = headers.get(wire.KEY, key), int(headers.get(wire.KEY_VERSION, "0")), headers.get(wire.ALGORITHM, "")
        return SignatureReply(KeyId(described[0]), described[1], described[2], signature)

    async def verify(self, key: str, data: Source, signature: bytes, *, version: int | None = None) -> None:
        """Raises ``SignatureInvalid``. Without ``version`` the key's newest eight versions may have signed."""
        await self._connection.fetch("POST", _path(key, "verify"), Upload(data), headers=_signature(signature, version))

    async def mac(self, key: str, data: Source) -> bytes:
        return await self._connection.fetch("POST", _path(key, "mac"), Upload(data))

    async def verify_mac(self, key: str, data: Source, mac: bytes, *, version: int | None = None) -> None:
        """Raises ``MacInvalid``; versions as in ``verify``."""
        await self._connection.fetch("POST", _path(key, "verify-mac"), Upload(data), headers=_signature(mac, version))

    async def digest(self, algorithm: str, data: Source) -> bytes:
        """Raises ``AlgorithmUnknown``."""
        return await self._connection.fetch("POST", f"/v1/digest/{quote(algorithm, safe='')}", Upload(data))

    async def random(self, length: int) -> bytes:
        """1 to 1048576 random bytes from the card."""
        return await self._connection.fetch("GET", f"/v1/random?bytes={length}")

    # -- the service ---------------------------------------------------------------------------------------------------

    async def algorithms(self) -> tuple[Algorithm, ...]:
        return (await self._connection.ask("GET", "/v1/algorithms", wire.AlgorithmsReply)).algorithms

    async def audit(self) -> tuple[AuditEntry, ...]:
        """The consumer's audit log, oldest first."""
        return (await self._connection.ask("GET", "/v1/audit", AuditLog)).entries

    async def endpoints(self) -> tuple[str, ...]:
        """Where this consumer's VCMs are now; the client uses them from here on."""
        told = (await self._connection.ask("GET", "/v1/endpoints", EndpointsReply)).endpoints
        self._connection.endpoints.learn(told)
        return told

    async def health(self) -> wire.HealthReply:
        """Which VCM and card answer. Raises ``ServiceOff``."""
        return await self._connection.ask("GET", "/v1/health", wire.HealthReply)


def _path(key: str, verb: str = "") -> str:
    return f"/v1/keys/{quote(key, safe='')}" + (f"/{verb}" if verb else "")


def _contexts(context: bytes, target_context: bytes = b"", key: str | None = None) -> dict[str, str]:
    headers = {} if key is None else {wire.KEY: quote(key, safe="")}
    for name, value in ((wire.CONTEXT, context), (wire.TARGET_CONTEXT, target_context)):
        if len(value) > wire.MAX_CONTEXT_BYTES:
            raise TooLarge(f"a context has at most {wire.MAX_CONTEXT_BYTES} bytes")
        if value:
            headers[name] = wire.to_header(value)
    return headers


def _signature(signature: bytes, version: int | None) -> dict[str, str]:
    if len(signature) > wire.MAX_SIGNATURE_BYTES:
        raise TooLarge(f"a signature has at most {wire.MAX_SIGNATURE_BYTES} bytes")
    headers = {wire.SIGNATURE: wire.to_header(signature)}
    if version is not None:
        headers[wire.KEY_VERSION] = str(version)
    return headers


async def _store(pieces: AsyncIterator[bytes], target: FilePath, *, private: bool) -> int:
    async with WholeFile(Path(target), private=private) as file:
        async for piece in pieces:
            await file.write(piece)
    return file.written
