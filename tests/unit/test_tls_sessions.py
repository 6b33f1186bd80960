"""Records of the probes become sessions, requests with bytes, and what is said to be unmeasured."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.ebpf import events
from aa.ebpf.events import Exec, Exit, Head, MalformedRecord, Net, TallyKey
from aa.ebpf.tls import processes, records, sessions
from aa.ebpf.tls.http import Request
from aa.ebpf.tls.processes import Processes
from aa.ebpf.tls.records import Data, Totals
from aa.ebpf.tls.sessions import Outcome, Seen, Sessions, Unmeasured, Who
from aa.ebpf.tls.telling import request_report, unmeasured_report
from aa.model import Kind, RecordType

RUN, PID = 77, 12
GET = b"GET /a HTTP/1.1\r\nHost: h.test\r\n\r\n"


def sent(
    data: bytes = GET, *, at: int = 0, key: bytes = b"k", received: int = 0, **changes: object
) -> Data:
    record = Data(
        head=Head(records.FROM_START, 1000 + at, RUN, PID, 1, 0, "curl"),
        key=key,
        born=500,
        offset=at,
        received=received,
        length=len(data),
        library=3,
        peer="",
        ended=False,
        data=data,
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def ended(*, at: int, received: int) -> Data:
    return sent(b"", at=at, received=received, ended=True)


def brief(outcomes: list[Outcome]) -> list[object]:
    return [
        (o.request.path, o.sent, o.received, o.continued) if isinstance(o, Seen) else o.reason
        for o in outcomes
    ]


def test_a_session_that_ends_tells_its_request_with_all_bytes() -> None:
    table = Sessions(lambda key: None)
    table.feed(sent(), 0.0)
    assert table.take() == []
    table.feed(ended(at=len(GET), received=900), 0.1)
    assert brief(table.take()) == [("/a", len(GET), 900, False)]
    assert len(table) == 0


def test_each_request_of_a_session_gets_its_own_bytes() -> None:
    table = Sessions(lambda key: None)
    post = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n"
    table.feed(sent(post), 0.0)
    second = len(post) + 1000
    table.feed(sent(at=second, received=50), 0.1)
    table.feed(ended(at=second + len(GET), received=80), 0.2)
    assert brief(table.take()) == [("/p", second, 50, False), ("/a", len(GET), 30, False)]


def test_a_request_is_told_soon_and_what_comes_later_continues_it() -> None:
    totals = Totals(500, len(GET), 10)
    table = Sessions(lambda key: totals)
    table.feed(sent(), 0.0)
    table.flush(sessions.TELL_SECONDS / 2)
    assert table.take() == []
    table.flush(sessions.TELL_SECONDS)
    assert brief(table.take()) == [("/a", len(GET), 10, False)]
    totals = Totals(500, len(GET), 5000)
    table.flush(sessions.TELL_SECONDS + sessions.CONTINUE_SECONDS)
    assert brief(table.take()) == [("/a", 0, 4990, True)]
    table.gone(PID)
    assert table.take() == []


def test_totals_of_another_session_at_the_same_address_are_not_taken() -> None:
    table = Sessions(lambda key: Totals(501, 10**6, 10**6))
    table.feed(sent(), 0.0)
    table.gone(PID)
    assert brief(table.take()) == [("/a", len(GET), 0, False)]


def test_a_process_that_ends_ends_its_own_sessions_only() -> None:
    table = Sessions(lambda key: None)
    table.feed(sent(key=b"1"), 0.0)
    other = sent(key=b"2")
    table.feed(replace(other, head=replace(other.head, pid=PID + 1)), 0.0)
    table.gone(PID)
    assert [o.who.pid for o in table.take()] == [PID]
    assert len(table) == 1


def test_what_came_before_the_probes_is_unmeasured_and_counted_once() -> None:
    table = Sessions(lambda key: None)
    late = sent(at=4000)
    late = replace(late, head=replace(late.head, flags=0))
    table.feed(late, 0.0)
    table.feed(replace(late, offset=4000 + len(GET)), 0.0)
    table.gone(PID)
    told = brief(table.take())
    assert told[0] == sessions.BEFORE_ATTACH
    assert told.count(sessions.BEFORE_ATTACH) == 1


def test_memory_that_could_not_be_read_is_unmeasured() -> None:
    table = Sessions(lambda key: None)
    table.feed(sent(b"", length=50), 0.0)
    assert sessions.UNREADABLE in brief(table.take())


def test_too_many_sessions_are_let_go_of_with_a_word() -> None:
    table = Sessions(lambda key: None, limit=2)
    for n in range(3):
        table.feed(sent(key=bytes([n])), 0.0)
    assert brief(table.take()) == [sessions.TOO_MANY, ("/a", len(GET), 0, False)]
    assert len(table) == 2


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 2000),
            st.sampled_from([GET, b"", b"\0\1", b"GET ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]),
            st.integers(0, 500),
            st.booleans(),
            st.integers(0, 3),
        ),
        max_size=40,
    )
)
def test_any_order_of_records_is_taken_and_bytes_are_never_negative(
    steps: list[tuple[int, int, bytes, int, bool, int]],
) -> None:
    table = Sessions(lambda key: Totals(500, 100, 100), limit=2)
    for n, (key, at, data, more, end, flags) in enumerate(steps):
        record = sent(data, at=at, key=bytes([key]), received=more, ended=end)
        record = replace(record, length=len(data) + more, head=replace(record.head, flags=flags))
        table.feed(record, n / 3)
        table.flush(n / 3)
    table.close()
    assert len(table) == 0
    for outcome in table.take():
        assert isinstance(outcome, Unmeasured) or (outcome.sent >= 0 and outcome.received >= 0)


# -- records


def raw(*, captured: int = 3, length: int = 5, data: bytes = b"abc", kind: int = 1) -> bytes:
    head = events.HEAD.pack(0, events.LAYOUT, kind, 1, 9, RUN, PID, 1, 0, 0, b"curl")
    rest = records.REST.pack(
        500, 7, 8, length, captured, 3, socket.AF_INET, 443, socket.inet_aton("192.0.2.7")
    )
    return head + records.KEY.pack(0xABC, PID, 0) + rest + data + bytes(20)


def test_decodes_a_record() -> None:
    data = records.decode(raw())
    assert (data.head.cgroup, data.head.pid, data.head.comm) == (RUN, PID, "curl")
    assert (data.born, data.offset, data.received, data.length) == (500, 7, 8, 5)
    assert (data.peer, data.data, data.library) == ("192.0.2.7:443", b"abc", 3)
    assert data.from_start and not data.http2 and not data.ended
    assert "abc" not in repr(data)


@pytest.mark.parametrize(
    "record", [b"", bytes(200), raw(kind=3), raw(captured=6), raw(captured=9, length=9)[:-40]]
)
def test_refuses_what_the_programs_cannot_have_made(record: bytes) -> None:
    with pytest.raises(MalformedRecord):
        records.decode(record)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_malformed(record: bytes) -> None:
    try:
        records.decode(record)
    except MalformedRecord:
        pass
    records.run_of(record)


# -- processes


def head(pid: int = PID, time: int = 0) -> Head:
    return Head(0, time, RUN, pid, 1, 0, "c")


def connect(port: int = 443, *, pid: int = PID, time: int = 100, protocol: int = 6) -> Net:
    key = TallyKey(RUN, "192.0.2.1", port, protocol, socket.AF_INET, 1, 0, events.VIA_CONNECT)
    return Net(head(pid, time), key, b"", 0, False)


def started(pid: int = PID) -> Exec:
    return Exec(head(pid), "/bin/agent", "/bin/agent", (), 0, 1, (0, 0))


def test_a_connection_to_443_without_a_library_is_unexplained() -> None:
    table = Processes()
    table.noticed(started(), 0.0)
    table.noticed(connect(), 1.0)
    (process,) = table.due(1.0, 10)
    process.library = False
    assert table.judge(1.0 + processes.JUDGE_SECONDS / 2) == []
    (found,) = table.judge(1.0 + processes.JUDGE_SECONDS)
    assert (found.reason, found.count) == (processes.NO_LIBRARY, 1)
    assert found.process.program == "/bin/agent"
    assert table.judge(99.0) == []


def test_a_connection_to_443_with_a_library_is_explained() -> None:
    table = Processes()
    table.noticed(connect(), 0.0)
    table.used(PID)
    assert table.judge(99.0) == []


@pytest.mark.parametrize("event", [connect(8443), connect(protocol=17)])
def test_other_connections_need_no_explanation(event: Net) -> None:
    table = Processes()
    table.noticed(event, 0.0)
    assert table.judge(99.0) == []


def test_a_process_that_was_gone_before_a_look_is_unexplained() -> None:
    table = Processes()
    table.noticed(connect(), 0.0)
    table.noticed(Exit(head(), 1, 0), 0.1)
    assert [f.reason for f in table.judge(0.2)] == [processes.GONE]
    table.judge(99.0)
    assert len(table) == 0


def test_a_new_program_in_the_same_process_is_judged_by_itself() -> None:
    table = Processes()
    table.noticed(connect(), 0.0)
    table.used(PID)
    table.noticed(started(), 0.1)
    table.noticed(connect(), 0.2)
    assert [f.reason for f in table.judge(99.0)] == [processes.GONE]


def test_a_flood_of_processes_has_a_bound_and_loses_no_suspicion() -> None:
    table = Processes(limit=3)
    for pid in range(1, 11):
        table.noticed(connect(pid=pid), 0.0)
    assert len(table) == 3
    assert sum(f.count for f in table.judge(99.0)) == 10


def test_the_peer_of_a_session_is_the_last_connection_before_it() -> None:
    table = Processes()
    table.noticed(connect(443, time=100), 0.0)
    table.noticed(connect(8443, time=200), 0.0)
    assert table.peer(PID, 150) == "192.0.2.1:443"
    assert table.peer(PID, 250) == "192.0.2.1:8443"
    assert table.peer(PID, 50) == table.peer(PID + 1, 250) == ""


# -- reports


def report_of(
    host: str, *, path: str = "/p", peer: str = "", inferred: str = ""
) -> tuple[str, str]:
    who = Who(RUN, PID, 0, "curl", 3, 500, peer)
    seen = Seen(who, Request("GET", host, path, "1.1"), 10, 1, 2)
    report = request_report(seen, run="r", library="/l", inferred=inferred, boot=5)
    assert (report.type, report.kind, report.time) == (
        RecordType.OBSERVED,
        Kind.HTTP_REQUEST,
        15,
    )
    assert report.attributes["peer_exact"] is bool(peer)
    return report.target, report.attributes["host"]


@pytest.mark.parametrize(
    ("host", "target", "name"),
    [
        ("h.test", "https://h.test/p", "h.test"),
        ("h.test:443", "https://h.test/p", "h.test"),
        ("h.test:8443", "https://h.test:8443/p", "h.test"),
        ("h.test.", "https://h.test/p", "h.test"),
        ("[::1]:444", "https://[::1]:444/p", "::1"),
        ("127.1", "https://127.1/p", "127.1"),
        ("", "https://192.0.2.9:443/p", ""),
    ],
)
def test_target_and_host_of_a_report(host: str, target: str, name: str) -> None:
    assert report_of(host, inferred="192.0.2.9:443") == (target, name)


def test_unmeasured_report_counts() -> None:
    report = unmeasured_report("why", 4, run="r", time=1, about={"pid": 2})
    assert (report.target, report.count) == ("unmeasured", 4)
    assert report.attributes == {"source": "tls-probe", "unmeasured": "why", "count": 4, "pid": 2}
