"""A VCM's listening socket, opened by the machine: on a loopback address, or inside the network namespace of the VCM's port."""

import asyncio
import ipaddress
import socket

from cipherfleet.channel.namespaces import run_inside
from cipherfleet.contract.errors import Malformed, PortTaken

BACKLOG = 512


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


async def open_listening(address: str, network_namespace: str = "") -> socket.socket:
    """A socket that listens on ``address``. Raises ``Malformed``, ``PortTaken`` or ``IsolationUnavailable``."""
    place = parse_address(address)
    if not network_namespace:
        return _listen(place)
    if "/" in network_namespace or network_namespace in (".", ".."):
        raise Malformed("this cannot be the name of a network namespace")
    return await asyncio.to_thread(run_inside, network_namespace, lambda: _listen(place))


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
