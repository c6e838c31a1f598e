"""Whom the terminal calls: the platform, which it trusts by the root on the Ukey, and VCMs, by the domain's CA alone."""

import re
import socket
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from cipherfleet.channel.client import Caller
from cipherfleet.channel.namespaces import run_inside
from cipherfleet.contract.errors import IsolationUnavailable, KmcUnavailable, Malformed, ManagementUnavailable, ServiceOff
from cipherfleet.contract.identities import Identity, Role
from cipherfleet.contract.ids import VcmId
from cipherfleet.terminal.ukey import Ukey

KMC = Identity(Role.KMC, "kmc")
MANAGEMENT = Identity(Role.MANAGEMENT, "management")
_NAMESPACE = re.compile(r"cf[0-9]{1,3}d[0-9]{1,3}a")


def kmc_caller(ukey: Ukey) -> Caller:
    return Caller(ukey.record.kmc_url, KMC.dns_name, ukey.channel(ukey.record.root), KmcUnavailable)


def management_caller(ukey: Ukey) -> Caller:
    return Caller(ukey.record.management_url, MANAGEMENT.dns_name, ukey.channel(ukey.record.root), ManagementUnavailable)


def vcm_caller(ukey: Ukey, vcm: VcmId, endpoint: str, namespace: str = "") -> Caller:
    """The VCM at ``endpoint`` (an https URL), reached from the network ``namespace`` of its security domain where there is one.

    Raises ``Malformed``: a permit must not lead the terminal off TLS, nor to any namespace of this host it likes.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        raise Malformed("the permit's endpoint is not an https address")
    if namespace and not _NAMESPACE.fullmatch(namespace):
        raise Malformed("the permit's network namespace is not one of a security domain")
    name = Identity(Role.VCM, vcm, ukey.record.consumer).dns_name
    sockets = partial(_socket_in, namespace) if namespace else None
    return Caller(endpoint, name, ukey.channel(ukey.record.domain), ServiceOff, timeout=5.0, sockets=sockets)


def _socket_in(namespace: str, address: tuple[Any, ...]) -> socket.socket:
    """A socket that lives in ``namespace``. Raises ``OSError`` when that is not there or not ours to enter."""
    family, kind, protocol = address[:3]
    try:
        return run_inside(namespace, lambda: socket.socket(family, kind, protocol))
    except IsolationUnavailable as exc:
        raise OSError(exc.message) from exc
