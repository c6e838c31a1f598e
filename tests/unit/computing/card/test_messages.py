"""Messages: they come back whole, or not at all."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_message import SEALED_CHUNK_BYTES, Decryptor, Encryptor, Reencryptor
from cipherfleet.contract.ciphertext import HEADER_BYTES, MAX_CHUNKS, sealed_length
from cipherfleet.contract.errors import (
    CipherfleetError,
    CiphertextForeignKey,
    CiphertextInvalid,
    CiphertextTruncated,
    Malformed,
    Tampered,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.vcc import CHUNK_BYTES, MAX_DATA_BYTES
from tests.unit.computing.card.consumer import make_key

AEADS = ("AES-256-GCM", "SM4-GCM")


@pytest.fixture(params=AEADS)
def key(request: pytest.FixtureRequest) -> Key:
    return make_key(str(request.param))


def encrypt(key: Key, plaintext: bytes, context: bytes = b"") -> bytes:
    return bytes(Encryptor(key, context).run(plaintext))


def decrypt(key: Key, ciphertext: bytes, context: bytes = b"") -> bytes:
    return bytes(Decryptor(key, ciphertext[:HEADER_BYTES], context).run(ciphertext[HEADER_BYTES:]))


def decrypt_by_chunks(key: Key, header: bytes, chunks: list[bytes], context: bytes = b"") -> bytes:
    decryptor = Decryptor(key, header, context)
    return b"".join([*(bytes(decryptor.update(c)) for c in chunks[:-1]), bytes(decryptor.finish(chunks[-1] if chunks else b""))])


def cut(ciphertext: bytes) -> tuple[bytes, list[bytes]]:
    body = ciphertext[HEADER_BYTES:]
    return ciphertext[:HEADER_BYTES], [body[i : i + SEALED_CHUNK_BYTES] for i in range(0, len(body), SEALED_CHUNK_BYTES)]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_comes_back(key: Key, size: int) -> None:
    plaintext = bytes(i * 7 % 256 for i in range(size))
    ciphertext = encrypt(key, plaintext, b"context")
    assert len(ciphertext) == sealed_length(size)
    assert decrypt(key, ciphertext, b"context") == plaintext
    assert decrypt_by_chunks(key, *cut(ciphertext), b"context") == plaintext


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=4), st.integers(0, CHUNK_BYTES))
def test_streams_and_whole_messages_are_one_format(counts: list[int], rest: int) -> None:
    key = make_key("AES-256-GCM")
    encryptor = Encryptor(key, b"")
    pieces = [bytes([n]) * (CHUNK_BYTES * n) for n in counts]
    ciphertext = encryptor.first + b"".join(bytes(encryptor.update(p)) for p in pieces) + bytes(encryptor.finish(b"r" * rest))
    assert decrypt(key, ciphertext) == b"".join(pieces) + b"r" * rest


def test_two_messages_share_nothing(key: Key) -> None:
    one, two = encrypt(key, b"the same"), encrypt(key, b"the same")
    assert one[HEADER_BYTES:] != two[HEADER_BYTES:]
    with pytest.raises(CiphertextInvalid):
        decrypt(key, one[:HEADER_BYTES] + two[HEADER_BYTES:])


def test_every_bit_counts(key: Key) -> None:
    ciphertext = encrypt(key, b"pay 100", b"c")
    for position, bit in itertools.product(range(len(ciphertext)), range(8)):
        changed = bytearray(ciphertext)
        changed[position] ^= 1 << bit
        with pytest.raises(Tampered):
            decrypt(key, bytes(changed), b"c")


def test_every_cut_is_seen(key: Key) -> None:
    ciphertext = encrypt(key, b"pay 100")
    for length in range(len(ciphertext)):
        with pytest.raises((CiphertextTruncated, CiphertextInvalid)):
            decrypt(key, ciphertext[:length])
        if length < HEADER_BYTES + 16:
            with pytest.raises(CiphertextTruncated):
                decrypt(key, ciphertext[:length])
    for more in (b"\0", b"0" * 16, ciphertext[HEADER_BYTES:]):
        with pytest.raises(CiphertextInvalid):
            decrypt(key, ciphertext + more)


def test_cut_between_chunks_is_called_truncated(key: Key) -> None:
    header, chunks = cut(encrypt(key, bytes(3 * CHUNK_BYTES)))
    for kept in range(3):
        with pytest.raises(CiphertextTruncated):
            decrypt_by_chunks(key, header, chunks[:kept])
        with pytest.raises(CiphertextTruncated):
            decrypt(key, header + b"".join(chunks[:kept]))


def test_every_other_order_of_chunks_is_refused(key: Key) -> None:
    """Whatever sequence of up to four of a message's chunks is not the message itself: reordered, repeated, left out."""
    plaintext = b"".join(bytes([n]) * CHUNK_BYTES for n in range(2)) + b"end"
    header, chunks = cut(encrypt(key, plaintext))
    for count in range(1, 5):
        for order in itertools.product(range(3), repeat=count):
            if order == (0, 1, 2):
                assert decrypt(key, header + b"".join(chunks)) == plaintext
                continue
            with pytest.raises(CipherfleetError) as refused:
                decrypt(key, header + b"".join(chunks[n] for n in order))
            assert isinstance(refused.value, Tampered)


