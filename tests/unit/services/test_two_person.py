"""The two-person rule: nothing of such a key is destroyed because one application wants it."""

from collections.abc import Callable
from typing import Any

import pytest

from cipherfleet import Client
from cipherfleet.contract.errors import KeyDeleted, NotPermitted, SecondPersonNeeded
from cipherfleet.contract.escrow import KeyState
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.statements import Right
from cipherfleet.contract.two_person import CONSENT_S
from tests.unit.services.stage import ALL_RIGHTS, Stage

TWO = KeyTerms(two_person=True)
WISHES: dict[str, Callable[[Client, str], Any]] = {
    "destroy": lambda client, key: client.delete_key(key),
    "schedule-deletion": lambda client, key: client.schedule_key_deletion(key),
    "trim:2": lambda client, key: client.trim_key(key, before=2),
}


@pytest.mark.parametrize("action", WISHES)
async def test_one_alone_destroys_nothing_and_two_do(stage: Stage, client: Client, action: str) -> None:
    wish = WISHES[action]
    stage.host.rights["second"] = ALL_RIGHTS
    key = (await client.create_key(terms=TWO)).id
    sealed = await client.encrypt(key, b"data")
    await client.rotate_key(key)
    for _ in range(2):  # the same person twice is one person
        with pytest.raises(SecondPersonNeeded):
            await wish(client, key)
    shown = await client.describe_key(key)
    assert shown.consent is not None
    assert (shown.state, shown.consent.action, shown.consent.by) == ("enabled", action, "application/shop")
    assert await client.decrypt(sealed) == b"data"
    async with stage.client("second") as second:
        done = await wish(second, key)
    assert done.consent is None
    assert done.state == {"destroy": "deleted", "schedule-deletion": "pending-deletion", "trim:2": "enabled"}[action]


async def test_consent_is_to_one_thing(stage: Stage, client: Client) -> None:
    stage.host.rights["second"] = ALL_RIGHTS
    key = (await client.create_key(terms=TWO)).id
    with pytest.raises(SecondPersonNeeded):
        await client.schedule_key_deletion(key)
    async with stage.client("second") as second:
        with pytest.raises(SecondPersonNeeded):
            await second.delete_key(key)
        assert (await second.describe_key(key)).state == "enabled"
        with pytest.raises(SecondPersonNeeded):
            await client.schedule_key_deletion(key)  # the other's word took the place of this one's


async def test_consent_is_over_after_a_week(stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.host.rights["second"] = ALL_RIGHTS
    key = (await client.create_key(terms=TWO)).id
    with pytest.raises(SecondPersonNeeded):
        await client.delete_key(key)
    now = stage.host.keys._wall_clock()
    monkeypatch.setattr(stage.host.keys, "_wall_clock", lambda: now + CONSENT_S + 1)
    assert (await client.describe_key(key)).consent is None
    async with stage.client("second") as second:
        with pytest.raises(SecondPersonNeeded):
            await second.delete_key(key)


async def test_who_may_not_manage_does_not_consent(stage: Stage, client: Client) -> None:
    stage.host.rights["second"] = (Right.SHOW, Right.DECRYPT)
    key = (await client.create_key(terms=TWO)).id
    with pytest.raises(SecondPersonNeeded):
        await client.delete_key(key)
    async with stage.client("second") as second:
        with pytest.raises(NotPermitted):
            await second.delete_key(key)
    assert (await client.describe_key(key)).state == KeyState.ENABLED


async def test_the_rule_is_for_good_and_other_keys_have_none(client: Client) -> None:
    key, other = (await client.create_key(terms=TWO)).id, (await client.create_key()).id
    changed = await client.update_key(key, label="new", max_uses=5)
    assert changed.terms.two_person
    await client.delete_key(other)
    with pytest.raises(KeyDeleted):
        await client.encrypt(other, b"")
