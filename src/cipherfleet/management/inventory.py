"""What the platform knows of machines, security domains and VCMs, as values."""

from enum import StrEnum

import msgspec

from cipherfleet.contract.ids import ConsumerId, MachineId, TokenId, VcmId
from cipherfleet.contract.lifecycle import Actor
from cipherfleet.contract.machine_api import Isolation, VcmState
from cipherfleet.contract.vcc import VccLimits

FIRST_SLOT, LAST_SLOT = 10, 17
LAST_DOMAIN = 250

BUILDING_STATES = frozenset({VcmState.BUILDING, VcmState.PREPARING})


class Cause(StrEnum):
    """Why a VCM is deleted, and so who does the terminal's steps."""

    CONSUMER = "consumer"  # asked for, and signed by the Ukey
    OPERATOR = "operator"  # forced
    REMOVAL = "removal"  # the Ukey is gone
    SCHEDULER = "scheduler"  # the VCM failed

    @property
    def actor(self) -> Actor:
        """Who stands in for a terminal that takes no part."""
        return {Cause.OPERATOR: Actor.OPERATOR, Cause.SCHEDULER: Actor.SCHEDULER}.get(self, Actor.AUTHENTICATION)


class MachineRecord(msgspec.Struct, frozen=True):
    id: MachineId
    url: str


class DomainRecord(msgspec.Struct, frozen=True):
    """``index``: 1..250, the consumer's for ever. ``wanted``: the consumer wants service, and no removal has ended it."""

    consumer: ConsumerId
    index: int
    wanted: bool
    removed: bool


class VcmRecord(msgspec.Struct, frozen=True):
    """One VCM, or its history. ``created``: all nine steps were done once. Times in unix seconds."""

    id: VcmId
    consumer: ConsumerId
    state: VcmState
    created_at: float
    changed_at: float
    machine: MachineId | None = None
    token_id: TokenId | None = None
    slot: int | None = None  # kept in the history; the port's own row says whether it is in use
    created: bool = False
    cause: Cause | None = None
    isolation: Isolation | None = None
    error: str = ""
    limits: VccLimits = VccLimits()  # as last set; a VCM begins with its predecessor's

    @property
    def alive(self) -> bool:
        return self.state is not VcmState.DELETED
