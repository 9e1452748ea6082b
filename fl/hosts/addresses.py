"""Addresses as HOST:PORT, and which of them other machines can reach."""

from __future__ import annotations

import ipaddress

from fl.errors import ConfigError


def split_address(key: str, value: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address stands in brackets, ``[::1]:8000``."""
    host, colon, port = value.rpartition(":")
    if colon and host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        way_out = "Flower's default port is 8000." if not colon else ""
        raise ConfigError(key, value, "HOST:PORT with a port from 1 to 65535, or [IPV6]:PORT", way_out)
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine and no other can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether ``host`` means all interfaces, so that it is no address to connect to."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
