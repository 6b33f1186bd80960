"""Addresses as the policy sees them: ranges that rules name, and the guard list of those that must be named.

An address on the guard list (loopback, link-local, private, metadata and
others that lead somewhere a public name has no business to lead) is reached
only where a rule names it by a range of `cidrs` that lies within the guarded one:
`10.1.0.0/16` names 10.1.2.3, `0.0.0.0/0` names nothing.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aa.policy.host import Address, address_of

CACHE_SIZE = 8192

_METADATA = (
    "169.254.169.254/32",  # nearly every cloud
    "169.254.170.2/32",  # containers' credentials
    "169.254.170.23/32",
    "168.63.129.16/32",  # the host of a virtual machine
    "100.100.100.200/32",
    "192.0.0.192/32",
    "fd00:ec2::254/128",
    "fd00:ec2::23/128",
    "fd20:ce::254/128",
)

_GUARDED: Mapping[str, tuple[str, ...]] = {
    "metadata": _METADATA,
    "unspecified": ("0.0.0.0/8", "::/128"),
    "loopback": ("127.0.0.0/8", "::1/128"),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10"),
    "shared (CGNAT)": ("100.64.0.0/10",),
    "multicast": ("224.0.0.0/4", "ff00::/8"),
    "broadcast": ("255.255.255.255/32",),
    "documentation": (
        "192.0.2.0/24",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "2001:db8::/32",
        "3fff::/20",
    ),
    "benchmarking": ("198.18.0.0/15", "2001:2::/48"),
    # Of IPv6 only 2000::/3 is given out; whatever is not exempt below is reserved.
    "reserved": ("192.0.0.0/24", "192.88.99.0/24", "240.0.0.0/4", "2001::/23", "::/3")
    + ("4000::/2", "8000::/1"),
}

_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


@dataclass(frozen=True, slots=True)
class Range:
    """A network: addresses whose first `length` bits are those of `first`."""

    version: int
    first: int
    length: int
    shift: int  # bits behind the prefix
    text: str

    @classmethod
    def of(cls, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Range:
        shift = network.max_prefixlen - network.prefixlen
        first = int(network.network_address) >> shift
        return cls(network.version, first, network.prefixlen, shift, str(network))

    def contains(self, place: Place) -> bool:
        return self.version == place.version and place.number >> self.shift == self.first


@dataclass(frozen=True, slots=True)
class Place:
    """An address ready to be matched. `inner` is the IPv4 address that it stands for, if any."""

    text: str
    version: int
    number: int
    guard: str = ""  # what the guard list calls it; "" for a public address
    guard_length: int = 0  # length of the guarded range around it
    inner: Place | None = None

    def named_by(self, ranges: Iterable[Range]) -> bool:
        """Whether one of the ranges names this guarded address, and not just contains it."""
        return any(r.length >= self.guard_length and r.contains(self) for r in ranges)


Table = Mapping[tuple[int, int], Mapping[int, str]]


def _table() -> Table:
    """(version, length) -> prefix -> class, so that a look-up is one step per length."""
    found: dict[tuple[int, int], dict[int, str]] = {}
    for name, networks in _GUARDED.items():
        for text in networks:
            r = Range.of(ipaddress.ip_network(text))
            found.setdefault((r.version, r.length), {}).setdefault(r.first, name)
    return dict(sorted(found.items(), key=lambda item: -item[0][1]))


_TABLE = _table()


@functools.lru_cache(maxsize=CACHE_SIZE)
def place(text: str) -> Place:
    """Reads an address. Raises InvalidHost."""
    return _place(address_of(text))


def _place(address: Address) -> Place:
    number = int(address)
    guard, length = _look_up(address.version, number, address.max_prefixlen)
    if isinstance(address, ipaddress.IPv4Address):
        return Place(str(address), 4, number, guard, length)
    inner, offset = _embedded(address)
    if inner is not None and offset is not None:
        # A translator on the way makes it the inner address, so that one's guard counts.
        guard, length = inner.guard, offset + inner.guard_length if inner.guard else 0
    return Place(str(address), 6, number, guard, length, inner)


def _embedded(address: ipaddress.IPv6Address) -> tuple[Place | None, int | None]:
    """The IPv4 address in an IPv6 one, and where it begins if the outer one is reachable."""
    number = int(address)
    if address in _SIX_TO_FOUR:
        return _place(ipaddress.IPv4Address((number >> 80) & 0xFFFFFFFF)), 16
    if address in _NAT64:
        return _place(ipaddress.IPv4Address(number & 0xFFFFFFFF)), 96
    if address in _COMPATIBLE and number > 1:
        return _place(ipaddress.IPv4Address(number)), None
    return None, None


def _look_up(version: int, number: int, bits: int) -> tuple[str, int]:
    for (v, length), prefixes in _TABLE.items():
        if v == version:
            name = prefixes.get(number >> (bits - length))
            if name is not None:
                return name, length
    return "", 0
