"""What becomes of a key after it was made: names, tags, scheduled deletion, destruction, trimming.

Everything is one write of sealed rows, all or none of them, each in the place of the row that was read before: of two VCMs that
change the same key or alias at once, one begins again.
"""

import time
from collections.abc import Callable, Sequence

import msgspec

from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.computing.vcm_keys import Keys
from cipherfleet.contract.errors import AliasUnknown, EscrowRowTampered, KeyUnknown, Malformed
from cipherfleet.contract.escrow import AliasAttributes, EscrowRow, KeyAttributes, KeyState, alias_id
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.key_life import (
    ALIASED,
    DAY_S,
    KeyUpdate,
    cancelled,
    check_alias,
    require_alive,
    require_there,
    scheduled,
    trimmed,
    updated,
    with_alias,
    without_alias,
)
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.vcm_api import MAX_KEYS_AT_ONCE, AliasEntry, KeyDescription, KeyQuery, ReceiptReply


class KeyLife:
    """Implements ``contract.vcm.KeyLife``."""

    def __init__(
        self,
        keys: Keys,
        escrow: Escrow,
        settings: Settings,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys, self._escrow, self._settings, self._wall_clock = keys, escrow, settings, wall_clock

    # -- names and tags ------------------------------------------------------------------------------------------------

    async def update(self, key: KeyId, change: KeyUpdate, *, actor: str) -> KeyDescription:
        """Label and tags. Raises ``Malformed``, ``TooLarge``, ``LimitReached``, ``KeyDeleted`` or ``KeyPendingDeletion``."""

        def decide(old: KeyAttributes) -> KeyAttributes | None:
            require_alive(key, old, self._wall_clock())
            new = updated(old, change, most_tags=self._settings.tags_per_key)
            return None if new == old else new

        return await self._keys.change(key, decide, actor=actor, event="key-update")

    async def resolve(self, name: str) -> KeyId:
        """Which key an alias is for. Raises ``AliasUnknown`` after it has looked at the escrow again."""
        target = (await self._alias(name))[0]
        if target is None:
            raise AliasUnknown(f"no alias is called {name!r}")
        return target

    async def set_alias(self, name: str, key: KeyId, *, actor: str) -> KeyDescription:
        """Make an alias, or move it to another key. Raises ``Malformed``, ``LimitReached``, ``KeyDeleted`` or ``KeyPendingDeletion``."""
        check_alias(name)

        async def attempt() -> None:
            before, kept, row = await self._alias(name)
            new, new_row = await self._keys.attributes(key)
            require_alive(key, new, self._wall_clock())
            if before == key:
                return
            named = with_alias(new, name, most=self._settings.aliases_per_key)
            changed: list[tuple[KeyId, KeyAttributes | AliasAttributes, EscrowRow | None]] = [(key, named, new_row)]
            if before is not None:
                old, old_row = await self._keys.attributes(before)
                changed.append((before, without_alias(old, name), old_row))
            changed.append((alias_id(name), AliasAttributes(name, key, 0 if kept is None else kept.revision), row))
            await self._write(changed, actor=actor, event="alias-set")

        await self._keys.retry(attempt)
        return await self._keys.describe(key)

    async def delete_alias(self, name: str, *, actor: str) -> None:
        """The key stays. Deleting what is gone succeeds."""

        async def attempt() -> None:
            target, kept, row = await self._alias(name)
            if target is None or kept is None:
                return
            old, old_row = await self._keys.attributes(target)
            changed: list[tuple[KeyId, KeyAttributes | AliasAttributes, EscrowRow | None]] = [
                (target, without_alias(old, name), old_row),
                (alias_id(name), AliasAttributes(name, "", kept.revision), row),
            ]
            await self._write(changed, actor=actor, event="alias-delete")

        await self._keys.retry(attempt)

    async def list_aliases(self) -> Sequence[AliasEntry]:
        """The consumer's, by name: each is checked, but the KMC's index could leave one out."""
        found: list[AliasEntry] = []
        query = KeyQuery(terms=(ALIASED,), limit=MAX_KEYS_AT_ONCE)
        while True:
            page = await self._keys.list_keys(query)
            found += [AliasEntry(name, key.id) for key in page.keys for name in key.aliases]
            if not page.next:
                return sorted(found, key=lambda entry: entry.name)
            query = msgspec.structs.replace(query, after=page.next)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def schedule_deletion(self, key: KeyId, days: float | None, *, actor: str) -> KeyDescription:
        """Refuse every use from now on, and destroy the key in ``days`` (default and bounds are settings); a second schedule counts.

        Raises ``Malformed`` or ``KeyDeleted``.
        """
        least, most = self._settings.deletion_days_min, self._settings.deletion_days
        chosen = float(most) if days is None else days
        if not least <= chosen <= max(most, least):
            raise Malformed(f"a key waits {least} to {most} days for its deletion")

        def decide(old: KeyAttributes) -> KeyAttributes:
            now = self._wall_clock()
            require_there(key, old, now)
            return scheduled(old, now + chosen * DAY_S)

        event = "key-schedule-deletion"
        return await self._keys.change_by_two(key, decide, actor=actor, action="schedule-deletion", event=event)

    async def receipt(self, key: KeyId) -> ReceiptReply:
        """Raises ``KeyUnknown``, or ``StateConflict`` when nothing of the key was destroyed."""
        await self._keys.attributes(key)
        return await self._escrow.receipt(key)

    async def trim(self, key: KeyId, before: int, *, actor: str) -> KeyDescription:
        """Destroy the versions below ``before``. Raises ``Malformed``, ``KeyDeleted`` or ``KeyPendingDeletion``."""

        def decide(old: KeyAttributes) -> KeyAttributes | None:
            return trimmed(key, old, before, self._wall_clock())

        return await self._keys.change_by_two(key, decide, actor=actor, action=f"trim:{before}", event="key-trim")

    async def cancel_deletion(self, key: KeyId, *, actor: str) -> KeyDescription:
        """The key is disabled then. Raises ``KeyDeleted``; a key whose deletion is not scheduled stays as it is."""

        def decide(old: KeyAttributes) -> KeyAttributes | None:
            require_there(key, old, self._wall_clock())
            return cancelled(old) if old.state is KeyState.PENDING_DELETION else None

        return await self._keys.change(key, decide, actor=actor, event="key-cancel-deletion")

    # -- aliases -------------------------------------------------------------------------------------------------------

    async def _alias(self, name: str) -> tuple[KeyId | None, AliasAttributes | None, EscrowRow | None]:
        """The key that an alias is for, if there is one, and what is kept of the alias."""
        try:
            kept, row = await self._keys.alias(alias_id(check_alias(name)))
        except KeyUnknown:
            return None, None, None
        if kept.name != name:
            raise EscrowRowTampered(f"the alias {name} is kept under the name of another")
        return await self._target(kept), kept, row

    async def _target(self, kept: AliasAttributes) -> KeyId | None:
        """The key, if it knows of the alias: one that was destroyed does not."""
        if not kept.target:
            return None
        attributes, _ = await self._keys.attributes(KeyId(kept.target))
        return KeyId(kept.target) if kept.name in attributes.aliases else None

    async def _write(
        self, changed: Sequence[tuple[KeyId, KeyAttributes | AliasAttributes, EscrowRow | None]], *, actor: str, event: str
    ) -> None:
        sealed = [
            await self._keys.seal(key, msgspec.structs.replace(attributes, revision=attributes.revision + 1), row)
            for key, attributes, row in changed
        ]
        await self._escrow.write(sealed, replaces=[row for _, _, row in changed], actor=actor, event=event)
