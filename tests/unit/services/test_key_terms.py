"""A key's terms as an application meets them: its time, its uses, its rotation; and old versions that are trimmed."""

import asyncio
import time

import pytest

from cipherfleet import Client
from cipherfleet.contract.errors import (
    KeyDeleted,
    KeyExpired,
    KeyNotYetValid,
    KeyUsesSpent,
    KeyVersionTrimmed,
    Malformed,
)
from cipherfleet.contract.key_life import DAY_S
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.vcc import Operation, Verb
from cipherfleet.services.wire import BatchAskItem
from tests.unit.services.stage import Stage


async def test_an_expired_key_protects_nothing_more_and_still_reads(client: Client, stage: Stage) -> None:
    key = await client.create_key(terms=KeyTerms(not_after=time.time() + 100))
    signer = await client.create_key("Ed25519", terms=KeyTerms(not_after=time.time() + 100))
    ciphertext, signature = await client.encrypt(key.id, b"data"), await client.sign(signer.id, b"message")
    stage.host.ahead_s = 101
    other = await client.create_key()
    for use in (
        client.encrypt(key.id, b""),
        client.generate_data_key(key.id),
        client.sign(signer.id, b""),
        client.reencrypt(key.id, ciphertext),
        client.rotate_key(key.id),
    ):
        with pytest.raises(KeyExpired):
            await use
    assert await client.decrypt(ciphertext) == b"data"
    await client.verify(signer.id, b"message", signature)
    assert await client.decrypt(await client.reencrypt(other.id, ciphertext)) == b"data"


async def test_the_card_itself_keeps_to_the_end_of_a_key(client: Client, stage: Stage) -> None:
    """A VCM that lets an expired key through, or says that it lasts longer, does not get past the card."""
    end = time.time() + 1.0
    key = await client.create_key(terms=KeyTerms(not_after=end))
    ciphertext = await client.encrypt(key.id, b"data")
    await client.update_key(key.id, not_after=end + 1000)
    stage.host.card.function.permit.wall_clock = lambda: end
    with pytest.raises(KeyExpired):
        await client.encrypt(key.id, b"data")
    with pytest.raises(KeyExpired):
        await client.generate_data_key(key.id)
    assert await client.decrypt(ciphertext) == b"data"
    await client.rotate_key(key.id)
    await client.encrypt(key.id, b"data")  # the new version was made with the new time


async def test_before_its_time_nothing_is_done_with_a_key(client: Client, stage: Stage) -> None:
    key = await client.create_key(terms=KeyTerms(not_before=time.time() + 100))
    for use in (client.encrypt(key.id, b""), client.rotate_key(key.id)):
        with pytest.raises(KeyNotYetValid):
            await use
    stage.host.ahead_s = 101
    assert await client.decrypt(await client.encrypt(key.id, b"data")) == b"data"


IMPOSSIBLE = [
    KeyTerms(not_after=-1),
    KeyTerms(not_before=200, not_after=100),
    KeyTerms(rotation_s=0.5),
    KeyTerms(max_uses=-1),
    KeyTerms(max_uses=2**60),
]


@pytest.mark.parametrize("terms", IMPOSSIBLE)
async def test_terms_that_cannot_be(client: Client, terms: KeyTerms) -> None:
    with pytest.raises(Malformed):
        await client.create_key(terms=terms)
    assert not await client.list_keys()


async def test_a_key_is_used_as_often_as_it_may_be(client: Client) -> None:
    key = await client.create_key(terms=KeyTerms(max_uses=3))
    ciphertexts = [await client.encrypt(key.id, b"data") for _ in range(2)]
    await client.generate_data_key(key.id)
    for use in (client.encrypt(key.id, b""), client.generate_data_key(key.id), client.reencrypt(key.id, ciphertexts[0])):
        with pytest.raises(KeyUsesSpent):
            await use
    (answer,) = await client.batch([BatchAskItem(Verb.ENCRYPT, key.id, data=b"x")])
    assert answer.error is not None
    assert answer.error.code == "key-uses-spent"
    assert [await client.decrypt(one) for one in ciphertexts] == [b"data"] * 2  # reading is not counted
    assert (await client.describe_key(key.id)).used == 3
    await client.rotate_key(key.id)
    with pytest.raises(KeyUsesSpent):
        await client.encrypt(key.id, b"")  # of all versions
    await client.update_key(key.id, max_uses=4)
    await client.encrypt(key.id, b"")
    with pytest.raises(KeyUsesSpent):
        await client.encrypt(key.id, b"")


async def test_who_uses_a_key_at_once_gets_no_more_of_it(client: Client) -> None:
    key = await client.create_key("HMAC-SHA-256", terms=KeyTerms(max_uses=10))
    answers = await asyncio.gather(*(client.mac(key.id, b"m") for _ in range(25)), return_exceptions=True)
    assert sum(isinstance(answer, bytes) for answer in answers) == 10
    assert all(isinstance(answer, bytes | KeyUsesSpent) for answer in answers)


