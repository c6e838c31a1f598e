"""What a Ukey believes of a policy that the KMC shows: what another Ukey signed while it counted, and nothing older than it knows."""

import hashlib

import pytest
from msgspec import structs

from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.channel.signing import LocalSigner
from cipherfleet.contract.errors import CipherfleetError, EscrowRolledBack, ForeignConsumer, Malformed, StatementForged
from cipherfleet.contract.escrow import LogEntry, Seen, policy_subject, statement_digest, ukey_subject
from cipherfleet.contract.ids import ConsumerId, UkeyId
from cipherfleet.contract.policy import BUILT_IN
from cipherfleet.contract.statements import IdentityRequest, PolicyStatement, Purpose, Signature, Signed
from cipherfleet.terminal.memory import KnownUkey, NewPolicy, Remembered
from cipherfleet.terminal.policy_told import read_policy_told

ACME = ConsumerId("acme")
A, B, STRANGER = (LocalSigner(new_key()) for _ in range(3))
UKEYS = (KnownUkey(UkeyId("ukey-0000000a"), A.public_key), KnownUkey(UkeyId("ukey-0000000b"), B.public_key))
KNOWN = Remembered(Seen(1, 0, bytes(32)))
FIPS, GM = BUILT_IN["fips"], BUILT_IN["gm"]


def revoked(until: int) -> tuple[KnownUkey, ...]:
    return structs.replace(UKEYS[0], until=until), UKEYS[1]


async def said(number: int, by: LocalSigner = A, *, consumer: ConsumerId = ACME, name: str = "fips") -> Signed:
    return await signing.sign(PolicyStatement(consumer, BUILT_IN[name], 1, number), by)


def named(signed: Signed, number: int, name: str = "fips", at: int = 1) -> LogEntry:
    return LogEntry(at, policy_subject(name, number), statement_digest(signed))


def revocation(number: int, at: int) -> LogEntry:
    return LogEntry(at, ukey_subject(UKEYS[0].ukey, number), hashlib.sha256(b"revocation").digest())


async def test_another_ukeys_policy_is_taken_over() -> None:
    first = await said(4)
    told = read_policy_told(ACME, KNOWN, UKEYS, UKEYS, [named(first, 4)], first)
    assert told == NewPolicy(FIPS, (1, 4), statement_digest(first), UKEYS[0].ukey, recorded=True)
    assert told is not None
    assert read_policy_told(ACME, structs.replace(KNOWN, policy_digest=told.digest), UKEYS, UKEYS, [], first) is None  # no news
    assert read_policy_told(ACME, KNOWN, UKEYS, UKEYS, [], None) is None  # never set
    later = await said(6, B, name="gm")  # signed after the log was read
    told = read_policy_told(ACME, KNOWN, UKEYS, UKEYS, [named(first, 4)], later)
    assert told == NewPolicy(GM, (1, 6), statement_digest(later), UKEYS[1].ukey, recorded=False)


async def test_what_the_log_names_last_must_be_shown() -> None:
    first, second = await said(4), await said(6, B, name="gm")
    log = [named(first, 4), named(second, 6, "gm", at=2)]
    for shown in (None, first):
        with pytest.raises(EscrowRolledBack, match="does not show"):
            read_policy_told(ACME, KNOWN, UKEYS, UKEYS, log, shown)
    known = structs.replace(KNOWN, policy_digest=statement_digest(first))
    with pytest.raises(EscrowRolledBack, match="does not show"):  # the one that is known already, instead of the newer one
        read_policy_told(ACME, known, UKEYS, UKEYS, log[1:], first)
    for subject in ("policy/fips@5", "policy/gm@4"):  # another number or name than was signed
        with pytest.raises(EscrowRolledBack):
            read_policy_told(ACME, KNOWN, UKEYS, UKEYS, [LogEntry(1, subject, statement_digest(first))], first)
    for number in ("x", "", "9" * 5000, "²"):
        with pytest.raises(EscrowRolledBack, match="nobody wrote"):
            read_policy_told(ACME, KNOWN, UKEYS, UKEYS, [LogEntry(1, f"policy/fips@{number}", bytes(32))], first)


async def test_what_nobody_that_counts_has_signed() -> None:
    good = await said(4)
    twice = await signing.countersign(good, B)
    other_kind = await signing.sign(IdentityRequest(ACME, bytes(32), Purpose.BUILD_VCM), A)
    raw = b'{"consumer":"acme","policy":{"name":"x","min_strength_bits":-1},"epoch":1,"sequence":9}'
    malformed = await signing.countersign(Signed(PolicyStatement.KIND, raw), A)
    wrong = structs.replace(good, signatures=(Signature(good.signatures[0].signer, b"\x30\x00"),))
    refused: list[tuple[Signed, type[CipherfleetError]]] = [
        (await said(4, STRANGER), StatementForged),
        (await said(4, consumer=ConsumerId("other")), ForeignConsumer),
        (twice, StatementForged),
        (other_kind, StatementForged),
        (structs.replace(good, payload=good.payload.replace(b"fips", b"gm")), StatementForged),
        (structs.replace(good, payload=good.payload[:-1]), StatementForged),
        (structs.replace(good, payload=good.payload + b" " * 70_000), StatementForged),
        (structs.replace(good, signatures=()), StatementForged),
        (wrong, StatementForged),
        (malformed, Malformed),
    ]
    for told, error in refused:
        with pytest.raises(error):
            read_policy_told(ACME, KNOWN, UKEYS, UKEYS, [], told)


async def test_a_revoked_ukeys_policy_counts_if_it_came_before() -> None:
    policy = await said(4)
    log = [named(policy, 4), revocation(7, at=2)]
    told = read_policy_told(ACME, KNOWN, UKEYS, revoked(7), log, policy)
    assert told is not None
    assert told.policy == FIPS


async def test_a_revoked_ukey_sets_no_policy() -> None:
    """Even with a number below its revocation's, which the KMC puts into the log afterwards."""
    policy, late = await said(4), await said(9)
    for ukeys_before, log, shown in (
        (UKEYS, [revocation(7, at=1), named(policy, 4, at=2)], policy),
        (UKEYS, [revocation(7, at=1), named(late, 9, at=2)], late),
        (UKEYS, [named(late, 9, at=1), revocation(7, at=2)], late),
        (revoked(7), [named(policy, 4)], policy),
    ):
        with pytest.raises(StatementForged, match="revoked by then"):
            read_policy_told(ACME, KNOWN, ukeys_before, revoked(7), log, shown)
    assert read_policy_told(ACME, KNOWN, UKEYS, revoked(7), [revocation(7, at=1)], policy) is None  # not in the log: no news
