"""A Ukey that is far behind the escrow reads its log in pages, and believes no more of it than of a frame."""

import os
from collections.abc import Awaitable, Callable

import pytest
from msgspec import structs

from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import CheckpointForged, CipherfleetError, EscrowRolledBack
from cipherfleet.contract.ids import ApplicationName
from cipherfleet.contract.statements import Right
from cipherfleet.terminal.applications import sign_in
from cipherfleet.terminal.callers import kmc_caller
from cipherfleet.terminal.catch_up import catch_up
from cipherfleet.terminal.ukey import DirectoryUkey
from tests.unit.terminal.platform import PIN, Platform


async def test_many_pages_are_read_to_the_end(enrolled: Platform) -> None:
    enrolled.kmc.page = 3
    enrolled.kmc.grow(10)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        async with kmc_caller(ukey) as kmc:
            await catch_up(ukey, kmc)
            assert ukey.memory.seen == enrolled.kmc.point()
            enrolled.kmc.grow(3)
            await catch_up(ukey, kmc)
            assert ukey.memory.seen.sequence == 13
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        assert ukey.memory.seen.sequence == 13


async def test_a_statement_follows_what_was_read(enrolled: Platform) -> None:
    enrolled.kmc.page = 3
    enrolled.kmc.grow(8)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await sign_in(ukey, ApplicationName("billing"), (Right.SIGN,), 1)
        assert ukey.memory.seen == enrolled.kmc.point()
    assert [request.since for request in enrolled.kmc.requests] == [8]


async def forged(enrolled: Platform) -> None:
    enrolled.kmc.signer = LocalSigner(new_key())


async def endless(enrolled: Platform) -> None:
    enrolled.kmc.page = 0


async def forked(enrolled: Platform) -> None:
    """The Ukey saw another change 2."""
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        await ukey.memory.remember(enrolled.kmc.point(log=enrolled.kmc.log[:2]))
    enrolled.kmc.log[1] = structs.replace(enrolled.kmc.log[1], digest=os.urandom(32))


@pytest.mark.parametrize(("lie", "error"), [(forged, CheckpointForged), (endless, EscrowRolledBack), (forked, EscrowRolledBack)])
async def test_a_log_that_lies_is_not_remembered(
    enrolled: Platform, lie: Callable[[Platform], Awaitable[None]], error: type[CipherfleetError]
) -> None:
    enrolled.kmc.page = 3
    enrolled.kmc.grow(10)
    await lie(enrolled)
    with DirectoryUkey.open(enrolled.ukey, PIN) as ukey:
        before = ukey.memory.seen
        async with kmc_caller(ukey) as kmc:
            with pytest.raises(error):
                await catch_up(ukey, kmc)
        assert ukey.memory.seen == before
