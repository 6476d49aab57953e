"""Names of hosts: which of them are this machine, and how they are written and reached."""

from __future__ import annotations

import ipaddress

# Where a server listens, or is, where nobody says.
DEFAULT_HOST = "127.0.0.1"

# What a server listens on is not always where it can be reached.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches `host`, and no proxy of the environment must interfere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def in_url(host: str) -> str:
    """`host` as it is written in a URL."""
    return f"[{host}]" if ":" in host else host


def reachable(host: str) -> str:
    """A host where this machine reaches what listens on `host` (pitfall 57)."""
    return _EVERYWHERE.get(host, host)
