"""A VCM's listening socket, opened by the machine: on a loopback address, or inside the network namespace of the VCM's port."""

import asyncio
import errno
import ipaddress
import socket
import time

from cipherfleet.channel.namespaces import run_inside
from cipherfleet.contract.errors import Malformed, PortTaken

BACKLOG = 512
PATIENCE_S = 3.0
"""For who had the address before and is just ending: a VCM of a machine that was killed outlives it by a moment."""


def parse_address(address: str) -> tuple[str, int]:
    """``host:port``, the host an IP address. Raises ``Malformed``."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        number = int(port)
    except ValueError as exc:
        raise Malformed(f"{address[:100]!r} is not an address (IP:port)") from exc
    if not 0 <= number < 65536:
        raise Malformed(f"{address[:100]!r} has no valid port")
    return host, number


async def open_listening(address: str, network_namespace: str = "", *, patience_s: float = PATIENCE_S) -> socket.socket:
    """A socket that listens on ``address``. Raises ``Malformed``, ``PortTaken`` or ``IsolationUnavailable``."""
    place = parse_address(address)
    if "/" in network_namespace or network_namespace in (".", ".."):
        raise Malformed("this cannot be the name of a network namespace")
    end = time.monotonic() + patience_s
    while True:
        try:
            if not network_namespace:
                return _listen(place)
            return await asyncio.to_thread(run_inside, network_namespace, lambda: _listen(place))
        except PortTaken as exc:
            used = isinstance(exc.__cause__, OSError) and exc.__cause__.errno == errno.EADDRINUSE
            if not used or time.monotonic() > end:
                raise
        await asyncio.sleep(0.05)


def _listen(place: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(place)
        opened.listen(BACKLOG)
        opened.setblocking(False)
    except OSError as exc:
        opened.close()
        raise PortTaken(f"cannot listen on {place[0]}:{place[1]}: {exc.strerror}", "stop what listens there") from exc
    return opened
