"""Undoing a creation: each step's undo is idempotent and needs the inventory alone, so it works after a restart too."""

import logging

from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.ids import VcmId
from cipherfleet.contract.lifecycle import CREATION, Step
from cipherfleet.contract.machine_api import VcmState
from cipherfleet.management.inventory import VcmRecord
from cipherfleet.management.modules import Modules
from cipherfleet.management.outbox import Decision
from cipherfleet.management.steps import bounded

log = logging.getLogger(__name__)

WHOLE_CREATION: tuple[Step, ...] = tuple(reversed(CREATION))


async def undo(modules: Modules, vcm: VcmId, steps: tuple[Step, ...] = WHOLE_CREATION) -> VcmRecord:
    """Undo ``steps``, newest first; the record afterwards.

    ``DELETED`` when nothing is left, else ``DELETING``: the ring tries again. Raises what the inventory raises.
    """
    record = await modules.store.vcm(vcm)
    left: list[int] = []
    for step in steps:
        try:
            await bounded(
                _undo_step(modules, record, step.number, clean=not left), modules.settings.step_s, None, what=f"undo {step.number}"
            )
        except CipherfleetError as exc:
            left.append(step.number)
            log.warning("%s: undoing creation step %d failed, it is tried again: %s", vcm, step.number, exc.code)
    if left:
        return await modules.store.change_vcm(vcm, state=VcmState.DELETING)
    return await modules.store.change_vcm(vcm, Decision("vcm-deleted", record.consumer, "management", vcm), state=VcmState.DELETED)


async def _undo_step(modules: Modules, record: VcmRecord, number: int, *, clean: bool) -> None:
    match number:
        case 6 if record.machine is not None:
            await modules.images.delete(record.machine, record.id)
        case 5:
            await modules.network.delete(record)
        case 4:
            await modules.authority.revoke_vcm(record.id)
            if clean:  # a port whose instance may still live is no other VCM's
                await modules.store.release_port(record.id)
        case 3:
            await modules.store.delete_token(record.id)
        case 2 if record.token_id is not None:
            await modules.authority.revoke_token(record.token_id)
        case _:
            pass  # asking, permitting and logging in leave nothing
