"""Domain isolation: each security domain is a real subnet of this host, made of network namespaces, a bridge and veth pairs.

For the domain with index D of the cloud with network number R::

    cfRdD     the fabric: a bridge, and on it one veth per member; what may pass is decided here, nothing is routed
    cfRdDa    the applications, 10.R.(D+1).200
    cfRdDvS   the port of the VCM in slot S, 10.R.(D+1).S: only the VCM's listening socket lives there

Only ARP and TCP between the applications and port 8443 of a VCM pass, begun by the applications. Two VCMs never see each other.
Every rule stands twice, in the fabric and in the port, so that neither has to be trusted alone.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from cipherfleet.contract.errors import IsolationUnavailable
from cipherfleet.management.drivers import namespaces
from cipherfleet.management.inventory import FIRST_SLOT, LAST_SLOT

SERVICE_PORT = 8443
APPLICATIONS_HOST = 200


class LocalDomainNetwork:
    """Domains on this host, as root. ``network`` is the cloud's number R."""

    def __init__(self, network: int) -> None:
        self._network = network
        self._changing = asyncio.Lock()

    @staticmethod
    def check() -> None:
        """Raises ``IsolationUnavailable`` when this host cannot do it."""
        if os.geteuid() != 0:
            raise IsolationUnavailable("domain isolation needs root", "use --isolation process, which needs none")
        if shutil.which("nft") is None:
            raise IsolationUnavailable("domain isolation needs the nft command", "install nftables, or use --isolation process")

    def fabric(self, index: int) -> str:
        return f"cf{self._network}d{index}"

    def applications(self, index: int) -> str:
        return f"{self.fabric(index)}a"

    def port(self, index: int, slot: int) -> str:
        return f"{self.fabric(index)}v{slot}"

    def _address(self, index: int, host: int) -> str:
        return f"10.{self._network}.{index + 1}.{host}"

    async def create_port(self, index: int, slot: int) -> str:
        async with self._changing:
            await self._create_domain(index)
            name = self.port(index, slot)
            if not await _complete(name):
                try:
                    await self._join(
                        index, name, f"v{slot}", slot, _port_rules(self._address(index, slot), self._address(index, APPLICATIONS_HOST))
                    )
                except BaseException:
                    await self._delete_port(index, slot)
                    raise
            return name

    async def delete_port(self, index: int, slot: int) -> None:
        async with self._changing:
            await self._delete_port(index, slot)

    async def delete_domain(self, index: int) -> None:
        async with self._changing:
            ports = re.compile(rf"{self.fabric(index)}(v\d+|a)")
            for name in filter(ports.fullmatch, namespaces.names()):
                await asyncio.to_thread(namespaces.delete, name)
            await asyncio.to_thread(namespaces.delete, self.fabric(index))

    async def sweep(self, known: Mapping[int, Collection[int]]) -> int:
        keep = {self.fabric(index) for index in known} | {self.applications(index) for index in known}
        keep |= {self.port(index, slot) for index, slots in known.items() for slot in slots}
        doomed = [name for name in _of_network(self._network) if name not in keep]
        async with self._changing:
            for name in doomed:
                if (port := re.fullmatch(r"cf\d+d(\d+)v(\d+)", name)) is not None:
                    await self._delete_port(int(port[1]), int(port[2]))
                else:
                    await asyncio.to_thread(namespaces.delete, name)
        return len(doomed)

    async def _create_domain(self, index: int) -> None:
        fabric, applications = self.fabric(index), self.applications(index)
        if await _complete(fabric, "br0") and await _complete(applications):
            return
        try:
            for name in (applications, fabric):
                await asyncio.to_thread(namespaces.delete, name)
            await asyncio.to_thread(namespaces.create, fabric)
            await namespaces.inside(fabric, lambda: _make_fabric(_fabric_rules(self._network, index)))
            await self._join(index, applications, "app", APPLICATIONS_HOST, _application_rules())
            await namespaces.inside(fabric, lambda: _set_up("br0"))
        except BaseException:
            for name in (applications, fabric):
                await asyncio.to_thread(namespaces.delete, name)
            raise

    async def _join(self, index: int, name: str, plug: str, host: int, rules: str) -> None:
        """A namespace with ``eth0`` on the fabric's bridge; up last, so that one that is up is complete."""
        await asyncio.to_thread(namespaces.delete, name)
        await asyncio.to_thread(namespaces.create, name)
        # A locally administered address that follows from the place: no neighbour remembers another one of the VCM before.
        hardware = f"02:cf:{self._network:02x}:{index:02x}:00:{host:02x}"
        await namespaces.inside(self.fabric(index), lambda: _plug_in(plug, name, hardware))
        address = self._address(index, host)
        await namespaces.inside(name, lambda: _make_end(address, rules))

    async def _delete_port(self, index: int, slot: int) -> None:
        # The veth goes first: a process that still holds a socket of the namespace keeps it alive, but cut off.
        if namespaces.exists(self.fabric(index)):
            with suppress(IsolationUnavailable):
                await namespaces.inside(self.fabric(index), lambda: _unplug(f"v{slot}"))
        await asyncio.to_thread(namespaces.delete, self.port(index, slot))


async def sweep_network(network: int) -> int:
    """Delete every namespace of the cloud with this network number; how many there were."""
    return await LocalDomainNetwork(network).sweep({})


def _of_network(network: int) -> list[str]:
    ours = re.compile(rf"cf{network}d\d+(a|v\d+)?")
    # Members before their fabric, so that nothing is plugged into a bridge that goes.
    return sorted(filter(ours.fullmatch, namespaces.names()), key=lambda name: (name[-1].isdigit() and "v" not in name, name))


# -- inside a namespace --------------------------------------------------------------------------------------------------


