"""The management platform: its routes, by the role that may call them, and their messages.

::

    operator    GET    /v1/status                           -> PlatformStatus
    operator    PUT    /v1/machines/{machine}               MachineRegistration -> Done
    operator    PUT    /v1/consumers/{consumer}             -> DomainInfo         security domain allotted; idempotent
    operator    DELETE /v1/consumers/{consumer}             -> Done
    operator    GET    /v1/vcms?all=0|1                     -> VcmList
    operator    GET    /v1/vcms/{vcm}                       -> VcmDetail
    operator    POST   /v1/vcms                             VcmCreateRequest -> VcmDetail     asks the consumer's terminal
    operator    PUT    /v1/vcms/{vcm}/limits                VccLimits -> VcmDetail            of its vCC, from now on
    operator    DELETE /v1/vcms/{vcm}?force=0|1             -> VcmDetail
    operator    POST   /v1/vcms/{vcm}/migrate               MigrateRequest -> VcmDetail
    terminal    WS     /v1/terminal                         TerminalToManagement / ManagementToTerminal
    terminal, application GET /v1/domain                    -> DomainInfo
"""

import msgspec

from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId
from cipherfleet.contract.lifecycle import TraceEntry
from cipherfleet.contract.machine_api import Isolation, MachineReport, VcmState
from cipherfleet.contract.messages import Message
from cipherfleet.contract.statements import Purpose, Signed
from cipherfleet.contract.vcc import VccLimits, VccStatistics


class MachineRegistration(Message, frozen=True):
    url: str


class DomainInfo(Message, frozen=True):
    """A consumer's security domain. ``subnet``: CIDR; ``endpoints``: URLs of its VCMs, serving ones first."""

    consumer: ConsumerId
    subnet: str
    endpoints: tuple[str, ...]


class VcmEntry(Message, frozen=True):
    """``machine`` is none until creation step 4 has placed it; ``endpoint`` is a URL, empty until then."""

    id: VcmId
    consumer: ConsumerId
    machine: MachineId | None
    state: VcmState
    pid: int
    isolation: str
    endpoint: str
    created_at: float
    operations: int = 0
    bytes: int = 0


class VcmList(Message, frozen=True):
    vcms: tuple[VcmEntry, ...]


class VcmDetail(Message, frozen=True):
    vcm: VcmEntry
    isolation: Isolation | None
    trace: tuple[TraceEntry, ...]
    limits: VccLimits = VccLimits()
    statistics: VccStatistics = VccStatistics()


class VcmCreateRequest(Message, frozen=True):
    consumer: ConsumerId
    machine: MachineId | None = None


class MigrateRequest(Message, frozen=True):
    machine: MachineId | None = None


class ConsumerStatus(Message, frozen=True):
    name: ConsumerId
    service: str  # on | off
    lease_s: float


class PlatformStatus(Message, frozen=True):
    consumers: tuple[ConsumerStatus, ...]
    machines: tuple[MachineReport, ...]
    vcms: tuple[VcmEntry, ...]


class TerminalToManagement(msgspec.Struct, frozen=True, tag_field="type"):
    """Frames that a terminal sends to the management platform."""


class Inserted(TerminalToManagement, frozen=True):
    """step a: the Ukey is in. ``wanted``: one VCM shall be there; not after the consumer deleted its last one."""

    wanted: bool = True


class IdentityAnswered(TerminalToManagement, frozen=True):
    """Creation or deletion step 1: the signed ``IdentityRequest``."""

    request: Signed


class LoggedIn(TerminalToManagement, frozen=True):
    """Creation step 8, and the terminal's answer for step 9."""

    vcm: VcmId


class LoginFailed(TerminalToManagement, frozen=True):
    vcm: VcmId
    code: str
    message: str


class ServiceOffSeen(TerminalToManagement, frozen=True):
    """Deletion step 8."""

    vcm: VcmId


class Removed(TerminalToManagement, frozen=True):
    """The Ukey is gone."""


class ManagementToTerminal(msgspec.Struct, frozen=True, tag_field="type"):
    """Frames that the management platform sends to a terminal."""


class IdentityWanted(ManagementToTerminal, frozen=True):
    """Prove the Ukey for this purpose: sign the nonce."""

    nonce: bytes
    purpose: Purpose
    vcm: VcmId | None = None


class LoginPermit(ManagementToTerminal, frozen=True):
    """Creation step 7, with the mark "CMK may be downloaded" (flow step c). ``endpoint``: URL.

    ``network_namespace``: with domain isolation on this host, the namespace (of `ip netns`) from which the endpoint is reachable.
    """

    vcm: VcmId
    endpoint: str
    mark: bytes
    network_namespace: str = ""


class ServiceOn(ManagementToTerminal, frozen=True):
    """Creation step 9; also the answer to ``Inserted`` when a VCM of the consumer serves already."""

    vcm: VcmId
    trace: tuple[TraceEntry, ...] = ()
    endpoint: str = ""


class DeletePermit(ManagementToTerminal, frozen=True):
    """Deletion step 7."""

    vcm: VcmId


class FlowFailed(ManagementToTerminal, frozen=True):
    code: str
    message: str
    hint: str = ""
