"""What is not about one key: the terminal's login, random bytes, endpoints, algorithms, audit, health."""

from aiohttp import web

from cipherfleet.channel import codec
from cipherfleet.channel.server import Call
from cipherfleet.contract.algorithms import REGISTRY
from cipherfleet.contract.audit import AuditLog, AuditQuery
from cipherfleet.contract.errors import ServiceOff
from cipherfleet.contract.policy import refusal
from cipherfleet.contract.statements import Right, Signed
from cipherfleet.contract.vcc import CardDescription, Operation, RandomRequest
from cipherfleet.contract.vcm_api import EndpointsReply, LoginReply
from cipherfleet.services import wire
from cipherfleet.services.components.bodies import whole_number
from cipherfleet.services.components.routes import ANY_RIGHT, Routes, raw


class Service:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("GET", "/v1/random", (Right.RANDOM,), self.random)
        routes.add("GET", "/v1/audit", (Right.SHOW,), self.audit)
        routes.add("GET", "/v1/endpoints", ANY_RIGHT, self.endpoints)
        routes.add("GET", "/v1/algorithms", ANY_RIGHT, self.algorithms)
        routes.add("GET", "/v1/health", ANY_RIGHT, self.health)
        routes.add("GET", "/v1/requests/{request}/error", ANY_RIGHT, routes.request_error)

    async def login(self, call: Call) -> LoginReply:
        """Creation step 8."""
        return await self._routes.host.login(call.peer, await self._routes.body(call).message(Signed))

    async def random(self, call: Call) -> web.Response:
        length = whole_number(call.query("bytes"), "bytes", 1, wire.MAX_RANDOM_BYTES)
        done = await self._routes.host.card.submit(Operation.RANDOM, parameters=codec.encode(RandomRequest(length)))
        return raw(done.data)

    async def audit(self, call: Call) -> AuditLog:
        return await self._routes.host.audit(AuditQuery.parse(call.request.query))

    async def endpoints(self, call: Call) -> EndpointsReply:
        return EndpointsReply(tuple(await self._routes.host.endpoints()))

    async def algorithms(self, call: Call) -> wire.AlgorithmsReply:
        rules = self._routes.host.keys.policy
        found = ((name, refusal(rules, chosen, bare=chosen.bare_only)) for name, chosen in REGISTRY.items())
        return wire.AlgorithmsReply(tuple(REGISTRY.values()), rules.name, {name: refused[0] for name, refused in found if refused})

    async def health(self, call: Call) -> wire.HealthReply:
        """Raises ``ServiceOff`` while the card does not serve this consumer."""
        done = await self._routes.host.card.submit(Operation.DESCRIBE)
        card = codec.decode(done.parameters, CardDescription)
        if not card.serving:
            raise ServiceOff(f"{self._routes.host.id} has no lease")
        return wire.HealthReply(self._routes.host.id, self._routes.host.consumer, card.card, card.serving)
