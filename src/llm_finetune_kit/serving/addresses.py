"""Hosts and origins as requests name them: read strictly, compared by value. Knows nothing of servers."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(?P<port>\d{1,5}))?", re.IGNORECASE)
ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#@\s]+)", re.IGNORECASE)
USUAL_PORT = {"http": "80", "https": "443"}


def host_and_port(header: str) -> tuple[str, str] | None:
    """A `Host` header as a name in lower case, without brackets and final dot, and a port (may be ""); None if it is none."""
    found = HOST.fullmatch(header.strip())
    if found is None:
        return None
    name = found["name"].lower().strip("[]")
    name = name[:-1] if name.endswith(".") and len(name) > 1 else name
    return name, found["port"] or ""


def address(name: str) -> IPv4Address | IPv6Address | None:
    """The IP address that a name spells out, or None. An IPv4 address inside an IPv6 one is that IPv4 address."""
    try:
        found = ip_address(name)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_loopback(name: str) -> bool:
    """Whether only this machine can mean itself by that name: localhost, 127.0.0.0/8, ::1."""
    found = address(name)
    return name == "localhost" if found is None else found.is_loopback


def origin_named(text: str) -> str | None:
    """An origin in one spelling, `scheme://host` or `scheme://host:port` without the scheme's usual port; None if it is none."""
    found = ORIGIN.fullmatch(text.strip())
    place = host_and_port(found["host"]) if found else None
    if found is None or place is None:
        return None
    scheme = found["scheme"].lower()
    return f"{scheme}://{_joined(*place, scheme)}"


def same_origin(origin: str, host: str) -> bool:
    """Whether `origin` (see `origin_named`) is the site that a `Host` header names.

    The scheme is left out: a server behind a proxy that speaks TLS does not know it.
    """
    scheme, _, place = origin.partition("://")
    asked = host_and_port(host)
    return asked is not None and place == _joined(*asked, scheme)


def network_of(client: str) -> str:
    """Whom an address stands for when attempts are counted: itself, or for IPv6 the /64 that one subscriber holds."""
    found = address(client)
    if isinstance(found, IPv6Address):
        return found.exploded[:19]
    return str(found or client)


def _joined(name: str, port: str, scheme: str) -> str:
    shown = f"[{name}]" if ":" in name else name
    return shown if port in ("", USUAL_PORT[scheme]) else f"{shown}:{port}"
