"""The client's calls about keys: their life, their names, who else may use them."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import quote, urlencode

from msgspec import structs

from cipherfleet.channel import codec, signing
from cipherfleet.channel.delegations import own_signer
from cipherfleet.contract.algorithms import algorithm as named
from cipherfleet.contract.errors import Malformed, PeerError, StatementReplayed
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import ApplicationName, is_slug
from cipherfleet.contract.key_life import ALIAS_PREFIX, NO_TAGS, KeyUpdate
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.messages import Done
from cipherfleet.contract.statements import DelegationStatement
from cipherfleet.contract.vcm_api import (
    MAX_KEYS_AT_ONCE,
    AliasEntry,
    AliasListReply,
    AliasRequest,
    Delegation,
    DelegationsReply,
    DeletionRequest,
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
    TrimRequest,
    WrappedImportRequest,
    keys_at_once,
)
from cipherfleet.services import wire
from cipherfleet.services.middleware.calls import Calls, contexts, path_of
from cipherfleet.services.middleware.envelope import NewKey, seal_keys, seal_material

DELEGATE_ATTEMPTS = 3
MAX_KEY_OVERHEAD_BYTES = 4 * wire.MAX_LABEL_CHARACTERS + 256


class KeyCalls(Calls):
    """See ``Client``."""

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
        headers = contexts(b"", version=version)
        return await self._connection.ask("POST", path_of(source, "derive-key"), KeyDescription, body=ask, headers=headers, safe=False)

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
        return await self._connection.ask("GET", path_of(key), KeyDescription)

    async def rotate_key(self, key: str) -> KeyDescription:
        """A new version for new ciphertexts and signatures; the old ones stay readable."""
        return await self._connection.ask("POST", path_of(key, "rotate"), KeyDescription, safe=False)

    async def enable_key(self, key: str) -> KeyDescription:
        return await self._connection.ask("POST", path_of(key, "enable"), KeyDescription)

    async def disable_key(self, key: str) -> KeyDescription:
        return await self._connection.ask("POST", path_of(key, "disable"), KeyDescription)

    async def delete_key(self, key: str) -> KeyDescription:
        """At once and for good: what the key encrypted cannot be read any more."""
        return await self._connection.ask("POST", path_of(key, "delete"), KeyDescription)

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
        return await self._connection.ask("POST", path_of(key, "update"), KeyDescription, body=change)

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
        return await self._connection.ask("POST", path_of(key, "schedule-deletion"), KeyDescription, body=DeletionRequest(days))

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
        return await self._connection.ask("POST", path_of(key, "export"), ExportReply, body=asked)

    async def trim_key(self, key: str, before: int) -> KeyDescription:
        """Destroy the versions below ``before``: what only they can decrypt or verify is lost. Raises ``Malformed``."""
        return await self._connection.ask("POST", path_of(key, "trim"), KeyDescription, body=TrimRequest(before))

    async def destruction_receipt(self, key: str) -> ReceiptReply:
        """The HSM's signed word that material of a key was destroyed. Raises ``StateConflict`` when none was."""
        return await self._connection.ask("GET", path_of(key, "receipt"), ReceiptReply)

    async def cancel_key_deletion(self, key: str) -> KeyDescription:
        """The key is there again, disabled. Raises ``KeyDeleted`` when its time is over."""
        return await self._connection.ask("POST", path_of(key, "cancel-deletion"), KeyDescription)

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
        return (await self._connection.ask("GET", path_of(key, "delegations"), DelegationsReply)).delegations

    async def _delegate(self, key: str, to: str, grants: Sequence[Grant], *, revoked: bool) -> Delegation:
        if not is_slug(to):
            raise Malformed(f"{to!r} cannot name an application")
        signer = own_signer(self.profile.key.encode())
        for attempt in range(DELEGATE_ATTEMPTS):
            known = await self._connection.ask("GET", path_of(key, "delegations"), DelegationsReply)
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
                return await self._connection.ask("POST", path_of(known.key, "delegate"), Delegation, body=signed, safe=False)
            except StatementReplayed:  # another process of this application took the number
                if attempt == DELEGATE_ATTEMPTS - 1:
                    raise
        raise RuntimeError("the last attempt returns or raises")


def _alias(name: str) -> str:
    return f"/v1/aliases/{quote(name.removeprefix(ALIAS_PREFIX), safe='')}"
