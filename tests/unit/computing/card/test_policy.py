"""The card enforces the policy that the Ukey signed into the lease, whatever the VCM asks."""

import time

import msgspec
import pytest

from cipherfleet.channel import codec
from cipherfleet.computing.card_function import VirtualFunction
from cipherfleet.contract.algorithms import REGISTRY, Kind
from cipherfleet.contract.ciphertext import HEADER_BYTES
from cipherfleet.contract.errors import LeaseForged, LeaseStale, OutOfOrder, PolicyRefused
from cipherfleet.contract.escrow import EscrowRow, VersionAttributes
from cipherfleet.contract.ids import new_key_id
from cipherfleet.contract.policy import BUILT_IN, DAY_S, INTERNATIONAL, Policy, Profile
from cipherfleet.contract.vcc import (
    CHUNK_BYTES,
    BatchAnswer,
    BatchItem,
    BatchRequest,
    CardDescription,
    DataKeyRequest,
    Operation,
    RowRequest,
    StreamRequest,
    Verb,
)
from tests.unit.computing.card.consumer import CARD, CERTIFIED, KMC_KEY, Function, signed, transport


def under(policy: Policy, function: Function | None = None) -> Function:
    """A function whose newest lease carries ``policy``."""
    function = function or Function()
    nonce = bytes(function.do(Operation.LEASE_NONCE).data)
    statement = msgspec.structs.replace(function.consumer.statement(nonce, vcm=function.vcm), policy=policy)
    function.do(Operation.LEASE, signed(statement, function.consumer.ukey, KMC_KEY))
    return function


@pytest.mark.parametrize("profile", BUILT_IN)
def test_each_profile_lets_in_what_the_registry_says(profile: str) -> None:
    function = under(BUILT_IN[profile])
    for chosen in REGISTRY.values():
        allowed = profile in chosen.profiles
        if chosen.kind is Kind.DIGEST:
            request = StreamRequest(Verb.DIGEST, digest=chosen.name)
            if allowed:
                function.run(request, b"x")
            else:
                with pytest.raises(PolicyRefused, match="rule profile"):
                    function.run(request, b"x")
        elif chosen.family != "RSA":  # its keys take seconds to make, and no rule is about them alone
            if allowed:
                function.generate(chosen.name)
            else:
                with pytest.raises(PolicyRefused, match="rule profile"):
                    function.generate(chosen.name)


def test_a_change_ends_the_streams_that_were_begun_before_it() -> None:
    """Else a VCM could hold one open and go on protecting under what the consumer has given up."""
    function = Function()
    handle, _ = function.generate("ChaCha20-Poly1305")
    stream = function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handle).value
    under(INTERNATIONAL, function)
    function.do(Operation.UPDATE, handle=stream, data=bytes(CHUNK_BYTES))  # the same policy once more is no change
    under(BUILT_IN["fips"], function)
    with pytest.raises(OutOfOrder):
        function.do(Operation.FINISH, handle=stream, data=b"data")


def test_a_vcm_cannot_make_a_key_younger_than_it_is() -> None:
    function = Function()
    attributes = codec.encode(VersionAttributes("AES-256-GCM", time.time() + 1000 * DAY_S))
    row = codec.decode(function.do(Operation.GENERATE, RowRequest(new_key_id(), 1, attributes)).parameters, EscrowRow)
    assert codec.decode(row.attributes, VersionAttributes).created_at <= time.time()


def test_a_change_is_in_force_with_the_next_lease_and_old_data_stays_readable() -> None:
    function = Function()
    handle, row = function.generate("ChaCha20-Poly1305")
    ciphertext = function.run(StreamRequest(Verb.ENCRYPT), b"x", handle=handle)
    opening = StreamRequest(Verb.DECRYPT, header=ciphertext[:HEADER_BYTES])
    under(BUILT_IN["fips"], function)
    assert codec.decode(function.do(Operation.DESCRIBE).parameters, CardDescription).policy == BUILT_IN["fips"]
    for refused in (StreamRequest(Verb.ENCRYPT), StreamRequest(Verb.REENCRYPT, header=opening.header, target=handle)):
        with pytest.raises(PolicyRefused):
            function.run(refused, ciphertext[HEADER_BYTES:], handle=handle)
    with pytest.raises(PolicyRefused):
        function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handle)
    with pytest.raises(PolicyRefused):
        function.do(Operation.DATA_KEY, DataKeyRequest(32, True), handle=handle)
    assert function.run(opening, ciphertext[HEADER_BYTES:], handle=handle) == b"x"
    again = function.do(Operation.LOAD, row).value
    under(Policy("strict", Profile.FIPS, legacy=False), function)
    for number in (handle, again):
        with pytest.raises(PolicyRefused):
            function.run(opening, ciphertext[HEADER_BYTES:], handle=number)
    under(INTERNATIONAL, function)
    assert function.run(StreamRequest(Verb.ENCRYPT), b"x", handle=handle)


