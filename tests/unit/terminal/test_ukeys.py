"""What a Ukey believes of the others: what they signed, in order, and nothing that the KMC leaves out."""

import pytest

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import EscrowRolledBack, ForeignConsumer, StatementForged
from cipherfleet.contract.escrow import LogEntry, statement_digest, ukey_subject
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.contract.statements import IdentityRequest, Purpose, Signed, UkeyStatement
from cipherfleet.terminal.memory import KnownUkey
from cipherfleet.terminal.ukeys import check_told, follow

ACME = ConsumerId("acme")
A, B, C = (LocalSigner(new_key()) for _ in range(3))
IDS = {A: UkeyId("ukey-0000000a"), B: UkeyId("ukey-0000000b"), C: UkeyId("ukey-0000000c")}
FIRST = (KnownUkey(IDS[A], A.public_key),)


async def said(by: LocalSigner, of: LocalSigner, number: int, *, revoked: bool = False, consumer: ConsumerId = ACME) -> Signed:
    return await signing.sign(UkeyStatement(consumer, IDS[of], of.public_key, number, revoked=revoked), by)


async def test_one_brings_the_next_and_is_revoked_by_it() -> None:
    story = [await said(A, B, 3), await said(B, C, 5), await said(C, A, 9, revoked=True)]
    ukeys, number = follow(ACME, FIRST, 0, story)
    assert number == 9
    assert {(u.ukey, u.until) for u in ukeys} == {(IDS[A], 9), (IDS[B], 0), (IDS[C], 0)}
    assert follow(ACME, ukeys, number, story) == (ukeys, number)  # shown again: nothing new
    with pytest.raises(StatementForged):
        follow(ACME, ukeys, number, [*story, await said(A, B, 10)])


async def test_what_nobody_that_counts_has_signed_is_refused() -> None:
    for story in ([await said(B, B, 1)], [await said(C, B, 1)], [await said(A, B, 1), await said(C, C, 2)]):
        with pytest.raises(StatementForged):
            follow(ACME, FIRST, 0, story)
    with pytest.raises(ForeignConsumer):
        follow(ACME, FIRST, 0, [await said(A, B, 1, consumer=ConsumerId("other"))])
    with pytest.raises(StatementForged):
        follow(ACME, FIRST, 0, [await signing.sign(IdentityRequest(ACME, bytes(32), Purpose.BUILD_VCM), A)])


async def test_a_statement_that_the_log_names_must_be_shown() -> None:
    statement = await said(A, B, 4)
    log = (LogEntry(7, ukey_subject(IDS[B], 4), statement_digest(statement)),)
    check_told(log, [statement])
    with pytest.raises(EscrowRolledBack):
        check_told(log, [])
