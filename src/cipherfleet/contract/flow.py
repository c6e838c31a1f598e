"""The service flow of the paper, steps a to i, as the terminal lives through it: a pure state machine.

Phase one (a to f) prepares, phase two (g to i) serves. ``ServiceFlow`` refuses any other order and holds the one rule that
matters most here: the ciphertext CMK leaves the Ukey only when the escrow's download signal matches the mark that the
authentication module set for exactly this VCM.
"""

import hmac
from enum import StrEnum

import msgspec

from cipherfleet.contract.errors import MarkMismatch, OutOfOrder
from cipherfleet.contract.ids import VcmId

MARK_BYTES = 32


class FlowStep(StrEnum):
    REQUESTED = "a"  # Ukey inserted, the terminal asked
    IDENTIFIED = "b"  # the CA verified the identity
    MARKED = "c"  # "CMK may be downloaded": mark set, VCM queued, domain set up
    PLACED = "d"  # the scheduler placed and started the VCM
    AUTHORISED = "e"  # the VCM authenticated itself to the CA
    RELEASED = "f"  # signal matched mark: the ciphertext CMK was released
    KEYS_LOADED = "g"  # the VCM has the DEKs
    SERVING = "h"  # the VCM serves, the monitor watches
    PLANNED = "i"  # the scheduler plans from it, at a regular interval


class Mark(msgspec.Struct, frozen=True):
    """ "CMK may be downloaded" for one VCM. ``value`` (32 bytes) is known to KMC and terminal, through two channels."""

    vcm: VcmId
    value: bytes


class ServiceFlow:
    """One VCM's flow at the terminal, from step a to serving."""

    def __init__(self) -> None:
        self.reached: list[FlowStep] = []
        self._mark: Mark | None = None

    @property
    def serving(self) -> bool:
        return FlowStep.SERVING in self.reached

    def reach(self, step: FlowStep) -> None:
        """``step`` happened. Raises ``OutOfOrder`` when an earlier one is missing, as a peer's message may cause it."""
        order = list(FlowStep)
        if order.index(step) != len(self.reached):
            raise OutOfOrder(f"flow step {step} came after {''.join(self.reached) or 'nothing'}")
        self.reached.append(step)

    def mark(self, mark: Mark) -> None:
        """step c: the authentication module lets the terminal mark "CMK may be downloaded"."""
        self.reach(FlowStep.MARKED)
        self._mark = mark

    def release(self, signal: Mark) -> None:
        """step f: the download signal came. Raises ``MarkMismatch`` unless it matches the mark; a mark is used once."""
        mark, self._mark = self._mark, None
        if mark is None or mark.vcm != signal.vcm or not hmac.compare_digest(mark.value, signal.value):
            raise MarkMismatch(f"the download signal for {signal.vcm} does not match a mark")
        self.reach(FlowStep.RELEASED)
