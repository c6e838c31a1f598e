"""One question of an application to its consumer's VCMs."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from cipherfleet import Client
from cipherfleet.app.options import run

T = TypeVar("T")


def ask(profile: Path, question: Callable[[Client], Awaitable[T]]) -> T:
    """Asked of whichever VCM serves."""

    async def work() -> T:
        async with Client(profile) as client:
            return await question(client)

    return run(work())