def test_each_item_of_a_batch_is_under_the_policy() -> None:
    function = Function()
    handles = [function.generate(name)[0] for name in ("AES-256-GCM", "SM4-GCM")]
    under(BUILT_IN["gm"], function)
    items = tuple(BatchItem(StreamRequest(Verb.ENCRYPT), handle, 1) for handle in handles)
    answer = function.do(Operation.BATCH, BatchRequest((*items, BatchItem(StreamRequest(Verb.DIGEST, digest="SHA-256")))), data=b"xy")
    results = codec.decode(answer.parameters, BatchAnswer).results
    assert [result.error.code if result.error else "" for result in results] == ["policy-refused", "", "policy-refused"]


def test_bare_brought_and_old_keys() -> None:
    function = Function()
    old, _ = function.generate("AES-256-GCM")  # made 1.5 seconds after 1970
    under(Policy("tight", bare=False, max_age_days=30), function)
    with pytest.raises(PolicyRefused, match="rule max-age-days"):
        function.run(StreamRequest(Verb.ENCRYPT), b"x", handle=old)
    for name, bare in (("AES-256-GCM", True), ("AES-256-CBC", False)):
        with pytest.raises(PolicyRefused, match="rule bare"):
            function.do(Operation.GENERATE, RowRequest(new_key_id(), 1, codec.encode(VersionAttributes(name, 1.5, bare=bare))))
    assert DAY_S == 24 * 3600


def test_the_age_is_by_the_wall_clock() -> None:
    function = Function(serving=False)
    now = [1.5 + 30 * DAY_S]
    function.inner = VirtualFunction(
        CARD, function.vcm, function.consumer.name, transport(), lambda: CERTIFIED, function.clock, wall_clock=lambda: now[0]
    )
    function.load_cmk()
    under(Policy("monthly", max_age_days=30), function)
    handle, _ = function.generate("AES-256-GCM")
    assert function.run(StreamRequest(Verb.ENCRYPT), b"x", handle=handle)
    now[0] += 1
    with pytest.raises(PolicyRefused):
        function.run(StreamRequest(Verb.ENCRYPT), b"x", handle=handle)


def test_nobody_but_the_ukey_sets_it() -> None:
    """Neither the KMC, which countersigns, nor who relays a lease."""
    function = under(BUILT_IN["gm"])
    nonce = bytes(function.do(Operation.LEASE_NONCE).data)
    loose = msgspec.structs.replace(function.consumer.statement(nonce, vcm=function.vcm), policy=INTERNATIONAL)
    strict = signed(msgspec.structs.replace(loose, policy=BUILT_IN["gm"]), function.consumer.ukey, KMC_KEY)
    for forged in (signed(loose, KMC_KEY), signed(loose, KMC_KEY, KMC_KEY), msgspec.structs.replace(strict, payload=codec.encode(loose))):
        with pytest.raises(LeaseForged):
            function.do(Operation.LEASE, forged)
    with pytest.raises(PolicyRefused):
        function.generate("AES-256-GCM")


def lease(function: Function, policy: Policy, epoch: int, sequence: int) -> None:
    nonce = bytes(function.do(Operation.LEASE_NONCE).data)
    statement = function.consumer.statement(nonce, vcm=function.vcm)
    changed = msgspec.structs.replace(statement, policy=policy, policy_epoch=epoch, policy_sequence=sequence)
    function.do(Operation.LEASE, signed(changed, function.consumer.ukey, KMC_KEY))


def test_a_lease_with_an_older_policy_is_stale() -> None:
    """As of a spare Ukey from which the KMC withholds what another one has set."""
    function, fips = Function(), BUILT_IN["fips"]
    lease(function, fips, 1, 4)
    for epoch, sequence in ((1, 3), (1, 0), (0, 9)):
        with pytest.raises(LeaseStale, match="older policy"):
            lease(function, INTERNATIONAL, epoch, sequence)
    with pytest.raises(PolicyRefused):
        function.run(StreamRequest(Verb.DIGEST, digest="SM3"), b"x")
    lease(function, fips, 1, 4)  # the same again
    lease(function, BUILT_IN["gm"], 2, 1)
    function.run(StreamRequest(Verb.DIGEST, digest="SM3"), b"x")
