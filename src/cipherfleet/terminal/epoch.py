"""A restored escrow, which shows less than the Ukey has seen: what is there, and the consumer's word that it goes on from there.

The log is read from its beginning, so nothing is accepted that is not whole. The new epoch is an entry of that log: what comes
later is chained to it, and an escrow without it, the old one above all, is refused from then on.
"""

import msgspec

from cipherfleet.channel import signing
from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import EscrowRolledBack, StateConflict
from cipherfleet.contract.escrow import EPOCH, FIRST_EPOCH, LogEntry, Seen, epoch_of, epoch_subject, extend, genesis, statement_digest
from cipherfleet.contract.kmc_api import EpochRequest, EpochStatements, LogPage, UkeyList
from cipherfleet.contract.statements import EpochStatement
from cipherfleet.terminal.callers import kmc_caller
from cipherfleet.terminal.checkpoint import read_checkpoint
from cipherfleet.terminal.ukey import Ukey
from cipherfleet.terminal.ukeys import all_known


class Restored(msgspec.Struct, frozen=True):
    """``seen`` by this Ukey, ``there`` now. ``lost``: changes at least that are gone. ``by_another``: another Ukey accepted it already.

    ``revoke_again``: Ukeys that this one knows to be revoked and that the platform takes for good again.
    """

    seen: Seen
    there: Seen
    lost: int
    by_another: bool
    revoke_again: tuple[str, ...]


class _Log(msgspec.Struct):
    """The log from its beginning. ``at_seen``: the head where the Ukey's point is. ``begun``: the newest epoch's entry, what was before."""

    point: Seen
    at_seen: bytes = b""
    begun: tuple[LogEntry, Seen] | None = None


async def look(ukey: Ukey) -> Restored:
    """What there is to accept.

    Raises ``StateConflict`` when nothing was set back, ``CheckpointForged``, ``EscrowRolledBack`` for a log that is not whole, or what
    the KMC answered.
    """
    async with kmc_caller(ukey) as kmc:
        seen = await ukey.memory.look()
        log = await _read(ukey, kmc, seen)
        return await _compare(ukey, kmc, seen, log)


async def accept(ukey: Ukey, restored: Restored) -> Seen:
    """Begin a new epoch where ``restored`` says that the escrow stands, or join the one that another Ukey began; the point then.

    Raises ``StateConflict`` when the escrow is elsewhere by now, ``EscrowRolledBack``, ``CheckpointForged``, or what the KMC answered.
    """
    record, memory, there = ukey.record, ukey.memory, restored.there
    async with kmc_caller(ukey) as kmc:
        seen = await memory.look()
        if seen != restored.seen:
            raise StateConflict("the Ukey has seen something else meanwhile", "look again")
        if restored.by_another:
            if (await _read(ukey, kmc, seen)).point != there:
                raise StateConflict("the escrow went on meanwhile", "look again")
            await memory.begin_epoch(there)
            return there
        number = await memory.next_sequence()
        epoch = max(seen.epoch, there.epoch) + 1
        points = (seen.epoch, seen.sequence, seen.head, there.epoch, there.sequence, there.head)
        signed = await signing.sign(EpochStatement(record.consumer, epoch, number, *points), ukey.signer)
        page = await kmc.call("POST", "/v1/epochs", EpochRequest(signed), reply=LogPage)
        entry = LogEntry(there.sequence + 1, epoch_subject(epoch, number), statement_digest(signed))
        point = Seen(epoch, entry.sequence, extend(there.head, entry))
        if page.log != (entry,) or page.checkpoint is None:
            raise EscrowRolledBack("the escrow did not write the new epoch down")
        if read_checkpoint(record.consumer, page.checkpoint, record.kmc_signing_key) != point:
            raise EscrowRolledBack("the escrow's checkpoint is not the new epoch's")
        await memory.begin_epoch(point)
        return point


async def _compare(ukey: Ukey, kmc: Caller, seen: Seen, log: _Log) -> Restored:
    if log.at_seen == seen.head and log.point.epoch == seen.epoch:
        raise StateConflict("the escrow shows all that this Ukey has seen", "there is no restore to accept")
    known = {other.public_key: other for other in all_known(ukey)}
    listed = (await kmc.call("GET", "/v1/ukeys", reply=UkeyList)).ukeys
    active = {entry.ukey for entry in listed if entry.state == "active"}
    again = tuple(sorted(other.ukey for other in known.values() if other.until and other.ukey in active))
    by_another = log.point.epoch > seen.epoch and await _signed_by_another(ukey, kmc, log)
    return Restored(seen, log.point, max(0, seen.sequence - log.point.sequence), by_another, again)


async def _signed_by_another(ukey: Ukey, kmc: Caller, log: _Log) -> bool:
    """Whether the epoch that the log is in was begun by a Ukey that this one knows. Raises ``StatementForged`` for a false one."""
    if log.begun is None:
        return False
    entry, before = log.begun
    keys = [known.public_key for known in all_known(ukey) if not known.until]
    for signed in (await kmc.call("GET", "/v1/epochs", reply=EpochStatements)).statements:
        if statement_digest(signed) == entry.digest:
            statement = signing.verify(signed, EpochStatement, keys)
            accepted = Seen(statement.accepted_epoch, statement.accepted_sequence, statement.accepted_head)
            return (statement.consumer, statement.new_epoch, accepted) == (ukey.record.consumer, log.point.epoch, before)
    return False


async def _read(ukey: Ukey, kmc: Caller, seen: Seen) -> _Log:
    """All of the log. Raises ``EscrowRolledBack`` or ``CheckpointForged``."""
    record = ukey.record
    log = _Log(Seen(FIRST_EPOCH, 0, genesis(record.consumer, FIRST_EPOCH)))
    log.at_seen = log.point.head if seen.sequence == 0 else b""
    while True:
        page = await kmc.call("GET", f"/v1/escrow?after={log.point.sequence}", reply=LogPage)
        for entry in page.log:
            if entry.sequence != log.point.sequence + 1:
                raise EscrowRolledBack(f"the escrow's log lacks entry {log.point.sequence + 1}")
            if entry.subject.startswith(EPOCH):
                if epoch_of(entry.subject) <= log.point.epoch:
                    raise EscrowRolledBack(f"entry {entry.sequence} begins no later epoch")
                log.begun = entry, log.point
            epoch = epoch_of(entry.subject) or log.point.epoch
            log.point = Seen(epoch, entry.sequence, extend(log.point.head, entry))
            if entry.sequence == seen.sequence:
                log.at_seen = log.point.head
        if page.checkpoint is not None:
            if read_checkpoint(record.consumer, page.checkpoint, record.kmc_signing_key) != log.point:
                raise EscrowRolledBack("the escrow's log does not lead to its checkpoint")
            return log
        if not page.log:
            raise EscrowRolledBack("the escrow's log ends without a checkpoint")
