"""What one run did, out of a log that is full of others: read backwards, and only as far as the run goes back.

The log's own lines are searched as bytes before any is parsed, so a short run in a large log costs little.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from aa.audit.file import history
from aa.audit.record import Record, timestamp

BLOCK = 1 << 20
"""Bytes that are read and searched at once."""
MAX_LINE = 1 << 18
"""A longer line is no record: one has at most a few fields of `record.MAX_TEXT`, and attributes."""
MAX_BYTES = 1 << 30
"""Of the log that are searched for one run."""
SLACK_SECONDS = 120.0
"""How much older than its run's start the first record of a run may claim to be, and clocks be set."""

_DECISION = b'"type":"decision"'


@dataclass(frozen=True, slots=True)
class Story:
    """The newest records of a run in the order of their times; `cut` says what is missing at their beginning."""

    records: list[Record]
    cut: str = ""


def story(
    path: Path,
    run: str,
    *,
    started: float = 0.0,
    kinds: Collection[str] = (),
    limit: int,
    max_bytes: int = MAX_BYTES,
    block: int = BLOCK,
) -> Story:
    """The records of a run that began at `started` (seconds since the epoch; 0: nobody knows).

    Of some `kinds` only when any are given. Raises `OSError` when the log cannot be read.
    """
    needle = b'"run":' + json.dumps(run).encode("ascii")
    since = timestamp(int(max(0.0, started - SLACK_SECONDS) * 1e9))
    found: dict[int, Record] = {}
    cut = ""
    left = max_bytes
    for lines in _backwards(path, block):
        if left <= 0:
            cut = f"records further back than {max_bytes >> 20} MiB of the log were not looked for"
            break
        left -= len(lines)
        for record in _of_run(lines, needle):
            if record["run"] != run or (kinds and record["kind"] not in kinds):
                continue
            if len(found) >= limit:
                cut = f"records before the newest {limit} are not shown"
                break
            found.setdefault(record["seq"], record)
        if cut or _older(lines, since):
            break
    # The kernel's events come after what they are about, and so does what waits for its equals.
    records = sorted(found.values(), key=lambda r: (r["time"], r["seq"]))
    return Story(records, cut)


def _backwards(path: Path, block: int) -> Iterator[bytes]:
    """Pieces of whole lines from the newest to the oldest, across the files as they are named now."""
    with contextlib.ExitStack() as opened:
        files = []
        for name in history(path):
            with contextlib.suppress(FileNotFoundError):  # rotated away in this moment
                files.append(opened.enter_context(open(name, "rb", buffering=0)))
        for file in files:
            end = os.fstat(file.fileno()).st_size
            rest = b""
            while end > 0:
                start = max(0, end - block)
                piece = os.pread(file.fileno(), end - start, start) + rest
                end = start
                if start == 0:
                    rest = b""
                elif (newline := piece.find(b"\n")) >= 0:
                    rest, piece = piece[: newline + 1], piece[newline + 1 :]
                else:  # all of it is within one line
                    rest, piece = (piece if len(piece) < MAX_LINE else b""), b""
                if piece:
                    yield piece


def _of_run(lines: bytes, needle: bytes) -> Iterator[Record]:
    """The records that have `needle` in their line, newest first."""
    at = len(lines)
    while (at := lines.rfind(needle, 0, at)) >= 0:
        start = lines.rfind(b"\n", 0, at) + 1
        end = lines.find(b"\n", at)
        record = _parse(lines[start : end if end >= 0 else len(lines)])
        if record is not None:
            yield record
        at = start


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("seq"), int):
        return None
    texts = (record.get(key) for key in ("time", "run", "kind"))
    return record if all(isinstance(text, str) for text in texts) else None


def _older(lines: bytes, since: str) -> bool:
    """Whether these lines were written before `since`, by the first decision among them.

    Its time is that of its writing; what a component reports may be much older than that.
    """
    at = lines.find(_DECISION)
    if at < 0:
        return False
    start = lines.rfind(b"\n", 0, at) + 1
    end = lines.find(b"\n", at)
    record = _parse(lines[start : end if end >= 0 else len(lines)])
    return record is not None and record["type"] == "decision" and record["time"] < since
