"""Every route: who may call it, and what bad input gets."""

import base64
import json
from typing import Any

import aiohttp
import pytest

from cipherfleet import Client
from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import (
    AlgorithmUnknown,
    ApplicationRevoked,
    ApplicationUnknown,
    LoginRefused,
    Malformed,
    NotPermitted,
    ServiceOff,
    WrongKeyType,
)
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import new_key_id
from cipherfleet.contract.statements import Right, Signed
from cipherfleet.contract.vcc import Operation
from cipherfleet.contract.vcm_api import LoginReply
from tests.unit.services.stage import ACME, CARD, VCM, Stage

KEY = "0" * 32
ROUTES: dict[tuple[str, str], tuple[Right, ...]] = {
    ("POST", "/v1/keys"): (Right.CREATE,),
    ("POST", "/v1/keys/batch"): (Right.CREATE,),
    ("POST", "/v1/import/batch"): (Right.CREATE,),
    ("GET", "/v1/import"): (Right.CREATE,),
    ("POST", "/v1/import"): (Right.CREATE,),
    ("GET", "/v1/keys"): (Right.SHOW,),
    ("GET", "/v1/keys/{key}"): (Right.SHOW,),
    ("POST", "/v1/keys/{key}/rotate"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/enable"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/disable"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/delete"): (Right.MANAGE,),
    ("POST", "/v1/import/parameters"): (Right.CREATE,),
    ("POST", "/v1/import/wrapped"): (Right.CREATE,),
    ("POST", "/v1/keys/{key}/export"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/derive-key"): (Right.DERIVE, Right.CREATE),
    ("GET", "/v1/keys/{key}/receipt"): (Right.SHOW,),
    ("POST", "/v1/keys/{key}/trim"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/schedule-deletion"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/cancel-deletion"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/update"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/delegate"): (),
    ("GET", "/v1/keys/{key}/delegations"): (),
    ("GET", "/v1/aliases"): (Right.SHOW,),
    ("PUT", "/v1/aliases/{alias}"): (Right.MANAGE,),
    ("DELETE", "/v1/aliases/{alias}"): (Right.MANAGE,),
    ("POST", "/v1/keys/{key}/encrypt"): (Right.ENCRYPT,),
    ("POST", "/v1/decrypt"): (Right.DECRYPT,),
    ("POST", "/v1/keys/{key}/decrypt"): (Right.DECRYPT,),
    ("POST", "/v1/keys/{key}/reencrypt"): (Right.DECRYPT, Right.ENCRYPT),
    ("POST", "/v1/keys/{key}/agree"): (Right.DERIVE,),
    ("POST", "/v1/keys/{key}/derive"): (Right.DERIVE,),
    ("POST", "/v1/keys/{key}/encapsulate"): (Right.ENCRYPT,),
    ("POST", "/v1/keys/{key}/decapsulate"): (Right.DECRYPT,),
    ("POST", "/v1/batch"): (),
    ("POST", "/v1/keys/{key}/data-key"): (Right.ENCRYPT,),
    ("POST", "/v1/keys/{key}/sign"): (Right.SIGN,),
    ("POST", "/v1/keys/{key}/verify"): (Right.VERIFY,),
    ("POST", "/v1/keys/{key}/mac"): (Right.MAC,),
    ("POST", "/v1/keys/{key}/verify-mac"): (Right.VERIFY,),
    ("POST", "/v1/digest/{algorithm}"): (Right.DIGEST,),
    ("GET", "/v1/random"): (Right.RANDOM,),
    ("GET", "/v1/audit"): (Right.SHOW,),
    ("GET", "/v1/endpoints"): (),
    ("GET", "/v1/algorithms"): (),
    ("GET", "/v1/health"): (),
    ("GET", "/v1/requests/{request}/error"): (),
}


async def error_of(response: aiohttp.ClientResponse) -> str:
    assert response.content_type == "application/json"
    code = (await response.json())["error"]["code"]
    assert isinstance(code, str)
    return code


async def call(session: aiohttp.ClientSession, method: str, path: str, **how: Any) -> tuple[int, str]:
    """(status, code of the error or "")."""
    async with session.request(method, path, **how) as response:
        return response.status, "" if response.status < 400 else await error_of(response)


def concrete(path: str, key: str = KEY) -> str:
    return path.format(key=key, algorithm="SHA-256", request=KEY, alias="name") + ("?bytes=3" if path == "/v1/random" else "")


def test_the_table_of_routes_is_whole(stage: Stage) -> None:
    served = {(r.method, r.resource.canonical) for r in stage.server._app.router.routes() if r.resource is not None}
    assert served == {*ROUTES, ("POST", "/v1/login")}


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=" ".join)
async def test_a_right_that_is_missing_refuses(stage: Stage, raw: aiohttp.ClientSession, method: str, path: str) -> None:
    needed = ROUTES[method, path]
    for missing in needed:
        stage.host.rights["shop"] = tuple(r for r in Right if r is not missing)
        assert await call(raw, method, concrete(path)) == (403, "not-permitted")
    stage.host.rights["shop"] = ()
    assert await call(raw, method, concrete(path)) == (403, "not-permitted")
    stage.host.rights["shop"] = needed or (Right.RANDOM,)
    _, code = await call(raw, method, concrete(path))
    assert code != "not-permitted"
    stage.host.revoked.add("shop")
    assert await call(raw, method, concrete(path)) == (403, "application-revoked")


@pytest.mark.parametrize("role", [Role.TERMINAL, Role.VCM, Role.UKEY])
async def test_other_roles_of_the_domain_are_refused(stage: Stage, role: Role) -> None:
    async with stage.raw(stage.credentials("ukey-1", role)) as session:
        for method, path in ROUTES:
            assert await call(session, method, concrete(path)) == (403, "not-permitted")


async def test_an_application_that_was_never_signed_in(stage: Stage) -> None:
    async with stage.client("stranger") as client:
        with pytest.raises(ApplicationUnknown):
            await client.list_keys()
        stage.host.revoked.add("stranger")
        with pytest.raises(ApplicationRevoked):
            await client.algorithms()


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if "{key}" in r[1] and ROUTES[r]], ids=" ".join)
async def test_keys_that_are_not_there(raw: aiohttp.ClientSession, method: str, path: str) -> None:
    bodies = dict.fromkeys(("data-key", "update", "schedule-deletion", "export"), b"{}")
    bodies |= {
        "trim": b'{"before": 1}',
        "agree": b'{"peer": ""}',
        "derive": b'{"length": 32}',
        "decapsulate": b'{"ciphertext": ""}',
        "derive-key": b'{"algorithm": "AES-256-GCM", "context": ""}',
    }
    how: dict[str, Any] = {"data": bodies.get(path.rpartition("/")[2], b"data")} if method == "POST" else {}
    how["headers"] = {"X-Cipherfleet-Signature": "AAAA"}
    assert await call(raw, method, concrete(path, str(new_key_id())), **how) == (404, "key-unknown")
    for bad in ("x", "0" * 31, "0" * 33, "A" * 32, "%00" * 32, "..%2f..%2f"):
        assert await call(raw, method, concrete(path, bad), **how) == (400, "malformed")


