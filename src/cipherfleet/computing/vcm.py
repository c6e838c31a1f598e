"""The virtual cipher machine: one consumer's, for as long as its lease lives.

It serves its components (``VcmHost``), and ends as soon as service is off: connections are cut and the listening socket is
closed at once, in the same turn of the loop that learns of it.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from cipherfleet.channel.server import Server
from cipherfleet.computing.vcm_chores import Chores
from cipherfleet.computing.vcm_data_audit import DataAudit
from cipherfleet.computing.vcm_escrow import Escrow, Kmc
from cipherfleet.computing.vcm_grants import Grants, Logins
from cipherfleet.computing.vcm_key_life import KeyLife
from cipherfleet.computing.vcm_keys import Keys
from cipherfleet.computing.vcm_transfer import Transfer
from cipherfleet.contract.audit import AuditLog, AuditQuery, KeyUsage
from cipherfleet.contract.errors import CardUnavailable, ForeignConsumer, LeaseExpired, NotPermitted, ServiceOff
from cipherfleet.contract.identities import Peer, Role
from cipherfleet.contract.ids import CardId, ConsumerId, KeyId, VcmId
from cipherfleet.contract.settings import Settings
from cipherfleet.contract.statements import Right, Signed
from cipherfleet.contract.vcc import Completion, Operation, VirtualCryptoCard
from cipherfleet.contract.vcm_api import Delegation, DelegationsReply, LoginReply

log = logging.getLogger(__name__)


class Ending(msgspec.Struct, frozen=True):
    """Why a VCM ended; ``code`` is empty when it was told to."""

    code: str
    message: str


class WatchedCard:
    """The vCC; once it says that the lease has ended, or that the card is gone, so it is for the whole VCM."""

    def __init__(self, card: VirtualCryptoCard, end: Callable[[str, str], None]) -> None:
        self._card, self._end = card, end

    async def submit(
        self, operation: Operation, *, handle: int = 0, parameters: bytes = b"", data: bytes | bytearray | memoryview = b""
    ) -> Completion:
        try:
            return await self._card.submit(operation, handle=handle, parameters=parameters, data=data)
        except (LeaseExpired, CardUnavailable) as exc:
            self._end(exc.code, exc.message)
            raise


class Vcm:
    """Implements ``contract.vcm.VcmHost``."""

    def __init__(
        self,
        id_: VcmId,
        consumer: ConsumerId,
        card_id: CardId,
        address: str,
        card: VirtualCryptoCard,
        kmc: Kmc,
        kmc_signing_key: bytes,
        settings: Settings,
    ) -> None:
        self._id, self._consumer, self._card_id, self._address = id_, consumer, card_id, address
        self._kmc = kmc
        self._card = WatchedCard(card, self.end)
        self.escrow = Escrow(consumer, kmc, kmc_signing_key)
        self._keys = Keys(self.escrow, self._card, most_tags=settings.tags_per_key)
        self.data_audit = DataAudit(kmc, settings)
        self.chores = Chores(self._keys, settings.chores_s)
        self._transfer = Transfer(self._keys, self._card, settings)
        self._key_life = KeyLife(self._keys, self.escrow, settings)
        self._grants = Grants(consumer, self.escrow, self._card, label_of=self._label_of)
        self._logins = Logins(id_, consumer, self._card)
        self._doors: tuple[Server, socket.socket] | None = None
        self.serving = False
        self.remaining: Callable[[], float] = lambda: 0.0  # seconds that the lease in force lasts
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    # -- the port ------------------------------------------------------------------------------------------------------

    @property
    def id(self) -> VcmId:
        return self._id

    @property
    def consumer(self) -> ConsumerId:
        return self._consumer

    @property
    def card_id(self) -> CardId:
        return self._card_id

    @property
    def card(self) -> VirtualCryptoCard:
        return self._card

    @property
    def keys(self) -> Keys:
        return self._keys

    @property
    def transfer(self) -> Transfer:
        return self._transfer

    @property
    def key_life(self) -> KeyLife:
        return self._key_life

    async def authorise(self, peer: Peer, right: Right) -> None:
        self._require_serving()
        await self._grants.authorise(peer, right)

    async def may_some(self, peer: Peer, right: Right) -> bool:
        self._require_serving()
        return await self._grants.may_some(peer, right)

    async def authorise_key(self, peer: Peer, right: Right, key: KeyId, context: bytes) -> None:
        self._require_serving()
        await self._grants.authorise_key(peer, right, key, context)

    def note_use(self, peer: Peer, operation: str, key: str, version: int, outcome: str) -> None:
        self.data_audit.note(peer.identity.id, operation, key, version, outcome)

    async def ask_use(self, peer: Peer, *uses: tuple[str, str, int]) -> None:
        await self.data_audit.ask(peer.identity.id, *uses)

    async def usage(self, key: KeyId) -> KeyUsage:
        return await self._kmc.call("GET", f"/v1/usage/{key}", reply=KeyUsage)

    async def _label_of(self, key: KeyId) -> str:
        return await self._keys.label_of(key)

    async def delegate(self, peer: Peer, key: KeyId, statement: Signed) -> Delegation:
        self._require_serving()
        return await self._grants.delegate(peer, key, statement)

    async def delegations(self, peer: Peer, key: KeyId) -> DelegationsReply:
        self._require_serving()
        return await self._grants.delegations(peer, key)

    async def login(self, peer: Peer, statement: Signed) -> LoginReply:
        self._require_serving()
        confirmation = await self._logins.login(peer, statement)
        return LoginReply(self._id, self._card_id, confirmation, self.remaining())

    async def endpoints(self) -> Sequence[str]:
        return (f"https://{self._address}",)

    async def audit(self, query: AuditQuery) -> AuditLog:
        return await self._kmc.call("GET", query.path, reply=AuditLog)

    # -- its doors -----------------------------------------------------------------------------------------------------

    def check_peer(self, peer: Peer) -> None:
        """For ``Server``: who may call at all. Raises ``ForeignConsumer`` or ``NotPermitted``."""
        if peer.identity.consumer != self._consumer:
            raise ForeignConsumer(f"{peer.identity.uri} is of another consumer")
        if peer.identity.role not in (Role.APPLICATION, Role.TERMINAL):
            raise NotPermitted(f"a {peer.identity.role} has no business here")

    def opened(self, server: Server, listening: socket.socket) -> None:
        """What to close when this ends."""
        self._doors = server, listening

    def end(self, code: str, message: str) -> None:
        """Service is off, now. The first reason counts."""
        if self.ended.done():
            return
        self.serving = False
        self.ended.set_result(Ending(code, message))
        log.info("%s ends: %s %s", self._id, code, message)
        if self._doors is not None:
            server, listening = self._doors
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # whoever else holds it: nobody is let in any more
            server.stop_listening()
            server.close_connections()

    def _require_serving(self) -> None:
        if self.ended.done():
            raise ServiceOff(f"{self._id} has ended")
        if not self.serving:
            raise ServiceOff(f"{self._id} waits for the consumer's keys and a lease")
