"""Decoding: bytes from the ring and the maps become values, or `MalformedRecord`. No I/O.

The layout is that of probes/events.h; tests/unit/test_ebpf_layout.py compares the
two. What a governed program can choose (names, arguments) is decoded so that any
bytes at all become text.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass

LAYOUT = 2

COMM_MAX = 16
ARGV_MAX = 1024
FILENAME_MAX = 512
PATH_MAX = 1024

EXEC, EXIT, CONNECT, REFUSED = 1, 2, 3, 4
KIND_NAMES = {EXEC: "exec", EXIT: "exit", CONNECT: "connect", REFUSED: "refused"}

VIA_CONNECT, VIA_DATAGRAM, VIA_FOREIGN = 0, 1, 2

REFUSED_END, REFUSED_FRAGMENT, REFUSED_HEADER, REFUSED_INTERFACE = 1, 2, 3, 4
REFUSED_SOCKET, REFUSED_JOIN = 5, 6

ARGV_CUT, ARGV_UNREAD, FILENAME_CUT, EXE_CUT, CWD_CUT, OUTSIDE = (1 << n for n in range(6))

HEAD = struct.Struct("=HBBIQQIIII16s")
EXEC_FIXED = struct.Struct("=QIIHHHH")
EXIT_REST = struct.Struct("=QII")
KEY = struct.Struct("=Q16sHHBBBB")
TOTAL = struct.Struct("=Q")

EXEC_SIZE = HEAD.size + EXEC_FIXED.size
EXIT_SIZE = HEAD.size + EXIT_REST.size
NET_SIZE = HEAD.size + KEY.size + TOTAL.size


class MalformedRecord(ValueError):
    """A record that the programs of this layout cannot have made."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every record has. `cgroup` is the run's, 0 for a process that is in none."""

    flags: int
    time: int  # CLOCK_BOOTTIME, nanoseconds
    cgroup: int
    pid: int  # 0 where the loader's pid namespace does not know it, or nobody sent it
    ppid: int
    uid: int
    comm: str

    @property
    def outside(self) -> bool:
        return bool(self.flags & OUTSIDE)


@dataclass(frozen=True, slots=True)
class Exec:
    head: Head
    filename: str  # as the program was asked for, made absolute
    exe: str  # the file that the kernel runs: for a script, its interpreter
    argv: tuple[str, ...]
    argc: int
    inode: int
    device: tuple[int, int]

    @property
    def argv_complete(self) -> bool:
        return not self.head.flags & (ARGV_CUT | ARGV_UNREAD)


@dataclass(frozen=True, slots=True)
class Exit:
    head: Head
    age: int  # nanoseconds
    status: int  # as wait() tells it

    @property
    def code(self) -> int | None:
        return None if self.signal else self.status >> 8 & 0xFF

    @property
    def signal(self) -> int:
        return self.status & 0x7F


@dataclass(frozen=True, slots=True)
class TallyKey:
    """What is counted together: where something went, and why it was refused if it was."""

    cgroup: int
    address: str  # "" where there is none
    port: int
    protocol: int
    family: int
    type: int
    reason: int
    via: int

    @property
    def protocol_name(self) -> str:
        return PROTOCOLS.get(self.protocol, str(self.protocol))

    @property
    def target(self) -> str:
        """address:port, or the kind of socket where there is no address."""
        if self.reason == REFUSED_SOCKET:
            family = FAMILIES.get(self.family, str(self.family))
            kind = SOCKET_TYPES.get(self.type, str(self.type))
            return f"socket:{family}/{kind}/{self.protocol_name}"
        if self.reason == REFUSED_JOIN:
            return f"multicast:{FAMILIES.get(self.family, str(self.family))}"
        if not self.address:
            return "packet:unknown"
        if self.protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            return self.address
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Net:
    """A connection that was asked for, or (`refused`) a packet or socket that was refused."""

    head: Head
    key: TallyKey
    raw_key: bytes
    total: int  # what the tally of `key` has counted; 0 for one event that is not tallied
    refused: bool


Event = Exec | Exit | Net

