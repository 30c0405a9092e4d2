"""By which network interface gloo reaches the other hosts, where this host's own name does not tell."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

__all__ = ["interface_for_gloo", "interface_towards"]

_IFNAME = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def interface_for_gloo(main_address: str) -> str | None:
    """The interface to be named to gloo for a run of several hosts; None where gloo finds one that will do.

    Gloo takes the address to which this host's name resolves, and the loopback where it resolves to nothing. Where the
    name is an alias of the loopback, as Debian's installer has it, no other host can connect.

    Args:
        main_address: of the host on which the run meets.
    """
    if os.environ.get(_IFNAME) or _others_find_this_host():
        return None
    return interface_towards(main_address)


def interface_towards(address: str) -> str | None:
    """The name of the interface by which packets go to ``address``; None for the loopback, or where nothing tells."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = ipaddress.ip_address(str(probe.getsockname()[0]).partition("%")[0])
    except OSError:
        return None
    return None if own.is_loopback else next((name for name, each in _addresses() if each == own), None)


def _others_find_this_host() -> bool:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    address = ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])
    return not address.is_loopback


def _addresses() -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Interfaces and their addresses, as Linux tells them; empty elsewhere."""
    found: list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]] = []
    if sys.platform != "linux":
        return found
    import fcntl  # no such module on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no such address
            found.append((name, ipaddress.ip_address(answer[20:24])))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        fields = line.split()
        found.append((fields[5], ipaddress.ip_address(bytes.fromhex(fields[0]))))
    return found
