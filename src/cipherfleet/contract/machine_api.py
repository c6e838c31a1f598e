"""A cloud cipher machine: its routes, by the role that may call them, and their messages.

::

    management GET    /v1/status                            -> MachineReport
    management PUT    /v1/vcms/{vcm}                        BuildOrder -> VcmReport     (creation step 6; idempotent)
    management PUT    /v1/vcms/{vcm}/limits                 VccLimits -> Done           of its vCC, from now on
    management DELETE /v1/vcms/{vcm}                        -> Done                     idempotent: gone is gone
"""

from enum import StrEnum

import msgspec

from cipherfleet.contract.ids import CardId, ConsumerId, MachineId, VcmId
from cipherfleet.contract.messages import Message
from cipherfleet.contract.vcc import VccLimits, VccStatistics


class VcmState(StrEnum):
    BUILDING = "building"
    PREPARING = "preparing"  # permitted, waiting for CMK and lease
    SERVING = "serving"
    DELETING = "deleting"
    DELETED = "deleted"
    FAILED = "failed"


class Isolation(Message, frozen=True):
    """The isolation really in force, as seen from the machine and from inside. ``namespaces``: those that differ from the host's."""

    mode: str  # process | domain
    launcher: str  # bubblewrap | zygote | unshare | none
    namespaces: tuple[str, ...] = ()
    no_new_privileges: bool = False
    seccomp: bool = False
    landlock_abi: int = 0
    capabilities: str = ""  # hex of the effective set; "0" when none
    read_only_root: bool = False
    limits: dict[str, int] = msgspec.field(default_factory=dict)
    network_confined: bool = False  # Landlock (ABI 4) refuses to connect and to bind over TCP, tried from inside


class VcmSize(Message, frozen=True):
    cpus: int
    memory_mib: int
    files: int


class BuildOrder(Message, frozen=True):
    consumer: ConsumerId
    token: bytes
    address: str  # host:port the VCM serves on
    isolation: str  # process | domain
    size: VcmSize
    network_namespace: str = ""  # domain isolation: the namespace (a name of `ip netns`) of this VCM's port
    limits: VccLimits = VccLimits()


class VcmReport(Message, frozen=True):
    id: VcmId
    consumer: ConsumerId
    state: VcmState
    pid: int
    isolation: Isolation | None = None
    started_ms: float = 0.0
    operations: int = 0
    bytes: int = 0
    keys: int = 0
    limits: VccLimits = VccLimits()
    statistics: VccStatistics = VccStatistics()
    error: str = ""  # "code: message" of a failed one


class CardReport(Message, frozen=True):
    id: CardId
    pid: int
    vccs: int
    operations: int
    bytes: int
    memory_locked: bool


class MachineReport(Message, frozen=True):
    id: MachineId
    url: str
    state: str  # up | down
    pid: int
    capacity: int
    card: CardReport | None
    vcms: tuple[VcmReport, ...]
    seen_at: float = 0.0
