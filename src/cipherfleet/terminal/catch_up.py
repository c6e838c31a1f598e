"""A Ukey that is far behind the escrow (a spare, or one that lay in a drawer) reads the log in pages before anything else."""

from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import EscrowRolledBack
from cipherfleet.contract.escrow import replay
from cipherfleet.contract.kmc_api import LogPage
from cipherfleet.terminal.checkpoint import read_checkpoint
from cipherfleet.terminal.ukey import Ukey


async def catch_up(ukey: Ukey, kmc: Caller) -> None:
    """What fits one page comes by frame, as ever; of more the Ukey remembers the end.

    Raises ``CheckpointForged``, ``EscrowRolledBack``, or what the KMC answered.
    """
    record, memory = ukey.record, ukey.memory
    seen = memory.seen
    point = seen
    while True:
        page = await kmc.call("GET", f"/v1/escrow?after={point.sequence}", reply=LogPage)
        if page.checkpoint is not None and point == seen:
            return
        if page.checkpoint is None and not page.log:
            raise EscrowRolledBack("the escrow's log ends without a checkpoint")
        point = replay(point, page.log)
        if page.checkpoint is not None:
            if read_checkpoint(record.consumer, page.checkpoint, record.kmc_signing_key) != point:
                raise EscrowRolledBack("the escrow's history differs from the one the Ukey saw")
            try:
                await memory.remember(point)
            except EscrowRolledBack:  # unless somebody else learned more meanwhile
                if memory.seen.epoch != point.epoch or memory.seen.sequence <= point.sequence:
                    raise
            return
