"""Records as the BPF programs make them, built by hand for tests of the decoder."""

from __future__ import annotations

import socket

from aa.ebpf import events


def head(kind: int, size: int, *, flags: int = 0, cgroup: int = 77, comm: bytes = b"tool") -> bytes:
    return events.HEAD.pack(
        size, events.LAYOUT, kind, flags, 5_000_000_000, cgroup, 100, 99, 1000, 0, comm
    )


def exec_record(
    *,
    filename: bytes = b"/bin/echo\0",
    exe: bytes = b"echo\0bin\0usr\0",
    cwd: bytes = b"",
    argv: bytes = b"echo\0hi\0",
    argc: int = 2,
    flags: int = 0,
    cgroup: int = 77,
) -> bytes:
    data = filename + exe + cwd + argv
    fixed = events.EXEC_FIXED.pack(
        4711, 254 << 20 | 3, argc, len(filename), len(exe), len(cwd), len(argv)
    )
    return (
        head(events.EXEC, events.EXEC_SIZE + len(data), flags=flags, cgroup=cgroup) + fixed + data
    )


def exit_record(status: int = 0, *, cgroup: int = 77) -> bytes:
    rest = events.EXIT_REST.pack(1_500_000_000, status, 0)
    return head(events.EXIT, events.EXIT_SIZE, cgroup=cgroup) + rest


def file_record(
    call: str = "openat",
    *,
    text: bytes = b"",
    directory: bytes = b"",
    to: bytes = b"",
    to_directory: bytes = b"",
    call_flags: int = 0,
    result: int = 0,
    flags: int = 0,
    cgroup: int = 77,
    comm: bytes = b"tool",
) -> bytes:
    parts = (text, directory, to, to_directory)
    number = events.CALLS.index(call)
    fixed = events.FILE_FIXED.pack(
        4712, 254 << 20 | 3, call_flags, result, *map(len, parts), number, b""
    )
    size = events.FILE_SIZE + sum(map(len, parts))
    return head(events.FILE, size, flags=flags, cgroup=cgroup, comm=comm) + fixed + b"".join(parts)


def mapped_record(inode: int = 5, *, cgroup: int = 77) -> bytes:
    rest = events.MAPPED_REST.pack(inode, 254 << 20 | 3, 0)
    return head(events.MAPPED, events.MAPPED_SIZE, cgroup=cgroup) + rest


def key(
    *,
    cgroup: int = 77,
    address: bytes = socket.inet_aton("192.0.2.1"),
    port: int = 443,
    protocol: int = 6,
    family: int = socket.AF_INET,
    type: int = 1,
    reason: int = 0,
    via: int = 0,
) -> bytes:
    return events.KEY.pack(cgroup, address, port, protocol, family, type, reason, via)


def net_record(raw_key: bytes, *, total: int = 0, refused: bool = False, flags: int = 0) -> bytes:
    kind = events.REFUSED if refused else events.CONNECT
    return head(kind, events.NET_SIZE, flags=flags) + raw_key + events.TOTAL.pack(total)
