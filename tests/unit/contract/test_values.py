"""Ids, identities, errors, algorithms, headers: what is well formed and what is refused."""

import pickle

import msgspec
import pytest

from cipherfleet.contract import ids
from cipherfleet.contract.algorithms import REGISTRY, algorithm, by_number
from cipherfleet.contract.ciphertext import HEADER_BYTES, Header, chunk_nonce, sealed_length
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    CertificateInvalid,
    CipherfleetError,
    CiphertextInvalid,
    CiphertextTruncated,
    ErrorBody,
    KeyUnknown,
    Malformed,
    PeerError,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.statements import signing_input
from cipherfleet.contract.vcc import (
    CHUNK_BYTES,
    COMPLETION,
    COMPLETIONS_AT,
    DESCRIPTOR,
    MAX_PARAMETER_BYTES,
    MAX_SUBMIT_BYTES,
    REGION_AT,
    REGION_BYTES,
    SUBMISSIONS_AT,
    Descriptor,
    Operation,
)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (ids.ConsumerId, "acme-2", ["", "-a", "a-", "A", "a/b", "..", "a" * 33, "a\n"]),
        (ids.VcmId, ids.new_vcm_id(), ["vcm-", "vcm-00000000000", "vcm-00000000000g", "../vcm-000000000000"]),
        (ids.KeyId, ids.new_key_id(), ["", "0" * 31, "0" * 33, "g" * 32]),
        (ids.CardId, ids.new_card_id(ids.MachineId("m1")), ["card-m1", "card-x1-00000000"]),
        (ids.TokenId, ids.new_token_id(), ["0" * 15]),
        (ids.MachineId, "m1", ["m", "1", "m12345", "m1\n"]),
        (ids.Serial, "1f", ["", "G", "1" * 41]),
    ],
    ids=["consumer", "vcm", "key", "card", "token", "machine", "serial"],
)
def test_ids_are_checked_when_they_are_decoded(kind: type[str], good: str, bad: list[str]) -> None:
    assert msgspec.convert(good, kind) == good
    for wrong in bad:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, kind)


@pytest.mark.parametrize(
    "identity",
    [
        Identity(Role.KMC, "kmc"),
        Identity(Role.MACHINE, "m1"),
        Identity(Role.VCM, "vcm-00000000000a", ids.ConsumerId("acme")),
        Identity(Role.APPLICATION, "billing", ids.ConsumerId("acme")),
    ],
)
def test_identities_survive_their_uri(identity: Identity) -> None:
    assert Identity.parse(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "cipherfleet:kmc/-",
        "cipherfleet:root/-/kmc",
        "other:kmc/-/kmc",
        "cipherfleet:kmc/acme/kmc",
        "cipherfleet:vcm/-/v",
        "cipherfleet:vcm/acme/../x",
        "cipherfleet:vcm/ACME/v",
        "cipherfleet:kmc/-/KMC",
    ],
)
def test_what_is_no_identity_is_refused(uri: str) -> None:
    with pytest.raises(CertificateInvalid):
        Identity.parse(uri)


def test_names_differ_between_consumers_and_roles() -> None:
    names = {Identity(role, "x", ids.ConsumerId(c)).dns_name for role in (Role.VCM, Role.APPLICATION) for c in ("acme", "globex")}
    assert len(names) == 4


def test_every_error_code_has_a_class_and_travels() -> None:
    for code, kind in CipherfleetError.codes().items():
        error = kind("what is wrong", "what to do")
        back = CipherfleetError.from_body(error.to_reply().error)
        assert type(back) is kind
        assert (back.code, back.message, back.hint) == (code, "what is wrong", "what to do")
        assert 400 <= error.status < 600
        assert isinstance(pickle.loads(pickle.dumps(error)), kind)  # noqa: S301


def test_an_unknown_code_is_a_peer_error() -> None:
    error = CipherfleetError.from_body(ErrorBody("from-the-future", "message"))
    assert isinstance(error, PeerError)
    assert "from-the-future" in error.message


def test_a_code_is_defined_once() -> None:
    with pytest.raises(RuntimeError, match="twice"):
        type("Again", (CipherfleetError,), {"code": KeyUnknown.code})


def test_algorithms_are_found_by_name_and_number() -> None:
    assert algorithm("aes-256-gcm") is REGISTRY["AES-256-GCM"]
    for known in REGISTRY.values():
        assert by_number(known.number) is known
    for wrong in ("AES", ""):
        with pytest.raises(AlgorithmUnknown):
            algorithm(wrong)
    with pytest.raises(AlgorithmUnknown):
        by_number(65535)


def test_headers_survive_and_bad_ones_are_refused() -> None:
    header = Header(1, ids.new_key_id(), 7, b"s" * 32)
    raw = header.encode()
    assert len(raw) == HEADER_BYTES
    assert Header.decode(raw + b"rest") == header
    for length in range(HEADER_BYTES):
        with pytest.raises(CiphertextTruncated):
            Header.decode(raw[:length])
    with pytest.raises(CiphertextInvalid):
        Header.decode(b"XXXX" + raw[4:])
    with pytest.raises(CiphertextInvalid):
        Header.decode(msgspec.structs.replace(header, chunk_bytes=1).encode())


def test_chunk_nonces_are_unique() -> None:
    nonces = {chunk_nonce(i, last=last) for i in range(1000) for last in (False, True)}
    assert len(nonces) == 2000
    assert all(len(n) == 12 for n in nonces)


@pytest.mark.parametrize(("size", "chunks"), [(0, 1), (1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (3 * CHUNK_BYTES, 3)])
def test_sealed_length(size: int, chunks: int) -> None:
    assert sealed_length(size) == HEADER_BYTES + size + 16 * chunks


def test_signing_input_is_unambiguous() -> None:
    inputs = {signing_input(k, p) for k, p in [("a", b"b c"), ("a b", b"c"), ("a", b"b"), ("ab", b""), ("", b"ab")]}
    assert len(inputs) == 5


GOOD = Descriptor(Operation.RUN, 5, 9, 0, 2, 2, MAX_SUBMIT_BYTES, 100, REGION_BYTES - 100)


def test_a_descriptor_fits_its_slot_and_comes_back() -> None:
    assert DESCRIPTOR.size == 64
    assert COMPLETION.size == 32
    assert Descriptor.decode(GOOD.encode()) == GOOD
    assert SUBMISSIONS_AT % 64 == COMPLETIONS_AT % 64 == REGION_AT % 4096 == 0


@pytest.mark.parametrize(
    "bad",
    [
        GOOD._replace(parameter_bytes=MAX_PARAMETER_BYTES + 1),
        GOOD._replace(data_bytes=MAX_SUBMIT_BYTES + 1),
        GOOD._replace(parameters_at=REGION_BYTES - 1),
        GOOD._replace(data_at=2**32 - 1),
        GOOD._replace(data_at=REGION_BYTES - MAX_SUBMIT_BYTES + 1),
        GOOD._replace(room_at=101),
        GOOD._replace(room_at=2**32 - 1, room_bytes=2**32 - 1),
    ],
)
def test_descriptors_are_bounded(bad: Descriptor) -> None:
    with pytest.raises(Malformed):
        Descriptor.decode(bad.encode())


def test_a_descriptor_has_no_flags() -> None:
    raw = bytearray(GOOD.encode())
    raw[2] = 1
    with pytest.raises(Malformed):
        Descriptor.decode(bytes(raw))
