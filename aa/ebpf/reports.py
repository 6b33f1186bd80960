"""What an event says in the audit log: the report of it, and which events are equal. No I/O."""

from __future__ import annotations

import signal
from collections.abc import Hashable
from dataclasses import replace

from aa.ebpf import events
from aa.ebpf.events import Event, Exec, Exit, Net
from aa.ebpf.merge import Merged
from aa.model import Effect, Json, Kind, Layer, RecordType, Report

GUARD_RULE = "<kernel-guard>"
UNKNOWN_RUN = "?"

VIA = {
    events.VIA_CONNECT: "connect",
    events.VIA_DATAGRAM: "datagram",
    events.VIA_FOREIGN: "socket from outside the run",
}


def equal_key(event: Event, program: str) -> Hashable:
    """Events with the same key differ in time and process only."""
    head = event.head
    match event:
        case Exec():
            return (events.EXEC, head.cgroup, event.filename, event.exe, event.argv, head.uid)
        case Exit():
            return (events.EXIT, head.cgroup, program, event.status, head.uid)
        case Net(refused=True):
            return (events.REFUSED, event.raw_key)
    return (events.CONNECT, event.raw_key, head.comm, head.uid)


def to_report(merged: Merged[Event], *, run: str, program: str, boot: int) -> Report:
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


def _process(event: Event, program: str) -> dict[str, Json]:
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


def _net(event: Net) -> dict[str, Json]:
    key = event.key
    about: dict[str, Json] = {"protocol": key.protocol_name} if key.protocol else {}
    if not event.refused:
        about["via"] = VIA.get(key.via, "?")
    if key.address:
        about |= {"address": key.address, "port": key.port}
    return about
