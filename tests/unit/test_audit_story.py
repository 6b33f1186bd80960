"""One run's records out of a log of many: all of them, in the order of their times, and no more read than needed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa.audit import story as module
from aa.audit.file import AuditFile
from aa.audit.record import timestamp
from aa.audit.story import story

NOW = 1_800_000_000.0


def record(seq: int, run: str, *, at: float | None = None, **more: Any) -> dict[str, Any]:
    when = NOW + seq if at is None else at
    return {
        "seq": seq,
        "time": timestamp(int(when * 1e9)),
        "type": "observed",
        "kind": "exec",
        "run": run,
        "attributes": {},
    } | more


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def as_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def write(path: Path, *records: dict[str, Any], max_bytes: int = 1 << 20) -> None:
    file = AuditFile(path, max_bytes=max_bytes, keep=8)
    for r in records:
        file.write(as_line(r))
    file.close()


def numbers(found: module.Story) -> list[int]:
    return [r["seq"] for r in found.records]


def test_finds_the_records_of_a_run_and_of_no_other(path: Path) -> None:
    write(path, *(record(n, "ab"[n % 2]) for n in range(1, 11)))
    assert numbers(story(path, "a", limit=100)) == [2, 4, 6, 8, 10]
    assert numbers(story(path, "none", limit=100)) == []


def test_a_run_that_names_another_in_what_it_did_is_not_mistaken_for_it(path: Path) -> None:
    write(path, record(1, "a", attributes={"run": "b"}), record(2, "b", target='"run":"a"'))
    assert numbers(story(path, "b", limit=9)) == [2]
    assert numbers(story(path, "a", limit=9)) == [1]


def test_goes_across_rotated_files(path: Path) -> None:
    write(path, *(record(n, "a") for n in range(1, 41)), max_bytes=1000)
    assert len(list(path.parent.iterdir())) > 4
    kept = numbers(story(path, "a", limit=100))
    assert kept == list(range(kept[0], 41)) and len(kept) > 20


def test_is_in_the_order_of_times_and_not_of_numbers(path: Path) -> None:
    write(path, record(1, "a", at=NOW), record(2, "a", at=NOW + 5), record(3, "a", at=NOW + 2))
    assert numbers(story(path, "a", limit=9)) == [1, 3, 2]


def test_keeps_the_newest_and_says_that_others_are_missing(path: Path) -> None:
    write(path, *(record(n, "a") for n in range(1, 21)))
    found = story(path, "a", limit=5)
    assert numbers(found) == [16, 17, 18, 19, 20]
    assert "newest 5" in found.cut
    assert story(path, "a", limit=20).cut == ""


def test_kinds_are_chosen_before_they_are_counted(path: Path) -> None:
    write(path, *(record(n, "a", kind="exec" if n % 5 else "exit") for n in range(1, 21)))
    found = story(path, "a", kinds={"exit"}, limit=3)
    assert numbers(found) == [10, 15, 20] and found.cut


def test_reads_no_further_back_than_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [record(n, "x", type="decision", at=NOW - 10_000 + n) for n in range(1, 3001)]
    write(path, *old, *(record(n, "a") for n in range(3001, 3011)))
    read = []
    pread = module.os.pread
    monkeypatch.setattr(module.os, "pread", lambda fd, n, at: read.append(n) or pread(fd, n, at))
    found = story(path, "a", started=NOW + 3001, limit=100, block=4096)
    assert numbers(found) == list(range(3001, 3011)) and found.cut == ""
    assert sum(read) < 20_000 < path.stat().st_size


def test_what_is_reported_late_does_not_end_the_search(path: Path) -> None:
    """A component that was cut off from the gateway tells of times long past."""
    late = [record(n, "x", at=NOW - 10_000) for n in range(50, 100)]
    write(path, *(record(n, "a") for n in range(1, 50)), *late, record(100, "a"))
    found = story(path, "a", started=NOW, limit=100, block=512)
    assert numbers(found) == [*range(1, 50), 100]


def test_says_when_it_stopped_at_its_own_bound(path: Path) -> None:
    write(path, *(record(n, "a") for n in range(1, 201)))
    found = story(path, "a", limit=1000, max_bytes=4096, block=1024)
    assert "were not looked for" in found.cut
    assert 0 < len(found.records) < 200


def test_lines_that_are_none_are_passed_over(path: Path) -> None:
    write(path, record(1, "a"))
    with path.open("ab") as f:
        f.write(b'{"run":"a"\n\xff"run":"a"\n[{"run":"a"}]\n{"run":"a","seq":"x"}\n\n')
        f.write(
            b'{"seq":7,"run":"a","time":1,"kind":"x"}\n' + b'["run":"a"' * 3 + b"[" * 5000 + b"\n"
        )
        f.write(json.dumps(record(2, "a"), separators=(",", ":")).encode() + b"\n")
        f.write(b'{"seq":3,"run":"a"')
    assert numbers(story(path, "a", limit=9)) == [1, 2]


def test_a_line_without_end_takes_no_more_memory_than_its_bound(path: Path) -> None:
    write(path, record(1, "a"))
    with path.open("ab") as f:
        f.write(b"x" * (module.MAX_LINE * 3) + b"\n")
    write(path, record(2, "a"))
    assert numbers(story(path, "a", limit=9, block=1 << 14)) == [1, 2]


def test_no_log_is_an_empty_story(path: Path) -> None:
    assert story(path, "a", limit=9).records == []


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.sampled_from("abc"), max_size=60),
    block=st.integers(1, 700),
    size=st.integers(200, 3000),
)
def test_any_size_of_block_and_file_gives_the_same(
    runs: list[str], block: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    records = [record(n, run, target="x" * (n * 7 % 90)) for n, run in enumerate(runs, start=1)]
    file = AuditFile(path, max_bytes=size, keep=100)
    for r in records:
        file.write(as_line(r))
    file.close()
    wanted = [r["seq"] for r in records if r["run"] == "a"]
    assert numbers(story(path, "a", limit=100, block=block)) == wanted


def test_a_short_run_in_a_large_log_is_found_quickly(path: Path) -> None:
    lines = b"".join(
        json.dumps(record(n, "other", target="t" * 300), separators=(",", ":")).encode() + b"\n"
        for n in range(2, 100_002)
    )
    write(path, record(1, "a"))
    with path.open("ab") as f:
        f.write(lines)
    began = time.process_time()
    assert numbers(story(path, "a", limit=9)) == [1]
    assert time.process_time() - began < 5.0, "no line of another run is parsed"
