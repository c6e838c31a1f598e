"""Statements: signed bytes, checked as they came."""

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from cipherfleet.channel.certificates import fingerprint, new_key, public_key_der
from cipherfleet.channel.signing import LocalSigner, countersign, sign, verify
from cipherfleet.contract.errors import Malformed, StatementForged
from cipherfleet.contract.ids import CardId, ConsumerId, VcmId
from cipherfleet.contract.statements import LeaseStatement, LoginStatement, Signature, Signed

LEASE = LeaseStatement(ConsumerId("acme"), CardId("card-m1-00000000"), VcmId("vcm-00000000000a"), b"n" * 16, 6000, 1, 0, b"h" * 32)


@pytest.fixture
def ukey() -> LocalSigner:
    return LocalSigner(new_key())


async def test_a_statement_is_what_was_signed(ukey: LocalSigner) -> None:
    kmc = LocalSigner(new_key())
    signed = await countersign(await sign(LEASE, ukey), kmc)
    for signer in (ukey, kmc):
        assert verify(signed, LeaseStatement, [signer.public_key]) == LEASE
    with pytest.raises(StatementForged):
        verify(signed, LeaseStatement, [LocalSigner(new_key()).public_key])
    with pytest.raises(StatementForged):
        verify(signed, LeaseStatement, [])


async def test_every_changed_byte_is_found(ukey: LocalSigner) -> None:
    signed = await sign(LEASE, ukey)
    for index in range(len(signed.payload)):
        payload = bytearray(signed.payload)
        payload[index] ^= 1
        with pytest.raises(StatementForged):
            verify(Signed(signed.kind, bytes(payload), signed.signatures), LeaseStatement, [ukey.public_key])


async def test_a_signature_over_one_kind_is_none_over_another(ukey: LocalSigner) -> None:
    signed = await sign(LEASE, ukey)
    with pytest.raises(StatementForged):
        verify(signed, LoginStatement, [ukey.public_key])
    with pytest.raises(StatementForged):
        verify(Signed(LoginStatement.KIND, signed.payload, signed.signatures), LoginStatement, [ukey.public_key])


async def test_a_good_signature_over_nonsense_is_malformed(ukey: LocalSigner) -> None:
    signed = await countersign(Signed(LeaseStatement.KIND, b"{}"), ukey)
    with pytest.raises(Malformed):
        verify(signed, LeaseStatement, [ukey.public_key])
    extra = msgspec.json.encode({**msgspec.to_builtins(LEASE), "unknown": 1})
    with pytest.raises(Malformed):
        verify(await countersign(Signed(LeaseStatement.KIND, extra), ukey), LeaseStatement, [ukey.public_key])


async def test_keys_that_are_none_count_for_nothing(ukey: LocalSigner) -> None:
    signed = await sign(LEASE, ukey)
    other = public_key_der(ed25519.Ed25519PrivateKey.generate().public_key())
    for spki in (b"garbage", other):
        forged = Signed(signed.kind, signed.payload, (Signature(fingerprint(spki), signed.signatures[0].value),))
        with pytest.raises(StatementForged):
            verify(forged, LeaseStatement, [spki])


async def test_too_much_is_refused(ukey: LocalSigner) -> None:
    signed = await sign(LEASE, ukey)
    with pytest.raises(StatementForged):
        verify(Signed(signed.kind, signed.payload, signed.signatures * 5), LeaseStatement, [ukey.public_key])
    with pytest.raises(StatementForged):
        verify(Signed(signed.kind, b" " * 70000, signed.signatures), LeaseStatement, [ukey.public_key])
