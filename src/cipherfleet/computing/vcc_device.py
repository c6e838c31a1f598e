"""The card's end of a vCC's rings: requests out, completions in. What the VCM wrote is read once, and not trusted."""

from cipherfleet.channel import codec
from cipherfleet.computing.vcc_memory import WORD, Memory, completion, submission
from cipherfleet.contract.errors import CipherfleetError, Malformed, TooLarge
from cipherfleet.contract.vcc import COMPLETION, RING_ENTRIES, Counter, Descriptor, Status

Data = bytes | bytearray | memoryview


class Device:
    """``take`` requests, ``complete`` each of them, in any order."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._taken = self._completed = 0

    def take(self) -> Descriptor | None:
        """The next request; None when there is none, or no room for its completion. Raises ``Malformed``."""
        counters = self._memory.counters
        submitted = counters[Counter.SUBMITTED]
        if submitted == self._taken:
            return None
        unseen = (self._completed - counters[Counter.SEEN]) & WORD
        if (submitted - self._taken) & WORD > RING_ENTRIES or unseen > RING_ENTRIES:
            raise Malformed("a counter of the rings is out of bounds")
        if unseen + (self._taken - self._completed) & WORD >= RING_ENTRIES:
            return None
        request = Descriptor.decode(bytes(self._memory.submissions[submission(self._taken)]))
        self._taken = (self._taken + 1) & WORD
        return request

    def parameters(self, request: Descriptor) -> bytes:
        """A copy, for good."""
        return bytes(self._memory.region[request.parameters_at : request.parameters_at + request.parameter_bytes])

    def data(self, request: Descriptor) -> memoryview:
        """As it is in the region: the VCM may change it while it is read."""
        return self._memory.region[request.data_at : request.data_at + request.data_bytes]

    def room(self, request: Descriptor) -> memoryview:
        return self._memory.region[request.room_at : request.room_at + request.room_bytes]

    def complete(self, request: Descriptor, value: int, parameters: bytes, data: Data) -> None:
        """``data`` as a view is in the room already, where it belongs."""
        parameter_bytes, data_bytes = len(parameters), len(data)
        if parameter_bytes + data_bytes > request.room_bytes:
            self.fail(request, TooLarge("the answer is longer than the room for it"))
            return
        region, data_at = self._memory.region, request.room_at + parameter_bytes
        if parameter_bytes:
            region[request.room_at : data_at] = parameters
        if data_bytes and not isinstance(data, memoryview):
            region[data_at : data_at + data_bytes] = data
        self._write(COMPLETION.pack(Status.DONE, 0, request.number, value, parameter_bytes, data_bytes))

    def fail(self, request: Descriptor, error: CipherfleetError) -> None:
        """Without a word when there is no room for one."""
        said = codec.encode(error.to_reply().error)
        said = said if len(said) <= request.room_bytes else b""
        self._memory.region[request.room_at : request.room_at + len(said)] = said
        self._write(COMPLETION.pack(Status.FAILED, 0, request.number, 0, len(said), 0))

    def _write(self, raw: bytes) -> None:
        self._memory.completions[completion(self._completed)] = raw
        self._completed = (self._completed + 1) & WORD
        self._memory.publish(Counter.COMPLETED, self._completed)

    @property
    def vcm_sleeps(self) -> bool:
        """Whether the VCM waits for its doorbell. Ask after ``complete``."""
        return self._memory.counters[Counter.VCM_SLEEPS] != 0

    def sleeps(self, state: bool) -> None:
        """Whether the VCM shall ring the doorbell. Take once more after ``True``: what came before did not ring."""
        self._memory.publish(Counter.CARD_SLEEPS, int(state))
