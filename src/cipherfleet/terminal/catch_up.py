"""What a Ukey learns of the escrow before anything else: where its log stands, whose signatures count, which numbers are used, the policy.

A spare, or one that lay in a drawer, may be far behind, so the log comes in pages.
"""

from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import EscrowRolledBack, UkeyRevoked
from cipherfleet.contract.escrow import POLICY, UKEY, LogEntry, Seen, replay
from cipherfleet.contract.kmc_api import LogPage, UkeyStatements
from cipherfleet.terminal.checkpoint import read_checkpoint
from cipherfleet.terminal.policy_told import read_policy_told
from cipherfleet.terminal.ukey import Ukey
from cipherfleet.terminal.ukeys import all_known, check_told, follow

FOLLOWED = (UKEY, POLICY)
"""What in the log makes a Ukey look at what other Ukeys said."""


async def catch_up(ukey: Ukey, kmc: Caller) -> Seen:
    """The point that was reached; the Ukey remembers all of it together, or nothing.

    Raises ``CheckpointForged``, ``EscrowRolledBack``, ``StatementForged``, ``UkeyRevoked`` when this one was revoked, or what the
    KMC answered.
    """
    record, memory = ukey.record, ukey.memory
    point, about = await read_on(ukey, kmc, await memory.look())
    said = await kmc.call("GET", "/v1/ukeys/statements", reply=UkeyStatements)  # after the log, so that it holds what that names
    check_told([entry for entry in about if entry.subject.startswith(UKEY)], said.statements)
    before = all_known(ukey)
    ukeys, number = follow(record.consumer, before, memory.known.ukey_sequence, said.statements)
    if any(other.until and other.public_key == ukey.signer.public_key for other in ukeys):
        raise UkeyRevoked(f"{record.serial} was revoked by another Ukey of {record.consumer}")
    policy = read_policy_told(record.consumer, memory.known, before, ukeys, about, said.policy)
    await memory.learn(point, ukeys, number, said.newest, policy)
    return point


async def read_on(ukey: Ukey, kmc: Caller, seen: Seen) -> tuple[Seen, list[LogEntry]]:
    """The end of the log, and what of it after ``seen`` is ``FOLLOWED``. Raises ``CheckpointForged`` or ``EscrowRolledBack``."""
    record, point, about = ukey.record, seen, list[LogEntry]()
    while True:
        page = await kmc.call("GET", f"/v1/escrow?after={point.sequence}", reply=LogPage)
        if page.checkpoint is None and not page.log:
            raise EscrowRolledBack("the escrow's log ends without a checkpoint")
        point = replay(point, page.log)
        about += [entry for entry in page.log if entry.subject.startswith(FOLLOWED)]
        if page.checkpoint is not None:
            if read_checkpoint(record.consumer, page.checkpoint, record.kmc_signing_key) != point:
                raise EscrowRolledBack("the escrow's history differs from the one the Ukey saw")
            return point, about
