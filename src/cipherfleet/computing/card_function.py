"""One virtual function of a card: everything that the card holds for one vCC, and every operation on it.

Sans-IO: ``execute`` takes a request apart and answers it. Nothing of one function is reachable from another. Every operation
on keys happens under a lease that is checked before and after it; what came out under a lease that ended meanwhile is thrown away.
"""

import hmac
import logging
import time
from collections.abc import Callable
from typing import Any

from cipherfleet.channel import codec
from cipherfleet.computing import card_chain, engine_wrap
from cipherfleet.computing.card_chain import KeyChain
from cipherfleet.computing.card_data import DataOperations
from cipherfleet.computing.card_keys import KeyOperations, Permit
from cipherfleet.computing.card_lease import Lease, boottime
from cipherfleet.computing.card_request import Answer, Request, Work, destroy, parameters
from cipherfleet.computing.card_tables import KeyTable, StreamTable
from cipherfleet.computing.engine_memory import Data, no_pause
from cipherfleet.contract.errors import (
    CmkInvalid,
    ForeignConsumer,
    LeaseExpired,
    Malformed,
    ServiceOff,
    StatementForged,
    Unsupported,
)
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.kmc_api import CardReply
from cipherfleet.contract.statements import ApplicationStatement, LoginStatement, Signed
from cipherfleet.contract.vcc import (
    CardDescription,
    CmkDelivery,
    Operation,
)

WAITING_S = 30.0
"""A CMK that no lease follows is dropped again after this time."""

log = logging.getLogger(__name__)


