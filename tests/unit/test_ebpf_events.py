"""The decoder: what good records become, and that bad ones are errors and never more than that."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa.ebpf import events
from aa.ebpf.events import Exec, Exit, MalformedRecord, Net, decode, tally_key
from tests.unit import ebpf_records as make


def test_an_exec_has_program_file_and_arguments() -> None:
    event = decode(make.exec_record())
    assert isinstance(event, Exec)
    assert event.filename == "/bin/echo"
    assert event.exe == "/usr/bin/echo"
    assert event.argv == ("echo", "hi")
    assert event.device == (254, 3)
    assert event.argv_complete
    assert (event.head.pid, event.head.ppid, event.head.uid) == (100, 99, 1000)
    assert event.head.comm == "tool"


@pytest.mark.parametrize(
    ("name", "cwd", "absolute"),
    [
        (b"./x\0", b"work\0home\0", "/home/work/x"),
        (b"x/y\0", b"work\0", "/work/x/y"),
        (b"../x\0", b"work\0", "/work/../x"),
        (b"x\0", b"", "/x"),
        (b"././/x\0", b"a\0", "/a/x"),
    ],
)
def test_a_relative_program_is_joined_with_the_working_directory(
    name: bytes, cwd: bytes, absolute: str
) -> None:
    event = decode(make.exec_record(filename=name, cwd=cwd))
    assert isinstance(event, Exec) and event.filename == absolute


def test_a_path_that_was_cut_says_so() -> None:
    event = decode(make.exec_record(exe=b"leaf\0dir\0", flags=events.EXE_CUT))
    assert isinstance(event, Exec) and event.exe == "…/dir/leaf"


@pytest.mark.parametrize(
    ("argv", "argc", "wanted"),
    [
        (b"", 0, ()),
        (b"\0", 1, ("",)),
        (b"a\0\0b\0", 3, ("a", "", "b")),
        (b"a\0tail-that-was-cu", 5, ("a", "tail-that-was-cu")),
    ],
)
def test_arguments(argv: bytes, argc: int, wanted: tuple[str, ...]) -> None:
    event = decode(make.exec_record(argv=argv, argc=argc))
    assert isinstance(event, Exec) and event.argv == wanted


def test_bytes_that_are_no_text_stay_readable() -> None:
    event = decode(make.exec_record(argv=b"\xff\xfe\0\xc3\xbc\0"))
    assert isinstance(event, Exec) and event.argv == ("\\xff\\xfe", "ü")


@pytest.mark.parametrize(
    ("status", "code", "number"), [(0, 0, 0), (7 << 8, 7, 0), (9, None, 9), (139, None, 11)]
)
def test_exit_status(status: int, code: int | None, number: int) -> None:
    event = decode(make.exit_record(status))
    assert isinstance(event, Exit)
    assert (event.code, event.signal) == (code, number)


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        (make.key(), "192.0.2.1:443"),
        (
            make.key(
                address=socket.inet_pton(socket.AF_INET6, "2001:db8::1"), family=socket.AF_INET6
            ),
            "[2001:db8::1]:443",
        ),
        (
            make.key(
                address=socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.7"),
                family=socket.AF_INET6,
            ),
            "192.0.2.7:443",
        ),
        (make.key(protocol=1, port=0, reason=events.REFUSED_HEADER), "192.0.2.1"),
        (make.key(family=0, reason=events.REFUSED_HEADER), "packet:unknown"),
        (
            make.key(protocol=262, reason=events.REFUSED_SOCKET, address=bytes(16), port=0),
            "socket:inet/stream/mptcp",
        ),
    ],
)
def test_what_a_network_record_names(raw: bytes, target: str) -> None:
    refused = bool(tally_key(raw).reason)
    event = decode(make.net_record(raw, refused=refused))
    assert isinstance(event, Net)
    assert event.key.target == target
    assert event.refused is refused


@pytest.mark.parametrize(
    "record",
    [
        b"",
        make.exec_record()[:-1],
        make.exec_record() + b"x",
        make.exit_record()[: events.HEAD.size],
        make.net_record(make.key(reason=1)),  # a reason, and nothing was refused
        make.net_record(make.key(), refused=True),
        make.net_record(make.key(reason=99), refused=True),
        make.head(99, events.HEAD.size),
        make.head(events.EXEC, events.HEAD.size),
        make.head(events.EXIT, events.HEAD.size),
        make.head(events.CONNECT, events.HEAD.size),
        make.exec_record(argv=b"x" * (events.ARGV_MAX + 1)),
        make.exec_record(filename=b"/" * (events.FILENAME_MAX + 1)),
        make.exec_record(exe=b"x\0" * events.PATH_MAX),
    ],
)
def test_a_record_that_no_program_makes_is_an_error(record: bytes) -> None:
    with pytest.raises(MalformedRecord):
        decode(record)


def test_another_layout_is_an_error() -> None:
    record = bytearray(make.exit_record())
    record[2] = events.LAYOUT + 1
    with pytest.raises(MalformedRecord, match="layout"):
        decode(bytes(record))


GOOD = [
    make.exec_record(),
    make.exec_record(filename=b"x\0", cwd=b"a\0b\0"),
    make.exit_record(9),
    make.net_record(make.key()),
    make.net_record(make.key(reason=1), total=5, refused=True),
]


@settings(max_examples=600, deadline=None)
@given(st.binary(max_size=600))
def test_garbage_is_an_error_and_no_crash(record: bytes) -> None:
    try:
        decode(record)
    except MalformedRecord:
        return


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    st.integers(0, 400),
)
def test_damaged_records_are_an_error_or_an_event(
    record: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    damaged = bytearray(record)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    data = bytes(damaged[: len(damaged) - cut] if cut % 3 == 0 else damaged)
    try:
        event = decode(data)
    except MalformedRecord:
        return
    assert isinstance(event, Exec | Exit | Net)
    if isinstance(event, Net):
        assert isinstance(event.key.target, str)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_any_key_has_a_target_or_is_an_error(raw: bytes) -> None:
    try:
        key = tally_key(raw)
    except MalformedRecord:
        return
    assert key.target
