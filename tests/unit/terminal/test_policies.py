"""The policy of a consumer's Ukeys: set by one, taken over by the others, never set back."""

import pytest
from msgspec import structs

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import EscrowRolledBack, KmcUnavailable, LimitReached, StatementForged, StatementReplayed
from cipherfleet.contract.kmc_api import LeaseRequested, LeaseSigned
from cipherfleet.contract.policy import BUILT_IN, INTERNATIONAL
from cipherfleet.contract.statements import LeaseStatement, PolicyStatement
from cipherfleet.terminal.callers import kmc_caller
from cipherfleet.terminal.catch_up import catch_up
from cipherfleet.terminal.memory import NewPolicy
from cipherfleet.terminal.policies import set_policy
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.unit.terminal.platform import ACME, PIN, Platform, Vcm
from tests.unit.terminal.running import Running

FIPS, GM = BUILT_IN["fips"], BUILT_IN["gm"]


async def meet(ukey: DirectoryUkey) -> None:
    async with kmc_caller(ukey) as kmc:
        await catch_up(ukey, kmc)


async def test_it_is_signed_recorded_and_kept(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        assert (ukey.memory.policy, ukey.memory.known.policy_point) == (INTERNATIONAL, (0, 0))
        await set_policy(ukey, FIPS)
        assert enrolled.kmc.policy is not None
        assert enrolled.verify(enrolled.kmc.policy, PolicyStatement) == PolicyStatement(ACME, FIPS, 1, 1)
        assert ukey.memory.seen == enrolled.kmc.point()
        await set_policy(ukey, GM)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        known = ukey.memory.known
        assert (known.policy, known.policy_point, known.policy_by) == (GM, (1, 2), ukey.record.serial)


async def test_an_older_one_is_never_taken(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await set_policy(ukey, INTERNATIONAL)
        lax = enrolled.kmc.policy
        await set_policy(ukey, FIPS)
        known = ukey.memory.known
        enrolled.kmc.policy = lax  # shown again
        await meet(ukey)
        assert ukey.memory.known == known
        assert lax is not None
        await enrolled.kmc.set_policy(lax)  # and put into the log again
        await meet(ukey)
        assert ukey.memory.policy == FIPS
        enrolled.kmc.policy = None
        await meet(ukey)
        assert ukey.memory.policy == FIPS


async def test_a_policy_that_the_log_names_is_not_withheld(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await enrolled.kmc.set_policy(await signing.sign(PolicyStatement(ACME, FIPS, 1, 5), ukey.signer))
        enrolled.kmc.policy = None
        before = ukey.memory.known
        with pytest.raises(EscrowRolledBack):
            await meet(ukey)
        await enrolled.kmc.set_policy(await signing.sign(PolicyStatement(ACME, GM, 1, 6), LocalSigner(new_key())))
        with pytest.raises(StatementForged):
            await meet(ukey)
        assert ukey.memory.known == before


async def test_the_kmc_cannot_hinder_this_ukey(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        enrolled.kmc.fail["policy"] = [LimitReached("no")]
        with pytest.raises(LimitReached) as refused:
            await set_policy(ukey, FIPS)
        assert "in force with this Ukey" in refused.value.hint
        assert ukey.memory.policy == FIPS
        enrolled.kmc.grow(1)
        signer, enrolled.kmc.signer = enrolled.kmc.signer, LocalSigner(new_key())  # an escrow that lies
        with pytest.raises(Exception, match="checkpoint"):
            await set_policy(ukey, GM)
        assert ukey.memory.policy == GM
        enrolled.kmc.signer = signer
        enrolled.kmc.fail["policy"] = [StatementReplayed("another Ukey took it"), None]
        await set_policy(ukey, FIPS)
        assert ukey.memory.known.policy_point == (1, 4)
        await enrolled.close()
        with pytest.raises(KmcUnavailable):
            await set_policy(ukey, GM)
        assert (ukey.memory.policy, ukey.memory.known.policy_point) == (GM, (1, 5))


async def test_of_two_with_one_number_the_logs_counts(enrolled: Platform) -> None:
    """Another Ukey gave the number that this one used for what the KMC did not take."""
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        enrolled.kmc.fail["policy"] = [LimitReached("no")]
        with pytest.raises(LimitReached):
            await set_policy(ukey, FIPS)
        other = await signing.sign(PolicyStatement(ACME, GM, 1, 1), ukey.signer)
        enrolled.kmc.policy = other  # said alone, it changes nothing
        await meet(ukey)
        assert ukey.memory.policy == FIPS
        await enrolled.kmc.set_policy(other)
        await meet(ukey)
        assert ukey.memory.policy == GM


async def test_a_later_epochs_policy_is_newer(enrolled: Platform) -> None:
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await ukey.memory.set_policy(NewPolicy(FIPS, (1, 9), b"f" * 32, "ukey-0000000b", recorded=True))
        for point in ((1, 8), (0, 99)):
            await ukey.memory.set_policy(NewPolicy(GM, point, b"g" * 32, "ukey-0000000b", recorded=True))
        assert ukey.memory.policy == FIPS
        await ukey.memory.set_policy(NewPolicy(GM, (2, 7), b"g" * 32, "ukey-0000000b", recorded=True))
        assert ukey.memory.policy == GM


async def heartbeat(platform: Platform, vcm: Vcm) -> LeaseStatement:
    await platform.kmc.line.say(LeaseRequested(vcm.id, vcm.card.id, b"n" * 16, await platform.kmc.checkpoint(), tuple(platform.kmc.log)))
    return platform.verify((await platform.kmc.line.hears_at_last(LeaseSigned)).lease, LeaseStatement)


async def test_a_terminal_in_service_learns_it_with_a_heartbeat(enrolled: Platform, terminal: Running) -> None:
    vcm = await enrolled.create()
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        signed = await signing.sign(PolicyStatement(ACME, GM, 1, 3), ukey.signer)
    await enrolled.kmc.set_policy(signed)
    lease = await heartbeat(enrolled, vcm)
    assert (lease.policy, lease.policy_epoch, lease.policy_sequence) == (GM, 1, 3)
    enrolled.kmc.policy = structs.replace(signed, payload=signed.payload.replace(b'"sequence":3', b'"sequence":9'))
    enrolled.kmc.grow(1)
    lease = await heartbeat(enrolled, vcm)  # nothing in the log is about policies: nobody looks
    assert lease.policy == GM
