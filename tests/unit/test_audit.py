"""Records, the file that rotates, and a log that says what it lost."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.audit.file import LOOK_SECONDS, AuditFile, history, read_backwards
from aa.audit.journal import PATIENCE_SECONDS, Journal, datagram
from aa.audit.log import AuditLog, AuditUnavailable, newest
from aa.audit.record import (
    MAX_ATTRIBUTES,
    MAX_TEXT,
    MESSAGE_IDS,
    Record,
    Subject,
    bounded_attributes,
    line,
    of_decision,
    sentence,
    timestamp,
)
from aa.model import Action, Decision, Effect, Kind, Layer, Mode, RecordType

SUBJECT = Subject("r1", "claude-code", "dev", 1000)


def record(target: str = "example.test:443", effect: Effect = Effect.DENY) -> Record:
    decision = Decision(effect, "no rule allows it", "<default>", "abc", Mode.ENFORCE)
    action = Action(Kind.NET_CONNECT, target, {"port": 443})
    return of_decision(SUBJECT, Layer.PROXY, action, decision, 1_700_000_000_123_456_000)


def text(record: Record) -> bytes:
    """Its line in the file."""
    return line(record, bounded_attributes(record))


def entry(record: Record) -> bytes:
    """Its entry in the journal."""
    return datagram(record, bounded_attributes(record))


def audit_file(directory: Path, **limits: int) -> AuditFile:
    return AuditFile(directory / "audit.jsonl", **{"max_bytes": 1 << 20, "keep": 3, **limits})


def lines(directory: Path) -> list[dict[str, Any]]:
    return list(reversed(list(read_backwards(directory / "audit.jsonl"))))


def test_a_record_has_the_time_of_the_event_in_utc() -> None:
    assert record()["time"] == "2023-11-14T22:13:20.123456Z"


def test_long_text_of_an_agent_is_cut_visibly() -> None:
    assert record("x" * 10_000)["target"] == "x" * (MAX_TEXT - 1) + "…"


def test_a_terminal_cannot_be_moved_by_a_target() -> None:
    told = sentence(record("evil\x1b[2J\rallow"))
    assert "\x1b" not in told and "\r" not in told and "\\x1b[2J" in told


def test_every_type_of_record_has_a_message_id() -> None:
    assert set(MESSAGE_IDS) == set(RecordType)
    assert len(set(MESSAGE_IDS.values())) == len(RecordType)


@given(st.text())
def test_a_journal_entry_cannot_be_given_a_field_by_an_agent(target: str) -> None:
    parsed = parse_entry(entry(record(target)))
    assert parsed["AA_DECISION"] == b"deny"
    assert parsed["AA_RUN"] == b"r1"
    assert len(parsed["MESSAGE"]) > 0


texts = st.text(st.characters() | st.sampled_from('\n="\\\x7f\u2028'), max_size=12)


@given(
    st.fixed_dictionaries(
        {
            **dict.fromkeys(("target", "rule", "reason", "policy", "agent", "run", "user"), texts),
            "would": st.sampled_from(("", "deny")),
            "attributes": st.dictionaries(texts, texts | st.integers(), max_size=3),
        }
    )
)
def test_line_and_entry_tell_every_field_whatever_is_in_it(fields: dict[str, Any]) -> None:
    whole = {**record(), **fields}
    assert json.loads(text(whole)) == whole
    assert text(whole).isascii() and text(whole).count(b"\n") == 1
    parsed = parse_entry(entry(whole))
    for name in ("target", "rule", "reason", "policy", "agent", "run", "user", "would"):
        told = parsed.get(f"AA_{name.upper()}", b"").decode("utf-8", "surrogateescape")
        assert told == fields[name].encode("utf-8", "backslashreplace").decode()
    assert (b"AA_ATTRIBUTES" in entry(whole)) >= bool(fields["attributes"])
    assert ("AA_ATTRIBUTES" in parsed) == bool(fields["attributes"])
    assert json.loads(parsed.get("AA_ATTRIBUTES", b"{}")) == fields["attributes"]
    assert len(parsed) == 4 + sum(1 for v in whole.values() if v not in ("", {}))


def test_attributes_over_the_limit_are_replaced_by_their_size() -> None:
    huge = {**record(), "attributes": {"body": "x" * MAX_ATTRIBUTES}}
    told = json.loads(text(huge))
    assert told["attributes"] == {"omitted": f"{MAX_ATTRIBUTES + 11} characters"}
    assert huge["attributes"] == told["attributes"]


def test_times_are_written_alike_before_and_after_a_full_second() -> None:
    for nanoseconds, told in (
        (0, "1970-01-01T00:00:00.000000Z"),
        (1_700_000_000_999_999_999, "2023-11-14T22:13:20.999999Z"),
        (1_700_000_001_000_000_000, "2023-11-14T22:13:21.000000Z"),
        (1_700_000_000_000_001_000, "2023-11-14T22:13:20.000001Z"),
    ):
        assert timestamp(nanoseconds) == told


def parse_entry(data: bytes) -> dict[str, bytes]:
    """The journal's native protocol, read as journald does; a field twice is an error."""
    found: dict[str, bytes] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, data = rest[8 : 8 + size], rest[8 + size + 1 :]
        else:
            data = rest
        assert name.decode() not in found
        found[name.decode()] = value
    return found


def test_what_was_written_is_read_back_newest_first(tmp_path: Path) -> None:
    file = audit_file(tmp_path)
    for n in range(500):
        file.write(text({**record(f"host{n}"), "seq": n}))
    assert [r["seq"] for r in read_backwards(file.path, block=700)] == list(reversed(range(500)))
    assert file.last_sequence() == 499


