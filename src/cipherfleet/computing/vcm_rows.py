"""Rows that a VCM has checked and keeps: least recently used go first, within a number of bytes."""

from collections import OrderedDict

from cipherfleet.contract.escrow import EscrowRow

CACHE_BYTES = 96 * 1024 * 1024
"""Both rows of more than 100,000 AES keys."""
OVERHEAD_BYTES = 180
"""What Python adds to a row: its two numbers, its object and its place in the order."""


class RowCache:
    """Rows by their number. They are packed: length of the attributes (4 bytes), attributes, wrapped key."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0
        self._sealed = bytearray()  # of each row by number: whether the card has found that the consumer's CMK sealed it

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def full(self) -> bool:
        """Whether a row more would put another one out, as good as."""
        return self._bytes > self._limit * 15 // 16

    def get(self, number: int) -> tuple[bytes, bytes] | None:
        """Attributes and wrapped key."""
        packed = self._kept.get(number)
        if packed is None:
            return None
        self._kept.move_to_end(number)
        end = 4 + int.from_bytes(packed[:4], "big")
        return packed[4:end], packed[end:]

    def put(self, number: int, row: EscrowRow) -> None:
        self._remove(number)
        packed = self._kept[number] = len(row.attributes).to_bytes(4, "big") + row.attributes + row.wrapped
        self._bytes += len(packed) + OVERHEAD_BYTES
        while self._bytes > self._limit:
            _, old = self._kept.popitem(last=False)
            self._bytes -= len(old) + OVERHEAD_BYTES

    def drop(self, number: int) -> None:
        """The row was replaced."""
        self._remove(number)
        if number < len(self._sealed):
            self._sealed[number] = 0

    def sealed(self, number: int) -> bool:
        """Whether the card has checked the newest row of that number, here or not."""
        return number < len(self._sealed) and self._sealed[number] != 0

    def note_sealed(self, number: int) -> None:
        if number >= len(self._sealed):
            self._sealed += bytes(number + 1 - len(self._sealed))
        self._sealed[number] = 1

    def _remove(self, number: int) -> None:
        old = self._kept.pop(number, None)
        if old is not None:
            self._bytes -= len(old) + OVERHEAD_BYTES

    def clear(self) -> None:
        self._kept.clear()
        self._sealed.clear()
        self._bytes = 0
