"""File calls: what their records say, what is told of them, and that too many are told with less detail."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aa.ebpf import events
from aa.ebpf.events import File, Files, decode
from aa.ebpf.merge import Detail, Merged
from aa.ebpf.reports import equal_key, to_report
from aa.model import Kind, RecordType, Report
from tests.unit import ebpf_records as make

WORK = b"work\0home\0"


def file(record: bytes) -> File:
    event = decode(record)
    assert isinstance(event, File)
    return event


def report(record: bytes, count: int = 1) -> Report:
    event = decode(record)
    return to_report(Merged(event, event, count, 0.0), run="r", program="/bin/sh", boot=0)


def test_an_opened_file_has_the_kernels_path() -> None:
    event = file(
        make.file_record(
            directory=b"x\0" + WORK, flags=events.OPENED | events.CREATED, call_flags=0o101
        )
    )
    assert (event.path, event.to, event.exact, event.error) == ("/home/work/x", "", True, 0)
    assert (event.action, event.access, event.inode) == ("open", "create", 4712)


def test_an_opened_file_with_a_path_that_was_cut_is_not_exact() -> None:
    event = file(make.file_record(directory=b"x\0d\0", flags=events.OPENED | events.DIR_CUT))
    assert event.path == "…/d/x" and not event.exact


@pytest.mark.parametrize(
    ("text", "directory", "flags", "path"),
    [
        (b"/etc/x\0", b"", 0, "/etc/x"),
        (b"x\0", WORK, 0, "/home/work/x"),
        (b"./x\0", WORK, 0, "/home/work/x"),
        (b"a//b/.//./c\0", WORK, 0, "/home/work/a/b/c"),
        (b"../x\0", WORK, 0, "/home/work/../x"),
        (b"\0", WORK, 0, "/home/work"),
        (b"x\0", b"", 0, "/x"),
        (b"x\0", b"", events.DIR_CUT, "…/x"),
        (b"x\0", b"d\0", events.DIR_CUT, "…/d/x"),
        (b"/long\0", b"", events.TEXT_CUT, "/long…"),
        (b"", b"", events.TEXT_CUT, "/…"),
        (b"\xff\n\0", WORK, 0, "/home/work/\\xff\n"),
    ],
)
def test_a_name_becomes_absolute(text: bytes, directory: bytes, flags: int, path: str) -> None:
    event = file(make.file_record("unlink", text=text, directory=directory, flags=flags))
    assert event.path == path and not event.exact


def test_a_rename_has_both_paths() -> None:
    event = file(
        make.file_record(
            "renameat2", text=b"a\0", directory=WORK, to=b"/b\0", call_flags=1, result=-17
        )
    )
    assert (event.action, event.path, event.to) == ("rename", "/home/work/a", "/b")
    assert event.error == 17


@pytest.mark.parametrize(
    ("call", "path", "to"),
    [
        ("link", "/home/work/b", "/home/work/a"),
        ("linkat", "/home/work/b", "/home/work/a"),
        ("symlink", "/home/work/b", "a"),
        ("symlinkat", "/home/work/b", "a"),
    ],
)
def test_a_link_is_the_name_that_is_made(call: str, path: str, to: str) -> None:
    directory = b"" if call.startswith("symlink") else WORK
    event = file(
        make.file_record(call, text=b"a\0", directory=directory, to=b"b\0", to_directory=WORK)
    )
    assert (event.action, event.access, event.path, event.to) == ("open", "create", path, to)
    assert event.path == path


@pytest.mark.parametrize(
    ("call", "call_flags", "result", "flags", "access"),
    [
        ("openat", os.O_WRONLY, 0, events.OPENED, "write"),
        ("openat", os.O_WRONLY | os.O_CREAT, 0, events.OPENED, "write"),
        ("openat", os.O_WRONLY | os.O_CREAT, 0, events.OPENED | events.CREATED, "create"),
        ("openat", os.O_WRONLY | os.O_CREAT, -13, 0, "create"),
        ("openat", os.O_RDWR, -13, 0, "write"),
        ("openat", os.O_TMPFILE | os.O_RDWR, 0, events.OPENED, "create"),
        ("truncate", 0, 0, 0, "write"),
        ("mkdirat", 0, 0, 0, "create"),
        ("mknod", 0, 0, 0, "create"),
    ],
)
def test_access(call: str, call_flags: int, result: int, flags: int, access: str) -> None:
    record = make.file_record(
        call, directory=b"x\0", call_flags=call_flags, result=result, flags=flags
    )
    assert file(record).access == access


def test_every_call_is_of_one_kind() -> None:
    kinds = {call: file(make.file_record(call, text=b"/x\0")).action for call in events.CALLS[1:]}
    assert {call for call, kind in kinds.items() if kind == "unlink"} == {
        "unlink",
        "unlinkat",
        "rmdir",
    }
    assert {call for call, kind in kinds.items() if kind == "rename"} == {
        "rename",
        "renameat",
        "renameat2",
    }


@pytest.mark.parametrize(
    "record",
    [
        make.file_record(text=b"/x\0")[:-1],
        make.file_record(text=b"/x\0") + b"x",
        make.file_record(text=b"/" * (events.PATH_MAX + 1)),
        make.file_record(result=1),
        make.head(events.FILE, events.HEAD.size),
    ],
)
def test_a_record_that_no_program_makes_is_an_error(record: bytes) -> None:
    with pytest.raises(events.MalformedRecord):
        decode(record)


@given(
    st.sampled_from(
        [
            make.file_record(directory=b"x\0" + WORK, flags=events.OPENED),
            make.file_record(
                "renameat2", text=b"a\0", directory=WORK, to=b"b\0", to_directory=WORK
            ),
        ]
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
)
@example(make.file_record(directory=b"x\0" + WORK, flags=events.OPENED), [(15, 255)])
def test_damaged_records_are_an_error_or_a_report(
    record: bytes, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(record)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    try:
        event = decode(bytes(damaged))
    except events.MalformedRecord:
        return
    told = to_report(Merged(event, event, 1, 0.0), run="r", program="", boot=0)
    assert Report.from_json(told.as_json()) == told
    hash(equal_key(event, ""))


def test_a_file_that_is_made_becomes_a_report() -> None:
    told = report(
        make.file_record(
            directory=b"x\0" + WORK,
            flags=events.OPENED | events.CREATED,
            call_flags=os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
        ),
        3,
    )
    assert (told.type, told.kind, told.target) == (
        RecordType.OBSERVED,
        Kind.FILE_OPEN,
        "/home/work/x",
    )
    assert told.count == 3
    wanted = {
        "access": "create",
        "exact": True,
        "call": "openat",
        "flags": ["CREAT", "TRUNC"],
        "pid": 100,
        "comm": "tool",
        "program": "/bin/sh",
        "inode": 4712,
    }
    assert wanted.items() <= {k: v for k, v in told.attributes.items() if k in wanted}.items()
    assert "error" not in told.attributes and "to" not in told.attributes


def test_a_removal_and_a_rename_become_reports() -> None:
    removed = report(make.file_record("unlinkat", text=b"/d\0", call_flags=events.AT_REMOVEDIR))
    assert removed.kind is Kind.FILE_UNLINK and removed.attributes["directory"] is True
    assert removed.attributes["exact"] is False
    renamed = report(
        make.file_record("renameat2", text=b"/a\0", to=b"/b\0", call_flags=2, result=-18)
    )
    assert renamed.kind is Kind.FILE_RENAME and renamed.target == "/a"
    assert renamed.attributes["to"] == "/b" and renamed.attributes["error"] == "EXDEV"
    assert renamed.attributes["flags"] == ["EXCHANGE"]


def test_what_is_only_counted_becomes_a_report_with_the_number() -> None:
    event = events.of_tally(make.key(via=events.VIA_FILES, address=bytes(16), port=0), 1234, 0)
    assert isinstance(event, Files)
    told = to_report(Merged(event, event, 1234, 0.0), run="r", program="", boot=0)
    assert (told.kind, told.count, told.target) == (Kind.FILE_OPEN, 1234, "…")
    assert "only counted" in told.reason


def test_a_mapped_file_is_an_event_of_its_own() -> None:
    event = decode(make.mapped_record(9))
    assert isinstance(event, events.Mapped)
    assert (event.inode, event.device, event.head.cgroup) == (9, (254, 3), 77)
    with pytest.raises(events.MalformedRecord):
        decode(make.mapped_record()[:-1])


def test_equal_files_differ_in_time_and_process_only() -> None:
    keys = [
        equal_key(decode(make.file_record("unlink", text=text, comm=comm, result=result)), "")
        for text, comm, result in (
            (b"/a\0", b"x", 0),
            (b"/a\0", b"x", 0),
            (b"/b\0", b"x", 0),
            (b"/a\0", b"y", 0),
            (b"/a\0", b"x", -2),
        )
    ]
    assert len(set(keys)) == 4 and keys[0] == keys[1]


def test_gathered_files_are_told_of_their_directory_and_then_of_the_run() -> None:
    one = file(make.file_record("unlink", text=b"/d/a\0", comm=b"x"))
    two = file(make.file_record("unlink", text=b"/d/b\0", comm=b"x"))
    assert one.of_directory().path == "/d/"
    assert equal_key(one.of_directory(), "") == equal_key(two.of_directory(), "")
    assert equal_key(one.of_directory(), "") != equal_key(one, "")
    other = file(make.file_record("unlink", text=b"/e/b\0", comm=b"y", result=-13))
    assert equal_key(one.of_run(), "") == equal_key(other.of_run(), "")
    told = to_report(Merged(one.of_run(), one.of_run(), 9, 0.0), run="r", program="", boot=0)
    assert told.target == "…" and told.kind is Kind.FILE_UNLINK and told.count == 9
    assert told.attributes == {"gathered": True, "until": told.time}


def test_detail_is_a_share_for_each_run_and_moment() -> None:
    detail = Detail(files=2, directories=1, seconds=1.0)
    assert [detail.file(1, 0.0) for _ in range(3)] == [True, True, False]
    assert [detail.directory(1, 0.5) for _ in range(2)] == [True, False]
    assert detail.file(2, 0.5), "another run has its own"
    assert not detail.file(1, 0.9)
    assert detail.file(1, 1.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5)), max_size=60))
def test_detail_is_bounded(asked: list[tuple[int, float]]) -> None:
    detail = Detail(files=3, limit=4)
    told: Counter[int] = Counter()
    for cgroup, at in asked:
        told[cgroup] += detail.file(cgroup, at)
        assert len(detail) <= 4