async def test_uses_are_reserved_by_blocks(client: Client, stage: Stage) -> None:
    key = await client.create_key("HMAC-SHA-256", terms=KeyTerms(max_uses=6400))
    sealed = stage.host.card.operations.count(Operation.SEAL_ATTRIBUTES)
    for _ in range(100):
        await client.mac(key.id, b"m")
    assert stage.host.card.operations.count(Operation.SEAL_ATTRIBUTES) - sealed == 1
    assert (await client.describe_key(key.id)).used == 100


async def test_after_so_many_uses_a_key_is_rotated(client: Client) -> None:
    key = await client.create_key(terms=KeyTerms(rotation_uses=3))
    ciphertexts = [await client.encrypt(key.id, b"data") for _ in range(7)]
    assert (await client.describe_key(key.id)).version == 3
    assert [await client.decrypt(one) for one in ciphertexts] == [b"data"] * 7


async def test_a_key_is_rotated_when_its_period_is_over(client: Client, stage: Stage) -> None:
    key = await client.create_key(terms=KeyTerms(rotation_s=DAY_S))
    assert key.next_rotation_at == key.created_at + DAY_S
    await stage.host.chores.look()
    assert (await client.describe_key(key.id)).version == 1
    stage.host.ahead_s = DAY_S + 1
    await asyncio.gather(stage.host.chores.look(), stage.host.chores.look())
    rotated = await client.describe_key(key.id)
    assert rotated.version == 2
    assert rotated.next_rotation_at is not None
    assert rotated.next_rotation_at > time.time() + 2 * DAY_S - 60
    await client.disable_key(key.id)
    stage.host.ahead_s = 5 * DAY_S
    await stage.host.chores.look()
    assert (await client.describe_key(key.id)).version == 2


async def test_a_key_past_its_waiting_time_is_refused_and_then_destroyed(client: Client, stage: Stage) -> None:
    key, other = await client.create_key(), await client.create_key()
    ciphertext = await client.encrypt(key.id, b"data")
    await client.schedule_key_deletion(key.id, days=7)
    await client.schedule_key_deletion(other.id, days=8)
    await stage.host.chores.look()
    assert (await client.describe_key(key.id)).state == "pending-deletion"
    stage.host.ahead_s = 7 * DAY_S + 1
    for use in (client.decrypt(ciphertext), client.cancel_key_deletion(key.id), client.schedule_key_deletion(key.id)):
        with pytest.raises(KeyDeleted):  # nobody has destroyed it yet
            await use
    await stage.host.chores.look()
    assert [(await client.describe_key(k.id)).state for k in (key, other)] == ["deleted", "pending-deletion"]
    assert {name for name in stage.store.rows if name[0] == key.id} == {(key.id, 0)}


async def test_trimmed_versions_are_destroyed(client: Client, stage: Stage) -> None:
    key, signer = await client.create_key(), await client.create_key("Ed25519")
    old, signature = await client.encrypt(key.id, b"old"), await client.sign(signer.id, b"message")
    await client.rotate_key(key.id)
    middle = await client.encrypt(key.id, b"middle")
    await client.rotate_key(key.id)
    await client.rotate_key(signer.id)
    trimmed = await client.trim_key(key.id, 2)
    assert (trimmed.versions, trimmed.version) == ((2, 3), 3)
    assert {name for name in stage.store.rows if name[0] == key.id} == {(key.id, 0), (key.id, 2), (key.id, 3)}
    with pytest.raises(KeyVersionTrimmed):
        await client.decrypt(old)
    with pytest.raises(KeyVersionTrimmed):
        await client.reencrypt(key.id, old)
    assert await client.decrypt(middle) == b"middle"
    assert (await client.trim_key(key.id, 1)).versions == (2, 3)  # nothing comes back
    for before in (4, 0, -1):
        with pytest.raises(Malformed):
            await client.trim_key(key.id, before)
    await client.trim_key(signer.id, 2)
    with pytest.raises(KeyVersionTrimmed):
        await client.verify(signer.id, b"message", signature, version=1)
    stage.host.keys._handles.forget()
    assert await client.decrypt(middle) == b"middle"


async def test_rotation_under_load(client: Client) -> None:
    """8 clients encrypt and decrypt during 50 rotations: no operation fails, no ciphertext is lost."""
    key = await client.create_key()
    made: list[bytes] = []
    done = asyncio.Event()

    async def work() -> int:
        count = 0
        while not done.is_set():
            ciphertext = await client.encrypt(key.id, b"data")
            made.append(ciphertext)
            assert await client.decrypt(ciphertext) == b"data"
            count += 1
        return count

    workers = [asyncio.create_task(work()) for _ in range(8)]
    for _ in range(50):
        await client.rotate_key(key.id)
    done.set()
    assert min(await asyncio.gather(*workers)) > 0
    assert (await client.describe_key(key.id)).version == 51
    assert [await client.decrypt(one) for one in made] == [b"data"] * len(made)
