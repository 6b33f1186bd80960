"""Decoding: bytes from the ring of the TLS probes become values, or `MalformedRecord`. No I/O.

The layout is that of probes/tls_events.h. `Data.data` is plaintext of a governed
program: it is looked at once and never written anywhere.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass, field

from aa.ebpf.events import HEAD, LAYOUT, TIME_LIMIT, Head, MalformedRecord

DATA, END = 1, 2

FROM_START, HTTP2, ENDED, UNREAD = (1 << n for n in range(4))

DATA_MAX = 16384
HEAD_MAX = 16384
RATE = 2000

KEY = struct.Struct("=QII")
REST = struct.Struct("=QQQIIIHH16s")
SESSION = struct.Struct("=QQQIiII")
COUNT = struct.Struct("=QQQQ")
FIXED_SIZE = HEAD.size + KEY.size + REST.size


@dataclass(frozen=True, slots=True)
class Data:
    """Something was sent (`ended` false), or the library let go of the session."""

    head: Head
    key: bytes  # of the kernel's table of sessions
    born: int  # with the key: which session this is
    offset: int  # bytes that were sent before
    received: int  # bytes that were received so far
    length: int
    library: int
    peer: str  # address:port, "" where it is not known
    ended: bool
    data: bytes = field(repr=False)

    @property
    def from_start(self) -> bool:
        return bool(self.head.flags & FROM_START)

    @property
    def http2(self) -> bool:
        return bool(self.head.flags & HTTP2)


@dataclass(frozen=True, slots=True)
class Totals:
    """struct aa_tls_session, as far as anybody asks."""

    born: int
    sent: int
    received: int

    @classmethod
    def unpack(cls, raw: bytes) -> Totals:
        return cls(*SESSION.unpack(raw)[:3])


@dataclass(frozen=True, slots=True)
class Count:
    """struct aa_tls_count, summed over the CPUs."""

    events: int = 0
    lost: int = 0
    held_back: int = 0

    @classmethod
    def sum_of(cls, per_cpu: bytes) -> Count:
        columns = zip(*COUNT.iter_unpack(per_cpu), strict=True)
        return cls(*[sum(column) for column in columns][:3])


def run_of(record: bytes) -> int:
    """The cgroup id of a record's run, without decoding the rest; 0 of one that is too short."""
    return int(HEAD.unpack_from(record)[5]) if len(record) >= HEAD.size else 0


def decode(record: bytes) -> Data:
    """One record of the ring. Raises `MalformedRecord`."""
    if len(record) < FIXED_SIZE:
        raise MalformedRecord(f"{len(record)} bytes are no record of a TLS probe")
    _, layout, kind, flags, time, cgroup, pid, ppid, uid, _, comm = HEAD.unpack_from(record)
    if layout != LAYOUT or kind not in (DATA, END):
        raise MalformedRecord(f"kind {kind} of layout {layout}")
    if time >= TIME_LIMIT:
        raise MalformedRecord(f"is from {time} ns after the boot")
    key = record[HEAD.size : HEAD.size + KEY.size]
    born, offset, received, length, captured, library, family, port, address = REST.unpack_from(
        record, HEAD.size + KEY.size
    )
    if captured > min(length, DATA_MAX) or FIXED_SIZE + captured > len(record):
        raise MalformedRecord(f"{captured} of {length} bytes in a record of {len(record)}")
    return Data(
        head=Head(
            flags,
            time,
            cgroup,
            pid,
            ppid,
            uid,
            comm.split(b"\0", 1)[0].decode("utf-8", "backslashreplace"),
        ),
        key=key,
        born=born,
        offset=offset,
        received=received,
        length=length,
        library=library,
        peer=_peer(family, port, address),
        ended=kind == END,
        data=record[FIXED_SIZE : FIXED_SIZE + captured],
    )


def _peer(family: int, port: int, raw: bytes) -> str:
    if family == socket.AF_INET:
        return end(str(ipaddress.IPv4Address(raw[:4])), port)
    if family == socket.AF_INET6:
        address = ipaddress.IPv6Address(raw)
        return end(str(address.ipv4_mapped or address), port)
    return ""


def end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
