"""Decoding: bytes from the ring and the maps become values, or `MalformedRecord`. No I/O.

The layout is that of probes/events.h; tests/unit/test_ebpf_layout.py compares the
two. What a governed program can choose (names, arguments) is decoded so that any
bytes at all become text.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
from dataclasses import dataclass, replace

TIME_LIMIT = 1 << 61
"""Nanoseconds since the boot, some 73 years: no clock is there yet."""
LAYOUT = 2

COMM_MAX = 16
ARGV_MAX = 1024
FILENAME_MAX = 512
PATH_MAX = 1024

FILE_RATE = 2000

EXEC, EXIT, CONNECT, REFUSED, FILE, MAPPED = 1, 2, 3, 4, 5, 6
KIND_NAMES = {
    EXEC: "exec",
    EXIT: "exit",
    CONNECT: "connect",
    REFUSED: "refused",
    FILE: "file",
    MAPPED: "mapped",
}

VIA_CONNECT, VIA_DATAGRAM, VIA_FOREIGN, VIA_FILES = 0, 1, 2, 3

REFUSED_END, REFUSED_FRAGMENT, REFUSED_HEADER, REFUSED_INTERFACE = 1, 2, 3, 4
REFUSED_SOCKET, REFUSED_JOIN = 5, 6

ARGV_CUT, ARGV_UNREAD, FILENAME_CUT, EXE_CUT, CWD_CUT, OUTSIDE = (1 << n for n in range(6))
OPENED, CREATED, TEXT_CUT, DIR_CUT, TO_CUT, TO_DIR_CUT = (1 << n for n in range(6, 12))

CALLS = (
    "",  # numbers begin with 1
    "open",
    "openat",
    "openat2",
    "creat",
    "open_by_handle_at",
    "truncate",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "unlink",
    "unlinkat",
    "rmdir",
    "rename",
    "renameat",
    "renameat2",
)
"""System calls by their number in enum aa_call."""
MISSING = "…"
"""Where a part of a path, or all of it, is not told."""
AT_REMOVEDIR = 0x200
_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
RENAME_EXCHANGE = 2

HEAD = struct.Struct("=HBBIQQIIII16s")
EXEC_FIXED = struct.Struct("=QIIHHHH")
EXIT_REST = struct.Struct("=QII")
FILE_FIXED = struct.Struct("=QIIiHHHHB3s")
MAPPED_REST = struct.Struct("=QII")
KEY = struct.Struct("=Q16sHHBBBB")
TOTAL = struct.Struct("=Q")

EXEC_SIZE = HEAD.size + EXEC_FIXED.size
FILE_SIZE = HEAD.size + FILE_FIXED.size
EXIT_SIZE = HEAD.size + EXIT_REST.size
MAPPED_SIZE = HEAD.size + MAPPED_REST.size
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
class File:
    """A call that opens for writing, makes, removes or renames a file, when it has returned.

    Paths are as the run's mount namespace has them. `exact`: the kernel's own path of the
    opened file; otherwise it is what the program's memory said, made absolute.
    """

    head: Head
    call: str
    path: str  # the file that is written, made or removed; before a rename
    to: str  # after a rename; what a link leads to
    flags: int  # as the call takes them
    error: int  # errno; 0 when it succeeded
    exact: bool
    inode: int = 0
    device: tuple[int, int] = (0, 0)
    gathered: bool = False
    """Stands for the files of a directory, or of the whole run, that are too many to be told one by one."""

    @property
    def action(self) -> str:
        """`open`, `unlink` or `rename`."""
        if self.call.startswith("rename"):
            return "rename"
        return "unlink" if self.call in ("unlink", "unlinkat", "rmdir") else "open"

    @property
    def access(self) -> str:
        """`create` where the call makes the file, or was to; else `write`."""
        if self.call.startswith("open") or self.call == "creat":
            made = self.head.flags & CREATED if not self.error else self.flags & os.O_CREAT
            return "create" if made or self.flags & _TMPFILE else "write"
        return "write" if self.call == "truncate" else "create"

    def of_directory(self) -> File:
        """The same, said of its directory."""
        directory = self.path.rpartition("/")[0] + "/"
        return replace(self, path=directory, to="", gathered=True, inode=0, device=(0, 0))

    def of_run(self) -> File:
        """The same, said of no place, no program and no result: a run cannot make many of these."""
        head = replace(self.head, flags=0, pid=0, ppid=0, uid=0, comm="")
        return replace(self.of_directory(), head=head, path=MISSING, flags=0, error=0, exact=False)


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


@dataclass(frozen=True, slots=True)
class Files:
    """File calls of a run beyond its rate: only counted."""

    head: Head
    raw_key: bytes
    total: int


@dataclass(frozen=True, slots=True)
class Mapped:
    """A file that was mapped to execute, which others may have done before. Not for the audit."""

    head: Head
    inode: int
    device: tuple[int, int]


Recorded = Exec | Exit | File | Files | Net
"""What belongs in the audit log."""
Event = Recorded | Mapped

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
    if time >= TIME_LIMIT:
        raise MalformedRecord(f"is from {time} ns after the boot")
    head = Head(flags, time, cgroup, pid, ppid, uid, _text(comm.split(b"\0", 1)[0]))
    match kind:
        case 1:
            return _exec(head, record)
        case 2:
            return _exit(head, record)
        case 3 | 4:
            return _net(head, record, refused=kind == REFUSED)
        case 5:
            return _file(head, record)
        case 6:
            return _mapped(head, record)
    raise MalformedRecord(f"kind {kind}")


def kind_of(event: Event) -> int:
    match event:
        case Exec():
            return EXEC
        case Exit():
            return EXIT
        case File() | Files():
            return FILE
        case Mapped():
            return MAPPED
        case Net(refused=True):
            return REFUSED
    return CONNECT


def of_tally(raw: bytes, count: int, time: int) -> Files | Net:
    """What a tally counted since it was told last. Raises `MalformedRecord`."""
    key = tally_key(raw)
    head = Head(0, time, key.cgroup, 0, 0, 0, "")
    if key.via == VIA_FILES:
        return Files(head, raw, count)
    return Net(head, key, raw, count, bool(key.reason))


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


def _file(head: Head, record: bytes) -> File:
    if len(record) < FILE_SIZE:
        raise MalformedRecord(f"a file of {len(record)} bytes")
    inode, device, flags, result, *lengths, call, _ = FILE_FIXED.unpack_from(record, HEAD.size)
    if FILE_SIZE + sum(lengths) != len(record) or max(lengths) > PATH_MAX:
        raise MalformedRecord(f"parts of {lengths} bytes in {len(record) - FILE_SIZE}")
    if not 0 < call < len(CALLS) or result > 0:
        raise MalformedRecord(f"call {call} with result {result}")
    parts, at = [], FILE_SIZE
    for length in lengths:
        parts.append(record[at : at + length])
        at += length
    text, directory, to, to_directory = parts
    name = CALLS[call]
    if head.flags & OPENED:
        path = _path(directory, bool(head.flags & DIR_CUT))
    else:
        path = _named(text, head.flags & TEXT_CUT, directory, head.flags & DIR_CUT)
    other = ""
    if name.startswith(("rename", "link", "symlink")):
        other = _named(to, head.flags & TO_CUT, to_directory, head.flags & TO_DIR_CUT)
        if name.startswith("symlink"):
            path = _text(text.split(b"\0", 1)[0])  # what it says, wherever that is
        if not name.startswith("rename"):
            path, other = other, path  # the name that is made
    return File(
        head=head,
        call=name,
        path=path,
        to=other,
        flags=flags,
        error=-result,
        exact=bool(head.flags & OPENED) and not head.flags & DIR_CUT,
        inode=inode,
        device=(device >> 20, device & 0xFFFFF),
    )


def _mapped(head: Head, record: bytes) -> Mapped:
    if len(record) != MAPPED_SIZE:
        raise MalformedRecord(f"a mapped file of {len(record)} bytes")
    inode, device, _ = MAPPED_REST.unpack_from(record, HEAD.size)
    return Mapped(head, inode, (device >> 20, device & 0xFFFFF))


def _named(text: bytes, text_cut: int, directory: bytes, directory_cut: int) -> str:
    """The absolute path of a name in a program's memory; `…` where something is missing."""
    name = _text(text.split(b"\0", 1)[0])
    if text_cut:
        name += MISSING
    if not name.startswith("/"):
        name = _join(_path(directory, bool(directory_cut)), name)
    return _REPEATED.sub("/", name)


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
    return (f"{MISSING}/" if cut else "/") + "/".join(reversed(names))


_REPEATED = re.compile(r"/(?:\.?/)+")  # `//` and `/./`; what `..` leads to only the kernel knows


def _join(directory: str, name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return f"{directory.rstrip('/')}/{name}" if name else directory
