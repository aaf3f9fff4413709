"""Which network interface leads to rank 0. Gloo must be told, or it looks up this host's own name.

In containers and on many clusters that name does not resolve, or resolves to 127.0.1.1, and then one rank ends with
"connection refused" while the others wait for it until their time is up.
"""

from __future__ import annotations

import socket

import psutil

ELSEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737): the route to it is the default route."""


def interface_towards(address: str, port: int) -> str | None:
    """Name of the interface whose address this host uses towards `address`, `lo` if that is this host alone.

    A host name that means 127.x on its own host, as in many an /etc/hosts, says nothing about how the others reach
    it: then it is the interface of the default route.

    Returns:
        None if there is no route, or the name does not resolve: the process group will say so better.
    """
    source = _source_address(address, port)
    if source is None:
        return None
    if _is_loopback(source) and not (address == "localhost" or _is_loopback(address)):
        source = _source_address(ELSEWHERE, port) or source
    if _is_loopback(source):
        source = "127.0.0.1"
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == source for entry in addresses):
            return name
    return None


def _source_address(address: str, port: int) -> str | None:
    """The address of this host that the kernel would send from."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port or 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Connecting a datagram socket sends nothing; it only makes the kernel choose the route.
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
