"""The life cycle of a VCM as pure state machines: creation in nine steps, deletion in eight, with trace and undo.

``Run`` decides nothing about how a step is done. It says which step comes next, refuses any other order, records who did
what when, and on failure names what to undo, newest first. Undoing is idempotent: undoing what never happened succeeds.
"""

from enum import StrEnum

import msgspec

from cipherfleet.contract.errors import CipherfleetError


class Process(StrEnum):
    CREATE = "create"
    DELETE = "delete"


class Actor(StrEnum):
    TERMINAL = "terminal"
    KMC = "kmc"
    AUTHENTICATION = "authentication"
    SCHEDULER = "scheduler"
    NETWORK = "network"
    IMAGE_STORE = "image-store"
    OPERATOR = "operator"
    VCM = "vcm"


class Step(msgspec.Struct, frozen=True):
    number: int
    actor: Actor
    action: str


CREATION: tuple[Step, ...] = (
    Step(1, Actor.TERMINAL, "auth_identity_request, build_vcm_request"),
    Step(2, Actor.KMC, "user_vcm_token generated"),
    Step(3, Actor.AUTHENTICATION, "user_vcm_token stored"),
    Step(4, Actor.SCHEDULER, "user_vcm_id, secure_region_deploy_request, instance_build_order"),
    Step(5, Actor.NETWORK, "secure_region_info"),
    Step(6, Actor.IMAGE_STORE, "build_successful"),
    Step(7, Actor.AUTHENTICATION, "login_permit"),
    Step(8, Actor.TERMINAL, "login"),
    Step(9, Actor.VCM, "service_on: vcm, terminal and kmc answer"),
)

DELETION: tuple[Step, ...] = (
    Step(1, Actor.TERMINAL, "auth_identity_request, delete_vcm_request"),
    Step(2, Actor.KMC, "user_vcm_token revoked, token_delete"),
    Step(3, Actor.AUTHENTICATION, "user_vcm_token deleted, instance_delete"),
    Step(4, Actor.SCHEDULER, "secure_region_delete_request, instance_delete_order, user_vcm_id deleted"),
    Step(5, Actor.NETWORK, "port deleted"),
    Step(6, Actor.IMAGE_STORE, "delete_successful"),
    Step(7, Actor.AUTHENTICATION, "delete_permit"),
    Step(8, Actor.TERMINAL, "service_off"),
)

STEPS: dict[Process, tuple[Step, ...]] = {Process.CREATE: CREATION, Process.DELETE: DELETION}


class TraceEntry(msgspec.Struct, frozen=True):
    """One step as it happened: ``at`` in unix seconds, ``ms`` how long it took."""

    process: Process
    step: int
    actor: str
    action: str
    at: float
    ms: float
    error: str = ""


class RunState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Run:
    """One creation or deletion under way."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.steps = STEPS[process]
        self.trace: list[TraceEntry] = []
        self.state = RunState.RUNNING

    @property
    def next_step(self) -> Step | None:
        """The step to do now, ``None`` when there is none left."""
        if self.state is not RunState.RUNNING:
            return None
        return self.steps[len(self.trace)]

    def complete(self, number: int, *, at: float, ms: float, actor: Actor | None = None) -> TraceEntry:
        """Step ``number`` is done. ``actor`` says who did it when not the usual one (the operator, by force)."""
        step = self._expect(number)
        entry = TraceEntry(self.process, number, actor or step.actor, step.action, at, ms)
        self.trace.append(entry)
        if len(self.trace) == len(self.steps):
            self.state = RunState.DONE
        return entry

    def fail(self, number: int, error: CipherfleetError, *, at: float, ms: float) -> tuple[Step, ...]:
        """Step ``number`` failed; what to undo, newest first, the failed step (half done, perhaps) included.

        A deletion undoes nothing: it is simply run again until it is through.
        """
        step = self._expect(number)
        self.state = RunState.FAILED
        self.trace.append(TraceEntry(self.process, number, step.actor, step.action, at, ms, error.code))
        if self.process is Process.DELETE:
            return ()
        return tuple(reversed(self.steps[:number]))

    def _expect(self, number: int) -> Step:
        step = self.next_step
        if step is None or step.number != number:
            expected = "none" if step is None else step.number
            raise RuntimeError(f"{self.process} step {number} out of order, expected {expected}")
        return step