def _index_of(route: IPRoute, name: str) -> int | None:
    found = route.link_lookup(ifname=name)
    return int(found[0]) if found else None


async def _complete(name: str, interface: str = "eth0") -> bool:
    if not namespaces.exists(name):
        return False

    def look() -> bool:
        with IPRoute() as route:
            return any(bool(link["flags"] & 1) for link in route.get_links() if link.get_attr("IFLA_IFNAME") == interface)

    try:
        return await namespaces.inside(name, look)
    except (IsolationUnavailable, NetlinkError, OSError):
        return False


def _make_fabric(rules: str) -> None:
    _no_leaks()
    load_rules(rules)
    with _netlink() as route:
        route.link("add", ifname="br0", kind="bridge")


def _plug_in(plug: str, namespace: str, hardware: str) -> None:
    with _netlink() as route:
        if (old := _index_of(route, plug)) is not None:
            route.link("del", index=old)
        route.link("add", ifname=plug, kind="veth", peer={"ifname": "eth0", "address": hardware, "net_ns_fd": namespace})
        index, bridge = _index_of(route, plug), _index_of(route, "br0")
        route.link("set", index=index, master=bridge)
        route.link("set", index=index, state="up")


def _unplug(plug: str) -> None:
    with _netlink() as route:
        if (index := _index_of(route, plug)) is not None:
            route.link("del", index=index)


def _make_end(address: str, rules: str) -> None:
    _no_leaks()
    load_rules(rules)
    with _netlink() as route:
        route.link("set", index=_index_of(route, "lo"), state="up")
        index = _index_of(route, "eth0")
        route.addr("add", index=index, address=address, prefixlen=24)
        route.link("set", index=index, state="up")


def _set_up(interface: str) -> None:
    with _netlink() as route:
        route.link("set", index=_index_of(route, interface), state="up")


class _netlink:  # noqa: N801 - reads as a statement
    """A route socket of the namespace this thread is in; its errors become ours."""

    def __init__(self) -> None:
        self._route = IPRoute()

    def __enter__(self) -> IPRoute:
        return self._route

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        self._route.close()
        if isinstance(exc, (NetlinkError, OSError)):
            raise IsolationUnavailable(f"the kernel refused a part of the security domain's network: {exc}") from exc


def _no_leaks() -> None:
    """No forwarding, no IPv6, and bridged frames judged by the bridge's rules alone. Absent switches need no turning off."""
    for switch, value in (("ipv4/ip_forward", "0"), ("ipv6/conf/all/disable_ipv6", "1"), ("bridge/bridge-nf-call-iptables", "0")):
        with suppress(OSError):
            # /proc/sys/net is of the namespace of the thread that opens it
            Path("/proc/sys/net", switch).write_text(value)


def load_rules(rules: str) -> None:
    done = subprocess.run(["nft", "-f", "-"], input=rules.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise IsolationUnavailable(f"nft refused the security domain's rules: {reason[0] if reason else done.returncode}")


# -- rules ---------------------------------------------------------------------------------------------------------------


_NOT_OPENING = "tcp flags & (syn | ack) != syn"
"""Any segment but the first of a connection."""


def _fabric_rules(network: int, index: int) -> str:
    """What the bridge lets pass. Stateless on purpose: TCP towards the applications passes only if it does not open a connection."""
    subnet = f"10.{network}.{index + 1}"
    application = f"{subnet}.{APPLICATIONS_HOST}"
    answer = f"tcp sport {SERVICE_PORT} {_NOT_OPENING}"
    lines = []
    for slot in range(FIRST_SLOT, LAST_SLOT + 1):
        vcm, plug = f"{subnet}.{slot}", f'"v{slot}"'
        lines += [
            f'iifname "app" oifname {plug} arp saddr ip {application} arp daddr ip {vcm} accept',
            f'iifname {plug} oifname "app" arp saddr ip {vcm} arp daddr ip {application} accept',
            f'iifname "app" oifname {plug} ip saddr {application} ip daddr {vcm} tcp dport {SERVICE_PORT} accept',
            f'iifname {plug} oifname "app" ip saddr {vcm} ip daddr {application} {answer} accept',
        ]
    return (
        "table bridge cipherfleet {\n chain forward {\n  type filter hook forward priority 0; policy drop;\n  "
        + "\n  ".join(lines)
        + "\n }\n chain input {\n  type filter hook input priority 0; policy drop;\n }\n}\n"
        + _closed("input", "forward", "output")
    )


def _port_rules(vcm: str, application: str) -> str:
    """A VCM's port answers on 8443 and begins nothing."""
    return f"""table inet cipherfleet {{
 chain input {{
  type filter hook input priority 0; policy drop;
  ip saddr {application} ip daddr {vcm} tcp dport {SERVICE_PORT} accept
 }}
 chain output {{
  type filter hook output priority 0; policy drop;
  ip saddr {vcm} ip daddr {application} tcp sport {SERVICE_PORT} tcp flags & (syn | ack) != syn accept
 }}
 chain forward {{
  type filter hook forward priority 0; policy drop;
 }}
}}
"""


def _application_rules() -> str:
    """Applications begin connections; nobody begins one to them, but they may talk among themselves."""
    return """table inet cipherfleet {
 chain input {
  type filter hook input priority 0; policy drop;
  iifname "lo" accept
  ip protocol tcp tcp flags & (syn | ack) != syn accept
 }
 chain forward {
  type filter hook forward priority 0; policy drop;
 }
}
"""


def _closed(*hooks: str) -> str:
    chains = "".join(f" chain {hook} {{\n  type filter hook {hook} priority 0; policy drop;\n }}\n" for hook in hooks)
    return f"table inet cipherfleet {{\n{chains}}}\n"
