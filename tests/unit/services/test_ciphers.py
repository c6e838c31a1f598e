"""Encrypt, decrypt, re-encrypt, data keys: every size, and every way to break a ciphertext."""

import os
from collections.abc import AsyncIterator, Callable

import pytest

from cipherfleet import Client
from cipherfleet.contract.ciphertext import HEADER_BYTES, TAG_BYTES, Header, sealed_length
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    CipherfleetError,
    CiphertextInvalid,
    CiphertextTruncated,
    KeyDeleted,
    KeyDisabled,
    KeyUnknown,
    Malformed,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.ids import new_key_id
from cipherfleet.contract.vcc import CHUNK_BYTES, Operation
from tests.unit.services.stage import RIVAL, Stage

CHUNK, SEALED = CHUNK_BYTES, CHUNK_BYTES + TAG_BYTES
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 8 * CHUNK, 8 * CHUNK + 1, 16 * CHUNK, 20_000_000]


async def in_pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def joined(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


@pytest.mark.parametrize("size", SIZES)
async def test_what_is_encrypted_is_decrypted(client: Client, stage: Stage, size: int) -> None:
    key = await client.create_key("AES-256-GCM")
    plaintext = os.urandom(size)
    ciphertext = await client.encrypt(key.id, plaintext, context=b"invoice 7")
    assert len(ciphertext) == sealed_length(size)
    assert Header.decode(ciphertext).key == key.id
    assert await client.decrypt(ciphertext, context=b"invoice 7") == plaintext
    assert not stage.host.card.open_streams


@pytest.mark.parametrize("size", SIZES)
async def test_streams_of_unknown_length_are_the_same(client: Client, stage: Stage, size: int) -> None:
    key = await client.create_key("SM4-GCM")
    plaintext = os.urandom(size)
    ciphertext = await joined(client.encrypt_stream(key.id, in_pieces(plaintext)))
    assert len(ciphertext) == sealed_length(size)
    assert await joined(client.decrypt_stream(in_pieces(ciphertext, 65_000))) == plaintext
    assert not stage.host.card.open_streams


async def test_a_small_body_is_one_operation_and_a_long_one_a_stream(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    stage.host.card.operations.clear()
    await client.encrypt(key.id, b"small")
    assert stage.host.card.operations == [Operation.RUN]
    stage.host.card.operations.clear()
    await client.encrypt(key.id, bytes(17 * CHUNK))
    assert stage.host.card.operations == [Operation.BEGIN, Operation.UPDATE, Operation.UPDATE, Operation.FINISH]


@pytest.mark.parametrize("size", [0, 1, 3 * CHUNK, 30 * CHUNK + 5])
async def test_reencryption_moves_a_ciphertext_to_another_key_and_context(client: Client, size: int) -> None:
    old, new = await client.create_key(), await client.create_key("SM4-GCM")
    plaintext = os.urandom(size)
    ciphertext = await client.encrypt(old.id, plaintext, context=b"old")
    moved = await client.reencrypt(new.id, ciphertext, context=b"old", target_context=b"new")
    assert Header.decode(moved).key == new.id
    assert len(moved) == len(ciphertext)
    assert await client.decrypt(moved, context=b"new") == plaintext
    assert await joined(client.reencrypt_stream(old.id, in_pieces(moved), context=b"new")) != ciphertext
    with pytest.raises(CiphertextInvalid):
        await client.reencrypt(new.id, ciphertext, context=b"another")


async def test_an_old_version_still_decrypts(client: Client) -> None:
    key = await client.create_key()
    old = await client.encrypt(key.id, b"before")
    assert (await client.rotate_key(key.id)).version == 2
    new = await client.encrypt(key.id, b"after")
    assert (Header.decode(old).version, Header.decode(new).version) == (1, 2)
    assert [await client.decrypt(c) for c in (old, new)] == [b"before", b"after"]
    assert Header.decode(await client.reencrypt(key.id, old)).version == 2


@pytest.mark.parametrize("length", [16, 32, 64])
async def test_a_data_key_comes_back_from_its_ciphertext(client: Client, length: int) -> None:
    key = await client.create_key()
    made = await client.generate_data_key(key.id, length=length, context=b"file 1")
    assert made.plaintext is not None
    assert len(made.plaintext) == length
    assert (made.key, made.version) == (key.id, 1)
    assert await client.decrypt(made.ciphertext, context=b"file 1") == made.plaintext
    hidden = await client.generate_data_key(key.id, length=length, plaintext=False)
    assert hidden.plaintext is None
    assert len(await client.decrypt(hidden.ciphertext)) == length


@pytest.mark.parametrize("length", [15, 65, 0, -1])
async def test_a_data_key_has_a_sensible_length(client: Client, length: int) -> None:
    key = await client.create_key()
    with pytest.raises(Malformed):
        await client.generate_data_key(key.id, length=length)


# -- broken ciphertexts ------------------------------------------------------------------------------------------------


def chunks(ciphertext: bytes) -> tuple[bytes, list[bytes]]:
    body = ciphertext[HEADER_BYTES:]
    return ciphertext[:HEADER_BYTES], [body[i : i + SEALED] for i in range(0, len(body), SEALED)]


def reordered(ciphertext: bytes) -> bytes:
    header, parts = chunks(ciphertext)
    parts[0], parts[1] = parts[1], parts[0]
    return header + b"".join(parts)


def duplicated(ciphertext: bytes) -> bytes:
    header, parts = chunks(ciphertext)
    return header + b"".join([parts[0], *parts])


def without_the_middle(ciphertext: bytes) -> bytes:
    header, parts = chunks(ciphertext)
    return header + b"".join([*parts[:1], *parts[2:]])


def extended(ciphertext: bytes) -> bytes:
    return ciphertext + ciphertext[-SEALED:]


def bit_flipped(position: int) -> Callable[[bytes], bytes]:
    def flip(ciphertext: bytes) -> bytes:
        changed = bytearray(ciphertext)
        changed[position] ^= 1
        return bytes(changed)

    return flip


BREAKS = {
    "reordered": reordered,
    "duplicated": duplicated,
    "without the middle": without_the_middle,
    "extended": extended,
    "first bit": bit_flipped(HEADER_BYTES),
    "last bit": bit_flipped(-1),
    "salt": bit_flipped(HEADER_BYTES - 1),
    "last chunk": bit_flipped(-SEALED - 1),
}


@pytest.mark.parametrize("long", [False, True], ids=["one operation", "stream"])
@pytest.mark.parametrize("name", BREAKS)
async def test_a_changed_ciphertext_is_refused(client: Client, stage: Stage, name: str, long: bool) -> None:
    key = await client.create_key()
    plaintext = os.urandom((30 if long else 3) * CHUNK)
    broken = BREAKS[name](await client.encrypt(key.id, plaintext))
    for source in (broken, in_pieces(broken)):
        released = bytearray()
        with pytest.raises((CiphertextInvalid, CiphertextTruncated)):
            async for piece in client.decrypt_stream(source):
                released += piece
        assert plaintext.startswith(released), "only verified plaintext leaves"
    with pytest.raises((CiphertextInvalid, CiphertextTruncated)):
        await client.reencrypt(key.id, broken)
    assert not stage.host.card.open_streams


async def test_chunks_of_two_messages_do_not_mix(client: Client) -> None:
    key = await client.create_key()
    header, parts = chunks(await client.encrypt(key.id, bytes(20 * CHUNK)))
    _, others = chunks(await client.encrypt(key.id, bytes(20 * CHUNK)))
    with pytest.raises(CiphertextInvalid):
        await client.decrypt(header + b"".join([*parts[:10], others[10], *parts[11:]]))


@pytest.mark.parametrize("known", [True, False], ids=["length known", "chunked"])
async def test_a_ciphertext_cut_anywhere_is_refused(client: Client, stage: Stage, known: bool) -> None:
    key = await client.create_key()
    plaintext = os.urandom(18 * CHUNK + 100)
    ciphertext = await client.encrypt(key.id, plaintext)
    boundaries = [HEADER_BYTES + i * SEALED for i in range(19)]
    cuts = {0, 1, HEADER_BYTES - 1, len(ciphertext) - 1, *boundaries, *(b + 1 for b in boundaries), *(b + 16 for b in boundaries)}
    cuts |= {b + CHUNK for b in boundaries if b + CHUNK < len(ciphertext)}
    for cut in sorted(cuts):
        released = bytearray()
        with pytest.raises((CiphertextTruncated, CiphertextInvalid)):
            async for piece in client.decrypt_stream(ciphertext[:cut] if known else in_pieces(ciphertext[:cut])):
                released += piece
        assert plaintext.startswith(released)
    assert not stage.host.card.open_streams


async def test_what_is_no_ciphertext_says_so(client: Client) -> None:
    for data, error in ((b"", CiphertextTruncated), (b"CFC1", CiphertextTruncated), (os.urandom(500), CiphertextInvalid)):
        with pytest.raises(error):
            await client.decrypt(data)


async def test_another_context_is_refused(client: Client) -> None:
    key = await client.create_key()
    ciphertext = await client.encrypt(key.id, b"data", context=b"one")
    for context in (b"", b"two"):
        with pytest.raises(CiphertextInvalid):
            await client.decrypt(ciphertext, context=context)


async def test_a_context_is_bounded(client: Client) -> None:
    key = await client.create_key()
    ciphertext = await client.encrypt(key.id, b"data", context=bytes(4096))
    assert await client.decrypt(ciphertext, context=bytes(4096)) == b"data"
    with pytest.raises(TooLarge):
        await client.encrypt(key.id, b"data", context=bytes(4097))


async def test_the_header_names_a_key_that_must_be_there_and_fit(client: Client) -> None:
    key, sm4, mac = await client.create_key(), await client.create_key("SM4-GCM"), await client.create_key("HMAC-SHA-256")
    body = (await client.encrypt(key.id, b"data"))[HEADER_BYTES:]

    async def refused(header: Header) -> type[CipherfleetError]:
        with pytest.raises(CipherfleetError) as caught:
            await client.decrypt(header.encode() + body)
        return type(caught.value)

    salt = bytes(32)
    assert await refused(Header(1, new_key_id(), 1, salt)) is KeyUnknown
    assert await refused(Header(1, key.id, 2, salt)) is KeyUnknown
    assert await refused(Header(99, key.id, 1, salt)) is AlgorithmUnknown
    assert await refused(Header(2, key.id, 1, salt)) is CiphertextInvalid
    assert await refused(Header(1, sm4.id, 1, salt)) is CiphertextInvalid
    assert await refused(Header(3, mac.id, 1, salt)) is WrongKeyType
    assert await refused(Header(1, key.id, 1, salt, chunk_bytes=1024)) is CiphertextInvalid


async def test_another_consumers_ciphertext_names_an_unknown_key(client: Client) -> None:
    other = await Stage.start(RIVAL)
    try:
        async with other.client() as rival:
            key = await rival.create_key()
            foreign = await rival.encrypt(key.id, b"theirs")
            assert await rival.decrypt(foreign) == b"theirs"
    finally:
        await other.stop()
    with pytest.raises(KeyUnknown):
        await client.decrypt(foreign)
    with pytest.raises(KeyUnknown):
        await client.encrypt(key.id, b"ours")


@pytest.mark.parametrize("verb", ["encrypt", "reencrypt", "generate_data_key"])
async def test_only_an_enabled_key_for_encryption_encrypts(client: Client, verb: str) -> None:
    good = await client.create_key()
    ciphertext = await client.encrypt(good.id, b"data")

    async def attempt(key: str) -> object:
        if verb == "generate_data_key":
            return await client.generate_data_key(key)
        return await getattr(client, verb)(key, ciphertext)

    for algorithm in ("HMAC-SHA-256", "Ed25519"):
        with pytest.raises(WrongKeyType):
            await attempt((await client.create_key(algorithm)).id)
    key = await client.create_key()
    await client.disable_key(key.id)
    with pytest.raises(KeyDisabled):
        await attempt(key.id)
    await client.enable_key(key.id)
    await attempt(key.id)
    await client.delete_key(key.id)
    with pytest.raises(KeyDeleted):
        await attempt(key.id)
    with pytest.raises(KeyUnknown):
        await attempt(new_key_id())
    with pytest.raises(Malformed):
        await attempt("../../etc/passwd")


async def test_a_disabled_key_does_not_decrypt(client: Client) -> None:
    key = await client.create_key()
    ciphertext = await client.encrypt(key.id, b"data")
    await client.disable_key(key.id)
    with pytest.raises(KeyDisabled):
        await client.decrypt(ciphertext)
