"""The processes of a run, as a person wants to see them before pausing or killing it."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from aa import cgroup
from aa.paths import CGROUP_ROOT

MAX_PROCESSES = 1024
"""Processes that are looked at; with more the answer says that it is not complete."""
MAX_ARGUMENTS = 32
MAX_ARGUMENT = 200
"""Arguments of a command line that are shown, and characters of each."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a run."""

    pid: int
    parent: int
    user: str
    state: str
    started: float
    cpu_seconds: float
    memory: int  # bytes in RAM
    command: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "command": list(self.command)}


def processes(path: str, root: Path = CGROUP_ROOT) -> tuple[list[Process], bool]:
    """The processes in a cgroup and below it, each behind its parent; and whether these are all."""
    pids, complete = _pids(root / path)
    found = [one for pid in pids if (one := _look(pid, path)) is not None]
    return _parents_first(found), complete


def _pids(directory: Path) -> tuple[list[int], bool]:
    pids: list[int] = []
    for folder, _, _ in os.walk(directory):
        try:
            text = Path(folder, "cgroup.procs").read_text()
        except OSError:  # the cgroup went while we looked
            continue
        pids += [int(line) for line in text.split()]
        if len(pids) > MAX_PROCESSES:
            return pids[:MAX_PROCESSES], False
    return pids, True


def _look(pid: int, path: str) -> Process | None:
    """A process, or None when it is gone or its number belongs to somebody else by now."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            cpu = process.cpu_times()
            found = Process(
                pid=pid,
                parent=process.ppid(),
                user=process.username(),
                state=process.status(),
                started=process.create_time(),
                cpu_seconds=round(cpu.user + cpu.system, 2),
                memory=process.memory_info().rss,
                command=_command(process),
            )
    except psutil.Error:
        return None
    where = cgroup.of_process(pid) or ""
    return found if where == path or where.startswith(path + "/") else None


def _command(process: psutil.Process) -> tuple[str, ...]:
    try:
        argv = process.cmdline()[:MAX_ARGUMENTS]
    except psutil.AccessDenied:
        argv = []
    return tuple(a[:MAX_ARGUMENT] for a in argv) or (f"[{process.name()}]",)


def _parents_first(found: list[Process]) -> list[Process]:
    known = {p.pid for p in found}
    children: dict[int, list[Process]] = defaultdict(list)
    for process in sorted(found, key=lambda p: (p.started, p.pid)):
        children[process.parent if process.parent in known else 0].append(process)
    ordered: list[Process] = []
    waiting = list(reversed(children.pop(0, [])))
    while waiting:
        process = waiting.pop()
        ordered.append(process)
        waiting += reversed(children.pop(process.pid, []))
    return ordered