def test_rotation_keeps_so_many_files_and_the_order(tmp_path: Path) -> None:
    file = audit_file(tmp_path, max_bytes=2000, keep=2)
    for n in range(1, 40):
        file.write(text({**record(), "seq": n}))
    assert [p.name for p in history(file.path)] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    kept = [r["seq"] for r in lines(tmp_path)]
    assert kept == list(range(kept[0], 40))
    assert all(p.stat().st_size <= 2000 for p in history(file.path))


def test_a_file_that_somebody_moved_is_made_again(tmp_path: Path) -> None:
    file = audit_file(tmp_path)
    file.write(text({**record(), "seq": 1}))
    os.rename(file.path, tmp_path / "elsewhere")
    time.sleep(2 * LOOK_SECONDS)
    file.write(text({**record(), "seq": 2}))
    assert [r["seq"] for r in lines(tmp_path)] == [2]


def test_half_a_line_of_a_power_cut_is_cut_off(tmp_path: Path) -> None:
    file = audit_file(tmp_path)
    file.write(text({**record(), "seq": 1}))
    with open(file.path, "ab") as f:
        f.write(b'{"seq":2,"tim')
    again = audit_file(tmp_path)
    again.write(text({**record(), "seq": 2}))
    assert [json.loads(x)["seq"] for x in file.path.read_text().splitlines()] == [1, 2]


class BrokenFile(AuditFile):
    """A file on a full disk, while `full` is set."""

    full = False

    def write(self, line: bytes) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(line)


@pytest.fixture
def journald(tmp_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "journal"))
    sock.setblocking(False)
    return sock


def received(sock: socket.socket) -> list[dict[str, bytes]]:
    found = []
    while True:
        try:
            found.append(parse_entry(sock.recv(1 << 20)))
        except BlockingIOError:
            return found


def test_the_file_and_the_journal_tell_the_same(tmp_path: Path, journald: socket.socket) -> None:
    log = AuditLog(audit_file(tmp_path), Journal(tmp_path / "journal"))
    log.write(record("a"))
    log.write(record("b"))
    assert [r["target"] for r in lines(tmp_path)] == ["a", "b"]
    assert [e["AA_TARGET"] for e in received(journald)] == [b"a", b"b"]


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        log = AuditLog(audit_file(tmp_path), Journal(tmp_path / "nobody"))
        log.write(record())
    assert [r["seq"] for r in lines(tmp_path)] == [1, 2]


def test_a_full_disk_leaves_a_gap_record_with_a_number(
    tmp_path: Path, journald: socket.socket
) -> None:
    file = BrokenFile(tmp_path / "audit.jsonl", max_bytes=1 << 20, keep=1)
    log = AuditLog(file, Journal(tmp_path / "journal"))
    log.write(record("a"))
    file.full = True
    log.write(record("b"))
    log.write(record("c"))
    assert log.problems == [f"2 records are missing in {file.path}"]
    file.full = False
    log.write(record("d"))
    found = lines(tmp_path)
    assert [(r["type"], r["target"], r["count"]) for r in found] == [
        ("decision", "a", 1),
        ("gap", "file", 2),
        ("decision", "d", 1),
    ]
    assert [e["AA_TARGET"] for e in received(journald)] == [b"a", b"b", b"c", b"d"]
    assert log.problems == []


def test_a_dead_journal_leaves_a_gap_record_in_the_journal(tmp_path: Path) -> None:
    log = AuditLog(audit_file(tmp_path), Journal(tmp_path / "journal"))
    log.write(record("a"))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "journal"))
    sock.setblocking(False)
    log.write(record("b"))
    entries = received(sock)
    assert [(e["AA_TYPE"], e["AA_TARGET"]) for e in entries] == [
        (b"gap", b"journal"),
        (b"decision", b"b"),
    ]
    assert [r["target"] for r in lines(tmp_path)] == ["a", "b"]


def test_a_journal_that_does_not_read_holds_nobody_up(
    tmp_path: Path, journald: socket.socket
) -> None:
    log = AuditLog(audit_file(tmp_path), Journal(tmp_path / "journal"))
    started = time.monotonic()
    for n in range(2000):  # far beyond any datagram queue
        log.write(record(str(n)))
    assert time.monotonic() - started < 10 * PATIENCE_SECONDS + 1.0  # one wait, not two thousand
    assert len(lines(tmp_path)) == 2000
    assert log.problems[0].endswith("records are missing in the journal")


def test_with_no_place_for_a_record_writing_fails(tmp_path: Path) -> None:
    file = BrokenFile(tmp_path / "audit.jsonl", max_bytes=1 << 20, keep=1)
    file.full = True
    log = AuditLog(file, Journal(tmp_path / "nobody"))
    with pytest.raises(AuditUnavailable):
        log.write(record())
    file.full = False
    log.write(record())
    assert lines(tmp_path)[-1]["seq"] == 1


def test_newest_gives_the_last_matching_records_in_order() -> None:
    records = [{"seq": n, "run": "a" if n % 2 else "b"} for n in range(10, 0, -1)]
    assert [r["seq"] for r in newest(records, {"run": "a"}, 2)] == [7, 9]
    assert newest(records, {}, 0) == []


def test_the_catalog_explains_every_message_id() -> None:
    catalog = Path(__file__).parents[2] / "units" / "agent-assembly.catalog"
    explained = [x.split()[1] for x in catalog.read_text().splitlines() if x.startswith("-- ")]
    assert sorted(explained) == sorted(MESSAGE_IDS.values())