class VirtualFunction:
    """The card's side of one vCC, for one VCM of one consumer."""

    def __init__(
        self,
        card: CardId,
        vcm: VcmId,
        consumer: ConsumerId,
        transport: engine_wrap.TransportKeys,
        certified: Callable[[], CardReply | None],
        clock: Callable[[], float] = boottime,
        deliveries: card_chain.Deliveries | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.card, self.vcm, self.consumer = card, vcm, consumer
        self.operations = self.bytes = 0
        self._transport, self._certified, self._clock = transport, certified, clock
        self._lease = Lease(consumer, card, vcm, clock)
        self._chain: KeyChain | None = None
        self._fingerprint = b""  # of the one CMK that this vCC takes in its life
        self._deliveries = deliveries or card_chain.Deliveries()
        self._waits_until = 0.0
        self._ended = False
        self._newest_point = (-1, -1)
        self._life = 0
        self._keys, self._streams = KeyTable(), StreamTable()
        self._without_lease: dict[int, Callable[[Request], Answer]] = {
            Operation.NULL: lambda _: Answer(),
            Operation.DESCRIBE: self._describe,
            Operation.LOAD_CMK: self._load_cmk,
            Operation.LEASE_NONCE: lambda _: Answer(data=self._lease.nonce()),
            Operation.LEASE: self._take_lease,
            Operation.DROP: self._drop,
            Operation.TRANSPORT: self._show_transport,
        }
        self.permit = Permit(self._lease, wall_clock)
        keys = KeyOperations((consumer, card, vcm), transport, self._require_chain, self.permit, self._keys, self._streams)
        data = DataOperations(self.permit, self._keys, self._streams)
        self._under_lease: dict[int, Callable[[Request], Answer | Work]] = {
            Operation.CONFIRM: self._confirm,
            Operation.VERIFY_STATEMENT: self._verify_statement,
            **keys.operations,
            **data.operations,
        }

    @property
    def keys(self) -> int:
        """How many keys are loaded."""
        return len(self._keys)

    def limit_keys(self, most: int) -> None:
        """From now on; what is loaded stays."""
        self._keys.most = most

    @property
    def serving(self) -> bool:
        return self._chain is not None and self._lease.serving

    @property
    def deadline(self) -> float | None:
        """When ``tick`` has something to do, by the card's clock."""
        if self._chain is None:
            return None
        return self._waits_until if self._lease.expires_at is None else self._lease.expires_at

    def tick(self) -> None:
        """Drop everything if its time is over."""
        deadline = self.deadline
        if deadline is not None and self._clock() >= deadline:
            ended = self._lease.expires_at is not None
            self.drop()
            self._ended = ended

    def drop(self) -> None:
        """Zeroise all keys, end all streams, forget the lease. What a thread is at, it ends; its result is thrown away."""
        self._life += 1
        self._streams.clear()
        self._keys.clear()
        if self._chain is not None:
            self._chain.close()
            self._chain = None
            until = self._lease.expires_at
            log.info("keys of %s dropped at %.3f, lease until %.3f", self.consumer, self._clock(), until if until is not None else 0.0)
        self._lease.forget()
        self._ended = False

    def execute(self, operation: int, handle: int, parameters: bytes, data: Data, room: memoryview | None = None) -> Answer | Work:
        """Run one operation. Only what may be seen at once is written into ``room``: ciphertext. Raises a ``CipherfleetError``."""
        self.operations += 1
        self.bytes += len(data)
        self.tick()
        request = Request(handle, parameters, data, room)
        free = self._without_lease.get(operation)
        if free is not None:
            return free(request)
        run = self._under_lease.get(operation)
        if run is None:
            raise Unsupported(f"a vCC has no operation {operation}")
        self._require_lease()
        answer = run(request)
        return answer._replace(life=self._life) if isinstance(answer, Work) else self._release(answer)

    def complete(self, work: Work, result: Any, error: Exception | None = None) -> Answer:
        """The rest of an operation, after its ``Work`` was done. Takes ``result`` over. Raises ``error``, or why it is thrown away."""
        well = False
        try:
            if error is not None:
                raise error
            self.tick()
            self._require_lease()
            if work.life != self._life:
                raise ServiceOff("the keys were dropped meanwhile")
            answer = work.keep(result)
            well = True
        except BaseException:
            destroy(result)
            raise
        finally:
            work.done(well)
        return self._release(answer)

    def run(self, operation: int, handle: int, parameters: bytes, data: Data, room: memoryview | None = None) -> Answer:
        """``execute``, its work included."""
        answer = self.execute(operation, handle, parameters, data, room)
        if not isinstance(answer, Work):
            return answer
        try:
            result = answer.run(no_pause)
        except Exception as exc:
            return self.complete(answer, None, exc)
        return self.complete(answer, result)

    # -- the lease -----------------------------------------------------------------------------------------------------

    def _require_lease(self) -> KeyChain:
        """Raises ``ServiceOff`` or ``LeaseExpired``."""
        chain = self._require_chain()
        try:
            self._lease.check()
        except LeaseExpired:
            self.tick()
            raise
        return chain

    def _require_chain(self) -> KeyChain:
        if self._chain is not None:
            return self._chain
        if self._ended:
            raise LeaseExpired("the lease has ended and the keys are gone", "the CMK must be released to the card again")
        raise ServiceOff("this card does not hold the consumer's CMK")

    def _release(self, answer: Answer) -> Answer:
        """The answer, if the lease still holds."""
        try:
            self._require_lease()
        except (LeaseExpired, ServiceOff):
            destroy(answer.data)
            raise
        return answer

    def _take_lease(self, request: Request) -> Answer:
        chain = self._require_chain()
        self._require_certified()
        signed = parameters(request, Signed)
        before = self._lease.policy
        state = self._lease.accept(signed, ukey_keys=chain.ukey_keys, kmc_key=chain.kmc_key)
        if self._lease.policy != before:
            self._streams.clear()  # they were begun under another policy
        return Answer(parameters=codec.encode(state))

    def _describe(self, _: Request) -> Answer:
        chain = self._chain
        seen = (*chain.point, chain.head) if chain is not None else (0, 0, b"")
        return Answer(
            parameters=codec.encode(
                CardDescription(
                    self.card,
                    self.vcm,
                    self.consumer,
                    chain is not None,
                    self.serving,
                    *seen,
                    kmc_signing_key=b"" if chain is None else chain.kmc_key,
                    policy=self._lease.policy,
                    operations=self.operations,
                    bytes=self.bytes,
                    keys=len(self._keys),
                )
            )
        )

    def _require_certified(self) -> CardReply:
        certified = self._certified()
        if certified is None:
            raise ServiceOff("this card is not certified yet")
        return certified

    def _show_transport(self, _: Request) -> Answer:
        return Answer(data=self._require_certified().chain.chain)

    def _drop(self, _: Request) -> Answer:
        self.drop()
        return Answer()

    # -- the CMK -------------------------------------------------------------------------------------------------------

    def _load_cmk(self, request: Request) -> Answer:
        """step f, in the card: the one place where both shares meet.

        A vCC takes one CMK in its life, the one that the terminal made the card confirm: another is for another VCM.
        """
        delivery = parameters(request, CmkDelivery)
        chain = card_chain.open_delivery(delivery, self._transport, self.consumer, self.card, self.vcm)
        try:
            self._deliveries.spend(delivery.sealed_ukey_share)
            if self._fingerprint and not hmac.compare_digest(self._fingerprint, chain.fingerprint):
                raise CmkInvalid("this vCC has had another CMK")
            if chain.point < self._newest_point:
                raise CmkInvalid("the sealed share is older than one that this vCC has had before")
        except CmkInvalid:
            chain.close()
            raise
        self._newest_point, self._fingerprint = chain.point, chain.fingerprint
        if self._chain is not None:
            self._chain.close()
            self._chain = chain  # the same CMK with news from the Ukey: keys and lease go on
            return Answer()
        self.drop()
        self._chain = chain
        self._waits_until = self._clock() + WAITING_S
        return Answer()

    def _confirm(self, request: Request) -> Answer:
        if len(request.data) != 32:
            raise Malformed("a nonce to confirm has 32 bytes")
        message = b"cipherfleet card confirm v1" + self.card.encode() + b"|" + self.vcm.encode() + b"|" + bytes(request.data)
        return Answer(data=hmac.digest(self._require_chain().confirm, message, "sha256"))

    def _verify_statement(self, request: Request) -> Answer:
        signed = parameters(request, Signed)
        kind: type[ApplicationStatement | LoginStatement]
        match signed.kind:
            case ApplicationStatement.KIND:
                kind = ApplicationStatement
            case LoginStatement.KIND:
                kind = LoginStatement
            case _:
                raise StatementForged("a card checks application and login statements alone")
        if len(signed.signatures) != 1:
            raise StatementForged("a statement carries the Ukey's signature and no other")
        statement = self._require_chain().verify(signed, kind)
        if statement.consumer != self.consumer:
            raise ForeignConsumer("the statement is about another consumer")
        return Answer(data=signed.payload)
