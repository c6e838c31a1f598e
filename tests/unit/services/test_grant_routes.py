"""Grants at a VCM's routes: the key and the context of each request are what counts, wherever they stand in it."""

import base64
from collections.abc import Awaitable
from typing import Any

import aiohttp
import pytest

from cipherfleet import Client
from cipherfleet.contract.errors import CipherfleetError
from cipherfleet.contract.grants import Grant
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.key_terms import KeyTerms
from cipherfleet.contract.statements import Right
from cipherfleet.services import wire
from tests.unit.services.stage import Stage
from tests.unit.services.test_routes import ROUTES, call

KEYED = [(method, path) for (method, path), rights in ROUTES.items() if "{key}" in path and rights]


async def key_of(stage: Stage, name: str = "AES-256-GCM", label: str = "") -> KeyId:
    return (await stage.host.keys.create(name, label=label, actor="test")).id


def grant(stage: Stage, *grants: Grant) -> None:
    """The application has these and no right in the domain."""
    stage.host.rights["shop"], stage.host.grants["shop"] = (), grants


async def refusal(work: Awaitable[Any]) -> str:
    try:
        await work
    except CipherfleetError as exc:
        return exc.code
    return ""


@pytest.mark.parametrize(("method", "path"), KEYED, ids=" ".join)
async def test_a_grant_for_one_key_is_none_for_another(stage: Stage, raw: aiohttp.ClientSession, method: str, path: str) -> None:
    mine, other = await key_of(stage), await key_of(stage)
    grant(stage, Grant(ROUTES[method, path], keys=(mine,)))
    body: dict[str, object] | None = None
    if path.endswith("/agree"):
        body = {"peer": base64.b64encode(b"x").decode(), "length": 32}
    elif path.endswith("/derive"):
        body = {"length": 32}
    assert await call(raw, method, path.format(key=other), json=body) == (403, "not-permitted")
    _, code = await call(raw, method, path.format(key=mine), json=body)
    assert code != "not-permitted"


KEYLESS = [route for route in ROUTES if "{key}" not in route[1] and ROUTES[route] and route[1] != "/v1/decrypt"]


@pytest.mark.parametrize(("method", "path"), KEYLESS, ids=" ".join)
async def test_what_names_no_key_needs_the_right_in_the_domain(stage: Stage, raw: aiohttp.ClientSession, method: str, path: str) -> None:
    grant(stage, Grant(ROUTES[method, path]))
    assert await call(raw, method, path.format(algorithm="SHA-256", alias="name")) == (403, "not-permitted")


async def test_the_key_in_a_ciphertext_is_the_one_that_counts(stage: Stage, client: Client) -> None:
    mine, other = await key_of(stage), await key_of(stage)
    sealed, foreign = await client.encrypt(mine, b"mine", context=b"c"), await client.encrypt(other, b"other")
    grant(stage, Grant((Right.DECRYPT,), keys=(mine,), context=b"c"), Grant((Right.ENCRYPT,), keys=(mine,)))
    assert await client.decrypt(sealed, context=b"c") == b"mine"
    assert await refusal(client.decrypt(sealed)) == "context-not-granted"
    assert await refusal(client.decrypt(foreign)) == "not-permitted"
    assert await refusal(client.reencrypt(mine, foreign)) == "not-permitted"
    assert await refusal(client.reencrypt(other, sealed, context=b"c")) == "not-permitted"
    assert await client.reencrypt(mine, sealed, context=b"c")


