"""The card's process: confined first, then keys; it talks to its machine (control) and to its vCCs, and to nobody else."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from cipherfleet.channel import codec
from cipherfleet.computing import engine_sm2
from cipherfleet.computing.card import Card
from cipherfleet.computing.card_confinement import Protection, confine
from cipherfleet.computing.card_control import (
    Attach,
    CardConfig,
    CardReady,
    CardRequests,
    CardStatus,
    Certify,
    ControlChannel,
    Detach,
    FromCard,
    Limit,
    StatusWanted,
    VccStatus,
)
from cipherfleet.computing.card_engine import helpers
from cipherfleet.computing.card_server import CardServer
from cipherfleet.contract.errors import CardUnavailable, CipherfleetError, Internal, Unsupported
from cipherfleet.contract.machine_api import CardReport

log = logging.getLogger(__name__)


class Confined(NamedTuple):
    """A card that has confined itself, and what is in force."""

    configuration: CardConfig
    protection: Protection


def confined(configuration: CardConfig) -> Confined:
    """First of all, before there is a loop: a loop's io_uring would be a way around seccomp."""
    with suppress(Unsupported):  # a system without SM2 has every other algorithm; who asks for SM2 is told
        engine_sm2.load()
    return Confined(configuration, confine())


async def main(process: Confined, ready: Callable[[object], None], stop: asyncio.Event) -> None:
    """A card's life: until ``stop``, or until its machine is gone."""
    configuration, protection = process
    card = Card(configuration.machine)
    server = CardServer(card, helpers())
    channel = ControlChannel(socket.socket(fileno=configuration.control))
    ready(CardReady(card.id, card.csr, card.transport.hpke_public_key, protection))
    control = asyncio.create_task(serve_control(channel, server, protection))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((control, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        server.close()
        for task in (control, stopping):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await control
        channel.close()


async def serve_control(channel: ControlChannel, server: CardServer, protection: Protection) -> None:
    """Do what the machine asks for, until it is gone."""
    while True:
        raw = await channel.receive()
        if not raw:
            return
        try:
            request: CardRequests = codec.decode(raw, CardRequests)  # type: ignore[arg-type]  # msgspec takes a union for a type
        except CipherfleetError:
            log.error("the machine sent what is no request")  # noqa: TRY400
            return
        try:
            answer = await _serve(request, channel, server, protection)
        except CipherfleetError as exc:
            answer = FromCard(request.number, error=exc.to_reply().error)
        except Exception as exc:
            log.error("internal error of the card: %s", type(exc).__name__)  # noqa: TRY400
            answer = FromCard(request.number, error=Internal("something went wrong in the crypto card").to_reply().error)
        try:
            await channel.send(answer)
        except CardUnavailable:
            return


async def _serve(request: CardRequests, channel: ControlChannel, server: CardServer, protection: Protection) -> FromCard:
    match request:
        case Certify():
            server.card.certify(request.reply)
        case Attach():
            sock = channel.take_socket()
            await server.attach(request.vcm, request.consumer, sock, request.limits)
        case Detach():
            server.detach(request.vcm)
        case Limit():
            server.limit(request.vcm, request.limits)
        case StatusWanted():
            return FromCard(request.number, status=status(server, protection))
    return FromCard(request.number)


def status(server: CardServer, protection: Protection) -> CardStatus:
    """The card's state now."""
    card = server.card
    vccs = tuple(VccStatus(f.vcm, f.consumer, f.serving, f.operations, f.bytes, f.keys, *server.look(f.vcm)) for f in card.functions)
    report = CardReport(card.id, os.getpid(), len(vccs), card.operations, card.bytes, protection.memory_locked)
    return CardStatus(report, vccs, protection)


__all__ = ["CardConfig", "confined", "main"]
