"""The consumer's keys as one VCM serves them: rows from the escrow, handles in the card, and no key material here.

Every change is made in the card, committed by the escrow, and only then visible and acknowledged.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec

from cipherfleet.channel import codec
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.contract.algorithms import Kind, algorithm
from cipherfleet.contract.errors import (
    CipherfleetError,
    EscrowRowTampered,
    KeyDeleted,
    KeyDisabled,
    KeyUnknown,
    ServiceOff,
    ServiceUnavailable,
    StateConflict,
    WrongKeyType,
)
from cipherfleet.contract.escrow import EscrowRow, KeyAttributes, KeyState, RowName, VersionAttributes, decode_attributes, row_digest
from cipherfleet.contract.ids import KeyId, new_key_id
from cipherfleet.contract.vcc import ImportRequest, Operation, RowRequest, VirtualCryptoCard
from cipherfleet.contract.vcm import KeyUse
from cipherfleet.contract.vcm_api import KeyDescription

_EVENTS = {KeyState.ENABLED: "key-enable", KeyState.DISABLED: "key-disable", KeyState.DELETED: "key-delete"}

SWEEP_AGAIN_S = 1.0


class Keys:
    """Implements ``contract.vcm.KeyStore``."""

    def __init__(self, escrow: Escrow, card: VirtualCryptoCard) -> None:
        self._escrow, self._card = escrow, card
        self._checked: dict[KeyId, tuple[EscrowRow, KeyAttributes]] = {}
        self._handles: dict[tuple[KeyId, int], int] = {}
        self._loading = asyncio.Lock()

    # -- the port ------------------------------------------------------------------------------------------------------

    async def create(self, name: str, *, label: str, actor: str, bare: bool = False) -> KeyDescription:
        """A new key. Raises ``AlgorithmUnknown``, ``WrongKeyType``, ``KmcUnavailable`` or what the card says."""
        return await self._create(name, None, label, actor, "key-create", bare)

    async def import_key(self, name: str, sealed: bytes, *, label: str, actor: str, bare: bool = False) -> KeyDescription:
        """A new key of material that was sealed to this card. Raises as ``create``, ``SealedForeign`` or ``KeyMaterialInvalid``."""
        return await self._create(name, sealed, label, actor, "key-import", bare)

    async def _create(self, name: str, sealed: bytes | None, label: str, actor: str, event: str, bare: bool) -> KeyDescription:
        self._require_loaded()
        await self._escrow.require()
        chosen = algorithm(name)
        if chosen.kind is Kind.DIGEST:
            raise WrongKeyType(f"{chosen.name} is a digest, it has no keys")
        key, now = new_key_id(), time.time()
        attributes = KeyAttributes(chosen.name, KeyState.ENABLED, 1, 1, now, label, actor, bare=bare or chosen.bare_only)
        await self._write_version(key, attributes, None, now, actor, event, sealed)
        return await self.describe(key)

    async def rotate(self, key: KeyId, *, actor: str) -> KeyDescription:
        """A new current version; the old ones go on decrypting. Raises ``KeyUnknown``, ``KeyDisabled``, ``KeyDeleted``."""

        async def attempt() -> None:
            old, row = await self._attributes(key)
            _require_enabled(key, old)
            changed = msgspec.structs.replace(old, current_version=old.current_version + 1, revision=old.revision + 1)
            await self._write_version(key, changed, row, time.time(), actor, "key-rotate")

        await self._retry(attempt)
        return await self.describe(key)

    async def set_state(self, key: KeyId, state: KeyState, *, actor: str) -> KeyDescription:
        """Enable, disable or delete; the state that a key is in already is well. Raises ``KeyUnknown`` or ``KeyDeleted``."""

        async def attempt() -> None:
            old, row = await self._attributes(key)
            if old.state is state:
                return
            if old.state is KeyState.DELETED:
                raise KeyDeleted(f"key {key} is deleted")
            changed = msgspec.structs.replace(old, state=state, revision=old.revision + 1)
            sealed = await self._seal(key, changed, row)
            await self._escrow.write((sealed,), replaces=(row,), actor=actor, event=_EVENTS[state])

        await self._retry(attempt)
        if state is KeyState.DELETED:
            await self._unload(key)
        return await self.describe(key)

    async def describe(self, key: KeyId) -> KeyDescription:
        attributes, _ = await self._attributes(key)
        return await self._describe(key, attributes)

    async def list_keys(self) -> Sequence[KeyDescription]:
        """All keys, deleted ones too, oldest first."""
        self._require_loaded()
        await self._escrow.require()
        return [await self.describe(key) for key in self._escrow.keys_from(0, self._escrow.keys)]

    async def use(self, key: KeyId, *, version: int | None = None) -> KeyUse:
        attributes, _ = await self._attributes(key)
        _require_enabled(key, attributes)
        wanted = attributes.current_version if version is None else version
        handle = self._handles.get((key, wanted))
        if handle is None:
            handle = await self._load(key, wanted)
        return KeyUse(key, wanted, attributes.algorithm, handle, attributes.bare)

    async def refresh(self) -> None:
        """Somebody else changed the escrow: see what, and unload what is deleted."""
        await self._escrow.refresh()
        for key in self._escrow.take_news() & {key for key, _ in self._handles}:
            with suppress(CipherfleetError):  # a row that is not good is refused when it is used
                attributes, _ = await self._attributes(key)
                if attributes.state is KeyState.DELETED:
                    await self._unload(key)

    async def sweep(self) -> None:
        """Have every row of the escrow checked, beside the service: half of the time at most goes into it.

        Raises what ``Escrow.rows`` raises for one that is not what the log names.
        """
        while not self._escrow.swept:
            began = time.monotonic()
            try:
                await self._escrow.sweep_page()
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

    async def _attributes(self, key: KeyId) -> tuple[KeyAttributes, EscrowRow]:
        """What is true of a key, after the card has checked that this consumer's CMK sealed it."""
        await self._known(key)
        if not self._escrow.has(key, 0):
            raise EscrowRowTampered(f"key {key} lacks its attributes")
        newest = self._escrow.versions(key)[-1:]
        row = (await self._escrow.rows((RowName(key, 0), *(RowName(key, version) for version in newest))))[0]
        known = self._checked.get(key)
        if known is not None and known[0] == row:
            return known[1], row
        await self._card.submit(Operation.VERIFY_ATTRIBUTES, parameters=codec.encode(row))
        attributes = _key_attributes(row)
        if known is not None and attributes.revision < known[1].revision:
            raise EscrowRowTampered(f"the attributes of key {key} are older than those seen before")
        self._checked[key] = row, attributes
        return attributes, row

    async def _describe(self, key: KeyId, attributes: KeyAttributes) -> KeyDescription:
        chosen = algorithm(attributes.algorithm)
        public_key, version = b"", attributes.current_version
        if not chosen.secret_key and attributes.state is not KeyState.DELETED:
            if (key, version) not in self._handles:
                await self._load(key, version)  # so the card has checked the public key, too
            public_key = _version_attributes(await self._escrow.row(key, version)).public_key
        current = await self._escrow.row(key, version) if self._escrow.has(key, version) else None
        return KeyDescription(
            id=key,
            algorithm=chosen.name,
            version=version,
            state=attributes.state,
            label=attributes.label,
            created_at=attributes.created_at,
            created_by=attributes.created_by,
            uses=tuple(chosen.uses),
            versions=self._escrow.versions(key),
            public_key=public_key,
            imported=current is not None and _version_attributes(current).imported,
            bare=attributes.bare,
        )

    # -- the card ------------------------------------------------------------------------------------------------------

    async def _seal(self, key: KeyId, attributes: KeyAttributes, replaces: EscrowRow | None) -> EscrowRow:
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
        imported: bytes | None = None,
    ) -> None:
        """Make the current version of ``attributes`` in the card (or open what is ``imported`` there), and store it with them."""
        version = attributes.current_version
        request = RowRequest(key, version, codec.encode(VersionAttributes(attributes.algorithm, now, bare=attributes.bare)))
        if imported is None:
            made = await self._card.submit(Operation.GENERATE, parameters=codec.encode(request))
        else:
            made = await self._card.submit(Operation.IMPORT, parameters=codec.encode(ImportRequest(request, imported)))
        try:
            sealed = await self._seal(key, attributes, replaces)
            material = codec.decode(made.parameters, EscrowRow)
            await self._escrow.write((material, sealed), replaces=(None, replaces), actor=actor, event=event)
        except BaseException:
            with suppress(CipherfleetError):
                await asyncio.shield(self._card.submit(Operation.UNLOAD, handle=made.value))
            raise
        self._handles[key, version] = made.value
        self._checked[key] = sealed, _key_attributes(sealed)

    async def _load(self, key: KeyId, version: int) -> int:
        """The handle of a version. Raises ``KeyUnknown``, ``EscrowRowTampered`` or ``EscrowRowForeign``."""
        async with self._loading:
            handle = self._handles.get((key, version))
            if handle is None:
                await self._known(key)
                if version > 0 and not self._escrow.has(key, version):
                    await self._escrow.refresh()  # another VCM may have rotated it a moment ago
                if version <= 0:
                    raise KeyUnknown(f"key {key} has no version {version}")
                row = await self._escrow.row(key, version)
                done = await self._card.submit(Operation.LOAD, parameters=codec.encode(row))
                handle = self._handles[key, version] = done.value
            return handle

    async def _unload(self, key: KeyId) -> None:
        async with self._loading:
            for name in [name for name in self._handles if name[0] == key]:
                with suppress(CipherfleetError):
                    await self._card.submit(Operation.UNLOAD, handle=self._handles.pop(name))

    async def _retry(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Once more with what is there now, when somebody else changed it first."""
        try:
            await attempt()
        except StateConflict:
            await self._escrow.refresh()
            await attempt()


def _require_enabled(key: KeyId, attributes: KeyAttributes) -> None:
    if attributes.state is KeyState.DELETED:
        raise KeyDeleted(f"key {key} is deleted")
    if attributes.state is KeyState.DISABLED:
        raise KeyDisabled(f"key {key} is disabled")


def _key_attributes(row: EscrowRow) -> KeyAttributes:
    attributes = decode_attributes(row)
    if not isinstance(attributes, KeyAttributes):
        raise EscrowRowTampered(f"key {row.key} lacks its attributes")
    return attributes


def _version_attributes(row: EscrowRow) -> VersionAttributes:
    attributes = decode_attributes(row)
    if not isinstance(attributes, VersionAttributes):
        raise EscrowRowTampered(f"row {row.subject} lacks its attributes")
    return attributes
