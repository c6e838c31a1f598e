"""Keys that come and go wrapped: import by a one-time key, export."""

from cipherfleet.channel.server import Call
from cipherfleet.contract.statements import Right
from cipherfleet.contract.vcm_api import (
    ExportAsk,
    ExportReply,
    ImportParameters,
    ImportParametersRequest,
    KeyDescription,
    WrappedImportRequest,
)
from cipherfleet.services.components.routes import Routes, actor


class Transfers:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        routes.add("POST", "/v1/import/parameters", (Right.CREATE,), self.parameters)
        routes.add("POST", "/v1/import/wrapped", (Right.CREATE,), self.import_wrapped)
        routes.add("POST", "/v1/keys/{key}/export", (Right.MANAGE,), self.export)

    async def parameters(self, call: Call) -> ImportParameters:
        wanted = await self._routes.body(call).message(ImportParametersRequest)
        return await self._routes.host.transfer.import_parameters(wanted)

    async def import_wrapped(self, call: Call) -> KeyDescription:
        request = await self._routes.body(call).message(WrappedImportRequest)
        return await self._routes.host.transfer.import_wrapped(request, actor=actor(call))

    async def export(self, call: Call) -> ExportReply:
        ask = await self._routes.body(call).message(ExportAsk)
        key = await self._routes.key_id(call)
        wrapping = await self._routes.named_key(ask.wrapping_key) if ask.wrapping_key else None
        if wrapping is not None:
            await self._routes.permit(call, Right.ENCRYPT, wrapping)
        return await self._routes.host.transfer.export(key, ask.version, public_key=ask.public_key, wrapping=wrapping)
