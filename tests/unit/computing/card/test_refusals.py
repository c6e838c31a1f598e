"""What a card refuses, each by its own code: keys that are none, points that are none, sizes, and verbs that a key is not for."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x448, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherfleet.channel import codec
from cipherfleet.computing import engine
from cipherfleet.computing.engine_stream import open_stream
from cipherfleet.contract.algorithms import REGISTRY, Kind, algorithm
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.escrow import VersionAttributes
from cipherfleet.contract.ids import new_key_id
from cipherfleet.contract.vcc import MAX_BATCH, BatchAnswer, BatchItem, BatchRequest, Operation, StreamRequest, Verb
from tests.unit.computing.card.consumer import Function
from tests.unit.computing.card.proof import TWEAK, spki

PKCS8 = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
P256 = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def function() -> Function:
    return Function()


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(CipherfleetError) as error:
        work()
    return error.value.code


def brought(name: str, material: bytes) -> str:
    return refused(lambda: engine.check_material(algorithm(name), material))


def test_rsa_keys_with_a_weak_exponent() -> None:
    weak = rsa.generate_private_key(3, 2048)
    assert brought("RSA-2048-PSS", weak.private_bytes(*PKCS8)) == "rsa-exponent-weak"
    good = rsa.generate_private_key(65537, 2048)
    assert brought("RSA-3072-PSS", good.private_bytes(*PKCS8)) == "key-material-invalid"
    assert engine.check_material(algorithm("RSA-2048-OAEP"), good.private_bytes(*PKCS8))
    numbers = good.private_numbers()
    wrong = rsa.RSAPrivateNumbers(numbers.p, numbers.q, numbers.d ^ 2, numbers.dmp1, numbers.dmq1, numbers.iqmp, numbers.public_numbers)
    inconsistent = wrong.private_key(unsafe_skip_rsa_key_validation=True).private_bytes(*PKCS8)
    assert brought("RSA-2048-PSS", inconsistent) == "key-material-invalid"


@pytest.mark.parametrize(
    ("name", "material"),
    [
        ("AES-256-GCM", bytes(16)),
        ("AES-128-XTS", b"half" * 8),
        ("AES-256-KW", b""),
        ("HMAC-SHA-256", bytes(13)),
        ("HMAC-SHA-256", bytes(513)),
        ("HKDF-SHA-256", bytes(8)),
        ("ECDSA-P-256", b""),
        ("ECDSA-P-256", P256.private_bytes(*PKCS8)[:-1]),
        ("ECDSA-P-256", ec.generate_private_key(ec.SECP384R1()).private_bytes(*PKCS8)),
        ("ECDH-P-256", ed25519.Ed25519PrivateKey.generate().private_bytes(*PKCS8)),
        ("ECDSA-P-256", P256.private_bytes(PKCS8[0], PKCS8[1], serialization.BestAvailableEncryption(b"passphrase"))),
        ("X25519", x448.X448PrivateKey.generate().private_bytes(*PKCS8)),
        ("SM2", P256.private_bytes(*PKCS8)),
        ("ML-DSA-44", bytes(54)),
        ("ML-KEM-768", bytes(2400)),
        ("HPKE-ML-KEM-768-X25519", bytes(95)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}",  # some are made anew each time
)
def test_key_material_that_is_none(name: str, material: bytes) -> None:
    assert brought(name, material) == "key-material-invalid"


@pytest.mark.parametrize("scalar", [0, 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551, 2**256 - 1])
def test_private_scalars_out_of_range(scalar: int) -> None:
    """0, the order of P-256, and more."""
    good, own = P256.private_bytes(*PKCS8), P256.private_numbers().private_value.to_bytes(32, "big")
    assert brought("ECDSA-P-256", good.replace(own, scalar.to_bytes(32, "big"))) == "key-material-invalid"


FITTING: dict[Verb, set[Kind]] = {
    Verb.ENCRYPT: {Kind.AEAD, Kind.CIPHER, Kind.KEY_WRAP, Kind.PUBLIC_KEY_ENCRYPTION},
    Verb.DECRYPT: {Kind.AEAD, Kind.CIPHER, Kind.KEY_WRAP, Kind.PUBLIC_KEY_ENCRYPTION},
    Verb.REENCRYPT: {Kind.AEAD},
    Verb.SIGN: {Kind.SIGNATURE},
    Verb.VERIFY: {Kind.SIGNATURE},
    Verb.MAC: {Kind.MAC},
    Verb.VERIFY_MAC: {Kind.MAC},
    Verb.AGREE: {Kind.KEY_AGREEMENT},
    Verb.ENCAPSULATE: {Kind.KEM},
    Verb.DECAPSULATE: {Kind.KEM},
    Verb.DERIVE: {Kind.KEY_DERIVATION},
}
ONE_OF_EACH = ["AES-256-GCM", "AES-256-CBC", "AES-256-KW", "SM2-ENCRYPT", "ECDSA-P-256", "AES-256-CMAC", "X25519", "ML-KEM-768", "HKDF-SM3"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_key_does_what_its_kind_does_and_nothing_else(function: Function, name: str) -> None:
    assert {REGISTRY[n].kind for n in ONE_OF_EACH} == set(Kind) - {Kind.DIGEST}
    handle, _ = function.generate(name)
    for verb, kinds in FITTING.items():
        if REGISTRY[name].kind in kinds:
            continue
        request = StreamRequest(verb, signature=bytes(64), length=32, target=handle)
        code = refused(lambda request=request: function.run(request, b"data", handle=handle))  # type: ignore[misc]
        # a ciphertext that names its key is looked at before the key is: this one names none
        assert code in ({"wrong-key-type", "ciphertext-truncated"} if verb in (Verb.DECRYPT, Verb.REENCRYPT) else {"wrong-key-type"}), verb


def test_points_that_are_none(function: Function) -> None:
    handle, _ = function.generate("ECDH-P-256")
    good = spki(P256.public_key())
    infinity = good[: good.index(b"\x03\x42\x00")] + b"\x03\x02\x00\x00"
    infinity = b"\x30" + bytes([len(infinity) - 2]) + infinity[2:]
    for peer in (b"", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), infinity, spki(ec.generate_private_key(ec.SECP256K1()).public_key())):
        assert refused(lambda peer=peer: function.run(StreamRequest(Verb.AGREE, peer=peer), handle=handle)) == "public-key-invalid"  # type: ignore[misc]


LOW_ORDER = [  # of Curve25519, little endian: RFC 7748, section 6.1, asks to look for the zeros that they give
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order(function: Function, point: str) -> None:
    handle, _ = function.generate("X25519")
    peer = spki(x25519.X25519PublicKey.from_public_bytes(bytes.fromhex(point)))
    assert refused(lambda: function.run(StreamRequest(Verb.AGREE, peer=peer), handle=handle)) == "shared-secret-zero"


def test_x448_has_them_too(function: Function) -> None:
    handle, _ = function.generate("X448")
    for point in (bytes(56), b"\1" + bytes(55)):
        peer = spki(x448.X448PublicKey.from_public_bytes(point))
        assert refused(lambda peer=peer: function.run(StreamRequest(Verb.AGREE, peer=peer), handle=handle)) == "shared-secret-zero"  # type: ignore[misc]


def test_what_is_done_at_once_is_no_stream(function: Function) -> None:
    for name, verb in (("AES-256-KW", Verb.ENCRYPT), ("SM2-ENCRYPT", Verb.ENCRYPT), ("ML-KEM-768", Verb.ENCAPSULATE)):
        handle, _ = function.generate(name)
        assert refused(lambda handle=handle, verb=verb: function.do(Operation.BEGIN, StreamRequest(verb), handle=handle)) == "unsupported"  # type: ignore[misc]


def test_blocks_and_their_bounds(function: Function) -> None:
    handle, _ = function.generate("AES-256-CBC")
    for size in (1, 15, 17):
        stream = function.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handle).value
        update = lambda stream=stream, size=size: function.do(Operation.UPDATE, handle=stream, data=bytes(size))  # noqa: E731
        assert refused(update) == "malformed"
        assert refused(update) == "out-of-order"  # what met an error is gone
    assert refused(lambda: function.run(StreamRequest(Verb.ENCRYPT), bytes(4 * 1024 * 1024 + 33), handle=handle)) == "too-large"
    assert refused(lambda: function.run(StreamRequest(Verb.DECRYPT, header=b"x"), bytes(32), handle=handle)) == "malformed"


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.integers(0, 40), max_size=6), rest=st.integers(0, 40), name=st.sampled_from(["AES-128-CBC", "SM4-CTR"]))
def test_a_stream_of_blocks_is_what_one_run_is(pieces: list[int], rest: int, name: str) -> None:
    handle = FUNCTION.load(name, bytes(range(16)))
    plaintext = bytes(i % 251 for i in range(sum(pieces) * 16 + rest))
    begun = FUNCTION.do(Operation.BEGIN, StreamRequest(Verb.ENCRYPT), handle=handle)
    out, at = bytes(begun.data), 0
    for count in pieces:
        out += bytes(FUNCTION.do(Operation.UPDATE, handle=begun.value, data=plaintext[at : at + 16 * count]).data)
        at += 16 * count
    out += bytes(FUNCTION.do(Operation.FINISH, handle=begun.value, data=plaintext[at:]).data)
    assert FUNCTION.run(StreamRequest(Verb.DECRYPT), out, handle=handle) == plaintext
    FUNCTION.do(Operation.UNLOAD, handle=handle)


FUNCTION = Function()


def test_batches_that_are_none(function: Function) -> None:
    digest = StreamRequest(Verb.DIGEST, digest="SHA-256")

    def batch(*items: BatchItem, data: bytes = b"") -> BatchAnswer:
        answer = function.do(Operation.BATCH, BatchRequest(items), data=data)
        return codec.decode(answer.parameters, BatchAnswer)

    for items, data in (
        ((), b""),
        ((BatchItem(digest),) * (MAX_BATCH + 1), b""),
        ((BatchItem(digest, 0, 5),), b"four"),
        ((BatchItem(digest, 0, 3),), b"four"),
        ((BatchItem(digest, 0, -1), BatchItem(digest, 0, 5)), b"four"),
    ):
        assert refused(lambda items=items, data=data: batch(*items, data=data)) == "malformed"  # type: ignore[misc]
    many = batch(*(BatchItem(StreamRequest(Verb.DIGEST, digest="SHAKE128", length=4096)) for _ in range(600)))
    codes = [result.error.code if result.error else "" for result in many.results]
    assert codes == [""] * 512 + ["too-large"] * 88
    mixed = batch(BatchItem(digest, 0, 2), BatchItem(StreamRequest(Verb.MAC), 7, 1), BatchItem(digest, 0, 1), data=b"abcd")
    assert [result.error.code if result.error else "" for result in mixed.results] == ["", "key-unknown", ""]


@pytest.mark.parametrize("name", ["AES-256-GCM", "AES-256-CCM", "AES-256-CBC", "AES-128-XTS", "AES-256-KW", "HKDF-SHA-256"])
def test_a_key_that_goes_meanwhile_is_not_used_half_wiped(name: str) -> None:
    """A run may be in a thread while its key is unloaded: it ends with the key that it began with."""
    chosen = algorithm(name)
    material = bytes(range(1, chosen.key_bits // 8 + 1))
    verb = Verb.DERIVE if chosen.kind is Kind.KEY_DERIVATION else Verb.ENCRYPT
    request = StreamRequest(verb, TWEAK if chosen.mode == "XTS" else b"", length=32 if verb is Verb.DERIVE else 0)
    key = engine.Key(new_key_id(), 1, chosen, bytearray(material), VersionAttributes(name, 1.5, bare=True))
    stream = open_stream(request, key)
    key.close()
    made = bytes(stream.run(b"" if verb is Verb.DERIVE else bytes(32)))
    stream.close()
    function = Function()
    handle = function.load(name, material, bare=True)
    if verb is Verb.DERIVE:
        assert function.run(request, handle=handle) == made
    else:
        assert function.run(StreamRequest(Verb.DECRYPT, request.context), made, handle=handle) == bytes(32)
