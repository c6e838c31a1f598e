"""Several Ukeys of one consumer, as the card sees them: what the sealed share says of each."""

import msgspec
import pytest

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import new_key, public_key_der
from cipherfleet.contract.errors import LeaseForged, StatementForged
from cipherfleet.contract.ids import ApplicationName
from cipherfleet.contract.statements import ApplicationStatement, LoginStatement, RevokedUkey, Right
from cipherfleet.contract.vcc import Operation
from tests.unit.computing.card.consumer import CARD, KMC_KEY, VCM, Function, signed

SPARE, LOST = new_key(), new_key()
REVOKED_BY = 7
"""The number of the statement that revoked LOST."""


@pytest.fixture
def function() -> Function:
    made = Function(serving=False)
    share = made.consumer.share()
    keys = (*share.ukey_public_keys, public_key_der(SPARE.public_key()))
    revoked = (RevokedUkey(public_key_der(LOST.public_key()), REVOKED_BY),)
    told = msgspec.structs.replace(share, ukey_public_keys=keys, revoked_ukeys=revoked)
    made.do(Operation.LOAD_CMK, made.consumer.delivery(told, info=f"cipherfleet sealed share v1|{CARD}|{VCM}".encode()))
    made.renew()
    return made


def application(function: Function, number: int) -> ApplicationStatement:
    return ApplicationStatement(function.consumer.name, ApplicationName("shop"), b"k" * 32, (Right.ENCRYPT,), 2**31, number)


def test_each_ukey_that_counts_signs(function: Function) -> None:
    for key in (function.consumer.ukey, SPARE):
        statement = application(function, 9)
        assert function.do(Operation.VERIFY_STATEMENT, signed(statement, key)).data == codec.encode(statement)


def test_of_a_revoked_ukey_only_what_came_before_its_revocation_stays_good(function: Function) -> None:
    before = application(function, REVOKED_BY - 1)
    assert function.do(Operation.VERIFY_STATEMENT, signed(before, LOST)).data == codec.encode(before)
    for late in (application(function, REVOKED_BY), application(function, REVOKED_BY + 1)):
        with pytest.raises(StatementForged):
            function.do(Operation.VERIFY_STATEMENT, signed(late, LOST))
    with pytest.raises(StatementForged):  # what has no number of the series is not before anything
        function.do(Operation.VERIFY_STATEMENT, signed(LoginStatement(function.consumer.name, VCM, b"n" * 32), LOST))


def test_a_revoked_ukey_prolongs_no_lease(function: Function) -> None:
    nonce = bytes(function.do(Operation.LEASE_NONCE).data)
    statement = function.consumer.statement(nonce)
    with pytest.raises(LeaseForged):
        function.do(Operation.LEASE, signed(statement, LOST, KMC_KEY))
    function.do(Operation.LEASE, signed(statement, SPARE, KMC_KEY))
