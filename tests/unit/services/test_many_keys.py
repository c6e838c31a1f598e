"""Many keys by the network: batches that are made whole or not at all, pages, and what is wrong with the asking."""

import os

import aiohttp
import pytest

from cipherfleet import Client
from cipherfleet.contract.algorithms import REGISTRY, algorithm
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    CipherfleetError,
    KeyMaterialInvalid,
    KeyNotExportable,
    KeyNotYetValid,
    KeyUsesSpent,
    LimitReached,
    Malformed,
    SecondPersonNeeded,
    TooLarge,
    WrongKeyType,
)
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.vcc import Operation
from cipherfleet.contract.vcm_api import RSA_KEYS_AT_ONCE, keys_at_once
from cipherfleet.services import wire
from cipherfleet.services.middleware.envelope import NewKey
from tests.unit.services.stage import Stage


async def test_many_are_made_at_once(stage: Stage, client: Client) -> None:
    told: list[int] = []
    labels = [f"k{number}" for number in range(1050)]
    made = await client.create_keys("aes-256-gcm", labels, done=told.append)
    assert told == [1000, 1050]
    assert [key.label for key in made] == labels
    assert {key.algorithm for key in made} == {"AES-256-GCM"}
    assert [key.id for key in await client.list_keys()] == [key.id for key in made]
    assert await client.decrypt(await client.encrypt(made[3].id, b"hello")) == b"hello"


async def test_many_are_brought_at_once(stage: Stage, client: Client) -> None:
    told: list[int] = []
    materials = [os.urandom(32) for _ in range(20)]
    made = await client.import_keys([NewKey("HMAC-SHA-256", material, f"m{n}") for n, material in enumerate(materials)], done=told.append)
    assert told == [20]
    assert [(key.label, key.imported) for key in made] == [(f"m{n}", True) for n in range(20)]
    assert stage.host.card.operations.count(Operation.IMPORT) == 20


TERMS = KeyTerms(not_after=2.0**33, max_uses=1, rotation_s=3600.0, two_person=True)
TAGS = {"env": "prod", "team": "x=y"}


async def test_terms_and_tags_of_many(client: Client) -> None:
    made = await client.create_keys("AES-256-GCM", ["a", "b"], terms=TERMS, tags=TAGS)
    brought = await client.import_keys(
        [NewKey("AES-256-GCM", bytes(32), "c", terms=TERMS, tags=TAGS), NewKey("AES-256-GCM", bytes(32), "d", tags={"env": "test"})]
    )
    one = await client.create_key("AES-256-GCM", label="e", terms=TERMS, tags=TAGS)
    other = await client.import_key("AES-256-GCM", bytes(32), label="f", terms=TERMS, tags=TAGS)
    alike = [*made, brought[0], one, other]
    assert [(key.terms, key.tags) for key in alike] == [(TERMS, TAGS)] * 5
    assert (brought[1].terms, brought[1].tags) == (KeyTerms(), {"env": "test"})
    assert [key.label for key in await client.list_keys(tags={"env": "prod"})] == ["a", "b", "c", "e", "f"]
    for key in alike:  # the terms are in force
        await client.encrypt(key.id, b"once")
        with pytest.raises(KeyUsesSpent):
            await client.encrypt(key.id, b"twice")
        with pytest.raises(SecondPersonNeeded):
            await client.delete_key(key.id)


async def test_what_a_term_of_many_has_made(client: Client) -> None:
    """What the card seals into each version."""
    wrapping = await client.create_key("AES-256-KWP", bare=True)
    [fixed, free] = await client.import_keys(
        [NewKey("AES-256-GCM", bytes(32)), NewKey("AES-256-GCM", b"k" * 32, terms=KeyTerms(exportable=True))]
    )
    assert (await client.export_key(free.id, wrapping_key=wrapping.id)).wrapped
    with pytest.raises(KeyNotExportable):
        await client.export_key(fixed.id, wrapping_key=wrapping.id)
    [early] = await client.create_keys("AES-256-GCM", [""], terms=KeyTerms(not_before=2.0**33))
    with pytest.raises(KeyNotYetValid):
        await client.encrypt(early.id, b"x")


@pytest.mark.parametrize(
    ("terms", "tags", "error"),
    [
        (KeyTerms(not_before=9.0, not_after=8.0), {}, Malformed),
        (KeyTerms(max_uses=-1), {}, Malformed),
        (KeyTerms(rotation_s=0.5), {}, Malformed),
        (KeyTerms(), {"": "x"}, Malformed),
        (KeyTerms(), {"a\n": "x"}, Malformed),
        (KeyTerms(), {"a": "x" * 257}, Malformed),
        (KeyTerms(), {str(number): "" for number in range(51)}, LimitReached),
        (KeyTerms(), {str(number): "x" * 200 for number in range(20)}, TooLarge),
    ],
)
async def test_wrong_terms_and_tags_make_nothing(
    stage: Stage, client: Client, terms: KeyTerms, tags: dict[str, str], error: type[CipherfleetError]
) -> None:
    good = NewKey("AES-256-GCM", bytes(32))
    with pytest.raises(error):
        await client.create_keys("AES-256-GCM", ["a", "b"], terms=terms, tags=tags)
    with pytest.raises(error):
        await client.import_keys([good, good._replace(terms=terms, tags=tags)])
    with pytest.raises(error):
        await client.create_key("AES-256-GCM", terms=terms, tags=tags)
    with pytest.raises(error):
        await client.import_key("AES-256-GCM", bytes(32), terms=terms, tags=tags)
    assert not {Operation.GENERATE, Operation.IMPORT} & set(stage.host.card.operations), "found before the card makes any"
    assert await client.list_keys() == ()


