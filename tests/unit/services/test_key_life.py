"""The life of a key as an application sees it: names, tags, and the end."""

import asyncio

import msgspec
import pytest

from cipherfleet import Client
from cipherfleet.channel import signing
from cipherfleet.channel.certificates import new_key
from cipherfleet.contract.errors import (
    AliasUnknown,
    CheckpointForged,
    CiphertextForeignKey,
    EscrowRowTampered,
    KeyDeleted,
    KeyDisabled,
    KeyPendingDeletion,
    LimitReached,
    Malformed,
    RouteUnknown,
    StateConflict,
    TooLarge,
)
from cipherfleet.contract.key_life import DAY_S
from cipherfleet.contract.statements import DestructionStatement
from tests.unit.computing.machine.fake_kmc import signed
from tests.unit.services.stage import Stage

# -- names and tags ----------------------------------------------------------------------------------------------------


async def test_an_alias_stands_wherever_a_key_does(client: Client) -> None:
    key, signing = await client.create_key(), await client.create_key("Ed25519")
    named = await client.set_alias("orders/2026", key.id)
    assert named.aliases == ("orders/2026",)
    await client.set_alias("alias/signer", signing.id)
    alias = "alias/orders/2026"
    ciphertext = await client.encrypt(alias, b"data")
    assert await client.decrypt(ciphertext, key=alias) == b"data"
    await client.set_alias("other", (await client.create_key()).id)
    with pytest.raises(CiphertextForeignKey):
        await client.decrypt(ciphertext, key="alias/other")
    await client.delete_alias("other")
    await client.verify("alias/signer", b"message", await client.sign("alias/signer", b"message"))
    assert (await client.generate_data_key(alias)).key == key.id
    assert (await client.rotate_key(alias)).id == key.id
    assert (await client.describe_key(alias)).versions == (1, 2)
    assert await client.decrypt(await client.reencrypt(alias, ciphertext)) == b"data"
    assert [(entry.name, entry.key) for entry in await client.list_aliases()] == [("orders/2026", key.id), ("signer", signing.id)]
    assert len(await client.list_keys()) == 3  # what aliases are kept in is no key


async def test_an_alias_moves_and_goes(client: Client) -> None:
    first, second = await client.create_key(), await client.create_key()
    await client.set_alias("current", first.id)
    old = await client.encrypt("alias/current", b"old")
    assert (await client.set_alias("current", second.id)).aliases == ("current",)
    assert (await client.describe_key(first.id)).aliases == ()
    assert (await client.describe_key("alias/current")).id == second.id
    assert await client.decrypt(old) == b"old"
    await client.set_alias("current", "alias/current")  # where it is already
    await client.delete_alias("current")
    await client.delete_alias("current")
    await client.delete_alias("never")
    for use in (client.describe_key("alias/current"), client.encrypt("alias/current", b""), client.set_alias("x", "alias/current")):
        with pytest.raises(AliasUnknown):
            await use
    await client.set_alias("current", first.id)
    assert (await client.describe_key("alias/current")).id == first.id


@pytest.mark.parametrize("name", ["", "x" * 129, "/x", "x/", "ä", "a b", "alias/alias/x", "a\n", "..", "."])
async def test_names_that_no_alias_can_have(client: Client, name: str) -> None:
    key = await client.create_key()
    with pytest.raises((Malformed, RouteUnknown)):  # some are no part of a path
        await client.set_alias(name, key.id)
    assert (await client.describe_key(key.id)).aliases == ()


async def test_a_key_has_a_bounded_number_of_aliases(client: Client) -> None:
    key = await client.create_key()
    for number in range(50):
        await client.set_alias(f"n{number}", key.id)
    with pytest.raises(LimitReached):
        await client.set_alias("one-more", key.id)
    assert len(await client.list_aliases()) == 50


async def test_of_two_who_take_a_name_at_once_it_is_one_keys(client: Client) -> None:
    keys = [await client.create_key() for _ in range(4)]
    await asyncio.gather(*(client.set_alias("mine", key.id) for key in keys), return_exceptions=True)
    owners = [key.id for key in keys if "mine" in (await client.describe_key(key.id)).aliases]
    assert owners == [(await client.describe_key("alias/mine")).id]


async def test_labels_and_tags_change(client: Client) -> None:
    key = await client.create_key(label="old")
    changed = await client.update_key(key.id, label="new", tags={"cost center": "42", "stage": "test"})
    assert (changed.label, changed.tags) == ("new", {"cost center": "42", "stage": "test"})
    changed = await client.update_key(key.id, tags={"stage": "production"}, untag=["cost center", "not there"])
    assert (changed.label, changed.tags) == ("new", {"stage": "production"})
    assert await client.describe_key(key.id) == changed
    assert (await client.update_key(key.id, label="")).label == ""


