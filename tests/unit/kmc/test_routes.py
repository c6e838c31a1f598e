"""The door: every route for its roles alone, whatever is sent to it."""

import pytest

from cipherfleet.channel.certificates import Credentials, key_to_pem, new_key
from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import CertificateInvalid, Malformed, NotPermitted, RouteUnknown, TooLarge, Unsupported
from cipherfleet.contract.identities import Role
from tests.unit.kmc.world import World, start_vcm, world_in

VCM, TOKEN = "vcm-000000000000", "0" * 16

ROUTES = {
    ("POST", "/v1/certificates/machine/m1"): {Role.OPERATOR},
    ("POST", "/v1/consumers"): {Role.OPERATOR},
    ("POST", "/v1/consumers/x/confirm"): {Role.OPERATOR},
    ("POST", "/v1/consumers/x/revoke-ukey"): {Role.OPERATOR},
    ("DELETE", "/v1/consumers/x"): {Role.OPERATOR},
    ("GET", "/v1/consumers"): {Role.OPERATOR},
    ("GET", "/v1/applications"): {Role.OPERATOR},
    ("POST", "/v1/applications/x/y/revoke"): {Role.OPERATOR},
    ("GET", "/v1/audit"): {Role.OPERATOR, Role.VCM, Role.TERMINAL},
    ("GET", "/v1/audit/heads"): {Role.OPERATOR},
    ("POST", "/v1/audit/events"): {Role.MANAGEMENT},
    ("POST", "/v1/usage"): {Role.VCM},
    ("GET", f"/v1/usage/{'0' * 32}"): {Role.VCM},
    ("POST", "/v1/identity/challenges"): {Role.MANAGEMENT},
    ("POST", "/v1/identity/verify"): {Role.MANAGEMENT},
    ("PUT", f"/v1/vcms/{VCM}"): {Role.MANAGEMENT},
    ("DELETE", f"/v1/vcms/{VCM}"): {Role.MANAGEMENT},
    ("DELETE", f"/v1/tokens/{TOKEN}"): {Role.MANAGEMENT},
    ("GET", f"/v1/vcms/{VCM}"): {Role.MANAGEMENT},
    ("POST", "/v1/consumers/x/revoke"): {Role.MANAGEMENT},
    ("POST", "/v1/cards"): {Role.MACHINE},
    ("POST", f"/v1/vcms/{VCM}/certificate"): {Role.MACHINE},
    ("POST", "/v1/certificate"): {Role.VCM},
    ("GET", "/v1/escrow"): {Role.VCM, Role.TERMINAL},
    ("POST", "/v1/escrow"): {Role.VCM},
    ("POST", "/v1/escrow/rows"): {Role.VCM},
    ("GET", "/v1/escrow/rows"): {Role.VCM},
    ("POST", "/v1/escrow/search"): {Role.VCM},
    ("POST", "/v1/escrow/statements"): {Role.VCM},
    ("POST", "/v1/escrow/delegations"): {Role.VCM},
    ("POST", "/v1/delegations"): {Role.VCM},
    ("GET", "/v1/escrow/receipts/00000000000000000000000000000000"): {Role.VCM},
    ("GET", "/v1/vcm"): {Role.VCM},
    ("GET", "/v1/terminal"): {Role.TERMINAL},
    ("POST", "/v1/applications"): {Role.TERMINAL},
    ("GET", "/v1/ukeys"): {Role.OPERATOR, Role.TERMINAL},
    ("POST", "/v1/ukeys"): {Role.TERMINAL},
    ("POST", "/v1/epochs"): {Role.TERMINAL},
    ("POST", "/v1/policies"): {Role.TERMINAL},
    ("GET", "/v1/epochs"): {Role.TERMINAL},
    ("POST", "/v1/ukeys/x/ukey-00000000/revoke"): {Role.OPERATOR},
    ("GET", "/v1/ukeys/statements"): {Role.TERMINAL},
}
NO_BODY = ("/revoke", "/revoke-ukey", "/search")  # or an empty one
BODIES = [r for r in ROUTES if r[0] in ("POST", "PUT") and not r[1].endswith(NO_BODY)]


async def callers(world: World) -> dict[Role, Caller]:
    alice, key = await world.enrol(), new_key()
    application = Credentials(key_to_pem(key), (await alice.application(key=key)).chain, alice.reply.root)
    return {
        Role.OPERATOR: await world.operator(),
        Role.MANAGEMENT: await world.management(),
        Role.MACHINE: await world.machine(),
        Role.VCM: (await start_vcm(world, alice, await alice.plug_in())).caller,
        Role.TERMINAL: alice.terminal(),
        Role.APPLICATION: world.call_as(application),
    }


async def test_every_route_is_here(world: World) -> None:
    mounted = {
        (route.method, "/".join("*" if part.startswith("{") else part for part in route.resource.canonical.split("/")))
        for route in world.kmc.server._app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert len(mounted) == len(ROUTES)


async def test_wrong_roles(world: World) -> None:
    everyone = await callers(world)
    for (method, path), allowed in ROUTES.items():
        for role, caller in everyone.items():
            if role not in allowed:
                with pytest.raises(NotPermitted):
                    await caller.call(method, path)


async def test_malformed_bodies(world: World) -> None:
    everyone = await callers(world)
    for method, path in BODIES:
        caller = everyone[next(iter(ROUTES[method, path]))]
        bodies: tuple[object, ...] = None, [], {}, {"csr": 1, "consumer": 1, "kind": 1, "card": 1, "writes": 1, "statement": 1}
        for body in bodies:
            with pytest.raises(Malformed):
                await caller.call(method, path, body)


async def test_oversized_bodies(world: World) -> None:
    everyone = await callers(world)
    huge = "x" * (16 * 1024 * 1024)
    for method, path in (("POST", "/v1/consumers"), ("POST", "/v1/escrow"), ("POST", "/v1/applications")):
        with pytest.raises(TooLarge):
            await everyone[next(iter(ROUTES[method, path]))].call(method, path, huge)


async def test_malformed_paths(world: World) -> None:
    everyone = await callers(world)
    for method, path, role in (
        ("GET", "/v1/vcms/vcm-1", Role.MANAGEMENT),
        ("DELETE", "/v1/vcms/vcm-%00", Role.MANAGEMENT),
        ("DELETE", "/v1/tokens/x", Role.MANAGEMENT),
        ("POST", "/v1/consumers/UPPER/confirm", Role.OPERATOR),
        ("DELETE", "/v1/consumers/%27", Role.OPERATOR),
        ("POST", "/v1/applications/alice/a%20b/revoke", Role.OPERATOR),
    ):
        with pytest.raises(Malformed):
            await everyone[role].call(method, path)
    with pytest.raises(RouteUnknown):
        await everyone[Role.OPERATOR].call("GET", "/v2/consumers")
    with pytest.raises(RouteUnknown):
        await everyone[Role.OPERATOR].call("PUT", "/v1/consumers")


async def test_a_channel_is_a_websocket(world: World) -> None:
    everyone = await callers(world)
    for role, path in ((Role.VCM, "/v1/vcm"), (Role.TERMINAL, "/v1/terminal")):
        with pytest.raises(Unsupported):
            await everyone[role].call("GET", path)


async def test_another_root_is_not_let_in(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with world_in(tmp_path_factory.mktemp("other")) as other:
        stranger = await other.operator()
        stranger.url = world.url
        with pytest.raises(CertificateInvalid):
            await stranger.call("GET", "/v1/consumers")
