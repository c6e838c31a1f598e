"""Process isolation: every VCM has a loopback address of its own; there is nothing to create."""

from collections.abc import Collection, Mapping


class LocalProcessNetwork:
    """All of 127.0.0.0/8 is there already; VCMs live in empty network namespaces and inherit their socket."""

    async def create_port(self, index: int, slot: int) -> str:
        return ""

    async def delete_port(self, index: int, slot: int) -> None:
        return None

    async def delete_domain(self, index: int) -> None:
        return None

    async def sweep(self, known: Mapping[int, Collection[int]]) -> int:
        return 0

    def applications(self, index: int) -> str:
        return ""
