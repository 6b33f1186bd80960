"""What the programs are told, and what they counted: the values of the maps as types. No I/O.

The layout is that of probes/events.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass

from aa.config import Listen

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK: tuple[Address, ...] = (
    ipaddress.IPv4Address("127.0.0.1"),
    ipaddress.IPv6Address("::1"),
)

KINDS = 8
MAX_ENDS = 64
MAX_TALLIES = 8192

_CONFIG = struct.Struct("=QIIIIQ")
_END = struct.Struct("=16sHBB")
_COUNT = struct.Struct("=QQQQ")
TALLY = struct.Struct("=QQ")

CONFIG_SIZE, END_SIZE, COUNT_SIZE = _CONFIG.size, _END.size, _COUNT.size


@dataclass(frozen=True, slots=True)
class Config:
    """struct aa_config: whom to observe."""

    slice: int = 0  # cgroup id of aa-agents.slice; 0 observes nobody
    level: int = 0  # its depth below the root of all cgroups
    pidns: int = 0  # inode of the loader's pid namespace
    generation: int = 0  # tracing programs of another generation keep silent
    canary: int = 0  # cgroup id of the canary that flies now; 0: none

    def pack(self) -> bytes:
        return _CONFIG.pack(self.slice, self.level, self.pidns, self.generation, 0, self.canary)

    @classmethod
    def unpack(cls, raw: bytes) -> Config:
        slice_, level, pidns, generation, _, canary = _CONFIG.unpack(raw)
        return cls(slice_, level, pidns, generation, canary)


@dataclass(frozen=True, slots=True)
class End:
    """Where packets of the proxy slice may go: one address, port and protocol."""

    address: Address
    port: int
    protocol: int

    def pack(self) -> bytes:
        family = socket.AF_INET if self.address.version == 4 else socket.AF_INET6
        return _END.pack(self.address.packed, self.port, self.protocol, family)

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        name = "tcp" if self.protocol == socket.IPPROTO_TCP else "udp"
        return f"{host}:{self.port}/{name}"


SHIPPED = Listen()
"""Where the units that are shipped listen."""


def proxy_ends(listen: Listen = SHIPPED) -> tuple[End, ...]:
    """The front's, the explicit listener's and the DNS forwarder's ends.

    Raises `ValueError` unless the explicit listener is on IPv4 loopback: a mistake
    here must not open a way to the network.
    """
    explicit = ipaddress.IPv4Address(listen.explicit_address)
    if not explicit.is_loopback or not 0 < listen.explicit_port < 65536:
        raise ValueError(f"{explicit}:{listen.explicit_port} is not on IPv4 loopback")
    ends = [End(explicit, listen.explicit_port, socket.IPPROTO_TCP)]
    for loopback in LOOPBACK:
        ends.append(End(loopback, listen.front_port, socket.IPPROTO_TCP))
        ends.append(End(loopback, listen.dns_port, socket.IPPROTO_TCP))
        ends.append(End(loopback, listen.dns_port, socket.IPPROTO_UDP))
    return tuple(ends)


@dataclass(frozen=True, slots=True)
class Count:
    """struct aa_count, or a sum of them."""

    events: int = 0
    lost: int = 0
    tallied: int = 0

    def pack(self) -> bytes:
        return _COUNT.pack(self.events, self.lost, self.tallied, 0)

    @classmethod
    def unpack(cls, raw: bytes) -> Count:
        return cls(*_COUNT.unpack(raw)[:3])

    @classmethod
    def sum_of(cls, per_cpu: bytes) -> Count:
        """The sum of the values of all CPUs, as the kernel hands them over in a row."""
        columns = zip(*_COUNT.iter_unpack(per_cpu), strict=True)
        return cls(*[sum(column) for column in columns][:3])

    def plus(self, other: Count) -> Count:
        return Count(
            self.events + other.events,
            self.lost + other.lost,
            self.tallied + other.tallied,
        )


def tally_total(raw: bytes) -> int:
    total: int = TALLY.unpack(raw)[0]
    return total


def index(number: int) -> bytes:
    """A key of an array map."""
    return struct.pack("=I", number)
