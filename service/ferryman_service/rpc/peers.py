"""Where a call comes from."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import unquote

_IPV6_PREFIX: Final = 64
"""A host has as many addresses of such a network as it likes."""


def peer_host(peer: str) -> str:
    """Return the host of what `ServicerContext.peer()` tells: "ipv4:192.0.2.1", "ipv6:2001:db8::/64", or the kind
    alone, as of all Unix sockets. Callers behind one proxy are one host."""
    kind, _, address = peer.partition(":")
    if kind == "ipv4":
        return f"ipv4:{address.rpartition(':')[0] or address}"
    if kind != "ipv6":
        return kind
    host = unquote(address).rpartition("]")[0].removeprefix("[").partition("%")[0]
    try:
        parsed = ipaddress.IPv6Address(host)
    except ValueError:
        return kind
    if parsed.ipv4_mapped is not None:
        return f"ipv4:{parsed.ipv4_mapped}"
    network = ipaddress.IPv6Network((int(parsed), _IPV6_PREFIX), strict=False)
    return f"ipv6:{network}"
