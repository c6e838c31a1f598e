"""The consumer sets its policy: by one Ukey, for all of them."""

from cipherfleet.channel.client import Caller
from cipherfleet.channel.signing import sign
from cipherfleet.contract.errors import CipherfleetError, StatementReplayed, UkeyAbsent, UkeyRevoked
from cipherfleet.contract.escrow import Seen, policy_subject, statement_digest
from cipherfleet.contract.kmc_api import PolicyReply, PolicyRequest
from cipherfleet.contract.policy import Policy
from cipherfleet.contract.statements import PolicyStatement, Signed
from cipherfleet.terminal.callers import kmc_caller
from cipherfleet.terminal.catch_up import catch_up
from cipherfleet.terminal.checkpoint import advance, check_recorded
from cipherfleet.terminal.memory import NewPolicy
from cipherfleet.terminal.ukey import Ukey

ATTEMPTS = 3
_HINT = "the policy is in force with this Ukey; set it again once the KMC takes it, so that the others learn of it"


async def set_policy(ukey: Ukey, policy: Policy) -> None:
    """What the consumer permits itself, at this Ukey from now on and at its others once they see the escrow.

    It is on this Ukey before anybody is asked, so the KMC cannot hinder it. Raises ``UkeyAbsent``, ``UkeyRevoked``, ``EscrowRolledBack``,
    ``CheckpointForged``, or what the KMC answered; after those but the first two, the policy is in force with this Ukey alone.
    """
    async with kmc_caller(ukey) as kmc:
        for attempt in range(1, ATTEMPTS + 1):
            refused: CipherfleetError | None = None
            try:
                seen = await catch_up(ukey, kmc)
            except (UkeyAbsent, UkeyRevoked):
                raise
            except CipherfleetError as exc:
                seen, refused = ukey.memory.seen, exc
            signed, subject = await _put(ukey, policy, seen)
            try:
                if refused is not None:
                    raise refused
                await _submit(ukey, kmc, signed, subject, seen)
            except StatementReplayed as exc:  # another Ukey took the number
                if attempt == ATTEMPTS:
                    raise _told(exc) from exc
            except UkeyAbsent:
                raise
            except CipherfleetError as exc:
                raise _told(exc) from exc
            else:
                return


async def _put(ukey: Ukey, policy: Policy, seen: Seen) -> tuple[Signed, str]:
    """Number it, sign it and keep it."""
    number = await ukey.memory.next_sequence()
    signed = await sign(PolicyStatement(ukey.record.consumer, policy, seen.epoch, number), ukey.signer)
    await ukey.memory.set_policy(NewPolicy(policy, (seen.epoch, number), statement_digest(signed), ukey.record.serial, recorded=False))
    return signed, policy_subject(policy.name, number)


async def _submit(ukey: Ukey, kmc: Caller, signed: Signed, subject: str, seen: Seen) -> None:
    """Send it; the escrow shows that it wrote it down."""
    reply = await kmc.call("POST", "/v1/policies", PolicyRequest(signed, seen.sequence), reply=PolicyReply)
    point = advance(ukey.record.consumer, seen, reply.checkpoint, reply.log, ukey.record.kmc_signing_key)
    check_recorded(reply.log, seen, point, subject, statement_digest(signed))
    await catch_up(ukey, kmc)


def _told(error: CipherfleetError) -> CipherfleetError:
    return type(error)(error.message, _HINT)
