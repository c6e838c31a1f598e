"""The client's calls on data: encryption, signatures, secrets, one or many at once."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from urllib.parse import quote

from cipherfleet.contract.errors import TooLarge
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.vcm_api import (
    DataKeyReply,
    EncapsulationReply,
    SecretReply,
    SignatureReply,
)
from cipherfleet.services import wire
from cipherfleet.services.middleware.calls import Calls, FilePath, contexts, path_of
from cipherfleet.services.middleware.sources import Bytes, Progress, Source, Upload
from cipherfleet.services.middleware.targets import WholeFile, open_source


class DataCalls(Calls):
    """See ``Client``."""

    # -- encryption ----------------------------------------------------------------------------------------------------

    async def encrypt(self, key: str, data: Bytes, *, context: bytes = b"", digest: str = "") -> bytes:
        """A ciphertext that names key and version; of a bare key, what its standard says.

        ``context`` (at most 4 KiB) is authenticated, not stored, and needed again. XTS: the tweak; RSA-OAEP: the label, and
        ``digest`` may be chosen.
        """
        return await self._connection.fetch("POST", path_of(key, "encrypt"), Upload(data), headers=contexts(context, digest=digest))

    async def decrypt(
        self, data: Bytes, *, context: bytes = b"", key: str | None = None, version: int | None = None, digest: str = ""
    ) -> bytes:
        """``key``: the only one that the ciphertext may be of (default: any of the consumer's).

        A bare ciphertext needs it, and ``version`` if that is not the newest. Raises ``CiphertextInvalid``,
        ``CiphertextTruncated``, ``TagTooShort`` or ``CiphertextForeignKey``.
        """
        return await self._connection.fetch("POST", _decrypt(key), Upload(data), headers=contexts(context, version=version, digest=digest))

    async def reencrypt(self, key: str, data: Bytes, *, context: bytes = b"", target_context: bytes = b"") -> bytes:
        """A ciphertext of any key as one of ``key``'s current version; the plaintext stays in the card."""
        return await self._connection.fetch("POST", path_of(key, "reencrypt"), Upload(data), headers=contexts(context, target_context))

    def encrypt_stream(
        self, key: str, data: Source, *, context: bytes = b"", digest: str = "", progress: Progress | None = None
    ) -> AsyncIterator[bytes]:
        """The ciphertext, piece by piece, while ``data`` is still read."""
        return self._connection.stream("POST", path_of(key, "encrypt"), Upload(data, progress), headers=contexts(context, digest=digest))

    def decrypt_stream(
        self,
        data: Source,
        *,
        context: bytes = b"",
        key: str | None = None,
        version: int | None = None,
        digest: str = "",
        progress: Progress | None = None,
    ) -> AsyncIterator[bytes]:
        """The plaintext, piece by piece. What is yielded was verified; only the end of the iteration says that it is whole."""
        headers = contexts(context, version=version, digest=digest)
        return self._connection.stream("POST", _decrypt(key), Upload(data, progress), headers=headers)

    def reencrypt_stream(
        self, key: str, data: Source, *, context: bytes = b"", target_context: bytes = b"", progress: Progress | None = None
    ) -> AsyncIterator[bytes]:
        headers = contexts(context, target_context)
        return self._connection.stream("POST", path_of(key, "reencrypt"), Upload(data, progress), headers=headers)

    async def encrypt_file(
        self, key: str, source: FilePath, target: FilePath, *, context: bytes = b"", progress: Progress | None = None
    ) -> int:
        """Encrypt a file; the bytes written. ``target`` appears when it is whole and on disk, or not at all.

        Raises ``FileProblem`` or ``DiskFull`` for the files.
        """
        with open_source(Path(source)) as file:
            return await _store(self.encrypt_stream(key, file, context=context, progress=progress), target, private=False)

    async def decrypt_file(
        self,
        source: FilePath,
        target: FilePath,
        *,
        context: bytes = b"",
        key: str | None = None,
        version: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Decrypt a file, as ``encrypt_file``; ``target`` gets mode 0600."""
        with open_source(Path(source)) as file:
            return await _store(
                self.decrypt_stream(file, context=context, key=key, version=version, progress=progress), target, private=True
            )

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
        return await self._connection.ask("POST", path_of(key, "data-key"), DataKeyReply, body=ask, headers=contexts(context))

    # -- signatures, MACs, digests -------------------------------------------------------------------------------------

    async def sign(self, key: str, data: Source, *, digest: str = "", prehashed: bool = False, context: bytes = b"") -> bytes:
        """A signature over ``data``, as the key's algorithm says; ECDSA and SM2 in DER.

        ``digest``: one that the algorithm allows; ``prehashed``: ``data`` is that digest (ML-DSA: mu); ``context``: ML-DSA's context
        string, SM2's user id.
        """
        return (await self.sign_with_version(key, data, digest=digest, prehashed=prehashed, context=context)).signature

    async def sign_with_version(
        self, key: str, data: Source, *, digest: str = "", prehashed: bool = False, context: bytes = b""
    ) -> SignatureReply:
        """As ``sign``, and which version of the key signed."""
        headers: dict[str, str] = {}
        asked = contexts(context, digest=digest, prehashed=prehashed)
        signature = await self._connection.fetch("POST", path_of(key, "sign"), Upload(data), headers=asked, answered=headers.update)
        described = headers.get(wire.KEY, key), int(headers.get(wire.KEY_VERSION, "0")), headers.get(wire.ALGORITHM, "")
        return SignatureReply(KeyId(described[0]), described[1], described[2], signature)

    async def verify(
        self,
        key: str,
        data: Source,
        signature: bytes,
        *,
        version: int | None = None,
        digest: str = "",
        prehashed: bool = False,
        context: bytes = b"",
    ) -> None:
        """Raises ``SignatureInvalid``. Without ``version`` the key's newest eight versions may have signed."""
        headers = {**_signature(signature, version), **contexts(context, digest=digest, prehashed=prehashed)}
        await self._connection.fetch("POST", path_of(key, "verify"), Upload(data), headers=headers)

    async def mac(self, key: str, data: Source) -> bytes:
        return await self._connection.fetch("POST", path_of(key, "mac"), Upload(data))

    async def verify_mac(self, key: str, data: Source, mac: bytes, *, version: int | None = None) -> None:
        """Raises ``MacInvalid``; versions as in ``verify``."""
        await self._connection.fetch("POST", path_of(key, "verify-mac"), Upload(data), headers=_signature(mac, version))

    async def digest(self, algorithm: str, data: Source, *, length: int = 0) -> bytes:
        """``length``: bytes wanted of SHAKE. Raises ``AlgorithmUnknown``."""
        return await self._connection.fetch("POST", f"/v1/digest/{quote(algorithm, safe='')}?length={length}", Upload(data))

    # -- secrets for the caller's own use ------------------------------------------------------------------------------

    async def agree(
        self, key: str, peer: bytes, *, length: int = 0, salt: bytes = b"", context: bytes = b"", version: int | None = None
    ) -> bytes:
        """The secret shared with the holder of the public key ``peer`` (SubjectPublicKeyInfo, DER), through HKDF-SHA-256 if ``length``.

        Raises ``PublicKeyInvalid`` or ``SharedSecretZero``.
        """
        ask = wire.AgreeAsk(peer, length, salt, context)
        headers = contexts(b"", version=version)
        return (await self._connection.ask("POST", path_of(key, "agree"), SecretReply, body=ask, headers=headers)).secret

    async def derive(self, key: str, length: int, *, salt: bytes = b"", context: bytes = b"", version: int | None = None) -> bytes:
        """``length`` bytes (at most 4096) by HKDF from the key, ``salt`` and ``context``: the same each time."""
        ask = wire.DeriveAsk(length, salt, context)
        headers = contexts(b"", version=version)
        return (await self._connection.ask("POST", path_of(key, "derive"), SecretReply, body=ask, headers=headers)).secret

    async def encapsulate(self, key: str) -> EncapsulationReply:
        """A fresh secret, and its ciphertext for whoever may decapsulate with the key (ML-KEM)."""
        return await self._connection.ask("POST", path_of(key, "encapsulate"), EncapsulationReply)

    async def decapsulate(self, key: str, ciphertext: bytes, *, version: int | None = None) -> bytes:
        """The secret of a ciphertext. One that was changed gives another secret, as FIPS 203 says, and no error."""
        ask, headers = wire.DecapsulateAsk(ciphertext), contexts(b"", version=version)
        return (await self._connection.ask("POST", path_of(key, "decapsulate"), SecretReply, body=ask, headers=headers)).secret

    async def batch(self, items: Iterable[wire.BatchAskItem]) -> tuple[wire.BatchReplyItem, ...]:
        """Up to 1,000 short operations in one request; what one meets is in its answer and concerns no other."""
        return (await self._connection.ask("POST", "/v1/batch", wire.BatchReply, body=wire.BatchAsk(tuple(items)))).items

    async def random(self, length: int) -> bytes:
        """1 to 1048576 random bytes from the card."""
        return await self._connection.fetch("GET", f"/v1/random?bytes={length}")


def _decrypt(key: str | None) -> str:
    return "/v1/decrypt" if key is None else path_of(key, "decrypt")


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
