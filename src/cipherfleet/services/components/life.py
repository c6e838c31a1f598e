"""What becomes of a key after it was made: names, tags, scheduled deletion."""

from cipherfleet.channel.server import Call
from cipherfleet.contract.key_life import KeyUpdate
from cipherfleet.contract.messages import Done
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcm_api import AliasListReply, AliasRequest, DeletionRequest, KeyDescription, ReceiptReply, TrimRequest
from cipherfleet.services.components.routes import Routes, actor


class Life:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/keys/{key}/update", (Right.MANAGE,), self.update)
        routes.add("POST", "/v1/keys/{key}/schedule-deletion", (Right.MANAGE,), self.schedule_deletion)
        routes.add("POST", "/v1/keys/{key}/cancel-deletion", (Right.MANAGE,), self.cancel_deletion)
        routes.add("GET", "/v1/keys/{key}/receipt", (Right.SHOW,), self.receipt)
        routes.add("POST", "/v1/keys/{key}/trim", (Right.MANAGE,), self.trim)
        routes.add("POST", "/v1/keys/{key}/delete", (Right.MANAGE,), self.destroy)
        routes.add("GET", "/v1/aliases", (Right.SHOW,), self.list_aliases)
        routes.add("PUT", "/v1/aliases/{alias}", (Right.MANAGE,), self.set_alias)
        routes.add("DELETE", "/v1/aliases/{alias}", (Right.MANAGE,), self.delete_alias)

    async def schedule_deletion(self, call: Call) -> KeyDescription:
        wanted = await self._routes.body(call).message(DeletionRequest)
        return await self._routes.host.key_life.schedule_deletion(await self._routes.key_id(call), wanted.days, actor=actor(call))

    async def cancel_deletion(self, call: Call) -> KeyDescription:
        return await self._routes.host.key_life.cancel_deletion(await self._routes.key_id(call), actor=actor(call))

    async def trim(self, call: Call) -> KeyDescription:
        wanted = await self._routes.body(call).message(TrimRequest)
        return await self._routes.host.key_life.trim(await self._routes.key_id(call), wanted.before, actor=actor(call))

    async def receipt(self, call: Call) -> ReceiptReply:
        return await self._routes.host.key_life.receipt(await self._routes.key_id(call))

    async def destroy(self, call: Call) -> KeyDescription:
        """At once."""
        return await self._routes.host.keys.destroy(await self._routes.key_id(call), actor=actor(call))

    async def update(self, call: Call) -> KeyDescription:
        change = await self._routes.body(call).message(KeyUpdate)
        if change.label is not None:  # grants go by labels: who manages one key alone brings it under no other grant
            await self._routes.host.authorise(call.peer, Right.MANAGE)
        return await self._routes.host.key_life.update(await self._routes.key_id(call), change, actor=actor(call))

    async def list_aliases(self, call: Call) -> AliasListReply:
        return AliasListReply(tuple(await self._routes.host.key_life.list_aliases()))

    async def set_alias(self, call: Call) -> KeyDescription:
        request = await self._routes.body(call).message(AliasRequest)
        key = await self._routes.named_key(request.key)
        return await self._routes.host.key_life.set_alias(call.path("alias", str), key, actor=actor(call))

    async def delete_alias(self, call: Call) -> Done:
        await self._routes.host.key_life.delete_alias(call.path("alias", str), actor=actor(call))
        return Done()
