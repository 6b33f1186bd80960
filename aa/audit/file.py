"""The rotating file of records, one JSON object a line. A line is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from aa.audit.record import Record

FILE_MODE = 0o640
LOOK_SECONDS = 0.02
"""How often it is looked whether the file was moved away; what comes meanwhile is in that one."""


class AuditFile:
    """Appends lines to `path`; at `max_bytes` it becomes `path.1` and `keep` old ones stay.

    `write` raises `OSError` (a full disk, say) and leaves no part of a line behind.
    """

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._fd = -1
        self._size = 0
        self._look_again = 0.0
        self._open()

    def _open(self) -> None:
        self._fd = os.open(
            self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE
        )
        self._size = os.fstat(self._fd).st_size
        self._mend_last_line()

    def _mend_last_line(self) -> None:
        """Cuts off what a power cut left of a line, so that the next one is readable."""
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            end = self._size
            while end and os.pread(self._fd, 1, end - 1) != b"\n":
                end -= 1
            os.ftruncate(self._fd, end)
            self._size = end

    def write(self, line: bytes) -> int:
        """Appends a record's line and returns its size."""
        if self._size + len(line) > self._max_bytes and self._size:
            self._rotate()
        elif time.monotonic() >= self._look_again:
            self._look_again = time.monotonic() + LOOK_SECONDS
            if self._moved():
                self._reopen()
        written = 0
        try:
            written = os.write(self._fd, line)
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            if written:
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)
        return len(line)

    def _moved(self) -> bool:
        """True when somebody else (logrotate, a person) renamed or removed the file."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return True
        return there.st_ino != os.fstat(self._fd).st_ino

    def _reopen(self) -> None:
        old = self._fd
        self._open()
        os.close(old)

    def _rotate(self) -> None:
        for n in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}.{n}", f"{self.path}.{n + 1}")
        if self._keep:
            os.replace(self.path, f"{self.path}.1")
        else:
            os.unlink(self.path)
        self._reopen()

    def last_sequence(self) -> int:
        """The number of the newest record on disk, 0 when there is none."""
        for record in read_backwards(self.path):
            return int(record["seq"])
        return 0

    def close(self) -> None:
        os.close(self._fd)


def history(path: Path) -> list[Path]:
    """The files that hold records, newest first."""
    rotated = []
    for candidate in path.parent.glob(f"{path.name}.*"):
        suffix = candidate.name.removeprefix(f"{path.name}.")
        if suffix.isdecimal():
            rotated.append((int(suffix), candidate))
    files = [path, *(p for _, p in sorted(rotated))]
    return [p for p in files if p.exists()]


def read_backwards(path: Path, *, block: int = 65536) -> Iterator[Record]:
    """Records from the newest to the oldest, across rotated files. Lines that do not parse are
    passed over: `last_sequence` and listings need what is readable."""
    for file in history(path):
        with open(file, "rb") as f:
            end = f.seek(0, os.SEEK_END)
            rest = b""
            while end > 0:
                start = max(0, end - block)
                f.seek(start)
                rest = f.read(end - start) + rest
                lines = rest.split(b"\n")
                rest = lines[0] if start else b""
                yield from _parsed(lines[1:] if start else lines)
                end = start


def read_forwards(path: Path) -> Iterator[Record | None]:
    """Records from the oldest to the newest, across rotated files; None for a line that is none."""
    for file in reversed(history(path)):
        with open(file, "rb") as f:
            for line in f:
                yield _record(line)


def _parsed(lines: list[bytes]) -> Iterator[Record]:
    for line in reversed(lines):
        record = _record(line) if line else None
        if record is not None:
            yield record


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("seq"), int) else None
