"""A virtual function: the CMK in two shares, keys in and out, and nobody else's."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherfleet.channel import codec
from cipherfleet.channel.certificates import public_key_der
from cipherfleet.computing import card_tables
from cipherfleet.computing.card_request import Work
from cipherfleet.computing.engine_memory import no_pause, wipe
from cipherfleet.computing.engine_wrap import TransportKeys
from cipherfleet.contract.algorithms import REGISTRY, Kind
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    CipherfleetError,
    CiphertextInvalid,
    CmkInvalid,
    EscrowRowForeign,
    EscrowRowTampered,
    ForeignConsumer,
    Internal,
    KeyExhausted,
    KeyUnknown,
    LeaseForged,
    LimitReached,
    Malformed,
    OutOfOrder,
    ServiceOff,
    StatementForged,
    TooLarge,
    Unsupported,
    WrongKeyType,
)
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes, associated_data
from cipherfleet.contract.ids import ApplicationName, CardId, ConsumerId, new_key_id
from cipherfleet.contract.statements import ApplicationStatement, LoginStatement, RevokedUkey, Right
from cipherfleet.contract.vcc import (
    CHUNK_BYTES,
    MAX_STREAMS,
    CardDescription,
    CmkDelivery,
    DataKeyRequest,
    Operation,
    RandomRequest,
    RowRequest,
    StreamRequest,
    Verb,
)
from tests.unit.computing.card.consumer import (
    CARD,
    KMC_KEY,
    OTHER_VCM,
    VCM,
    Consumer,
    Function,
    key_attributes,
    signed,
)
from tests.unit.computing.card.proof import proves_itself

KEYED = [a.name for a in REGISTRY.values() if a.kind is not Kind.DIGEST]


@pytest.fixture
def function() -> Function:
    return Function()


# -- the CMK -----------------------------------------------------------------------------------------------------------


def test_the_key_chain_by_hand(function: Function) -> None:
    """A row that the card wrapped opens with the chain as the design writes it down."""
    consumer = function.consumer
    _, row = function.generate("HMAC-SHA-256")
    cmk = HKDF(hashes.SHA256(), 32, b"cipherfleet cmk v1", b"alice").derive(consumer.hsm_share + consumer.ukey_share)
    wrapping = HKDF(hashes.SHA256(), 32, b"", b"cipherfleet dek wrap v1").derive(cmk)
    material = AESGCM(wrapping).decrypt(
        row.wrapped[:12], row.wrapped[12:], associated_data(row.consumer, row.key, row.version, row.attributes)
    )
    assert len(material) == 32
    function.do(Operation.DROP)
    with pytest.raises(ServiceOff):
        function.do(Operation.LOAD, row)


def test_what_the_sealed_share_brings(function: Function) -> None:
    described = function.describe()
    assert (described["epoch"], described["sequence"], described["loaded"], described["serving"]) == (1, 3, True, True)
    assert (described["card"], described["vcm"], described["consumer"]) == (CARD, VCM, "alice")


def refused_deliveries() -> dict[str, Callable[[Consumer], CmkDelivery]]:
    def with_share(**changes: object) -> Callable[[Consumer], CmkDelivery]:
        return lambda c: c.delivery(
            msgspec.structs.replace(c.share(), **changes), info=f"cipherfleet sealed share v1|{CARD}|{VCM}".encode()
        )

    p384 = public_key_der(ec.generate_private_key(ec.SECP384R1()).public_key())
    return {
        "another card's HPKE key": lambda c: c.delivery(hpke_public=TransportKeys().hpke_public_key),
        "another card's RSA key": lambda c: c.delivery(rsa_public=rsa.generate_private_key(65537, 3072).public_key()),
        "another VCM's seal": lambda c: c.delivery(c.share(vcm=OTHER_VCM)),
        "another card's seal": lambda c: c.delivery(c.share(card=CardId("card-m1-00000000"))),
        "another consumer inside": with_share(consumer=ConsumerId("bob")),
        "another card inside": with_share(card=CardId("card-m1-00000000")),
        "another VCM inside": with_share(vcm=OTHER_VCM),
        "a short share": with_share(ukey_share=b"s" * 31),
        "no Ukey key": with_share(ukey_public_keys=()),
        "too many Ukey keys": with_share(ukey_public_keys=(Consumer().spki,) * 9),
        "a Ukey that counts and is revoked": lambda c: with_share(revoked_ukeys=(RevokedUkey(c.spki, 7),))(c),
        "a revoked Ukey key that is none": with_share(revoked_ukeys=(RevokedUkey(b"none", 7),)),
        "a Ukey key that is none": with_share(ukey_public_keys=(b"none",)),
        "a Ukey key of another curve": with_share(ukey_public_keys=(p384,)),
        "a short HSM share": lambda c: c.delivery(hsm_share=b"h" * 31),
        "no JSON inside": lambda c: c.delivery(plaintext=b"\xff not JSON"),
        "an empty seal": lambda c: CmkDelivery(c.delivery().wrapped_hsm_share, b""),
        "an empty wrap": lambda c: CmkDelivery(b"", c.delivery().sealed_ukey_share),
        "noise": lambda c: CmkDelivery(os.urandom(384), os.urandom(1400)),
    }


@pytest.mark.parametrize("case", sorted(refused_deliveries()))
def test_a_delivery_for_somebody_else_is_refused(case: str) -> None:
    function = Function(serving=False)
    with pytest.raises(CmkInvalid):
        function.do(Operation.LOAD_CMK, refused_deliveries()[case](function.consumer))
    assert function.describe()["loaded"] is False


def test_every_byte_of_a_delivery_counts() -> None:
    function = Function(serving=False)
    delivery = function.consumer.delivery()
    for field in ("wrapped_hsm_share", "sealed_ukey_share"):
        whole: bytes = getattr(delivery, field)
        for position in range(0, len(whole), 29):
            changed = bytearray(whole)
            changed[position] ^= 1
            with pytest.raises(CmkInvalid):
                function.do(Operation.LOAD_CMK, msgspec.structs.replace(delivery, **{field: bytes(changed)}))


def test_a_second_delivery_of_the_same_cmk_brings_news_and_disturbs_nothing(function: Function) -> None:
    handle, _ = function.generate()
    function.do(Operation.LOAD_CMK, function.consumer.delivery(msgspec.structs.replace(function.consumer.share(), sequence=7)))
    assert function.describe()["sequence"] == 7
    assert function.run(StreamRequest(Verb.ENCRYPT), b"x", handle=handle)
    with pytest.raises(CmkInvalid):
        function.do(Operation.LOAD_CMK, function.consumer.delivery())
    function.do(Operation.DROP)
    with pytest.raises(CmkInvalid):
        function.do(Operation.LOAD_CMK, function.consumer.delivery())


def test_a_vcc_takes_one_cmk_in_its_life(function: Function) -> None:
    """Whoever could seal another share (HPKE proves no sender) cannot put another CMK under a confirmed service."""
    handle, _ = function.generate()
    genuine, function.consumer.hsm_share = function.consumer.hsm_share, secrets.token_bytes(32)
    with pytest.raises(CmkInvalid):
        function.load_cmk()
    function.run(StreamRequest(Verb.ENCRYPT), b"x", handle=handle)
    function.do(Operation.DROP)
    with pytest.raises(CmkInvalid):
        function.load_cmk()
    function.consumer.hsm_share = genuine
    function.load_cmk()


def test_a_recorded_release_brings_no_cmk_back(function: Function) -> None:
    recorded = function.consumer.delivery(function.consumer.share(vcm=VCM))
    function.do(Operation.LOAD_CMK, recorded)
    function.do(Operation.DROP)
    with pytest.raises(CmkInvalid):
        function.do(Operation.LOAD_CMK, recorded)


def test_confirmation_by_hand(function: Function) -> None:
    nonce = secrets.token_bytes(32)
    key = HKDF(hashes.SHA256(), 32, b"", b"cipherfleet card confirm v1").derive(function.consumer.ukey_share)
    message = b"cipherfleet card confirm v1" + CARD.encode() + b"|" + VCM.encode() + b"|" + nonce
    assert function.do(Operation.CONFIRM, data=nonce).data == hmac.digest(key, message, hashlib.sha256)
    with pytest.raises(Malformed):
        function.do(Operation.CONFIRM, data=b"short")


def test_drop_zeroises(function: Function) -> None:
    handles = [function.generate(name)[0] for name in ("AES-256-GCM", "HMAC-SHA-256", "Ed25519")]
    function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handles[0])
    keys = [function.inner._keys.get(h) for h in handles]
    secrets_ = [k.secret for k in keys[:2]]
    chain = function.inner._chain
    assert chain is not None
    assert "..." in repr(chain)
    function.do(Operation.DROP)
    assert not any(any(s) for s in secrets_)
    assert not any(chain.wrapping + chain.confirm)
    assert all(k.private is None and not k.secret for k in keys)
    assert len(function.inner._streams) == 0
    with pytest.raises(ServiceOff):
        function.do(Operation.RANDOM, RandomRequest(1))
    function.do(Operation.DROP)


def test_wiping_reaches_what_libraries_hand_out() -> None:
    secret = secrets.token_bytes(32)
    wipe(secret)
    assert secret == bytes(32)
    for short in (b"", b"x", bytearray()):
        wipe(short)


def test_a_lease_counts_with_the_kmcs_key_that_the_ukey_knows() -> None:
    """Whoever certified the card may have named another key."""
    consumer = Consumer()
    function = Function(consumer, serving=False)
    other = public_key_der(ec.generate_private_key(ec.SECP256R1()).public_key())
    function.do(Operation.LOAD_CMK, consumer.delivery(msgspec.structs.replace(consumer.share(), kmc_signing_key=other)))
    with pytest.raises(LeaseForged):
        function.do(Operation.LEASE, consumer.lease(bytes(function.do(Operation.LEASE_NONCE).data), 6000))
    described = codec.decode(function.do(Operation.DESCRIBE).parameters, CardDescription)
    assert described.kmc_signing_key == other
    nameless = msgspec.structs.replace(consumer.share(), kmc_signing_key=b"none")
    with pytest.raises(CmkInvalid):
        Function(consumer, serving=False).do(Operation.LOAD_CMK, consumer.delivery(nameless))


# -- statements --------------------------------------------------------------------------------------------------------


def test_statements_of_the_consumer_alone(function: Function) -> None:
    alice = function.consumer
    application = ApplicationStatement(alice.name, ApplicationName("shop"), b"k" * 32, (Right.ENCRYPT,), 2**31, 1)
    login = LoginStatement(alice.name, VCM, b"n" * 32)
    for statement in (application, login):
        good = signed(statement, alice.ukey)
        assert function.do(Operation.VERIFY_STATEMENT, good).data == codec.encode(statement)
        twice = msgspec.structs.replace(good, signatures=good.signatures * 2)
        for bad in (
            signed(statement),
            signed(statement, KMC_KEY),
            signed(statement, alice.ukey, KMC_KEY),
            twice,
            msgspec.structs.replace(good, payload=good.payload + b" "),
        ):
            with pytest.raises(StatementForged):
                function.do(Operation.VERIFY_STATEMENT, bad)
    with pytest.raises(StatementForged):
        function.do(Operation.VERIFY_STATEMENT, signed(alice.statement(b"n" * 16), alice.ukey))
    with pytest.raises(StatementForged):
        function.do(Operation.VERIFY_STATEMENT, msgspec.structs.replace(signed(application, alice.ukey), kind=LoginStatement.KIND))
    with pytest.raises(ForeignConsumer):
        function.do(Operation.VERIFY_STATEMENT, signed(msgspec.structs.replace(login, consumer=ConsumerId("bob")), alice.ukey))


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYED)
def test_a_key_goes_out_wrapped_and_comes_back(function: Function, name: str) -> None:
    handle, row = function.generate(name.lower(), version=4)
    attributes = msgspec.json.decode(row.attributes, type=VersionAttributes)
    assert (row.consumer, row.version, attributes.algorithm, attributes.created_at) == ("alice", 4, name, 1.5)
    again = function.do(Operation.LOAD, row).value
    assert again != handle
    assert function.do(Operation.UNLOAD, handle=handle) is not None
    proves_itself(function, REGISTRY[name], again, attributes.public_key)


def test_no_two_wraps_are_the_same(function: Function) -> None:
    _, one = function.generate()
    _, two = function.generate()
    assert one.wrapped[:12] != two.wrapped[:12]


def test_a_row_that_was_changed_moved_or_swapped(function: Function) -> None:
    _, row = function.generate(version=2)
    _, other = function.generate(version=2)
    attributes = msgspec.json.decode(row.attributes, type=VersionAttributes)
    changed = {
        "key": new_key_id(),
        "version": 1,
        "attributes": codec.encode(msgspec.structs.replace(attributes, algorithm="HMAC-SHA-256")),
        "wrapped": other.wrapped,
    }
    for field, value in changed.items():
        with pytest.raises(EscrowRowTampered):
            function.do(Operation.LOAD, msgspec.structs.replace(row, **{field: value}))
    for position in range(len(row.wrapped)):
        wrapped = bytearray(row.wrapped)
        wrapped[position] ^= 128
        with pytest.raises(EscrowRowTampered):
            function.do(Operation.LOAD, msgspec.structs.replace(row, wrapped=bytes(wrapped)))
    for length in (0, 12, 27, len(row.wrapped) - 1):
        with pytest.raises(EscrowRowTampered):
            function.do(Operation.LOAD, msgspec.structs.replace(row, wrapped=row.wrapped[:length]))
    assert function.do(Operation.LOAD, row).value


def test_a_row_of_another_consumer(function: Function) -> None:
    bob = Function(Consumer("bob"))
    _, row = bob.generate()
    with pytest.raises(EscrowRowForeign):
        function.do(Operation.LOAD, row)
    with pytest.raises(EscrowRowTampered):
        function.do(Operation.LOAD, msgspec.structs.replace(row, consumer=function.consumer.name))


def test_attributes_of_a_whole_key(function: Function) -> None:
    key = new_key_id()
    sealed = function.do(Operation.SEAL_ATTRIBUTES, RowRequest(key, 0, key_attributes()))
    row = msgspec.json.decode(sealed.parameters, type=EscrowRow)
    assert (row.consumer, row.key, row.version, row.attributes) == ("alice", key, 0, key_attributes())
    function.do(Operation.VERIFY_ATTRIBUTES, row)
    for tampered in (
        msgspec.structs.replace(row, attributes=key_attributes(2)),
        msgspec.structs.replace(row, key=new_key_id()),
        msgspec.structs.replace(row, wrapped=row.wrapped[:-1] + bytes([row.wrapped[-1] ^ 1])),
    ):
        with pytest.raises(EscrowRowTampered):
            function.do(Operation.VERIFY_ATTRIBUTES, tampered)
    with pytest.raises(EscrowRowForeign):
        function.do(Operation.VERIFY_ATTRIBUTES, msgspec.structs.replace(row, consumer=ConsumerId("bob")))
    _, version_row = function.generate()
    with pytest.raises(Malformed):
        function.do(Operation.VERIFY_ATTRIBUTES, version_row)
    with pytest.raises(Malformed):
        function.do(Operation.LOAD, row)
    with pytest.raises(Malformed):
        function.do(Operation.SEAL_ATTRIBUTES, RowRequest(key, 1, key_attributes()))
    with pytest.raises(Malformed):
        function.do(Operation.SEAL_ATTRIBUTES, RowRequest(key, 0, b"{}"))
    with pytest.raises(TooLarge):
        function.do(Operation.SEAL_ATTRIBUTES, RowRequest(key, 0, bytes(70_000)))


def test_what_cannot_be_generated(function: Function) -> None:
    def request(name: str = "AES-256-GCM", version: int = 1, attributes: bytes = b"") -> RowRequest:
        return RowRequest(new_key_id(), version, attributes or codec.encode(VersionAttributes(name, 1.0)))

    cases: list[tuple[RowRequest, type[CipherfleetError]]] = [
        (request("ROT13"), AlgorithmUnknown),
        (request("SHA-256"), WrongKeyType),
        (request(version=0), Malformed),
        (request(version=2**32), Malformed),
        (request(version=-1), Malformed),
        (request(attributes=b"[]"), Malformed),
        (request(attributes=b"{" * 70_000), TooLarge),
    ]
    for bad, error in cases:
        with pytest.raises(error):
            function.do(Operation.GENERATE, bad)
    assert function.inner.keys == 0


def test_the_number_of_keys_has_an_end(function: Function) -> None:
    function.inner.limit_keys(2)
    _, row = function.generate()
    handle, _ = function.generate()
    with pytest.raises(LimitReached):
        function.generate()
    with pytest.raises(LimitReached):
        function.do(Operation.LOAD, row)
    function.do(Operation.UNLOAD, handle=handle)
    function.do(Operation.LOAD, row)


def test_unload_ends_the_keys_streams(function: Function) -> None:
    one, _ = function.generate()
    two, _ = function.generate("SM4-GCM")
    ciphertext = function.run(StreamRequest(Verb.ENCRYPT), b"data", handle=one)
    own = function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=two).value
    passing = function.do(Operation.BEGIN, StreamRequest(Verb.REENCRYPT, header=ciphertext[:HEADER_BYTES], target=two), handle=one).value
    digest = function.do(Operation.BEGIN, StreamRequest(Verb.DIGEST, digest="SM3")).value
    function.do(Operation.UNLOAD, handle=two)
    for stream in (own, passing):
        with pytest.raises(OutOfOrder):
            function.do(Operation.FINISH, handle=stream)
    assert function.do(Operation.FINISH, handle=digest).data
    with pytest.raises(KeyUnknown):
        function.do(Operation.UNLOAD, handle=two)


def test_a_slow_key_made_for_a_cmk_that_is_gone(function: Function) -> None:
    request = RowRequest(new_key_id(), 1, codec.encode(VersionAttributes("RSA-3072-PSS", 1.0)))
    work = function.inner.execute(Operation.GENERATE, 0, codec.encode(request), b"")
    assert isinstance(work, Work)
    material = work.run(no_pause)
    function.do(Operation.DROP)
    with pytest.raises(ServiceOff):
        function.inner.complete(work, material)
    assert not any(material)
    function.load_cmk()
    function.renew()
    material = work.run(no_pause)
    with pytest.raises(ServiceOff):
        function.inner.complete(work, material)
    assert not any(material)


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_stream_from_begin_to_finish(function: Function) -> None:
    handle, _ = function.generate()
    target, _ = function.generate("SM4-GCM")
    begun = function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT, context=b"c"), handle=handle)
    header = bytes(begun.data)
    body = bytes(function.do(Operation.UPDATE, handle=begun.value, data=bytes(2 * CHUNK_BYTES)).data)
    body += function.do(Operation.FINISH, handle=begun.value, data=b"end").data
    with pytest.raises(OutOfOrder):
        function.do(Operation.FINISH, handle=begun.value)
    request = StreamRequest(Verb.REENCRYPT, context=b"c", header=header, target=target, target_context=b"d")
    moved = function.run(request, body, handle=handle)
    opening = StreamRequest(Verb.DECRYPT, context=b"d", header=moved[:HEADER_BYTES])
    assert function.run(opening, moved[HEADER_BYTES:], handle=target) == bytes(2 * CHUNK_BYTES) + b"end"


def test_an_error_ends_the_stream(function: Function) -> None:
    handle, _ = function.generate()
    stream = function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handle).value
    with pytest.raises(Malformed):
        function.do(Operation.UPDATE, handle=stream, data=b"no whole chunk")
    with pytest.raises(OutOfOrder):
        function.do(Operation.UPDATE, handle=stream, data=b"")


def test_streams_have_an_end(function: Function) -> None:
    request = StreamRequest(Verb.DIGEST, digest="SHA-256")
    streams = [function.do(Operation.BEGIN, request).value for _ in range(MAX_STREAMS)]
    with pytest.raises(LimitReached):
        function.do(Operation.BEGIN, request)
    function.do(Operation.ABORT, handle=streams[0])
    with pytest.raises(OutOfOrder):
        function.do(Operation.ABORT, handle=streams[0])
    function.do(Operation.BEGIN, request)
    assert len(set(streams)) == MAX_STREAMS


def test_held_messages_have_an_end(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_tables, "MAX_HELD_BYTES", 3 * 1024 * 1024)
    handle, _ = function.generate("Ed25519")
    streams = [function.do(Operation.BEGIN, StreamRequest(Verb.SIGN), handle=handle).value for _ in range(4)]
    for stream in streams[:3]:
        function.do(Operation.UPDATE, handle=stream, data=bytes(1024 * 1024))
    with pytest.raises(LimitReached):
        function.do(Operation.UPDATE, handle=streams[3], data=b"x")
    hashing, _ = function.generate("ECDSA-P-256")
    other = function.do(Operation.BEGIN, StreamRequest(Verb.SIGN), handle=hashing).value
    function.do(Operation.UPDATE, handle=other, data=bytes(4 * 1024 * 1024))
    assert len(function.do(Operation.FINISH, handle=streams[0]).data) == 64


def test_messages_of_a_key_version_are_counted(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_tables, "MAX_MESSAGES", 3)
    handle, row = function.generate()
    source, _ = function.generate()
    ciphertext = function.run(StreamRequest(Verb.ENCRYPT), b"1", handle=source)
    function.run(StreamRequest(Verb.ENCRYPT), b"1", handle=handle)
    function.do(Operation.DATA_KEY, DataKeyRequest(32, plaintext=False), handle=handle)
    reencrypt = StreamRequest(Verb.REENCRYPT, header=ciphertext[:HEADER_BYTES], target=handle)
    last = function.run(reencrypt, ciphertext[HEADER_BYTES:], handle=source)
    again = function.do(Operation.LOAD, row).value
    for attempt in (
        lambda: function.run(StreamRequest(Verb.ENCRYPT), b"4", handle=again),
        lambda: function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handle),
        lambda: function.do(Operation.DATA_KEY, DataKeyRequest(32, plaintext=True), handle=handle),
        lambda: function.run(reencrypt, ciphertext[HEADER_BYTES:], handle=source),
    ):
        with pytest.raises(KeyExhausted):
            attempt()
    opening = StreamRequest(Verb.DECRYPT, header=last[:HEADER_BYTES])
    assert function.run(opening, last[HEADER_BYTES:], handle=handle) == b"1"


def test_the_counters_take_bounded_memory(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_tables, "MAX_COUNTED_KEYS", 2)
    for _ in range(4):
        handle, _ = function.generate()
        function.run(StreamRequest(Verb.ENCRYPT), b"", handle=handle)
    assert len(function.inner._keys._messages) == 2


@pytest.mark.parametrize("length", [16, 32, 64])
def test_data_keys(function: Function, length: int) -> None:
    handle, _ = function.generate()
    both = function.do(Operation.DATA_KEY, DataKeyRequest(length, plaintext=True, context=b"c"), handle=handle)
    ciphertext, plaintext = bytes(both.data[: both.value]), bytes(both.data[both.value :])
    assert len(plaintext) == length
    request = StreamRequest(Verb.DECRYPT, context=b"c", header=ciphertext[:HEADER_BYTES])
    assert function.run(request, ciphertext[HEADER_BYTES:], handle=handle) == plaintext
    wrapped_only = function.do(Operation.DATA_KEY, DataKeyRequest(length, plaintext=False), handle=handle)
    assert wrapped_only.value == len(wrapped_only.data)


def test_data_keys_out_of_bounds(function: Function) -> None:
    handle, _ = function.generate()
    for length in (15, 65, -1, 2**40):
        with pytest.raises(Malformed):
            function.do(Operation.DATA_KEY, DataKeyRequest(length, plaintext=True), handle=handle)


def test_random(function: Function) -> None:
    one, two = (bytes(function.do(Operation.RANDOM, RandomRequest(32)).data) for _ in range(2))
    assert len(one) == 32
    assert one != two
    assert len(function.do(Operation.RANDOM, RandomRequest(1024 * 1024)).data) == 1024 * 1024
    with pytest.raises(TooLarge):
        function.do(Operation.RANDOM, RandomRequest(1024 * 1024 + 1))
    for length in (0, -1):
        with pytest.raises(Malformed):
            function.do(Operation.RANDOM, RandomRequest(length))


# -- two of them -------------------------------------------------------------------------------------------------------


def test_two_vccs_cannot_use_each_others_handles_and_streams() -> None:
    alice = Function()
    others = [Function(Consumer("bob"), OTHER_VCM), Function(alice.consumer, OTHER_VCM)]
    handle, _ = alice.generate()
    stream = alice.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handle).value
    for other in others:
        own, _ = other.generate()
        assert own != handle
        ciphertext = other.run(StreamRequest(Verb.ENCRYPT), b"own", handle=own)
        with pytest.raises(KeyUnknown):
            other.run(StreamRequest(Verb.ENCRYPT), b"x", handle=handle)
        with pytest.raises(KeyUnknown):
            other.do(Operation.UNLOAD, handle=handle)
        with pytest.raises(KeyUnknown):
            other.run(StreamRequest(Verb.REENCRYPT, header=ciphertext[:HEADER_BYTES], target=handle), ciphertext[HEADER_BYTES:], handle=own)
        for operation in (Operation.UPDATE, Operation.FINISH, Operation.ABORT):
            with pytest.raises(OutOfOrder):
                other.do(operation, handle=stream)
    alice.do(Operation.FINISH, handle=stream, data=b"still there")


def test_two_vccs_of_one_consumer_share_ciphertexts_not_handles() -> None:
    one = Function()
    two = Function(one.consumer, OTHER_VCM)
    handle, row = one.generate()
    ciphertext = one.run(StreamRequest(Verb.ENCRYPT), b"shared", handle=handle)
    other = two.do(Operation.LOAD, row).value
    request = StreamRequest(Verb.DECRYPT, header=ciphertext[:HEADER_BYTES])
    assert two.run(request, ciphertext[HEADER_BYTES:], handle=other) == b"shared"
    with pytest.raises(CiphertextInvalid):
        two.run(StreamRequest(Verb.DECRYPT, header=ciphertext[:HEADER_BYTES], context=b"x"), ciphertext[HEADER_BYTES:], handle=other)


FUZZED, SHAKEN = Function(), Function()
FUZZED_KEYS = [FUZZED.generate(name)[0] for name in KEYED]

# -- hostile requests --------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**16 - 1) | st.sampled_from(list(Operation)),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=200),
    st.binary(max_size=200),
)
def test_whatever_comes_gets_an_answer_or_an_error_of_ours(operation: int, handle: int, parameters: bytes, data: bytes) -> None:
    function = SHAKEN
    try:
        function.do(operation, parameters, handle=handle, data=data)
    except CipherfleetError as exc:
        assert not isinstance(exc, Internal)
    if operation in (Operation.DROP, Operation.LOAD_CMK):
        function.load_cmk()
        function.renew()


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([Operation.BEGIN, Operation.RUN]),
    st.builds(
        StreamRequest,
        st.sampled_from(Verb),
        st.binary(max_size=20),
        st.binary(max_size=80),
        st.binary(max_size=80),
        st.sampled_from(["", "SHA-256", "SM3", "AES-256-GCM", "\0"]),
        st.integers(0, 2**63),
        st.binary(max_size=20),
    ),
    st.integers(0, 6),
    st.binary(max_size=300),
)
def test_whatever_a_stream_asks_for(operation: Operation, request: StreamRequest, which: int, data: bytes) -> None:
    handles = [0, *FUZZED_KEYS]
    try:
        answer = FUZZED.do(operation, request, handle=handles[which], data=data)
    except CipherfleetError as exc:
        assert not isinstance(exc, Internal)
        return
    if operation is Operation.BEGIN:
        FUZZED.do(Operation.ABORT, handle=answer.value)


def test_unknown_operations(function: Function) -> None:
    for operation in (39, 255, 65535):
        with pytest.raises(Unsupported):
            function.do(operation)


def test_the_error_of_a_strange_parameter_shows_no_value(function: Function) -> None:
    with pytest.raises(Malformed) as refused:
        function.do(Operation.LOAD_CMK, b'{"wrapped_hsm_share": "c2VjcmV0", "sealed_ukey_share": 77}')
    assert "c2VjcmV0" not in refused.value.message
