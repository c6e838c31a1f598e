"""A machine's crypto card: always one that runs and is certified, as soon as the KMC can be reached."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from cipherfleet.channel.client import Caller
from cipherfleet.computing.card_handle import CardHandle, CardStatus
from cipherfleet.contract.errors import CardUnavailable, CipherfleetError
from cipherfleet.contract.ids import MachineId
from cipherfleet.contract.kmc_api import CardReply, CardRequest
from cipherfleet.contract.settings import Settings

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
KMC_TIMEOUT_S = 5.0
STATUS_S = 0.5


class CardKeeper:
    """``on_lost`` is awaited when a card's process died, before the next one is started."""

    def __init__(
        self, machine: MachineId, kmc: Caller, settings: Settings, *, logs: Path, run_folder: str, on_lost: Callable[[], Awaitable[None]]
    ) -> None:
        self._machine, self._kmc, self._settings, self._logs, self._run_folder = machine, kmc, settings, logs, run_folder
        self._on_lost = on_lost
        self._certified: tuple[CardHandle, bytes] | None = None
        self._status: CardStatus | None = None

    @property
    def card(self) -> tuple[CardHandle, bytes]:
        """The certified card, and the KMC's signing key. Raises ``CardUnavailable``."""
        if self._certified is None:
            raise CardUnavailable(f"the crypto card of {self._machine} is not ready", "the machine needs the KMC to certify its card")
        return self._certified

    async def status(self) -> CardStatus | None:
        """Of the certified card; as it was when last heard, if it does not answer at once. None when there is no card."""
        if self._certified is None:
            return None
        with suppress(CipherfleetError, TimeoutError):
            async with asyncio.timeout(STATUS_S):
                self._status = await self._certified[0].status()
        return self._status

    async def run(self) -> None:
        """Until it is cancelled; the card ends then."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                card = await CardHandle.start(self._machine, self._logs, self._settings, self._run_folder)
            except CipherfleetError as exc:
                log.error("the card did not start: %s: %s", exc.code, exc.message)  # noqa: TRY400
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            pause = FIRST_PAUSE_S
            certifying = asyncio.create_task(self._certify(card))
            try:
                await card.wait()
                log.error("the card %s is gone", card.id)
            finally:
                certifying.cancel()
                await asyncio.gather(certifying, return_exceptions=True)
                self._certified = self._status = None
                await card.stop()
            await self._on_lost()

    async def _certify(self, card: CardHandle) -> None:
        """Again and again until the KMC did it."""
        pause = FIRST_PAUSE_S
        request = CardRequest(card.id, card.csr, card.hpke_public_key)
        while True:
            try:
                reply = await self._kmc.call("POST", "/v1/cards", request, reply=CardReply, timeout=KMC_TIMEOUT_S)
                await card.certify(reply)
            except CipherfleetError as exc:
                log.warning("the card %s is not certified yet: %s: %s", card.id, exc.code, exc.message)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._certified = card, reply.kmc_signing_key
                return
