"""The port of the network manager: security domains and their ports on a host."""

from collections.abc import Collection, Mapping
from typing import Protocol


class NetworkDriver(Protocol):
    """Security domains by index (1..250), ports of VCMs in them by slot (10..17).

    Post-conditions: a failed creation leaves nothing new, creating what is there and deleting what is gone succeed.
    """

    async def create_port(self, index: int, slot: int) -> str:
        """The port, and the domain with it; the network namespace to listen in ("" = the host's).

        Raises ``IsolationUnavailable``.
        """
        ...

    async def delete_port(self, index: int, slot: int) -> None:
        """Cut the port off, whoever still holds a socket of it."""
        ...

    async def delete_domain(self, index: int) -> None: ...

    async def sweep(self, known: Mapping[int, Collection[int]]) -> int:
        """Delete what is not in ``known`` (index -> slots in use); how much was deleted."""
        ...

    def applications(self, index: int) -> str:
        """The network namespace of the domain's applications ("" = the host's)."""
        ...
