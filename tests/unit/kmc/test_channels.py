"""A channel's sending half: in order, never waiting for a slow reader."""

import asyncio

import pytest

from cipherfleet.contract.kmc_api import EscrowChanged, KmcToVcm
from cipherfleet.kmc import channels
from cipherfleet.kmc.channels import Channel


class Wire:
    """The frames' end, whose reader may be slow or gone."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.flowing, self.closed = asyncio.Event(), asyncio.Event()
        self.gone = False

    async def send(self, frame: object) -> None:
        await self.flowing.wait()
        if self.gone:
            raise ConnectionResetError
        self.sent.append(frame)

    async def close(self) -> None:
        self.closed.set()


@pytest.fixture
async def wire() -> Wire:
    return Wire()


def channel_on(wire: Wire) -> Channel[KmcToVcm]:
    return Channel(wire)  # type: ignore[arg-type]


async def test_what_waits_is_sent_before_the_end(wire: Wire) -> None:
    channel = channel_on(wire)
    for number in range(3):
        channel.post(EscrowChanged(number))
    channel.finish()
    channel.finish()
    channel.post(EscrowChanged(9))
    await channel.closed(0.01)
    assert not wire.closed.is_set()
    wire.flowing.set()
    await channel.closed()
    assert wire.sent == [EscrowChanged(0), EscrowChanged(1), EscrowChanged(2)]
    assert wire.closed.is_set()


@pytest.mark.parametrize("last", ["post", "finish"])
async def test_a_reader_that_does_not_read_is_cut_off(wire: Wire, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    monkeypatch.setattr(channels, "MAX_WAITING", 2)
    channel = channel_on(wire)
    await asyncio.sleep(0)
    for number in range(2):
        channel.post(EscrowChanged(number))
    if last == "post":
        channel.post(EscrowChanged(2))
    else:
        channel.finish()
    await channel.closed(5)
    assert wire.closed.is_set()
    assert channel.finished


async def test_a_reader_that_is_gone(wire: Wire) -> None:
    channel = channel_on(wire)
    wire.gone = True
    wire.flowing.set()
    channel.post(EscrowChanged(1))
    await channel.closed(5)
    assert channel.finished
    assert wire.closed.is_set()
