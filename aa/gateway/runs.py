"""The registry of runs: in memory for decisions, in SQLite so that it survives the gateway."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from aa.model import LIVE_STATES, Run, RunState

ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
ID_LENGTH = 8
ENDED_KEPT = 1000
"""Runs that are over and still listed; older ones are in the audit log only."""

SCHEMA = """
create table if not exists run (
    id text primary key,
    state text not null,
    started real not null,
    ended real not null,
    json text not null
) strict;
create index if not exists run_by_end on run (ended);
create table if not exists halt (one integer primary key check (one = 1), json text not null) strict;
"""


@dataclass(frozen=True, slots=True)
class Halt:
    """Nothing is allowed on this host, as aa-launch said: by whom, why, since when."""

    user: str
    reason: str
    since: float

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"this host is halted by {self.user}{why}"


class RegistryCorrupt(Exception):
    """The database cannot be read; says where it is."""


class RunRegistry:
    """Every change is on disk before it is returned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = full")
            if self._db.execute("pragma quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its check failed")
            self._db.executescript(SCHEMA)
            self.halt = self._read_halt()
            self._live = {r.id: r for r in self._read("state != ?", RunState.ENDED.value)}
        except (sqlite3.Error, ValueError, TypeError) as e:
            raise RegistryCorrupt(
                f"{path}: {e}; move it away to start with an empty registry "
                "(runs that live now will be unknown, and so denied)"
            ) from e
        self._by_cgroup = {r.cgroup_id: r for r in self._live.values() if r.cgroup_id}

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Run]:
        return list(self._live.values())

    def started_by(self, uid: int) -> int:
        """How many live runs a user asked for."""
        return sum(1 for run in self._live.values() if run.caller_uid == uid)

    def get_live(self, run: str) -> Run | None:
        return self._live.get(run)

    def get(self, run: str) -> Run | None:
        """A run that lives, or one that ended not too long ago."""
        return self._live.get(run) or next(self._read("id = ?", run), None)

    def ended(self, limit: int = 100) -> list[Run]:
        """Runs that are over, newest first."""
        return list(
            self._read("state = ? order by ended desc limit ?", RunState.ENDED.value, limit)
        )

    def new_id(self) -> str:
        while True:
            candidate = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
            if self.get(candidate) is None:
                return candidate

    def put(self, run: Run) -> Run:
        """Stores a run in its new state."""
        self._db.execute(
            "insert or replace into run values (?, ?, ?, ?, ?)",
            (run.id, run.state.value, run.started, run.ended, json.dumps(run.as_json())),
        )
        old = self._live.pop(run.id, None)
        if old is not None:
            self._by_cgroup.pop(old.cgroup_id, None)
        if run.state in LIVE_STATES:
            self._live[run.id] = run
            if run.cgroup_id:
                self._by_cgroup[run.cgroup_id] = run
        return run

    def end(self, run: Run, *, exit_code: int | None, signal: int | None) -> Run:
        ended = replace(
            run,
            state=RunState.ENDED,
            ended=time.time(),
            exit_code=exit_code,
            signal=signal,
            paused_by=-1,
        )
        self.put(ended)
        self._db.execute(
            "delete from run where state = ? and id not in "
            "(select id from run where state = ? order by ended desc limit ?)",
            (RunState.ENDED.value, RunState.ENDED.value, ENDED_KEPT),
        )
        return ended

    def put_halt(self, halt: Halt | None) -> None:
        if halt is None:
            self._db.execute("delete from halt")
        else:
            self._db.execute(
                "insert or replace into halt values (1, ?)", (json.dumps(asdict(halt)),)
            )
        self.halt = halt

    def _read_halt(self) -> Halt | None:
        row = self._db.execute("select json from halt").fetchone()
        return Halt(**json.loads(row[0])) if row else None

    def _read(self, where: str, *values: str | int) -> Iterator[Run]:
        for (text,) in self._db.execute(f"select json from run where {where}", values):
            yield Run.from_json(json.loads(text))

    def close(self) -> None:
        self._db.close()