PROTOCOLS = {
    1: "icmp",
    6: "tcp",
    17: "udp",
    33: "dccp",
    58: "icmpv6",
    132: "sctp",
    136: "udplite",
    255: "raw",
    262: "mptcp",
}
FAMILIES: dict[int, str] = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}
SOCKET_TYPES = {1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket", 6: "dccp"}

REASONS = {
    REFUSED_END: "the packet was not for the proxy; the kernel guard dropped it",
    REFUSED_FRAGMENT: "a fragment or a packet with IP options; the kernel guard dropped it",
    REFUSED_HEADER: "a packet that is neither TCP nor UDP; the kernel guard dropped it",
    REFUSED_INTERFACE: "the packet left through a real interface; the kernel guard dropped it",
    REFUSED_JOIN: "proxied runs join no multicast group; the kernel guard refused it",
    REFUSED_SOCKET: "proxied runs get TCP and UDP sockets only; the kernel guard refused it",
}


def decode(record: bytes) -> Event:
    """One record of the ring. Raises `MalformedRecord`."""
    if len(record) < HEAD.size:
        raise MalformedRecord(f"{len(record)} bytes are no record")
    size, layout, kind, flags, time, cgroup, pid, ppid, uid, _, comm = HEAD.unpack_from(record)
    if layout != LAYOUT:
        raise MalformedRecord(f"layout {layout}, not {LAYOUT}")
    if size != len(record):
        raise MalformedRecord(f"says {size} bytes, has {len(record)}")
    head = Head(flags, time, cgroup, pid, ppid, uid, _text(comm.split(b"\0", 1)[0]))
    match kind:
        case 1:
            return _exec(head, record)
        case 2:
            return _exit(head, record)
        case 3 | 4:
            return _net(head, record, refused=kind == REFUSED)
    raise MalformedRecord(f"kind {kind}")


def kind_of(event: Event) -> int:
    match event:
        case Exec():
            return EXEC
        case Exit():
            return EXIT
        case Net(refused=True):
            return REFUSED
    return CONNECT


def tally_key(raw: bytes) -> TallyKey:
    """A key of the table of tallies. Raises `MalformedRecord`."""
    if len(raw) != KEY.size:
        raise MalformedRecord(f"a key of {len(raw)} bytes")
    cgroup, address, port, protocol, family, type_, reason, via = KEY.unpack(raw)
    if reason and reason not in REASONS:
        raise MalformedRecord(f"reason {reason}")
    where = "" if reason in (REFUSED_SOCKET, REFUSED_JOIN) else _address(family, address)
    return TallyKey(cgroup, where, port, protocol, family, type_, reason, via)


def _exec(head: Head, record: bytes) -> Exec:
    if len(record) < EXEC_SIZE:
        raise MalformedRecord(f"an exec of {len(record)} bytes")
    inode, device, argc, *lengths = EXEC_FIXED.unpack_from(record, HEAD.size)
    if EXEC_SIZE + sum(lengths) != len(record):
        raise MalformedRecord(f"parts of {sum(lengths)} bytes in {len(record) - EXEC_SIZE}")
    if lengths[0] > FILENAME_MAX or max(lengths[1:3]) > PATH_MAX or lengths[3] > ARGV_MAX:
        raise MalformedRecord(f"parts of {lengths} bytes")
    parts, at = [], EXEC_SIZE
    for length in lengths:
        parts.append(record[at : at + length])
        at += length
    name, exe, cwd, argv = parts
    filename = _text(name.split(b"\0", 1)[0])
    if not filename.startswith("/"):
        filename = _join(_path(cwd, bool(head.flags & CWD_CUT)), filename)
    if argv.endswith(b"\0"):
        argv = argv[:-1]
    return Exec(
        head=head,
        filename=filename,
        exe=_path(exe, bool(head.flags & EXE_CUT)),
        argv=tuple(_text(x) for x in argv.split(b"\0")) if argv or argc else (),
        argc=argc,
        inode=inode,
        device=(device >> 20, device & 0xFFFFF),  # the kernel's own dev_t
    )


def _exit(head: Head, record: bytes) -> Exit:
    if len(record) != EXIT_SIZE:
        raise MalformedRecord(f"an exit of {len(record)} bytes")
    age, status, _ = EXIT_REST.unpack_from(record, HEAD.size)
    return Exit(head, age, status)


def _net(head: Head, record: bytes, *, refused: bool) -> Net:
    if len(record) != NET_SIZE:
        raise MalformedRecord(f"a network record of {len(record)} bytes")
    raw = record[HEAD.size : HEAD.size + KEY.size]
    key = tally_key(raw)
    if bool(key.reason) is not refused:
        raise MalformedRecord(f"reason {key.reason} in a record of the other kind")
    (total,) = TOTAL.unpack_from(record, HEAD.size + KEY.size)
    return Net(head, key, raw, total, refused)


def _address(family: int, raw: bytes) -> str:
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(raw[:4]))
    if family == socket.AF_INET6:
        address = ipaddress.IPv6Address(raw)
        return str(address.ipv4_mapped or address)
    return ""


def _text(raw: bytes) -> str:
    """Text of any bytes; what is not UTF-8 stays readable as \\xNN."""
    return raw.decode("utf-8", "backslashreplace")


def _path(components: bytes, cut: bool) -> str:
    """A path of its components from the leaf up; `…/` in front when the upper ones are missing."""
    names = [_text(x) for x in components.split(b"\0") if x]
    return ("…/" if cut else "/") + "/".join(reversed(names))


def _join(directory: str, name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return f"{directory.rstrip('/')}/{name}" if name else directory
