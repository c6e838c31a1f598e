"""The Python client of a consumer's VCMs."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeAlias
from urllib.parse import quote, urlencode

from msgspec import structs

from cipherfleet.channel import codec, signing
from cipherfleet.channel.audit_check import AuditCheck, AuditVerdict
from cipherfleet.channel.delegations import own_signer
from cipherfleet.contract.algorithms import Algorithm
from cipherfleet.contract.algorithms import algorithm as named
from cipherfleet.contract.audit import MAX_PAGE, AuditEntry, AuditLog, AuditQuery
from cipherfleet.contract.errors import CertificateInvalid, Malformed, PeerError, StatementReplayed, TooLarge
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, KeyId, is_slug
from cipherfleet.contract.key_life import ALIAS_PREFIX, NO_TAGS, KeyUpdate
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.messages import Done
from cipherfleet.contract.profile import Profile
from cipherfleet.contract.statements import DelegationStatement
from cipherfleet.contract.vcm_api import (
    MAX_KEYS_AT_ONCE,
    AliasEntry,
    AliasListReply,
    AliasRequest,
    DataKeyReply,
    Delegation,
    DelegationsReply,
    DeletionRequest,
    EncapsulationReply,
    EndpointsReply,
    ExportAsk,
    ExportReply,
    ImportParameters,
    ImportParametersRequest,
    ImportTarget,
    KeyCreateRequest,
    KeyDeriveRequest,
    KeyDescription,
    KeyImportRequest,
    KeyListReply,
    KeysCreateRequest,
    KeysImportRequest,
    ReceiptReply,
    SecretReply,
    SignatureReply,
    TrimRequest,
    WrappedImportRequest,
    keys_at_once,
)
from cipherfleet.services import wire
from cipherfleet.services.middleware.connection import Connection, read_profile
from cipherfleet.services.middleware.envelope import NewKey, seal_keys, seal_material
from cipherfleet.services.middleware.sources import Bytes, Progress, Source, Upload
from cipherfleet.services.middleware.targets import WholeFile, open_source

TIMEOUT_S = 60.0
DELEGATE_ATTEMPTS = 3
MAX_KEY_OVERHEAD_BYTES = 4 * wire.MAX_LABEL_CHARACTERS + 256
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

    async def create_key(
        self,
        algorithm: str = "AES-256-GCM",
        *,
        label: str = "",
        bare: bool = False,
        terms: KeyTerms = NO_TERMS,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> KeyDescription:
        """A new key; it is in the key escrow when this returns. ``bare``: its ciphertexts are ``nonce || ciphertext || tag``.

        Raises ``AlgorithmUnknown``.
        """
        request = KeyCreateRequest(algorithm, label, bare, terms, dict(tags))
        return await self._connection.ask("POST", "/v1/keys", KeyDescription, body=request, safe=False)

    async def import_key(
        self,
        algorithm: str,
        material: bytes,
        *,
        label: str = "",
        bare: bool = False,
        terms: KeyTerms = NO_TERMS,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> KeyDescription:
        """A new key of the caller's own ``material``: raw bytes of a symmetric key, PKCS#8 (PEM or DER, unencrypted) of a private one.

        It travels sealed to the card that takes it; the VCM and the key escrow see it wrapped alone. Raises ``CardUntrusted``,
        ``KeyMaterialInvalid`` or ``AlgorithmUnknown``.
        """
        target = await self._connection.ask("GET", "/v1/import", ImportTarget)
        sealed = seal_material(self.profile, target, algorithm, material)
        request = KeyImportRequest(algorithm, sealed, label, bare, terms, dict(tags))
        return await self._connection.ask("POST", "/v1/import", KeyDescription, body=request, safe=False)

    async def create_keys(
        self,
        algorithm: str,
        labels: Sequence[str],
        *,
        bare: bool = False,
        terms: KeyTerms = NO_TERMS,
        tags: Mapping[str, str] = NO_TAGS,
        done: Callable[[int], object] = lambda _: None,
    ) -> tuple[KeyDescription, ...]:
        """A new key for each label, all of the same terms and tags; of each request all are made, or none.

        A request has a thousand keys, of RSA ``contract.vcm_api.RSA_KEYS_AT_ONCE``, as those take long.
        ``done`` is called with the number of keys that are in the escrow so far.
        """
        made: list[KeyDescription] = []
        most = keys_at_once(named(algorithm))
        for start in range(0, len(labels), most):
            request = KeysCreateRequest(algorithm, tuple(labels[start : start + most]), bare, terms, dict(tags))
            made += (await self._connection.ask("POST", "/v1/keys/batch", KeyListReply, body=request, safe=False)).keys
            done(len(made))
        return tuple(made)

    async def import_keys(self, keys: Sequence[NewKey], *, done: Callable[[int], object] = lambda _: None) -> tuple[KeyDescription, ...]:
        """As ``import_key``, up to a thousand in one request; of each request all are there then, or none."""
        made: list[KeyDescription] = []
        while len(made) < len(keys):
            target = await self._connection.ask("GET", "/v1/import", ImportTarget)
            some = keys[len(made) : len(made) + MAX_KEYS_AT_ONCE]
            sealed = await asyncio.to_thread(seal_keys, self.profile, target, some)
            asked: list[KeyImportRequest] = []
            size = 0
            for key, one in zip(some, sealed, strict=True):
                size += len(one) * 4 // 3 + MAX_KEY_OVERHEAD_BYTES + len(codec.encode(key.tags))
                if asked and size > wire.MAX_BATCH_BYTES:
                    break
                asked.append(KeyImportRequest(key.algorithm, one, key.label, key.bare, key.terms, key.tags))
            request = KeysImportRequest(tuple(asked))
            made += (await self._connection.ask("POST", "/v1/import/batch", KeyListReply, body=request, safe=False)).keys
            done(len(made))
        return tuple(made)

    async def key_page(
        self,
        *,
        limit: int = 100,
        after: str = "",
        label: str = "",
        state: str = "",
        algorithm: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> KeyListReply:
        """A page of up to ``limit`` (1,000) keys, and in ``next`` where the following one begins: empty at the end.

        All keys come in the order of their creation. ``label`` (its beginning), ``state``, ``algorithm`` and ``tags`` choose among them;
        what is found then is checked, but only the list of all keys is sure to be complete.
        """
        asked = {"limit": str(limit), "after": after, "label": label, "state": state, "algorithm": algorithm}
        wanted = [(name, value) for name, value in asked.items() if value]
        query = urlencode(wanted + [("tag", f"{name}={value}") for name, value in (tags or {}).items()])
        return await self._connection.ask("GET", f"/v1/keys?{query}", KeyListReply)

    async def derive_key(
        self,
        source: str,
        algorithm: str,
        *,
        context: bytes,
        salt: bytes = b"",
        label: str = "",
        bare: bool = False,
        version: int | None = None,
    ) -> KeyDescription:
        """A new key of a symmetric algorithm that ``source`` (HKDF) gives in the card: the same for the same context and salt."""
        ask = KeyDeriveRequest(algorithm, context, salt, label, bare)
        headers = _contexts(b"", version=version)
        return await self._connection.ask("POST", _path(source, "derive-key"), KeyDescription, body=ask, headers=headers, safe=False)

    async def list_keys(
        self, *, limit: int | None = None, label: str = "", state: str = "", algorithm: str = "", tags: Mapping[str, str] | None = None
    ) -> tuple[KeyDescription, ...]:
        """All keys, or the first ``limit`` of them; see ``key_page``."""
        found: list[KeyDescription] = []
        after = ""
        while limit is None or len(found) < limit:
            count = MAX_KEYS_AT_ONCE if limit is None else min(MAX_KEYS_AT_ONCE, limit - len(found))
            page = await self.key_page(limit=count, after=after, label=label, state=state, algorithm=algorithm, tags=tags)
            found += page.keys
            after = page.next
            if not after:
                break
        return tuple(found)

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
        """At once and for good: what the key encrypted cannot be read any more."""
        return await self._connection.ask("POST", _path(key, "delete"), KeyDescription)

    # -- names, tags, the end ------------------------------------------------------------------------------------------

    async def update_key(
        self,
        key: str,
        *,
        label: str | None = None,
        tags: Mapping[str, str] | None = None,
        untag: Iterable[str] = (),
        not_before: float | None = None,
        not_after: float | None = None,
        rotation_s: float | None = None,
        rotation_uses: int | None = None,
        max_uses: int | None = None,
    ) -> KeyDescription:
        """Change the label, add or replace ``tags``, remove those that ``untag`` names, change terms (0 takes one away).

        A later ``not_after`` than a version was made with holds for the next version, as the card keeps to the first.
        Raises ``LimitReached``, ``TooLarge`` or ``Malformed``.
        """
        change = KeyUpdate(label, dict(tags or {}), tuple(untag), not_before, not_after, rotation_s, rotation_uses, max_uses)
        return await self._connection.ask("POST", _path(key, "update"), KeyDescription, body=change)

    async def set_alias(self, name: str, key: str) -> KeyDescription:
        """Make the alias ``name``, or move it; from then on ``alias/NAME`` names ``key`` wherever a key's id does."""
        return await self._connection.ask("PUT", _alias(name), KeyDescription, body=AliasRequest(key))

    async def delete_alias(self, name: str) -> None:
        """The key stays. Deleting what is gone succeeds."""
        await self._connection.ask("DELETE", _alias(name), Done)

    async def list_aliases(self) -> tuple[AliasEntry, ...]:
        """As far as the KMC's index knows of them; each is checked."""
        return (await self._connection.ask("GET", "/v1/aliases", AliasListReply)).aliases

    async def schedule_key_deletion(self, key: str, *, days: float | None = None) -> KeyDescription:
        """Refuse every use from now on, and destroy the key in ``days`` (default 30, from 7 on). Raises ``KeyDeleted``."""
        return await self._connection.ask("POST", _path(key, "schedule-deletion"), KeyDescription, body=DeletionRequest(days))

    async def import_parameters(self, algorithm: str, *, bits: int = 4096, bare: bool = False) -> ImportParameters:
        """An RSA key to wrap one key's material to, and the token to import it with: for tools that know no more than RSA and AES.

        Good for one import, for a day by default, at any VCM of the consumer. Raises ``AlgorithmUnknown``.
        """
        asked = ImportParametersRequest(algorithm, bits, bare)
        return await self._connection.ask("POST", "/v1/import/parameters", ImportParameters, body=asked)

    async def import_wrapped(self, token: bytes, wrapped: bytes, *, label: str = "", terms: KeyTerms = NO_TERMS) -> KeyDescription:
        """Raises ``ImportTokenInvalid``, ``ImportTokenExpired``, ``ImportTokenUsed`` or ``KeyMaterialInvalid``."""
        asked = WrappedImportRequest(token, wrapped, label, terms)
        return await self._connection.ask("POST", "/v1/import/wrapped", KeyDescription, body=asked, safe=False)

    async def export_key(self, key: str, *, public_key: bytes = b"", wrapping_key: str = "", version: int | None = None) -> ExportReply:
        """A key that was made exportable, wrapped to an RSA ``public_key`` (DER) or under a key of AES-256-KWP.

        Raises ``KeyNotExportable``, ``PublicKeyInvalid`` or ``WrongKeyType``.
        """
        asked = ExportAsk(public_key, wrapping_key, version)
        return await self._connection.ask("POST", _path(key, "export"), ExportReply, body=asked)

    async def trim_key(self, key: str, before: int) -> KeyDescription:
        """Destroy the versions below ``before``: what only they can decrypt or verify is lost. Raises ``Malformed``."""
        return await self._connection.ask("POST", _path(key, "trim"), KeyDescription, body=TrimRequest(before))

    async def destruction_receipt(self, key: str) -> ReceiptReply:
        """The HSM's signed word that material of a key was destroyed. Raises ``StateConflict`` when none was."""
        return await self._connection.ask("GET", _path(key, "receipt"), ReceiptReply)

    async def cancel_key_deletion(self, key: str) -> KeyDescription:
        """The key is there again, disabled. Raises ``KeyDeleted`` when its time is over."""
        return await self._connection.ask("POST", _path(key, "cancel-deletion"), KeyDescription)

    # -- delegation ----------------------------------------------------------------------------------------------------

    async def delegate_key(self, key: str, to: str, grants: Sequence[Grant]) -> Delegation:
        """Give the application ``to`` these ``grants`` with ``key``, in the place of what it was given by this one before.

        Signed here, with the key in the profile. A grant that names no key is for this one. Raises ``DelegationTooWide`` for
        more than a grant of one's own gives and lets delegate, ``ApplicationUnknown``, ``Malformed``, ``Unsupported``.
        """
        return await self._delegate(key, to, grants, revoked=False)

    async def revoke_delegation(self, key: str, to: str) -> Delegation:
        """Take back what this application gave ``to`` with ``key``. Raises ``ApplicationUnknown`` if that is nothing."""
        return await self._delegate(key, to, (), revoked=True)

    async def list_delegations(self, key: str) -> tuple[Delegation, ...]:
        """What this application gave of a key, and what it was given; who may show every key sees all."""
        return (await self._connection.ask("GET", _path(key, "delegations"), DelegationsReply)).delegations

    async def _delegate(self, key: str, to: str, grants: Sequence[Grant], *, revoked: bool) -> Delegation:
        if not is_slug(to):
            raise Malformed(f"{to!r} cannot name an application")
        signer = own_signer(self.profile.key.encode())
        for attempt in range(DELEGATE_ATTEMPTS):
            known = await self._connection.ask("GET", _path(key, "delegations"), DelegationsReply)
            if not key.startswith(ALIAS_PREFIX) and known.key != key:
                raise PeerError("the VCM answered about another key")
            given = tuple(grant if grant.keys else structs.replace(grant, keys=(known.key,)) for grant in grants)
            statement = DelegationStatement(
                self.profile.consumer,
                self.profile.application,
                ApplicationName(to),
                known.key,
                given,
                known.next,
                signer.public_key,
                revoked=revoked,
            )
            signed = await signing.sign(statement, signer)
            try:
                return await self._connection.ask("POST", _path(known.key, "delegate"), Delegation, body=signed, safe=False)
            except StatementReplayed:  # another process of this application took the number
                if attempt == DELEGATE_ATTEMPTS - 1:
                    raise
        raise RuntimeError("the last attempt returns or raises")

    # -- encryption ----------------------------------------------------------------------------------------------------

    async def encrypt(self, key: str, data: Bytes, *, context: bytes = b"", digest: str = "") -> bytes:
        """A ciphertext that names key and version; of a bare key, what its standard says.

        ``context`` (at most 4 KiB) is authenticated, not stored, and needed again. XTS: the tweak; RSA-OAEP: the label, and
        ``digest`` may be chosen.
        """
        return await self._connection.fetch("POST", _path(key, "encrypt"), Upload(data), headers=_contexts(context, digest=digest))

    async def decrypt(
        self, data: Bytes, *, context: bytes = b"", key: str | None = None, version: int | None = None, digest: str = ""
    ) -> bytes:
        """``key``: the only one that the ciphertext may be of (default: any of the consumer's).

        A bare ciphertext needs it, and ``version`` if that is not the newest. Raises ``CiphertextInvalid``,
        ``CiphertextTruncated``, ``TagTooShort`` or ``CiphertextForeignKey``.
        """
        return await self._connection.fetch("POST", _decrypt(key), Upload(data), headers=_contexts(context, version=version, digest=digest))

    async def reencrypt(self, key: str, data: Bytes, *, context: bytes = b"", target_context: bytes = b"") -> bytes:
        """A ciphertext of any key as one of ``key``'s current version; the plaintext stays in the card."""
        return await self._connection.fetch("POST", _path(key, "reencrypt"), Upload(data), headers=_contexts(context, target_context))

    def encrypt_stream(
        self, key: str, data: Source, *, context: bytes = b"", digest: str = "", progress: Progress | None = None
    ) -> AsyncIterator[bytes]:
        """The ciphertext, piece by piece, while ``data`` is still read."""
        return self._connection.stream("POST", _path(key, "encrypt"), Upload(data, progress), headers=_contexts(context, digest=digest))

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
        headers = _contexts(context, version=version, digest=digest)
        return self._connection.stream("POST", _decrypt(key), Upload(data, progress), headers=headers)

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
        return await self._connection.ask("POST", _path(key, "data-key"), DataKeyReply, body=ask, headers=_contexts(context))

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
        asked = _contexts(context, digest=digest, prehashed=prehashed)
        signature = await self._connection.fetch("POST", _path(key, "sign"), Upload(data), headers=asked, answered=headers.update)
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
        headers = {**_signature(signature, version), **_contexts(context, digest=digest, prehashed=prehashed)}
        await self._connection.fetch("POST", _path(key, "verify"), Upload(data), headers=headers)

    async def mac(self, key: str, data: Source) -> bytes:
        return await self._connection.fetch("POST", _path(key, "mac"), Upload(data))

    async def verify_mac(self, key: str, data: Source, mac: bytes, *, version: int | None = None) -> None:
        """Raises ``MacInvalid``; versions as in ``verify``."""
        await self._connection.fetch("POST", _path(key, "verify-mac"), Upload(data), headers=_signature(mac, version))

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
        headers = _contexts(b"", version=version)
        return (await self._connection.ask("POST", _path(key, "agree"), SecretReply, body=ask, headers=headers)).secret

    async def derive(self, key: str, length: int, *, salt: bytes = b"", context: bytes = b"", version: int | None = None) -> bytes:
        """``length`` bytes (at most 4096) by HKDF from the key, ``salt`` and ``context``: the same each time."""
        ask = wire.DeriveAsk(length, salt, context)
        headers = _contexts(b"", version=version)
        return (await self._connection.ask("POST", _path(key, "derive"), SecretReply, body=ask, headers=headers)).secret

    async def encapsulate(self, key: str) -> EncapsulationReply:
        """A fresh secret, and its ciphertext for whoever may decapsulate with the key (ML-KEM)."""
        return await self._connection.ask("POST", _path(key, "encapsulate"), EncapsulationReply)

    async def decapsulate(self, key: str, ciphertext: bytes, *, version: int | None = None) -> bytes:
        """The secret of a ciphertext. One that was changed gives another secret, as FIPS 203 says, and no error."""
        ask, headers = wire.DecapsulateAsk(ciphertext), _contexts(b"", version=version)
        return (await self._connection.ask("POST", _path(key, "decapsulate"), SecretReply, body=ask, headers=headers)).secret

    async def batch(self, items: Iterable[wire.BatchAskItem]) -> tuple[wire.BatchReplyItem, ...]:
        """Up to 1,000 short operations in one request; what one meets is in its answer and concerns no other."""
        return (await self._connection.ask("POST", "/v1/batch", wire.BatchReply, body=wire.BatchAsk(tuple(items)))).items

    async def random(self, length: int) -> bytes:
        """1 to 1048576 random bytes from the card."""
        return await self._connection.fetch("GET", f"/v1/random?bytes={length}")

    # -- the service ---------------------------------------------------------------------------------------------------

    async def algorithms(self) -> tuple[Algorithm, ...]:
        """All that there are, also what the consumer's policy refuses: ``policy`` tells that."""
        return (await self._connection.ask("GET", "/v1/algorithms", wire.AlgorithmsReply)).algorithms

    async def policy(self) -> tuple[str, dict[str, str]]:
        """The name of the consumer's policy, and the algorithms that it refuses for new data, each with the rule."""
        reply = await self._connection.ask("GET", "/v1/algorithms", wire.AlgorithmsReply)
        return reply.policy, reply.refused

    async def audit(
        self, *, after: int = 0, since: float = 0.0, event: str = "", key: str = "", newest: bool = False, limit: int = MAX_PAGE
    ) -> tuple[AuditEntry, ...]:
        """Entries of the consumer's audit log, oldest first, at most ``limit`` (up to 2,000): ask on with ``after``, the last one's number.

        ``since``: unix seconds. ``newest``: the last ones that fit, not the first.
        """
        return (await self.audit_page(AuditQuery("", after, since, event, key, newest, limit))).entries

    async def audit_page(self, query: AuditQuery) -> AuditLog:
        """A page as the VCM hands it on; without filters with the checkpoints."""
        return await self._connection.ask("GET", query.path, AuditLog)

    async def verify_audit(self) -> AuditVerdict:
        """Check the consumer's whole audit log here, by the signing key that the Ukey put into the profile.

        Raises ``AuditBroken``, or ``CertificateInvalid`` for a profile without that key.
        """
        if not self.profile.kmc_signing_key:
            raise CertificateInvalid("the profile names no signing key of the KMC", "sign the application in again: cipherfleet app add")
        check = AuditCheck(self.profile.consumer, self.profile.kmc_signing_key)
        query: AuditQuery | None = AuditQuery()
        while query is not None:
            query = check.page(await self.audit_page(query))
        return check.end()

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


def _decrypt(key: str | None) -> str:
    return "/v1/decrypt" if key is None else _path(key, "decrypt")


def _alias(name: str) -> str:
    return f"/v1/aliases/{quote(name.removeprefix(ALIAS_PREFIX), safe='')}"


def _contexts(
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
