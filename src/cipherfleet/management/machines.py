"""The way to every cipher machine of the inventory: one caller each, made when first needed."""

from cipherfleet.channel.certificates import Credentials
from cipherfleet.channel.client import Caller
from cipherfleet.contract.errors import MachineUnavailable, MachineUnknown
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import MachineId
from cipherfleet.management.inventory import MachineRecord
from cipherfleet.management.store import Store


class Machines:
    def __init__(self, store: Store, credentials: Credentials) -> None:
        self._store = store
        self._credentials = credentials
        self._callers: dict[MachineId, Caller] = {}

    async def known(self) -> list[MachineRecord]:
        return await self._store.machines()

    async def register(self, machine: MachineRecord) -> None:
        """A machine started, or moved to another address."""
        await self._store.put_machine(machine)

    async def caller(self, machine: MachineId) -> Caller:
        """Raises ``MachineUnknown``."""
        for record in await self._store.machines():
            if record.id == machine:
                return await self.caller_of(record)
        raise MachineUnknown(f"there is no cipher machine {machine}")

    async def caller_of(self, record: MachineRecord) -> Caller:
        caller = self._callers.get(record.id)
        if caller is None or caller.url != record.url.rstrip("/"):
            if caller is not None:
                await caller.close()
            name = Identity(Role.MACHINE, record.id).dns_name
            caller = self._callers[record.id] = Caller(record.url, name, self._credentials, MachineUnavailable)
        return caller

    async def close(self) -> None:
        for caller in self._callers.values():
            await caller.close()
        self._callers.clear()
