"""The names and addresses of the lab's network: what its DNS answers, its certificates carry and its tests use."""

from __future__ import annotations

from dataclasses import dataclass

ORIGINS_V4, ORIGINS_V6 = "10.77.0.2", "fd77::2"

API = "api.allowed.test"
GIT = "git.allowed.test"
V4_ONLY = "v4.allowed.test"
V6_ONLY = "v6.allowed.test"
WILDCARD = "any.wild.allowed.test"
INSPECTED = "inspected.allowed.test"
"""For policies that look inside: speaks WebSocket below /public/chat."""
DENIED = "denied.test"
OTHER = "other.test"
MIXED = "mixed.allowed.test"
"""Has one address of `API` and one on loopback: one denied address must deny."""
REBOUND = "rebound.allowed.test"
"""Resolves to loopback, as a lying resolver would have it."""
METADATA = "metadata.allowed.test"
"""Resolves to the address where clouds serve credentials."""

ECHO_PORT = 9999
"""TCP and UDP echo."""
BANNER_PORT = 2222
"""A server that speaks first, then echoes."""
BANNER = b"220 lab.test speaks first\r\n"


@dataclass(frozen=True, slots=True)
class Host:
    """One name of the test network: where it is, and whether an origin of ours answers there."""

    name: str
    v4: tuple[str, ...] = ()
    v6: tuple[str, ...] = ()


HOSTS = (
    Host(API, ("10.77.0.10",), ("fd77::10",)),
    Host(GIT, ("10.77.0.11",), ("fd77::11",)),
    Host(V4_ONLY, ("10.77.0.12",)),
    Host(V6_ONLY, (), ("fd77::13",)),
    Host(WILDCARD, ("10.77.0.10",), ("fd77::10",)),
    Host(INSPECTED, ("10.77.0.14",), ("fd77::14",)),
    Host(DENIED, ("10.77.0.20",), ("fd77::20",)),
    Host(OTHER, ("10.77.0.21",), ("fd77::21",)),
    Host(MIXED, ("10.77.0.10", "127.0.0.1")),
    Host(REBOUND, ("127.0.0.1",), ("::1",)),
    Host(METADATA, ("169.254.169.254",)),
)

METADATA_V4 = "169.254.169.254"


def addresses() -> list[str]:
    """Every address of the origins besides their first, v4 then v6, each once."""
    found = dict.fromkeys(a for host in HOSTS for a in host.v4 + host.v6)
    return [a for a in found if a.startswith(("10.77.", "fd77:"))]
