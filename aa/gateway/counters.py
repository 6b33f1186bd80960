"""What was used of each limit in its window, in SQLite: it survives restarts and kill -9.

Each change is handed to the kernel before the answer that depends on it. When that fails, or
the file is corrupt, `problem` says so, and what is limited is denied until it is mended.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

SCHEMA = """
create table if not exists counter (
    ref text not null,
    measure text not null,
    subject text not null,
    window integer not null,
    amount real not null,
    primary key (ref, measure, subject)
) strict, without rowid;
"""
MAX_COUNTERS = 100_000
"""Kept at once. Those of windows that are over go first; beyond it nothing new is allowed."""

Key = tuple[str, str, str]
"""The limit's ref, the measure, the subject."""

log = logging.getLogger(__name__)


class Counters:
    """Amounts by key. A window that is over counts as nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._amounts: dict[Key, tuple[int, float]] = {}
        self._unwritten: set[Key] = set()
        self.problem = ""
        try:
            self._open()
        except (sqlite3.Error, ValueError, TypeError) as e:
            self._fail(f"{e}; move it away to count from nothing, then restart aa-gateway")

    def _open(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None)
        db.execute("pragma journal_mode = wal")
        # In the page cache after each change, which kill -9 does not touch.
        db.execute("pragma synchronous = normal")
        if db.execute("pragma quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("its check failed")
        db.executescript(SCHEMA)
        rows = db.execute("select ref, measure, subject, window, amount from counter")
        for ref, measure, subject, window, amount in rows:
            self._amounts[ref, measure, subject] = (int(window), float(amount))
        self._db = db

    def used(self, key: Key, window: int) -> float:
        then, amount = self._amounts.get(key, (window, 0.0))
        return amount if then == window else 0.0

    def subjects(self) -> dict[tuple[str, str], set[str]]:
        """The subjects of each limit's measure that have a counter."""
        found: dict[tuple[str, str], set[str]] = {}
        for ref, measure, subject in self._amounts:
            found.setdefault((ref, measure), set()).add(subject)
        return found

    def add(self, key: Key, window: int, amount: float) -> None:
        """Counts it at once; `problem` is set when the disk does not have it."""
        if key not in self._amounts and len(self._amounts) >= MAX_COUNTERS:
            self._fail(f"more than {MAX_COUNTERS} counters")
            return
        self._amounts[key] = (window, self.used(key, window) + amount)
        self._unwritten.add(key)
        self._write()

    def _write(self) -> None:
        if self._db is None:
            return
        try:
            for key in list(self._unwritten):
                window, amount = self._amounts[key]
                self._db.execute(
                    "insert or replace into counter values (?, ?, ?, ?, ?)", (*key, window, amount)
                )
                self._unwritten.discard(key)
        except sqlite3.Error as e:
            self._fail(str(e))
        else:
            self.problem = ""

    def _fail(self, why: str) -> None:
        problem = f"the counters of limits cannot be kept: {self._path}: {why}"
        if problem != self.problem:
            log.error("%s", problem)
        self.problem = problem

    def forget_before(self, moment: int) -> None:
        """Drops what began before it, and tries again to write what is not on disk."""
        if self._db is None:
            return
        old = [key for key, (window, _) in self._amounts.items() if window < moment]
        for key in old:
            del self._amounts[key]
            self._unwritten.discard(key)
        try:
            self._db.execute("delete from counter where window < ?", (moment,))
        except sqlite3.Error as e:
            self._fail(str(e))
        else:
            self._write()

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
