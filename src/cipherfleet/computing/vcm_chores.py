"""What falls due: keys to destroy, keys to rotate. Every VCM that serves looks; of two that act at once, the second finds it done."""

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from cipherfleet.computing.vcm_keys import Keys
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.key_life import DUE, deletion_due, rotation_due
from cipherfleet.contract.vcm_api import MAX_KEYS_AT_ONCE, KeyQuery

log = logging.getLogger(__name__)

ACTOR = "schedule"


class Chores:
    """``every_s``: seconds between two looks. A key past its time is refused in between, whether or not anybody has looked."""

    def __init__(self, keys: Keys, every_s: float, wall_clock: Callable[[], float] = time.time) -> None:
        self._keys, self._every_s, self._wall_clock = keys, every_s, wall_clock

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.look()
            except CipherfleetError as exc:
                log.info("what falls due: %s", exc.code)
            await asyncio.sleep(self._every_s)

    async def look(self) -> None:
        """Once, at all that the KMC's index knows of. Raises what ``Keys`` raises for the index; one key does not hinder the others."""
        query = KeyQuery(terms=(DUE,), limit=MAX_KEYS_AT_ONCE)
        while True:
            page = await self._keys.list_keys(query)
            for key in page.keys:
                try:
                    await self._do(key.id)
                except CipherfleetError as exc:
                    log.warning("a key that is due: %s", exc.code)
            if not page.next:
                return
            query = msgspec.structs.replace(query, after=page.next)

    async def _do(self, key: KeyId) -> None:
        attributes, _ = await self._keys.attributes(key)
        now = self._wall_clock()
        if deletion_due(attributes, now):
            await self._keys.destroy(key, actor=ACTOR, due=True)
        elif rotation_due(attributes, now):
            await self._keys.rotate(key, actor=ACTOR, due=True)
