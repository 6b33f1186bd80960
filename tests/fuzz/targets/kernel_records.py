"""Records of the rings and keys of the maps: a value, or `MalformedRecord`, and bounded after that."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from aa.ebpf import events
from aa.ebpf.events import Exec, Exit, MalformedRecord, Mapped, Net
from aa.ebpf.merge import Merged
from aa.ebpf.reports import equal_key, to_report
from aa.ebpf.tls import records
from aa.ebpf.tls.records import Totals
from aa.ebpf.tls.sessions import Seen, Sessions
from aa.ebpf.tls.telling import request_report, unmeasured_report
from aa.model import Json, Report
from aa.varlink.codec import decode, encode
from tests.unit.ebpf_records import (
    exec_record,
    exit_record,
    file_record,
    key,
    mapped_record,
    net_record,
)

WORDS = (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0bin\0")


def tls_record(data: bytes, *, kind: int = 1, flags: int = 1, offset: int = 0) -> bytes:
    head = events.HEAD.pack(0, events.LAYOUT, kind, flags, 9, 77, 12, 1, 0, 0, b"curl")
    address = socket.inet_aton("192.0.2.7")
    rest = records.REST.pack(500, offset, 8, len(data), len(data), 3, 2, 443, address)
    return head + records.KEY.pack(0xABC, 12, 0) + rest + data


def joined(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<H", len(part)) + part for part in parts)


def seeds() -> Iterator[bytes]:
    for record in (
        exec_record(),
        exec_record(filename=b"./x\0", cwd=b"dev\0home\0", flags=63),
        exit_record(9),
        mapped_record(),
        file_record(directory=b"x\0dev\0", flags=events.OPENED),
        file_record("renameat2", text=b"a\0", directory=b"dev\0", to=b"b\0", to_directory=b"dev\0"),
        net_record(key()),
        net_record(key(reason=1), refused=True, total=5),
        net_record(key(family=10, address=socket.inet_pton(10, "::ffff:1.2.3.4"))),
    ):
        yield b"\0" + record
    yield b"\1" + key(reason=5)
    get = b"GET /a?b HTTP/1.1\r\nHost: a.test\r\n\r\n"
    yield b"\2" + joined(
        tls_record(get), tls_record(b"x", offset=len(get)), tls_record(b"", kind=2)
    )
    h2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\x05\x01\x04\0\0\0\1\x82\x86\x84\x41\x00"
    yield b"\2" + joined(tls_record(h2, flags=3), tls_record(b"", kind=2, flags=3))


def one(data: bytes) -> None:
    if not data:
        return
    kind, data = data[0] % 3, data[1:]
    if kind == 0:
        _event(data)
    elif kind == 1:
        try:
            assert events.tally_key(data).target
        except MalformedRecord:
            return
    else:
        _sessions(data)


def _event(record: bytes) -> None:
    try:
        event = events.decode(record)
    except MalformedRecord:
        return
    match event:
        case Exec():
            assert event.filename == "" or event.filename[0] in "/…"
            assert len(event.argv) <= events.ARGV_MAX + 1
            assert all(isinstance(a.encode(), bytes) for a in (*event.argv, event.exe))
        case Exit():
            assert event.code is None or 0 <= event.code < 256
        case Net():
            assert event.key.target and event.key.protocol_name
    if isinstance(event, Mapped):
        return  # it is for whoever attaches probes, and told to nobody
    merged = Merged(event, event, 1, 0.0)
    _told(to_report(merged, run="r", program="/bin/x", boot=10**18))
    assert hash(equal_key(event, "/bin/x")) is not None


def _sessions(data: bytes) -> None:
    table = Sessions(lambda key: Totals(500, 100, 100), limit=3)
    now = 0.0
    while len(data) > 2:
        (size,) = struct.unpack_from("<H", data)
        raw, data = data[2 : 2 + size], data[2 + size :]
        records.run_of(raw)
        try:
            record = records.decode(raw)
        except MalformedRecord:
            continue
        table.feed(record, now)
        now += 0.7
        table.flush(now)
        assert len(table) <= 3
    table.close()
    assert len(table) == 0
    for outcome in table.take():
        if isinstance(outcome, Seen):
            assert outcome.sent >= 0 and outcome.received >= 0
            assert outcome.request.path.isprintable() and outcome.request.host.isprintable()
            _told(request_report(outcome, run="r", library="l", inferred="", boot=10**18))
        else:
            about: dict[str, Json] = {"pid": outcome.who.pid, "comm": outcome.who.comm}
            _told(unmeasured_report(outcome.reason, 1, run="r", time=1, about=about))


def _told(report: Report) -> None:
    """It fits into a message, and the gateway reads the same from it."""
    assert Report.from_json(decode(encode(report.as_json())[:-1])) == report
