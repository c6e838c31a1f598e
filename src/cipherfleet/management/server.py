"""The management platform's routes, as ``contract.management_api`` names them, with the roles that may call them."""

from cipherfleet.channel.server import Call, Server
from cipherfleet.contract.errors import Malformed
from cipherfleet.contract.identities import Role
from cipherfleet.contract.ids import ConsumerId, MachineId, VcmId
from cipherfleet.contract.management_api import (
    DomainInfo,
    MachineRegistration,
    MigrateRequest,
    PlatformStatus,
    VcmCreateRequest,
    VcmDetail,
    VcmList,
)
from cipherfleet.contract.messages import Done
from cipherfleet.contract.vcc import VccLimits
from cipherfleet.management.inventory import MachineRecord
from cipherfleet.management.lifecycle import Lifecycle
from cipherfleet.management.machines import Machines
from cipherfleet.management.modules import Modules
from cipherfleet.management.overview import Overview
from cipherfleet.management.ring import Ring

OPERATOR = (Role.OPERATOR,)
MAX_URL = 200


class Routes:
    def __init__(self, modules: Modules, machines: Machines, lifecycle: Lifecycle, ring: Ring) -> None:
        self._modules, self._machines, self._lifecycle, self._ring = modules, machines, lifecycle, ring
        self._overview = Overview(modules, ring)

    def mount(self, server: Server) -> None:
        server.route("GET", "/v1/status", OPERATOR, self._status)
        server.route("PUT", "/v1/machines/{machine}", OPERATOR, self._put_machine)
        server.route("PUT", "/v1/consumers/{consumer}", OPERATOR, self._put_consumer)
        server.route("DELETE", "/v1/consumers/{consumer}", OPERATOR, self._delete_consumer)
        server.route("GET", "/v1/vcms", OPERATOR, self._vcms)
        server.route("GET", "/v1/vcms/{vcm}", OPERATOR, self._vcm)
        server.route("POST", "/v1/vcms", OPERATOR, self._create)
        server.route("PUT", "/v1/vcms/{vcm}/limits", OPERATOR, self._limit)
        server.route("DELETE", "/v1/vcms/{vcm}", OPERATOR, self._delete)
        server.route("POST", "/v1/vcms/{vcm}/migrate", OPERATOR, self._migrate)
        server.route("GET", "/v1/terminal", (Role.TERMINAL,), self._terminal)
        server.route("GET", "/v1/domain", (Role.TERMINAL, Role.APPLICATION), self._domain)

    async def _status(self, call: Call) -> PlatformStatus:
        return await self._overview.status()

    async def _put_machine(self, call: Call) -> Done:
        machine = call.path("machine", MachineId)
        url = (await call.body(MachineRegistration)).url
        if not url.startswith("https://") or len(url) > MAX_URL:
            raise Malformed("a machine's url begins with https://")
        await self._machines.register(MachineRecord(machine, url))
        await self._modules.monitor.look(machine)
        return Done()

    async def _put_consumer(self, call: Call) -> DomainInfo:
        consumer = call.path("consumer", ConsumerId)
        await self._modules.store.allot_domain(consumer)
        return await self._overview.domain(consumer)

    async def _delete_consumer(self, call: Call) -> Done:
        await self._modules.store.remove_domain(call.path("consumer", ConsumerId))
        return Done()

    async def _vcms(self, call: Call) -> VcmList:
        return await self._overview.vcms(deleted=_flag(call, "all"))

    async def _vcm(self, call: Call) -> VcmDetail:
        return await self._overview.vcm(call.path("vcm", VcmId))

    async def _create(self, call: Call) -> VcmDetail:
        request = await call.body(VcmCreateRequest)
        return await self._overview.vcm((await self._lifecycle.create(request.consumer, request.machine)).id)

    async def _limit(self, call: Call) -> VcmDetail:
        vcm = call.path("vcm", VcmId)
        await self._lifecycle.limit(vcm, await call.body(VccLimits))
        return await self._overview.vcm(vcm)

    async def _delete(self, call: Call) -> VcmDetail:
        vcm, force = call.path("vcm", VcmId), _flag(call, "force")
        return await self._overview.vcm((await self._lifecycle.delete(vcm, force=force)).id)

    async def _migrate(self, call: Call) -> VcmDetail:
        vcm = call.path("vcm", VcmId)
        request = await call.body(MigrateRequest)
        return await self._overview.vcm((await self._lifecycle.migrate(vcm, request.machine)).id)

    async def _terminal(self, call: Call) -> object:
        return await self._modules.authentication.serve(call, self._ring)

    async def _domain(self, call: Call) -> DomainInfo:
        return await self._overview.domain(call.peer.identity.consumer)


def _flag(call: Call, name: str) -> bool:
    """A query of 0 or 1. Raises ``Malformed``."""
    value = call.query(name, "0")
    if value not in ("0", "1"):
        raise Malformed(f"{name} is 0 or 1")
    return value == "1"
