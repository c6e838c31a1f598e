"""An application gives another one of what the consumer lets it delegate."""

from cipherfleet.channel.server import Call
from cipherfleet.contract.statements import Signed
from cipherfleet.contract.vcm_api import Delegation, DelegationsReply
from cipherfleet.services.components.routes import ANY_RIGHT, Routes


class Delegations:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/keys/{key}/delegate", ANY_RIGHT, self.delegate)
        routes.add("GET", "/v1/keys/{key}/delegations", ANY_RIGHT, self.list_delegations)

    async def delegate(self, call: Call) -> Delegation:
        """It is acknowledged after the escrow has it."""
        statement = await self._routes.body(call).message(Signed)
        return await self._routes.host.delegate(call.peer, await self._routes.key_id(call), statement)

    async def list_delegations(self, call: Call) -> DelegationsReply:
        return await self._routes.host.delegations(call.peer, await self._routes.key_id(call))
