"""What goes in and out of a virtual function: a request, its answer, and the slow work between them."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from cipherfleet.channel import codec
from cipherfleet.computing.engine_memory import Data, Pause, wipe

T = TypeVar("T")


class Request(NamedTuple):
    """``data`` may change while it is read, ``room`` be read while it is written: both may be in memory that the VCM shares."""

    handle: int
    parameters: bytes
    data: Data
    room: memoryview | None = None


class Answer(NamedTuple):
    """A completion, its data not yet copied anywhere: a view is one of the request's ``room``."""

    value: int = 0
    parameters: bytes = b""
    data: Data = b""


class Work(NamedTuple):
    """The slow part of an operation: ``run`` belongs into a thread, its result goes to ``VirtualFunction.complete``.

    Where there is no thread for it, ``run`` pauses between parts of long data.
    ``alone``: nothing else of this vCC may begin before it is complete; ``lasting``: it takes a good part of a second.
    """

    run: Callable[[Pause], Any]
    keep: Callable[[Any], Answer]
    life: int = 0  # of the function that began it
    alone: bool = False
    lasting: bool = False
    done: Callable[[bool], None] = lambda _well: None


def parameters(request: Request, kind: type[T]) -> T:
    """Raises ``Malformed``."""
    return codec.decode(request.parameters, kind, what="the operation's parameters")


def destroy(result: object) -> None:
    """Wipe what nobody may have."""
    if isinstance(result, tuple):
        for part in result:
            destroy(part)
    elif isinstance(result, bytearray):
        wipe(result)
    elif isinstance(result, memoryview):
        result[:] = bytes(len(result))