async def test_tags_are_bounded_in_number_and_size(client: Client) -> None:
    key = await client.create_key()
    await client.update_key(key.id, tags={f"t{number}": "" for number in range(50)})
    with pytest.raises(LimitReached):
        await client.update_key(key.id, tags={"one more": ""})
    await client.update_key(key.id, tags={"one more": ""}, untag=["t0"])
    for tags in ({"": ""}, {"n" * 129: ""}, {"n": "v" * 257}, {"a\n": ""}, {"a": "\x1b"}):
        with pytest.raises(Malformed):
            await client.update_key(key.id, tags=tags)
    with pytest.raises(TooLarge):
        await client.update_key(key.id, tags={f"t{number}": "v" * 256 for number in range(1, 20)})


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_key_whose_deletion_is_scheduled_refuses_everything(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    ciphertext = await client.encrypt(key.id, b"data")
    pending = await client.schedule_key_deletion(key.id)
    assert pending.state == "pending-deletion"
    assert pending.delete_at is not None
    assert abs(pending.delete_at - pending.created_at - 30 * DAY_S) < 60
    for use in (
        client.encrypt(key.id, b""),
        client.decrypt(ciphertext),
        client.generate_data_key(key.id),
        client.rotate_key(key.id),
        client.enable_key(key.id),
        client.disable_key(key.id),
        client.update_key(key.id, label="x"),
        client.set_alias("x", key.id),
    ):
        with pytest.raises(KeyPendingDeletion):
            await use
    again = await client.schedule_key_deletion(key.id, days=7)
    assert again.delete_at is not None
    assert again.delete_at < pending.delete_at
    back = await client.cancel_key_deletion(key.id)
    assert (back.state, back.delete_at) == ("disabled", None)
    with pytest.raises(KeyDisabled):
        await client.decrypt(ciphertext)
    await client.enable_key(key.id)
    assert await client.decrypt(ciphertext) == b"data"
    assert (await client.cancel_key_deletion(key.id)).state == "enabled"  # nothing to cancel


@pytest.mark.parametrize("days", [6.9, 31, 0, -1, float("1e300")])
async def test_the_waiting_time_has_bounds(client: Client, days: float) -> None:
    key = await client.create_key()
    with pytest.raises(Malformed):
        await client.schedule_key_deletion(key.id, days=days)
    assert (await client.describe_key(key.id)).state == "enabled"


async def test_a_destroyed_key_is_gone_and_its_names_are_free(client: Client) -> None:
    key, other = await client.create_key(), await client.create_key()
    ciphertext = await client.encrypt(key.id, b"data")
    await client.set_alias("name", key.id)
    gone = await client.delete_key(key.id)
    assert (gone.state, gone.versions, gone.aliases) == ("deleted", (), ())
    assert (await client.delete_key(key.id)).state == "deleted"
    for use in (
        client.encrypt(key.id, b""),
        client.decrypt(ciphertext),
        client.rotate_key(key.id),
        client.enable_key(key.id),
        client.cancel_key_deletion(key.id),
        client.schedule_key_deletion(key.id),
        client.update_key(key.id, label="x"),
        client.set_alias("x", key.id),
    ):
        with pytest.raises(KeyDeleted):
            await use
    with pytest.raises(AliasUnknown):
        await client.encrypt("alias/name", b"")
    await client.set_alias("name", other.id)
    assert (await client.describe_key("alias/name")).id == other.id


async def test_what_was_destroyed_has_a_receipt(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    with pytest.raises(StateConflict):
        await client.destruction_receipt(key.id)
    await client.rotate_key(key.id)
    await client.delete_key(key.id)
    told = await client.destruction_receipt(key.id)
    statement = signing.verify(told.receipt, DestructionStatement, (told.signer,))
    assert (statement.key, [one.version for one in statement.material]) == (key.id, [1, 2])
    wrong = msgspec.structs.replace(statement, material=(msgspec.structs.replace(statement.material[0], digest=bytes(32)),))
    other = msgspec.structs.replace(statement, key=(await client.create_key()).id)
    for forged, error in (
        (signed(wrong, stage.store.kmc_key), EscrowRowTampered),
        (signed(other, stage.store.kmc_key), CheckpointForged),
        (signed(statement, new_key()), CheckpointForged),
    ):
        stage.store.forged = forged
        with pytest.raises(error):
            await client.destruction_receipt(key.id)