async def test_keys_that_take_long_are_few_in_a_batch(client: Client, raw: aiohttp.ClientSession, stage: Stage) -> None:
    for bits, most in RSA_KEYS_AT_ONCE.items():
        assert keys_at_once(algorithm(f"RSA-{bits}-PSS")) == most
        for name in (f"RSA-{bits}-PSS", f"RSA-{bits}-PKCS1", f"RSA-{bits}-OAEP"):
            async with raw.post("/v1/keys/batch", json={"algorithm": name, "labels": [""] * (most + 1)}) as response:
                error = (await response.json())["error"]
            assert (response.status, error["code"], error["hint"]) == (413, "too-large", "make them in several batches")
            assert f"at most {most} keys of {name}" in error["message"]
    assert Operation.GENERATE not in stage.host.card.operations
    assert {keys_at_once(one) for one in REGISTRY.values() if one.family != "RSA"} == {1000}


async def test_the_client_asks_for_as_many_as_fit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RSA_KEYS_AT_ONCE, 2048, 2)
    told: list[int] = []
    made = await client.create_keys("RSA-2048-PSS", ["a", "b", "c"], done=told.append)
    assert (told, [key.label for key in made]) == ([2, 3], ["a", "b", "c"])


async def test_a_batch_that_is_too_long_for_a_request_is_two(stage: Stage, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BATCH_BYTES", 16_000)
    told: list[int] = []
    made = await client.import_keys([NewKey("AES-256-GCM", bytes(32))] * 12, done=told.append)
    assert len(told) > 1
    assert len(made) == told[-1] == 12


async def test_of_a_batch_that_is_wrong_nothing_is_made(stage: Stage, client: Client) -> None:
    good = NewKey("AES-256-GCM", bytes(32))
    for wrong, error in (
        (NewKey("ROT13", bytes(32)), AlgorithmUnknown),
        (NewKey("SHA-256", bytes(32)), WrongKeyType),
        (NewKey("AES-256-GCM", bytes(31)), KeyMaterialInvalid),
        (NewKey("AES-256-GCM", bytes(32), "two\nlines"), Malformed),
    ):
        with pytest.raises(error):
            await client.import_keys([good, wrong, good])
    with pytest.raises(Malformed):
        await client.create_keys("AES-256-GCM", ["good", "x" * 257])
    assert await client.list_keys() == ()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/keys/batch", {"algorithm": "AES-256-GCM", "labels": []}),
        ("/v1/keys/batch", {"algorithm": "AES-256-GCM", "labels": [""] * 1001}),
        ("/v1/import/batch", {"keys": []}),
        ("/v1/import/batch", {"keys": [{"algorithm": "AES-256-GCM", "sealed": ""}] * 1001}),
    ],
)
async def test_no_batch_is_empty_or_too_long(raw: aiohttp.ClientSession, path: str, body: object) -> None:
    async with raw.post(path, json=body) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "malformed")


async def test_pages(client: Client) -> None:
    made = await client.create_keys("AES-256-GCM", ["shop/a", "shop/b", "billing", "", ""])
    signer = await client.create_key("Ed25519", label="shop/c")
    await client.disable_key(made[0].id)
    page = await client.key_page(limit=4)
    assert [key.id for key in page.keys] == [key.id for key in made[:4]]
    rest = await client.key_page(limit=4, after=page.next)
    assert ([key.id for key in rest.keys], rest.next) == ([made[4].id, signer.id], "")
    assert len(await client.list_keys(limit=5)) == 5
    assert [key.label for key in await client.list_keys(label="shop/")] == ["shop/a", "shop/b", "shop/c"]
    assert [key.id for key in await client.list_keys(algorithm="ed25519")] == [signer.id]
    assert [key.id for key in await client.list_keys(state="disabled", label="shop")] == [made[0].id]


async def test_by_tags(client: Client) -> None:
    made = await client.create_keys("AES-256-GCM", ["a", "b", "c"])
    await client.update_key(made[0].id, tags={"env": "prod", "team": "x=y"})
    await client.update_key(made[2].id, tags={"env": "prod"})
    assert [key.label for key in await client.list_keys(tags={"env": "prod"})] == ["a", "c"]
    assert [key.label for key in await client.list_keys(tags={"env": "prod", "team": "x=y"}, label="a")] == ["a"]
    assert await client.list_keys(tags={"env": "test"}) == ()


@pytest.mark.parametrize(
    "query",
    [
        "tag=x",
        "&".join(["tag=a=b"] * 17),
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=-1",
        "after=x",
        "after=W10=",
        "state=lost",
        "colour=red",
        "label=" + "x" * 257,
    ],
)
async def test_wrong_questions(raw: aiohttp.ClientSession, query: str) -> None:
    async with raw.get(f"/v1/keys?{query}") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "malformed")


async def test_an_algorithm_that_is_none(client: Client) -> None:
    with pytest.raises(AlgorithmUnknown):
        await client.list_keys(algorithm="ROT13")
