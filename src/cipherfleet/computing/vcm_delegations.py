"""What applications have delegated, as one VCM sees it: statements that their delegators signed, each the newest that the log names.

Whether the delegator may (still) delegate it decides ``vcm_grants``, at each use, by what the Ukey has signed.
"""

from collections.abc import Sequence

from cipherfleet.channel.delegations import read_delegation
from cipherfleet.computing.vcm_escrow import Escrow
from cipherfleet.contract.errors import CipherfleetError, EscrowRowTampered, KmcUnavailable
from cipherfleet.contract.escrow import DelegationName, statement_digest
from cipherfleet.contract.ids import ApplicationName, ConsumerId, KeyId
from cipherfleet.contract.statements import DelegationStatement, Signed

ATTEMPTS = 3


class Delegated:
    """Read when they are needed, checked, and kept until the log names newer ones."""

    def __init__(self, consumer: ConsumerId, escrow: Escrow) -> None:
        self._consumer, self._escrow = consumer, escrow
        self._kept: dict[DelegationName, tuple[bytes, DelegationStatement | None]] = {}

    def any_to(self, delegate: ApplicationName) -> bool:
        return bool(self._escrow.state.delegated(delegate))

    async def to(self, delegate: ApplicationName, key: KeyId) -> Sequence[DelegationStatement]:
        """What an application was given of a key and not lost again, by whom it was given. Raises as ``read``."""
        found = await self.read(self._escrow.state.delegated(delegate, key))
        return [statement for statement in found.values() if statement is not None and not statement.revoked]

    async def of_key(self, key: KeyId) -> dict[DelegationName, DelegationStatement | None]:
        """All of a key. Raises as ``read``."""
        return await self.read([name for name in self._escrow.state.delegations if name.key == key])

    async def read(self, names: Sequence[DelegationName]) -> dict[DelegationName, DelegationStatement | None]:
        """The newest statements; ``None`` for what is none, and so gives nothing, though somebody wrote it into the log.

        Raises ``EscrowRowTampered`` for one that is missing or not the newest, ``KmcUnavailable``.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                await self._escrow.refresh()  # one may have been signed since the log was read
            wanted = [name for name in names if self._current(name) is None]
            for signed in await self._escrow.delegations(wanted) if wanted else ():
                self._take(signed, wanted)
            if all(self._current(name) is not None for name in names):
                return {name: self._kept[name][1] for name in names}
        missing = next((name for name in names if self._current(name) is None), None)
        if missing is None:
            raise KmcUnavailable("the escrow's delegations change faster than they can be read")
        raise EscrowRowTampered(f"what {missing.delegator} delegated of key {missing.key} is not what the escrow's log names")

    def _current(self, name: DelegationName) -> tuple[bytes, DelegationStatement | None] | None:
        kept, newest = self._kept.get(name), self._escrow.state.delegation(name)
        return kept if kept is not None and newest is not None and kept[0] == newest[1] else None

    def _take(self, signed: Signed, wanted: Sequence[DelegationName]) -> None:
        """Keep a statement if it is the newest of one of those that are ``wanted``."""
        digest = statement_digest(signed)
        for name in wanted:
            newest = self._escrow.state.delegation(name)
            if newest is not None and newest[1] == digest:
                self._kept[name] = digest, self._checked(signed, name, newest[0])

    def _checked(self, signed: Signed, name: DelegationName, number: int) -> DelegationStatement | None:
        try:
            statement = read_delegation(signed)
        except CipherfleetError:
            return None
        told = statement.consumer, DelegationName(statement.delegator, statement.delegate, statement.key), statement.sequence
        return statement if told == (self._consumer, name, number) else None