def test_chunks_of_another_message_are_refused(key: Key) -> None:
    header, chunks = cut(encrypt(key, bytes(2 * CHUNK_BYTES)))
    _, others = cut(encrypt(key, bytes(2 * CHUNK_BYTES)))
    for mixed in ([others[0], chunks[1]], [chunks[0], others[1]]):
        with pytest.raises(CiphertextInvalid):
            decrypt_by_chunks(key, header, mixed)


def test_nothing_of_a_bad_piece_comes_out(key: Key) -> None:
    header, chunks = cut(encrypt(key, bytes(3 * CHUNK_BYTES)))
    chunks[1] = chunks[1][:-1] + bytes([chunks[1][-1] ^ 1])
    decryptor = Decryptor(key, header, b"")
    with pytest.raises(CiphertextInvalid):
        decryptor.update(chunks[0] + chunks[1])


def test_other_context_key_version_algorithm(key: Key) -> None:
    ciphertext = encrypt(key, b"secret", b"tenant 1")
    for context in (b"", b"tenant 2", b"tenant 1 "):
        with pytest.raises(CiphertextInvalid):
            decrypt(key, ciphertext, context)
    name = key.algorithm.name
    newer = Key(key.id, 2, key.algorithm, bytearray(key.secret))
    other = make_key(next(n for n in AEADS if n != name))
    for wrong in (newer, make_key(name), other):
        with pytest.raises(CiphertextForeignKey):
            decrypt(wrong, ciphertext, b"tenant 1")


def test_a_header_of_ours_with_another_keys_secret(key: Key) -> None:
    twin = Key(key.id, key.version, key.algorithm, bytearray(len(key.secret)))
    with pytest.raises(CiphertextInvalid):
        decrypt(twin, encrypt(key, b"secret"))


def test_sizes(key: Key) -> None:
    encryptor = Encryptor(key, b"")
    with pytest.raises(Malformed):
        encryptor.update(b"x")
    with pytest.raises(TooLarge):
        encryptor.update(bytes(MAX_DATA_BYTES + CHUNK_BYTES))
    with pytest.raises(TooLarge):
        encryptor.finish(bytes(CHUNK_BYTES + 1))
    with pytest.raises(TooLarge):
        encryptor.run(bytes(MAX_DATA_BYTES + 1))
    with pytest.raises(TooLarge):
        Encryptor(key, bytes(4097))
    header = encrypt(key, b"")[:HEADER_BYTES]
    decryptor = Decryptor(key, header, b"")
    with pytest.raises(Malformed):
        decryptor.update(bytes(SEALED_CHUNK_BYTES + 1))
    with pytest.raises(TooLarge):
        decryptor.update(bytes(65 * SEALED_CHUNK_BYTES))
    with pytest.raises(TooLarge):
        decryptor.finish(bytes(SEALED_CHUNK_BYTES + 1))
    with pytest.raises(TooLarge):
        decryptor.run(bytes(64 * SEALED_CHUNK_BYTES + 1))
    with pytest.raises(Malformed):
        Decryptor(key, header + b"x", b"")


def test_the_last_chunk_number_is_the_last() -> None:
    key = make_key("AES-256-GCM")
    encryptor = Encryptor(key, b"")
    encryptor._index = MAX_CHUNKS - 1
    encryptor.finish(b"fits")
    with pytest.raises(TooLarge):
        encryptor.finish(b"does not")
    decryptor = Decryptor(key, encryptor.first, b"")
    decryptor._index = MAX_CHUNKS
    with pytest.raises(CiphertextInvalid):
        decryptor.finish(bytes(20))


def test_reencrypt(key: Key) -> None:
    target = make_key("SM4-GCM", version=3)
    plaintext = bytes(range(256)) * 600
    header, chunks = cut(encrypt(key, plaintext, b"old"))
    passing = Reencryptor(Decryptor(key, header, b"old"), Encryptor(target, b"new"))
    result = passing.first + b"".join(bytes(passing.update(c)) for c in chunks[:-1]) + bytes(passing.finish(chunks[-1]))
    passing.close()
    assert decrypt(target, result, b"new") == plaintext
    whole = Reencryptor(Decryptor(key, header, b"old"), Encryptor(target, b"")).run(b"".join(chunks))
    assert decrypt(target, bytes(whole)) == plaintext
    with pytest.raises(CiphertextInvalid):
        Reencryptor(Decryptor(key, header, b"old"), Encryptor(target, b"")).run(b"".join(chunks[::-1]))


def test_only_aead_keys_encrypt() -> None:
    with pytest.raises(WrongKeyType):
        Encryptor(make_key("HMAC-SHA-256"), b"")


def test_closed_keys_and_messages_are_of_no_use(key: Key) -> None:
    encryptor = Encryptor(key, b"")
    encryptor.close()
    with pytest.raises(RuntimeError):
        encryptor.run(b"x")
    secret = key.secret
    key.close()
    assert not any(secret)
    with pytest.raises(RuntimeError):
        Encryptor(key, b"")
    assert "gone" not in repr(key)
