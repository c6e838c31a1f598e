"""What a virtual function holds by number: keys by handle and open streams, both bounded, neither guessable."""

import secrets
from collections.abc import Callable

from cipherfleet.computing.engine import Key
from cipherfleet.computing.engine_memory import Data, Pause
from cipherfleet.computing.engine_message import Decryptor, Encryptor
from cipherfleet.computing.engine_signature import Signature
from cipherfleet.computing.engine_stream import Stream
from cipherfleet.contract.errors import KeyExhausted, KeyUnknown, LimitReached, OutOfOrder
from cipherfleet.contract.ids import KeyId
from cipherfleet.contract.vcc import MAX_STREAMS

MAX_KEYS = 16384
MAX_MESSAGES = 2**32
"""Messages under one key version: with a key of its own for each, two salts (32 bytes) meet with less than 2**-190."""
MAX_COUNTED_KEYS = 4 * MAX_KEYS
MAX_HELD_BYTES = 8 * 1024 * 1024


class KeyTable:
    """Loaded keys by handle, and how many messages each key version has encrypted here (also while it was not loaded)."""

    def __init__(self) -> None:
        self.most = MAX_KEYS
        self._keys: dict[int, Key] = {}
        self._messages: dict[tuple[KeyId, int], int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def check_room(self) -> None:
        """Raises ``LimitReached``."""
        if len(self._keys) >= self.most:
            raise LimitReached(f"this vCC holds at most {self.most} keys")

    def add(self, key: Key) -> int:
        """The new key's handle."""
        handle = secrets.randbits(63) or 1
        self._keys[handle] = key
        return handle

    def get(self, handle: int) -> Key:
        """Raises ``KeyUnknown``."""
        key = self._keys.get(handle)
        if key is None:
            raise KeyUnknown("no key of this vCC has that handle")
        return key

    def remove(self, handle: int) -> None:
        """Zeroise one key. Raises ``KeyUnknown``."""
        self.get(handle).close()
        del self._keys[handle]

    def clear(self) -> None:
        """Zeroise all keys."""
        for key in self._keys.values():
            key.close()
        self._keys.clear()

    def count_message(self, key: Key) -> None:
        """One message more under ``key``. Raises ``KeyExhausted``."""
        name = (key.id, key.version)
        count = self._messages.get(name, 0)
        if count >= MAX_MESSAGES:
            raise KeyExhausted(f"version {key.version} of key {key.id} has encrypted {MAX_MESSAGES} messages")
        if count == 0 and len(self._messages) >= MAX_COUNTED_KEYS:
            del self._messages[next(iter(self._messages))]
        self._messages[name] = count + 1


class OpenStream:
    """A stream and what is under way in it: closed when it has ended and nothing is under way any more."""

    def __init__(self, stream: Stream, handles: tuple[int, ...]) -> None:
        self.stream, self.handles = stream, handles
        self._under_way, self._ended = 0, False

    def enter(self) -> None:
        self._under_way += 1

    def leave(self) -> None:
        self._under_way -= 1
        self._close()

    def end(self) -> None:
        self._ended = True
        self._close()

    def _close(self) -> None:
        if self._ended and not self._under_way:
            self.stream.close()


class StreamTable:
    """Open streams by number. A stream that met an error is gone."""

    def __init__(self) -> None:
        self._streams: dict[int, OpenStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def check_room(self) -> None:
        """Raises ``LimitReached``."""
        if len(self._streams) >= MAX_STREAMS:
            raise LimitReached(f"a vCC has at most {MAX_STREAMS} streams open")

    def add(self, stream: Stream, handles: tuple[int, ...]) -> int:
        """The number of a new stream, which ends with the keys that ``handles`` name."""
        number = secrets.randbits(63) or 1
        self._streams[number] = OpenStream(stream, handles)
        return number

    def get(self, number: int) -> OpenStream:
        """Raises ``OutOfOrder``."""
        found = self._streams.get(number)
        if found is None:
            raise OutOfOrder("no stream of this vCC has that number", "begin one first")
        return found

    def step(self, number: int, data: Data, into: memoryview | None, *, last: bool) -> Callable[[Pause], Data]:
        """What is to be done with the next part. After the ``last`` one, and after an error, the stream is gone."""
        stream = self.get(number).stream
        try:
            if isinstance(stream, Encryptor | Decryptor):
                return stream.begin(data, into, last=last)
            if isinstance(stream, Signature) and stream.holds and not last:
                self._check_held(len(data))
            work = stream.finish if last else stream.update
            return lambda pause: work(data, into, pause)
        except BaseException:
            self.abort(number)
            raise

    def abort(self, number: int) -> None:
        """Raises ``OutOfOrder``."""
        self.get(number).end()
        del self._streams[number]

    def end_those_of(self, handle: int) -> None:
        """End the streams that use a key."""
        for number in [n for n, opened in self._streams.items() if handle in opened.handles]:
            self.abort(number)

    def clear(self) -> None:
        for number in list(self._streams):
            self.abort(number)

    def forget(self, number: int) -> None:
        """End a stream, if it is there yet."""
        if number in self._streams:
            self.abort(number)

    def _check_held(self, more: int) -> None:
        held = sum(o.stream.held_bytes for o in self._streams.values() if isinstance(o.stream, Signature))
        if held + more > MAX_HELD_BYTES:
            raise LimitReached(f"a vCC holds at most {MAX_HELD_BYTES} bytes of messages to sign")
