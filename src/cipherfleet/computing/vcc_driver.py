"""The VCM's end of a vCC's rings: requests in, completions out. Sans-IO but for the shared memory; not for several threads."""

from typing import NamedTuple

from cipherfleet.computing.vcc_memory import WORD, Memory, completion, submission
from cipherfleet.contract.errors import CardUnavailable
from cipherfleet.contract.vcc import COMPLETION, REGION_BYTES, RING_ENTRIES, Counter, Descriptor, Operation, Status

Data = bytes | bytearray | memoryview

ANSWER_BYTES = 8 * 1024
"""Room for an answer that is no longer than the request: a few parameters, an error, a header and tags."""
_ANSWER_BYTES = {Operation.RANDOM: 1024 * 1024 + ANSWER_BYTES, Operation.BATCH: 2 * 1024 * 1024 + 32 * ANSWER_BYTES}
_SHORT_BYTES = 4 * 1024
_UNIT_BYTES = 256


class Answered(NamedTuple):
    """A completion, its answer copied out of the region."""

    number: int
    status: int
    value: int
    parameters: bytes
    data: bytes


class _Place(NamedTuple):
    """Where a request lies in the region. ``secret``: its answer is to be in that one response and nowhere else."""

    at: int
    size: int
    room_at: int
    room_bytes: int
    secret: bool


class Extents:
    """What is free of the region: lowest first, so that few pages are ever touched."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]

    def take(self, size: int) -> int | None:
        """The offset of ``size`` bytes, or None while there is no such piece."""
        for index, (at, length) in enumerate(self._free):
            if length > size:
                self._free[index] = at + size, length - size
                return at
            if length == size:
                del self._free[index]
                return at
        return None

    def give_back(self, at: int, size: int) -> None:
        free, index = self._free, 0
        while index < len(free) and free[index][0] < at:
            index += 1
        if index < len(free) and at + size == free[index][0]:
            size += free.pop(index)[1]
        if index and sum(free[index - 1]) == at:
            index -= 1
            before, length = free[index]
            free[index] = before, length + size
        else:
            free.insert(index, (at, size))


class Driver:
    """``push`` requests, ``pull`` completions; the caller rings the card's doorbell when ``push`` says so."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._extents = Extents(REGION_BYTES)
        self._submitted = self._seen = 0
        self._under_way: dict[int, _Place] = {}

    def __len__(self) -> int:
        """How many requests are under way."""
        return len(self._under_way)

    def push(self, operation: Operation, number: int, handle: int, parameters: bytes, data: Data) -> bool:
        """Put a request into the ring, if there is room. ``number`` must not be under way."""
        if len(self._under_way) >= RING_ENTRIES:
            return False
        parameter_bytes, data_bytes = len(parameters), len(data)
        room_bytes = parameter_bytes + data_bytes + data_bytes // 256 + _ANSWER_BYTES.get(operation, ANSWER_BYTES)
        size = -(-(parameter_bytes + data_bytes + room_bytes) // _UNIT_BYTES) * _UNIT_BYTES
        at = self._extents.take(size)
        if at is None:
            return False
        region = self._memory.region
        data_at = at + parameter_bytes
        room_at = data_at + data_bytes
        if parameter_bytes:
            region[at:data_at] = parameters
        if data_bytes:
            region[data_at:room_at] = data
        request = Descriptor(operation, number, handle, at, parameter_bytes, data_at, data_bytes, room_at, room_bytes)
        self._memory.submissions[submission(self._submitted)] = request.encode()
        # what is agreed on, derived, unwrapped or made as a data key is short
        secret = operation in (Operation.DATA_KEY, Operation.BATCH) or (operation is Operation.RUN and data_bytes <= _SHORT_BYTES)
        self._under_way[number] = _Place(at, size, room_at, room_bytes, secret)
        self._submitted = (self._submitted + 1) & WORD
        self._memory.publish(Counter.SUBMITTED, self._submitted)
        return True

    @property
    def card_sleeps(self) -> bool:
        """Whether the card waits for its doorbell. Ask after ``push``."""
        return self._memory.counters[Counter.CARD_SLEEPS] != 0

    def sleeps(self, state: bool) -> None:
        """Whether the card shall ring this end's doorbell. Pull once more after ``True``: what came before did not ring."""
        self._memory.publish(Counter.VCM_SLEEPS, int(state))

    def pull(self) -> list[Answered]:
        """What was completed since the last call. Raises ``CardUnavailable`` when the card writes nonsense."""
        completed = self._memory.counters[Counter.COMPLETED]
        if completed == self._seen:
            return []
        if (completed - self._seen) & WORD > RING_ENTRIES:
            raise CardUnavailable("the crypto card answered what nobody asked")
        answers = []
        while self._seen != completed:
            status, flags, number, value, parameter_bytes, data_bytes = COMPLETION.unpack(self._memory.completions[completion(self._seen)])
            self._seen = (self._seen + 1) & WORD
            place = self._under_way.pop(number, None)
            if place is None or flags or status not in (Status.DONE, Status.FAILED) or parameter_bytes + data_bytes > place.room_bytes:
                raise CardUnavailable("the crypto card answered what nobody asked")
            region, data_at = self._memory.region, place.room_at + parameter_bytes
            end = data_at + data_bytes
            answers.append(Answered(number, status, value, bytes(region[place.room_at : data_at]), bytes(region[data_at:end])))
            if place.secret:
                region[place.room_at : end] = bytes(end - place.room_at)
            self._extents.give_back(place.at, place.size)
        self._memory.publish(Counter.SEEN, self._seen)
        return answers


__all__ = ["ANSWER_BYTES", "Answered", "Data", "Driver", "Extents"]
