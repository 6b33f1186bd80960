"""What an event says in the audit log: the report of it, and which events are equal. No I/O."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Hashable
from dataclasses import replace

from aa.ebpf import events
from aa.ebpf.events import MISSING, Exec, Exit, File, Files, Net, Recorded
from aa.ebpf.merge import Merged
from aa.model import Effect, Json, Kind, Layer, RecordType, Report

GUARD_RULE = "<kernel-guard>"
UNKNOWN_RUN = "?"

VIA = {
    events.VIA_CONNECT: "connect",
    events.VIA_DATAGRAM: "datagram",
    events.VIA_FOREIGN: "socket from outside the run",
}

FILE_KINDS = {"open": Kind.FILE_OPEN, "unlink": Kind.FILE_UNLINK, "rename": Kind.FILE_RENAME}
_OPEN_FLAGS = {
    name: getattr(os, f"O_{name}")
    for name in ("APPEND", "CREAT", "DIRECT", "EXCL", "NOFOLLOW", "RDWR", "SYNC", "TRUNC")
}
_RENAME_FLAGS = {"NOREPLACE": 1, "EXCHANGE": 2, "WHITEOUT": 4}


def equal_key(event: Recorded, program: str) -> Hashable:
    """Events with the same key differ in time and process only."""
    head = event.head
    match event:
        case Exec():
            return (events.EXEC, head.cgroup, event.filename, event.exe, event.argv, head.uid)
        case Exit():
            return (events.EXIT, head.cgroup, program, event.status, head.uid)
        case File():
            what = (event.action, event.access, event.path, event.to, event.error, event.gathered)
            return (events.FILE, head.cgroup, *what, event.exact, head.comm, head.uid)
        case Files():
            return (events.FILE, event.raw_key)
        case Net(refused=True):
            return (events.REFUSED, event.raw_key)
    return (events.CONNECT, event.raw_key, head.comm, head.uid)


def to_report(merged: Merged[Recorded], *, run: str, program: str, boot: int) -> Report:
    """The report of an event and its equals.

    `program` is the path of the process's program where it is known, `boot` the time of
    the boot in nanoseconds since the epoch.
    """
    event = merged.first
    attributes = _process(event, program)
    if merged.count > 1:
        attributes["until"] = merged.last.head.time + boot
    report = Report(
        type=RecordType.OBSERVED,
        layer=Layer.KERNEL,
        kind=Kind.NET_CONNECT,
        target="",
        time=event.head.time + boot,
        run=run,
        count=merged.count,
    )
    match event:
        case Exec():
            return replace(
                report, kind=Kind.EXEC, target=event.filename, attributes=attributes | _exec(event)
            )
        case Exit():
            return replace(
                report,
                kind=Kind.EXIT,
                target=program or event.head.comm,
                attributes=attributes | _exit(event),
            )
        case File():
            return replace(
                report,
                kind=FILE_KINDS[event.action],
                target=event.path,
                attributes=attributes | _file(event),
            )
        case Files():
            why = f"the run's file calls beyond {events.FILE_RATE} a second are only counted"
            return replace(
                report,
                kind=Kind.FILE_OPEN,
                target=MISSING,
                reason=why,
                attributes=attributes | {"gathered": True},
            )
    report = replace(report, target=event.key.target, attributes=attributes | _net(event))
    if not event.refused:
        return report
    return replace(
        report,
        type=RecordType.REFUSAL,
        effect=Effect.DENY,
        rule=GUARD_RULE,
        reason=events.REASONS[event.key.reason],
    )


def _process(event: Recorded, program: str) -> dict[str, Json]:
    head = event.head
    if not head.pid and not head.comm:
        return {}
    about: dict[str, Json] = {
        "pid": head.pid,
        "ppid": head.ppid,
        "uid": head.uid,
        "comm": head.comm,
    }
    if program and not isinstance(event, Exec):
        about["program"] = program
    if head.outside:
        about["outside"] = True  # the socket is a run's, the process is not in one
    return about


def _exec(event: Exec) -> dict[str, Json]:
    about: dict[str, Json] = {
        "argv": list(event.argv),
        "exe": event.exe,
        "inode": event.inode,
        "device": "{}:{}".format(*event.device),
    }
    if not event.argv_complete:
        about |= {"argv_truncated": True, "argc": event.argc}
    return about


def _exit(event: Exit) -> dict[str, Json]:
    about: dict[str, Json] = {"seconds": round(event.age / 1e9, 6)}
    if event.signal:
        return about | {"signal": _signal_name(event.signal)}
    return about | {"code": event.code}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _file(event: File) -> dict[str, Json]:
    if event.gathered:
        return {"gathered": True} | ({"access": event.access} if event.action == "open" else {})
    about: dict[str, Json] = {"call": event.call, "exact": event.exact}
    match event.action:
        case "open":
            about["access"] = event.access
        case "unlink" if event.call == "rmdir" or event.flags & events.AT_REMOVEDIR:
            about["directory"] = True
    if flags := _flags(event):
        about["flags"] = flags
    if event.to:
        about["to" if event.action == "rename" else "of"] = event.to
    if event.inode:
        about |= {"inode": event.inode, "device": "{}:{}".format(*event.device)}
    if event.error:
        about["error"] = errno.errorcode.get(event.error, str(event.error))
    return about


def _flags(event: File) -> list[str]:
    """The names of the flags that say something."""
    if event.call.startswith("open"):
        names = _OPEN_FLAGS
    elif event.call == "renameat2":
        names = _RENAME_FLAGS
    else:
        return []
    return [name for name, bits in names.items() if event.flags & bits == bits]


def _net(event: Net) -> dict[str, Json]:
    key = event.key
    about: dict[str, Json] = {"protocol": key.protocol_name} if key.protocol else {}
    if not event.refused:
        about["via"] = VIA.get(key.via, "?")
    if key.address:
        about |= {"address": key.address, "port": key.port}
    return about