async def test_each_item_of_a_batch_is_held_to_the_grants(stage: Stage, client: Client, raw: aiohttp.ClientSession) -> None:
    mine, other = await key_of(stage), await key_of(stage)
    foreign = await client.encrypt(other, b"other")
    grant(stage, Grant((Right.ENCRYPT,), keys=(mine,), context=b"c"), Grant((Right.DECRYPT,), keys=(mine,)))

    def item(operation: str, key: str = "", data: bytes = b"data", **more: str) -> dict[str, str]:
        return {"operation": operation, "key": key, "data": base64.b64encode(data).decode(), **more}

    c = base64.b64encode(b"c").decode()
    items = [
        item("encrypt", mine, context=c),
        item("encrypt", mine),
        item("encrypt", other, context=c),
        item("decrypt", data=foreign),
        item("reencrypt", mine, foreign, target_context=c),
        item("sign", mine),
        {"operation": "digest", "digest": "SHA-256", "data": ""},
    ]
    async with raw.post("/v1/batch", json={"items": items}) as response:
        told = [one.get("error", {}) or {} for one in (await response.json())["items"]]
    refused = ["", "context-not-granted", "not-permitted", "not-permitted", "not-permitted", "not-permitted", "not-permitted"]
    assert [one.get("code", "") for one in told] == refused


async def test_a_context_in_the_body_is_the_one_that_counts(stage: Stage, raw: aiohttp.ClientSession) -> None:
    key = await key_of(stage, "HKDF-SHA-256")
    grant(stage, Grant((Right.DERIVE,), keys=(key,), context=b"c"))
    c, d = base64.b64encode(b"c").decode(), base64.b64encode(b"d").decode()
    path = f"/v1/keys/{key}/derive"
    assert await call(raw, "POST", path, json={"length": 32, "context": d}, headers={wire.CONTEXT: c}) == (403, "context-not-granted")
    assert await call(raw, "POST", path, json={"length": 32, "context": c}) == (200, "")


async def test_over_its_rate_a_grant_says_when_to_come_back(stage: Stage, raw: aiohttp.ClientSession) -> None:
    key = await key_of(stage)
    grant(stage, Grant((Right.ENCRYPT,), keys=(key,), rate=0.25))
    path = f"/v1/keys/{key}/encrypt"
    assert await call(raw, "POST", path, data=b"x") == (200, "")
    async with raw.post(path, data=b"x") as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "4")
        assert (await response.json())["error"]["code"] == "rate-limited"


async def test_a_label_that_is_granted(stage: Stage, client: Client) -> None:
    billing, payroll = await key_of(stage, label="billing-1"), await key_of(stage, label="payroll-1")
    grant(stage, Grant((Right.ENCRYPT,), labels=("billing-*",)))
    assert await client.encrypt(billing, b"x")
    assert await refusal(client.encrypt(payroll, b"x")) == "not-permitted"


async def test_who_manages_a_key_brings_it_under_no_other_grant(stage: Stage, client: Client, raw: aiohttp.ClientSession) -> None:
    key = await key_of(stage, label="private")
    grant(stage, Grant((Right.MANAGE,), keys=(key,)), Grant((Right.DECRYPT,), labels=("public*",)))
    path = f"/v1/keys/{key}/update"
    assert await call(raw, "POST", path, json={"label": "public"}) == (403, "not-permitted")
    assert (await stage.host.keys.describe(key)).label == "private"
    assert await call(raw, "POST", f"/v1/keys/{key}/disable") == (200, "")
    assert await refusal(client.list_keys()) == "not-permitted"


async def test_an_export_needs_the_use_of_the_wrapping_key(stage: Stage, client: Client, raw: aiohttp.ClientSession) -> None:
    key = (await client.create_key(terms=KeyTerms(exportable=True))).id
    wrapping = await key_of(stage, "AES-256-KWP")
    path, body = f"/v1/keys/{key}/export", {"wrapping_key": wrapping}
    grant(stage, Grant((Right.MANAGE,), keys=(key,)))
    assert await call(raw, "POST", path, json=body) == (403, "not-permitted")
    grant(stage, Grant((Right.MANAGE,), keys=(key,)), Grant((Right.ENCRYPT,), keys=(wrapping,)))
    assert await call(raw, "POST", path, json=body) == (200, "")