JSON_ROUTES = ["/v1/keys", "/v1/keys/batch", "/v1/keys/{key}/data-key", "/v1/keys/{key}/update", "/v1/keys/{key}/schedule-deletion"]


@pytest.mark.parametrize("path", JSON_ROUTES)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"algorithm": 7, "length": "x", "label": 7, "days": "x"}', 400),
        (b"x" * 300_000, 413),
        (b"[" * 5000, 400),
    ],
)
async def test_malformed_json(client: Client, raw: aiohttp.ClientSession, path: str, body: bytes, status: int) -> None:
    key = await client.create_key()
    async with raw.post(concrete(path, key.id), data=body) as response:
        assert response.status == status
        assert await error_of(response) in ("malformed", "too-large")

    async def chunked() -> Any:
        yield body

    assert (await call(raw, "POST", concrete(path, key.id), data=chunked()))[0] == status


@pytest.mark.parametrize("path", ["/v1/keys/{key}/encrypt", "/v1/decrypt", "/v1/keys/{key}/reencrypt", "/v1/keys/{key}/data-key"])
async def test_a_context_that_cannot_be_read(client: Client, raw: aiohttp.ClientSession, path: str) -> None:
    key = await client.create_key()
    ciphertext = await client.encrypt(key.id, b"data")
    for header, status in (("!!!", 400), ("AAA", 400), ("AA AA", 400), (base64.b64encode(bytes(4097)).decode(), 413)):
        found = await call(raw, "POST", concrete(path, key.id), data=ciphertext, headers={"X-Cipherfleet-Context": header})
        assert found[0] == (400 if path.endswith("data-key") else status)
    twice = [("X-Cipherfleet-Context", "AAAA"), ("X-Cipherfleet-Context", "AAAA")]
    assert await call(raw, "POST", concrete(path, key.id), data=ciphertext, headers=twice) == (400, "malformed")


