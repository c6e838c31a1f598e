"""A look at every row of the escrow, page by page, beside the service: what nobody asks for is checked as well."""

from collections.abc import Sequence
from itertools import pairwise

from cipherfleet.contract.errors import EscrowRolledBack, EscrowRowTampered
from cipherfleet.contract.escrow import EscrowRow, RowName


class Sweep:
    """How far it came. ``rows``: how many there were when it began; later ones do not count."""

    def __init__(self, rows: int) -> None:
        self._missing = bytearray(b"\x01") * rows
        self._after: tuple[str, int] = ("", -1)
        self.ended = False

    @property
    def path(self) -> str:
        """Where the next page is."""
        key, version = self._after
        return f"/v1/escrow/rows?after={key}/{version}" if key else "/v1/escrow/rows"

    def names(self, page: Sequence[EscrowRow]) -> list[RowName]:
        """The rows of a page, which must go on where the last one ended. Raises ``EscrowRowTampered``."""
        order = [self._after, *((row.key, row.version) for row in page)]
        if any(first >= second for first, second in pairwise(order)):
            raise EscrowRowTampered("the escrow does not show its rows in order")
        return [RowName(row.key, row.version) for row in page]

    def passed(self, names: Sequence[RowName], numbers: Sequence[int | None]) -> None:
        """These rows are good."""
        for number in numbers:
            if number is not None and number < len(self._missing):
                self._missing[number] = 0
        if names:
            self._after = (names[-1].key, names[-1].version)

    def end(self) -> None:
        """There are no more. Raises ``EscrowRolledBack`` when one has not been shown."""
        if (count := self._missing.count(1)) > 0:
            raise EscrowRolledBack(f"{count} rows are missing in the escrow")
        self.ended = True
