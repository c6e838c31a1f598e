"""The consumer's keys as one VCM serves them: rows from the escrow, handles in the card, and no key material here.

Every change is made in the card, committed by the escrow, and only then visible and acknowledged.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple

import msgspec

from cipherfleet.channel import codec
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.computing.vcm_handles import Handles, Name
from cipherfleet.computing.vcm_listing import find, fits
from cipherfleet.computing.vcm_uses import Uses, block_of
from cipherfleet.contract.algorithms import Algorithm, Kind, algorithm
from cipherfleet.contract.errors import (
    CipherfleetError,
    EscrowRowTampered,
    ImportTokenUsed,
    KeyUnknown,
    ServiceOff,
    ServiceUnavailable,
    StateConflict,
    WrongKeyType,
)
from cipherfleet.contract.escrow import (
    AliasAttributes,
    EscrowRow,
    KeyAttributes,
    KeyState,
    RowName,
    VersionAttributes,
    decode_attributes,
    is_alias,
    is_destroyed,
    row_digest,
)
from cipherfleet.contract.ids import KeyId, new_key_id
from cipherfleet.contract.key_life import (
    MAX_TAGS,
    NO_TAGS,
    check_tags,
    check_terms,
    deletion_due,
    destroyed,
    next_rotation,
    require_alive,
    require_protecting,
    require_usable,
    require_version,
    reserved,
    rotated,
    rotation_due,
    uses_due,
)
from cipherfleet.contract.key_terms import NO_TERMS, KeyTerms
from cipherfleet.contract.policy import INTERNATIONAL, refusal
from cipherfleet.contract.two_person import SecondPerson
from cipherfleet.contract.vcc import (
    Completion,
    DeriveKeyRequest,
    ImportRequest,
    ImportToken,
    ImportWrappedRequest,
    Operation,
    RowRequest,
    VirtualCryptoCard,
)
from cipherfleet.contract.vcm import KeyUse
from cipherfleet.contract.vcm_api import KeyDescription, KeyImportRequest, KeyListReply, KeyQuery, KeysCreateRequest


class Derivation(NamedTuple):
    """How a key is derived: the handle of its source, and what it is for."""

    source: int
    context: bytes
    salt: bytes


Imported = bytes | tuple[ImportToken, bytes] | Derivation
"""What was sealed to the card, or wrapped to the import key of a token."""
Change = Callable[[KeyAttributes], KeyAttributes | None]
_EVENTS = {KeyState.ENABLED: "key-enable", KeyState.DISABLED: "key-disable"}

SWEEP_AGAIN_S = 1.0
ATTEMPTS = 8
AT_ONCE = 32
"""Requests to the card that one list or batch has under way."""


class Keys:
    """Implements ``contract.vcm.KeyStore``."""

    def __init__(
        self, escrow: Escrow, card: VirtualCryptoCard, wall_clock: Callable[[], float] = time.time, *, most_tags: int = MAX_TAGS
    ) -> None:
        self._escrow, self._card, self._wall_clock, self._most_tags = escrow, card, wall_clock, most_tags
        self._revisions: dict[KeyId, int] = {}  # of keys that changed
        self._handles = Handles(card)
        self._uses = Uses(self._reserve)
        self.policy = INTERNATIONAL
        """What the card permits, as it said with the newest lease: told to those who ask, enforced by the card."""

    # -- the port ------------------------------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        *,
        label: str,
        actor: str,
        bare: bool = False,
        terms: KeyTerms = NO_TERMS,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> KeyDescription:
        """A new key.

        Raises ``AlgorithmUnknown``, ``WrongKeyType``, ``Malformed``, ``TooLarge``, ``LimitReached``, ``KmcUnavailable``, or what the
        card says.
        """
        return await self._create(self._first(name, label, actor, bare, terms, tags), None, actor, "key-create")

    async def import_key(self, key: KeyImportRequest, *, actor: str) -> KeyDescription:
        """A new key of material that was sealed to this card. Raises as ``create``, ``SealedForeign`` or ``KeyMaterialInvalid``."""
        return await self._create(self._first_of(key, actor), key.sealed, actor, "key-import")

    async def derive(
        self, source: KeyUse, name: str, context: bytes, salt: bytes, *, label: str, actor: str, bare: bool, terms: KeyTerms
    ) -> KeyDescription:
        """A new key that ``source`` gives in the card, the same each time. Raises as ``create``."""
        derivation = Derivation(source.handle, context, salt)
        return await self._create(self._first(name, label, actor, bare, terms, NO_TAGS), derivation, actor, "key-derive")

    async def create_many(self, wanted: KeysCreateRequest, *, actor: str) -> list[KeyDescription]:
        """A key for each label, all or none. Raises as ``create``."""
        alike = KeyImportRequest(wanted.algorithm, b"", "", wanted.bare, wanted.terms, wanted.tags)
        return await self._create_many([msgspec.structs.replace(alike, label=label) for label in wanted.labels], actor, "key-create")

    async def import_many(self, keys: Sequence[KeyImportRequest], *, actor: str) -> list[KeyDescription]:
        """All of these, or none. Raises as ``import_key``."""
        return await self._create_many(keys, actor, "key-import")

    async def import_by_token(self, token: ImportToken, wrapped: bytes, *, label: str, actor: str, terms: KeyTerms) -> KeyDescription:
        """The one key of a token. Its row is written once, whichever VCM writes it: so a token is good once. Raises ``ImportTokenUsed``."""
        self._require_loaded()
        await self._escrow.require()
        now = self._wall_clock()
        attributes = msgspec.structs.replace(_first_attributes(token.algorithm, label, actor, token.bare), created_at=now, terms=terms)
        if self._escrow.has(token.key, 0):
            raise ImportTokenUsed("the import token was used before")
        try:
            await self._write_version(token.key, attributes, None, now, actor, "key-import", (token, wrapped))
        except StateConflict as exc:
            raise ImportTokenUsed("the import token was used before") from exc
        return await self.describe(token.key)

    def _first(self, name: str, label: str, actor: str, bare: bool, terms: KeyTerms, tags: Mapping[str, str]) -> KeyAttributes:
        """The attributes of a new key."""
        made = _first_attributes(name, label, actor, bare)
        checked = check_tags(dict(tags), self._most_tags)
        return msgspec.structs.replace(made, created_at=self._wall_clock(), terms=check_terms(terms), tags=checked)

    def _first_of(self, key: KeyImportRequest, actor: str) -> KeyAttributes:
        return self._first(key.algorithm, key.label, actor, key.bare, key.terms, key.tags)

    async def _create(self, attributes: KeyAttributes, sealed: Imported | None, actor: str, event: str) -> KeyDescription:
        self._require_loaded()
        await self._escrow.require()
        key = new_key_id()
        await self._write_version(key, attributes, None, attributes.created_at, actor, event, sealed)
        return await self.describe(key)

    async def _create_many(self, wanted: Sequence[KeyImportRequest], actor: str, event: str) -> list[KeyDescription]:
        """Made in the card, some at a time, then stored in one write; what of them was loaded is unloaded again."""
        self._require_loaded()
        await self._escrow.require()
        turns, imported = asyncio.Semaphore(AT_ONCE), event == "key-import"
        first = [self._first_of(one, actor) for one in wanted]  # before the card makes any

        async def make(attributes: KeyAttributes, sealed: bytes) -> tuple[EscrowRow, EscrowRow]:
            key = new_key_id()
            async with turns:
                made = await self._make(key, attributes, attributes.created_at, sealed if imported else None)
                await self._handles.drop(made.value)
                return codec.decode(made.parameters, EscrowRow), await self.seal(key, attributes, None)

        made = await asyncio.gather(*(make(of, one.sealed) for of, one in zip(first, wanted, strict=True)), return_exceptions=True)
        rows: list[EscrowRow] = []
        for pair in made:
            if isinstance(pair, BaseException):
                raise pair
            rows += pair
        await self._escrow.write(rows, replaces=[None] * len(rows), actor=actor, event=event)
        for row in rows:
            self._escrow.note_sealed(row)
        return [await self.describe(row.key) for row in rows if row.version == 0]

    async def rotate(self, key: KeyId, *, actor: str, due: bool = False) -> KeyDescription:
        """A new current version; the old ones go on decrypting. ``due``: if it is, still, by the key's terms.

        Raises ``KeyUnknown``, ``KeyDisabled``, ``KeyDeleted``, ``KeyPendingDeletion``, ``KeyNotYetValid`` or ``KeyExpired``.
        """

        async def attempt() -> None:
            old, row = await self.attributes(key)
            now = self._wall_clock()
            if due and not rotation_due(old, now):
                return
            require_protecting(key, old, now)
            await self._write_version(key, rotated(old, now), row, now, actor, "key-rotate")

        await self.retry(attempt)
        return await self.describe(key)

    async def set_state(self, key: KeyId, state: KeyState, *, actor: str) -> KeyDescription:
        """Enable or disable; the state that a key is in already is well. Raises ``KeyUnknown``, ``KeyDeleted``, ``KeyPendingDeletion``."""

        def change(old: KeyAttributes) -> KeyAttributes | None:
            require_alive(key, old, self._wall_clock())
            return None if old.state is state else msgspec.structs.replace(old, state=state)

        return await self.change(key, change, actor=actor, event=_EVENTS[state])

    async def destroy(self, key: KeyId, *, actor: str, due: bool = False) -> KeyDescription:
        """Destroy all material of a key; destroying what is gone succeeds. ``due``: if its waiting time is over. Raises ``KeyUnknown``."""

        def change(old: KeyAttributes) -> KeyAttributes | None:
            if due and not deletion_due(old, self._wall_clock()):
                return None
            return None if old.state is KeyState.DELETED else destroyed(old, self._wall_clock())

        if due:  # whoever scheduled it had consent
            return await self.change(key, change, actor=actor, event="key-destroy")
        return await self.change_by_two(key, change, actor=actor, action="destroy", event="key-destroy")

    async def change_by_two(self, key: KeyId, change: Change, *, actor: str, action: str, event: str) -> KeyDescription:
        """As ``change``, of what the two-person rule is about. Raises ``SecondPersonNeeded`` once the first consent is written."""
        wish = SecondPerson(action, actor, self._wall_clock())
        await self._write_change(key, lambda old: wish.settle(old, change(old)), actor=actor, event=lambda: wish.event(event))
        wish.require(key)
        await self._unload_destroyed(key)
        return await self.describe(key)

    async def change(self, key: KeyId, change: Change, *, actor: str, event: str) -> KeyDescription:
        """Write what ``change`` makes of a key's attributes, unless it makes nothing. It may be called several times, and raise."""
        await self._write_change(key, change, actor=actor, event=lambda: event)
        await self._unload_destroyed(key)
        return await self.describe(key)

    async def _write_change(self, key: KeyId, change: Change, *, actor: str, event: Callable[[], str]) -> None:

        async def attempt() -> None:
            old, row = await self.attributes(key)
            changed = change(old)
            if changed is not None:
                sealed = await self.seal(key, msgspec.structs.replace(changed, revision=old.revision + 1), row)
                await self._escrow.write((sealed,), replaces=(row,), actor=actor, event=event())

        await self.retry(attempt)

    async def label_of(self, key: KeyId) -> str:
        """As the card has sealed it. Raises ``KeyUnknown``."""
        return (await self.attributes(key))[0].label

    async def describe(self, key: KeyId) -> KeyDescription:
        attributes, _ = await self.attributes(key)
        return await self._describe(key, attributes)

    async def list_keys(self, query: KeyQuery) -> KeyListReply:
        """A page of keys, deleted ones too: all in the order of creation, or those that fit."""
        self._require_loaded()
        await self._escrow.require()
        keys, after = await find(self._escrow, query)
        if not query.everything and any(not self._escrow.has(key, 0) for key in keys):
            await self._escrow.refresh()
            keys = [key for key in keys if self._escrow.has(key, 0)]
        await self._escrow.rows([RowName(key, version) for key in keys for version in self._first_and_newest(key)])
        keys = [key for key in keys if not is_alias(await self._escrow.row(key, 0))]
        unseen = [key for key in keys if not self._escrow.sealed(key, 0)]
        for start in range(0, len(unseen), AT_ONCE):
            await asyncio.gather(*(self.attributes(key) for key in unseen[start : start + AT_ONCE]))
        described = [await self.describe(key) for key in keys]
        if not query.everything:
            described = [one for one in described if fits(query, one)]
        return KeyListReply(tuple(described), after)

    async def use(self, key: KeyId, *, version: int | None = None, protects: bool = False) -> KeyUse:
        attributes, _ = await self.attributes(key)
        if protects:
            require_protecting(key, attributes, self._wall_clock())
            if attributes.terms.counted:
                await self._uses.spend(key, 1)
                attributes, _ = await self.attributes(key)
        else:
            require_usable(key, attributes, self._wall_clock())
        wanted = attributes.current_version if version is None else version
        require_version(key, attributes, wanted)
        handle = self._handles.take(Name(key, wanted))
        if handle is None:
            handle = await self._load(key, wanted)
        return KeyUse(key, wanted, attributes.algorithm, handle, attributes.bare)

    async def _reserve(self, key: KeyId, wanted: int) -> int:
        """Uses for this VCM, ``wanted`` or more, committed by the escrow. Raises ``KeyUsesSpent`` or ``StateConflict``."""
        got = 0

        def change(old: KeyAttributes) -> KeyAttributes:
            nonlocal got
            require_protecting(key, old, self._wall_clock())
            limits = [limit for limit in (old.terms.max_uses, old.terms.rotation_uses) if limit]
            new = reserved(key, old, wanted, block_of(min(limits, default=1)))
            got = new.used - old.used
            return new

        attributes, _ = await self.attributes(key)
        if uses_due(attributes):
            await self.rotate(key, actor="schedule", due=True)
        await self._write_change(key, change, actor="", event=lambda: "key-uses-reserved")
        return got

    def hold(self) -> AbstractContextManager[None]:
        return self._handles.hold()

    async def refresh(self) -> None:
        """Somebody else changed the escrow: see what, and unload what is destroyed."""
        await self._escrow.refresh()
        for key in self._handles.of(self._escrow.take_news()):
            with suppress(CipherfleetError):  # a row that is not good is refused when it is used
                await self._unload_destroyed(key)

    async def _unload_destroyed(self, key: KeyId) -> None:
        """Out of the card, too; of a key that was trimmed all of it, as what is left is loaded again when it is used."""
        attributes, _ = await self.attributes(key)
        if is_destroyed(attributes, 1):
            await self._handles.unload((key,))

    async def sweep(self) -> None:
        """Have every row of the escrow checked, beside the service: half of the time at most goes into it.

        Raises what ``Escrow.rows`` raises for one that is not what the log names. One that the card refuses is refused when it is used.
        """
        while not self._escrow.swept:
            began = time.monotonic()
            try:
                rows = [row for row in await self._escrow.sweep_page() if row.version == 0]
                for start in range(0, len(rows), AT_ONCE):
                    await asyncio.gather(*(self._check(row) for row in rows[start : start + AT_ONCE]), return_exceptions=True)
            except ServiceUnavailable:
                await asyncio.sleep(SWEEP_AGAIN_S)
            await asyncio.sleep(time.monotonic() - began)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _require_loaded(self) -> None:
        if self._escrow.seen is None:
            raise ServiceOff("the keys are not loaded yet")

    async def _known(self, key: KeyId) -> None:
        """That the log names this key. Raises ``KeyUnknown``."""
        self._require_loaded()
        await self._escrow.require()
        if not self._escrow.has(key, 0) and not self._escrow.versions(key):
            await self._escrow.refresh()  # another VCM may have made it a moment ago
            if not self._escrow.has(key, 0) and not self._escrow.versions(key):
                raise KeyUnknown(f"there is no key {key}")

    async def attributes(self, key: KeyId) -> tuple[KeyAttributes, EscrowRow]:
        """What is true of a key, after the card has checked that this consumer's CMK sealed it."""
        await self._known(key)
        if not self._escrow.has(key, 0):
            raise EscrowRowTampered(f"key {key} lacks its attributes")
        row = self._escrow.kept(RowName(key, 0))
        if row is None:
            row = (await self._escrow.rows([RowName(key, version) for version in self._first_and_newest(key)]))[0]
        if is_alias(row):
            raise KeyUnknown(f"there is no key {key}")
        attributes = await self._check(row)
        if not isinstance(attributes, KeyAttributes):
            raise EscrowRowTampered(f"key {key} lacks its attributes")
        return attributes, row

    async def alias(self, id_: KeyId) -> tuple[AliasAttributes, EscrowRow]:
        """What is kept under the id of an alias, checked likewise. Raises ``KeyUnknown``."""
        await self._known(id_)
        row = await self._escrow.row(id_, 0)
        attributes = await self._check(row)
        if not isinstance(attributes, AliasAttributes):
            raise EscrowRowTampered(f"row {row.subject} is no alias")
        return attributes, row

    async def _check(self, row: EscrowRow) -> KeyAttributes | AliasAttributes:
        """A key's attributes, once the card has checked them. Raises ``EscrowRowTampered``."""
        attributes, known = _whole_attributes(row), self._revisions.get(row.key, 1)
        if attributes.revision < known:
            raise EscrowRowTampered(f"the attributes of key {row.key} are older than those seen before")
        if not self._escrow.sealed(row.key, 0):
            await self._card.submit(Operation.VERIFY_ATTRIBUTES, parameters=codec.encode(row))
            self._escrow.note_sealed(row)
        if attributes.revision > known:
            self._revisions[row.key] = attributes.revision
        return attributes

    def _first_and_newest(self, key: KeyId) -> tuple[int, ...]:
        """The versions that describe a key: its attributes, and its newest material."""
        return (0, *self._escrow.versions(key)[-1:])

    async def _describe(self, key: KeyId, attributes: KeyAttributes) -> KeyDescription:
        chosen = algorithm(attributes.algorithm)
        public_key, version = b"", attributes.current_version
        there = not is_destroyed(attributes, version)
        if not chosen.secret_key and there:
            if not self._escrow.sealed(key, version):
                await self._load(key, version)  # so the card has checked the public key, too
            public_key = _version_attributes(await self._escrow.row(key, version)).public_key
        current = await self._escrow.row(key, version) if there and self._escrow.has(key, version) else None
        return KeyDescription(
            id=key,
            algorithm=chosen.name,
            version=version,
            state=attributes.state,
            label=attributes.label,
            created_at=attributes.created_at,
            created_by=attributes.created_by,
            uses=tuple(chosen.uses),
            versions=tuple(v for v in self._escrow.versions(key) if not is_destroyed(attributes, v)),
            public_key=public_key,
            imported=current is not None and _version_attributes(current).imported,
            bare=attributes.bare,
            policy=self._policy_says(chosen, attributes, None if current is None else _version_attributes(current)),
            aliases=attributes.aliases,
            tags=attributes.tags,
            delete_at=attributes.delete_at or None,
            terms=attributes.terms,
            used=attributes.used,
            next_rotation_at=next_rotation(attributes),
            consent=attributes.consent if self._wall_clock() < attributes.consent.until else None,
        )

    def _policy_says(self, chosen: Algorithm, attributes: KeyAttributes, version: VersionAttributes | None) -> str:
        age_s, imported = (0.0, False) if version is None else (time.time() - version.created_at, version.imported)
        refused = refusal(self.policy, chosen, bare=attributes.bare, imported=imported, age_s=age_s)
        return f"{self.policy.name}: " + ("allowed" if refused is None else f"refused by rule {refused[0]}: {refused[1]}")

    # -- the card ------------------------------------------------------------------------------------------------------

    async def seal(self, key: KeyId, attributes: KeyAttributes | AliasAttributes, replaces: EscrowRow | None) -> EscrowRow:
        """The row of ``attributes``, good in the place of ``replaces`` and nowhere else."""
        attributes = msgspec.structs.replace(attributes, previous=b"" if replaces is None else row_digest(replaces))
        request = RowRequest(key, 0, codec.encode(attributes))
        done = await self._card.submit(Operation.SEAL_ATTRIBUTES, parameters=codec.encode(request))
        return codec.decode(done.parameters, EscrowRow)

    async def _write_version(
        self,
        key: KeyId,
        attributes: KeyAttributes,
        replaces: EscrowRow | None,
        now: float,
        actor: str,
        event: str,
        imported: Imported | None = None,
    ) -> None:
        """Make the current version of ``attributes`` in the card (or open what is ``imported`` there), and store it with them."""
        version = attributes.current_version
        made = await self._make(key, attributes, now, imported)
        try:
            sealed = await self.seal(key, attributes, replaces)
            material = codec.decode(made.parameters, EscrowRow)
            await self._escrow.write((material, sealed), replaces=(None, replaces), actor=actor, event=event)
        except BaseException:
            await self._handles.drop(made.value)
            raise
        self._handles.adopt(Name(key, version), made.value)
        for row in (material, sealed):
            self._escrow.note_sealed(row)

    async def _make(self, key: KeyId, attributes: KeyAttributes, now: float, imported: Imported | None) -> Completion:
        """The current version of ``attributes``, made or opened in the card. Raises what the card says."""
        terms = attributes.terms
        of_version = VersionAttributes(
            attributes.algorithm, now, bare=attributes.bare, not_after=terms.not_after, exportable=terms.exportable
        )
        request = RowRequest(key, attributes.current_version, codec.encode(of_version))
        if imported is None:
            return await self._handles.submit(Operation.GENERATE, codec.encode(request))
        if isinstance(imported, Derivation):
            return await self._handles.submit(Operation.DERIVE_KEY, codec.encode(DeriveKeyRequest(request, *imported)))
        if isinstance(imported, tuple):
            return await self._handles.submit(Operation.IMPORT_WRAPPED, codec.encode(ImportWrappedRequest(request, *imported)))
        return await self._handles.submit(Operation.IMPORT, codec.encode(ImportRequest(request, imported)))

    async def _load(self, key: KeyId, version: int) -> int:
        """The handle of a version. Raises ``KeyUnknown``, ``EscrowRowTampered`` or ``EscrowRowForeign``."""
        await self._known(key)
        if version <= 0:
            raise KeyUnknown(f"key {key} has no version {version}")
        if not self._escrow.has(key, version):
            await self._escrow.refresh()  # another VCM may have rotated it a moment ago
        row = await self._escrow.row(key, version)
        handle = await self._handles.load(Name(key, version), codec.encode(row))
        self._escrow.note_sealed(row)
        return handle

    async def retry(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Again with what is there now, when somebody else changed it first: a few times, as who hurries meets others who do."""
        for _ in range(ATTEMPTS - 1):
            try:
                return await attempt()
            except StateConflict:
                await self._escrow.refresh()
        return await attempt()


def _first_attributes(name: str, label: str, actor: str, bare: bool) -> KeyAttributes:
    """Of a new key. Raises ``AlgorithmUnknown`` or ``WrongKeyType``."""
    chosen = algorithm(name)
    if chosen.kind is Kind.DIGEST:
        raise WrongKeyType(f"{chosen.name} is a digest, it has no keys")
    return KeyAttributes(chosen.name, KeyState.ENABLED, 1, 1, time.time(), label, actor, bare=bare or chosen.bare_only)


def _whole_attributes(row: EscrowRow) -> KeyAttributes | AliasAttributes:
    attributes = decode_attributes(row)
    if isinstance(attributes, VersionAttributes):
        raise EscrowRowTampered(f"key {row.key} lacks its attributes")
    return attributes


def _version_attributes(row: EscrowRow) -> VersionAttributes:
    attributes = decode_attributes(row)
    if not isinstance(attributes, VersionAttributes):
        raise EscrowRowTampered(f"row {row.subject} lacks its attributes")
    return attributes