@pytest.mark.parametrize(
    "header", [{}, {"X-Cipherfleet-Signature": ""}, {"X-Cipherfleet-Signature": "ä"}, {"X-Cipherfleet-Signature": "_-_-"}]
)
async def test_signatures_that_cannot_be_read(client: Client, raw: aiohttp.ClientSession, header: dict[str, str]) -> None:
    signer, mac = await client.create_key("Ed25519"), await client.create_key("HMAC-SHA-256")
    assert await call(raw, "POST", f"/v1/keys/{signer.id}/verify", data=b"x", headers=header) == (400, "malformed")
    assert await call(raw, "POST", f"/v1/keys/{mac.id}/verify-mac", data=b"x", headers=header) == (400, "malformed")


@pytest.mark.parametrize("version", ["0", "-1", "x", "1.0", "99999999999", "", "²"])
async def test_versions_that_cannot_be_read(client: Client, raw: aiohttp.ClientSession, version: str) -> None:
    key = await client.create_key("Ed25519")
    headers = {"X-Cipherfleet-Signature": "AAAA", "X-Cipherfleet-Key-Version": version}
    assert await call(raw, "POST", f"/v1/keys/{key.id}/verify", data=b"x", headers=headers) == (400, "malformed")


@pytest.mark.parametrize(
    "query", ["", "?bytes=", "?bytes=x", "?bytes=0", "?bytes=-5", "?bytes=1048577", "?bytes=1e3", "?bytes=99999999999999"]
)
async def test_random_wants_a_number(raw: aiohttp.ClientSession, query: str) -> None:
    assert await call(raw, "GET", f"/v1/random{query}") == (400, "malformed")


async def test_request_names_that_cannot_be_read(client: Client, raw: aiohttp.ClientSession) -> None:
    key = await client.create_key()
    for name in ("x", "0" * 33, "G" * 32):
        found = await call(raw, "POST", f"/v1/keys/{key.id}/encrypt", data=b"x", headers={"X-Cipherfleet-Request": name})
        assert found == (400, "malformed")
    assert await call(raw, "GET", "/v1/requests/nope/error") == (400, "malformed")


async def test_routes_that_are_not_there(raw: aiohttp.ClientSession) -> None:
    for method, path in (("GET", "/"), ("GET", "/v1"), ("PUT", "/v1/keys"), ("DELETE", f"/v1/keys/{KEY}"), ("GET", "/v1/decrypt")):
        assert await call(raw, method, path) == (404, "route-unknown")


async def test_what_comes_back_names_the_key_and_is_not_stored(client: Client, raw: aiohttp.ClientSession) -> None:
    key = await client.create_key("Ed25519")
    async with raw.post(f"/v1/keys/{key.id}/sign", data=b"message") as response:
        assert response.content_type == "application/octet-stream"
        assert response.headers["X-Cipherfleet-Key"] == key.id
        assert response.headers["X-Cipherfleet-Key-Version"] == "1"
        assert response.headers["X-Cipherfleet-Algorithm"] == "Ed25519"
        assert response.headers["Cache-Control"] == "no-store"
        signature = await response.read()
    headers = {"X-Cipherfleet-Signature": base64.b64encode(signature).decode()}
    async with raw.post(f"/v1/keys/{key.id}/verify", data=b"message", headers=headers) as response:
        assert response.status == 204
    assert await call(raw, "POST", f"/v1/keys/{key.id}/verify", data=b"another", headers=headers) == (422, "signature-invalid")


# -- keys and the service ----------------------------------------------------------------------------------------------


async def test_the_life_of_a_key(client: Client, stage: Stage) -> None:
    made = await client.create_key("aes-256-gcm", label="orders")
    assert (made.algorithm, made.label, made.version, made.state) == ("AES-256-GCM", "orders", 1, "enabled")
    assert made.created_by == "application/shop"
    assert await client.describe_key(made.id) == made
    assert [k.id for k in await client.list_keys()] == [made.id]
    assert (await client.rotate_key(made.id)).versions == (1, 2)
    assert (await client.disable_key(made.id)).state == "disabled"
    assert (await client.enable_key(made.id)).state == "enabled"
    assert (await client.delete_key(made.id)).state == "deleted"


async def test_keys_that_cannot_be(client: Client) -> None:
    with pytest.raises(AlgorithmUnknown):
        await client.create_key("DES")
    with pytest.raises(WrongKeyType):
        await client.create_key("SHA-256")
    for label in ("x" * 257, "a\nb", "\x1b[31m"):
        with pytest.raises(Malformed):
            await client.create_key(label=label)


async def test_the_service_describes_itself(client: Client, stage: Stage) -> None:
    assert {a.name for a in await client.algorithms()} >= {"AES-256-GCM", "SM3"}
    assert [e.event for e in await client.audit()] == ["enrolled"]
    assert await client.endpoints() == (stage.url,)
    health = await client.health()
    assert (health.vcm, health.card, health.consumer, health.serving) == (VCM, CARD, ACME, True)


async def test_without_keys_in_the_card_the_service_is_off(client: Client, stage: Stage) -> None:
    key = await client.create_key()
    stage.host.card.function.execute(Operation.DROP, 0, b"", b"")
    with pytest.raises(ServiceOff):
        await client.health()
    with pytest.raises(ServiceOff) as caught:
        await client.encrypt(key.id, b"data")
    assert "Ukey" in caught.value.hint


async def test_the_terminal_logs_in_and_nobody_else(stage: Stage) -> None:
    name = Identity(Role.VCM, VCM, ACME).dns_name
    async with Caller(stage.url, name, stage.credentials("ukey-1", Role.TERMINAL), ServiceOff) as terminal:
        reply = await terminal.call("POST", "/v1/login", Signed("right", b"payload"), reply=LoginReply)
        assert reply.confirmation == b"confirmed"
        with pytest.raises(LoginRefused):
            await terminal.call("POST", "/v1/login", Signed("wrong", b"payload"), reply=LoginReply)
        with pytest.raises(Malformed):
            await terminal.call("POST", "/v1/login", {"kind": 3}, reply=LoginReply)
    async with Caller(stage.url, name, stage.credentials(), ServiceOff) as application:
        with pytest.raises(NotPermitted):
            await application.call("POST", "/v1/login", Signed("right", b"payload"), reply=LoginReply)


async def test_errors_are_json_with_a_hint(raw: aiohttp.ClientSession) -> None:
    async with raw.post("/v1/keys", data=json.dumps({"algorithm": "DES"})) as response:
        assert response.status == 400
        body = await response.json()
    assert body["error"]["code"] == "algorithm-unknown"
    assert body["error"]["hint"] == "see: cipherfleet algorithms"
