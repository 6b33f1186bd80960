"""What `[sandbox]` says confinement may cost, read from files and merged: no file widens another's.

Pure: it becomes unit properties and Landlock rules elsewhere.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aa.config import folder_problem
from aa.tomlfile import Document, Problem

Json = Any

PRIVATE = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue")
"""Folders of the run's own: nobody else sees what it writes there."""
WRITABLE_ANYHOW = (*PRIVATE, "/dev", "/proc")
"""Besides `writable`: what a run may write to as far as the private /dev and the files' owners let it."""
NEEDED = (
    "/bin", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin",
    "/sys", "/usr",
)  # fmt: skip
"""What `file = "deny"` lets a run read all the same: without it no program starts."""

ESSENTIAL = ("/dev", "/etc/ld.so.cache", "/proc", "/usr/lib")
"""What no policy can close to a run: without it no program starts."""

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE = re.compile(r"([1-9][0-9]{0,8})([KMGT])")
MEMORY_LEAST = 16 << 20
"""Bytes; with less no interpreter starts."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """None is what no file states. Folders: `.` is the working directory, `~/` the home."""

    writable: tuple[str, ...] | None = None
    read_only: tuple[str, ...] = ()
    """Never writable, whatever lies around them; relative ones are below the working directory."""
    user_namespaces: bool | None = None
    memory: int | None = None
    """Bytes."""
    tasks: int | None = None
    """Processes and threads."""

    def as_json(self) -> dict[str, Json]:
        return {
            "writable": None if self.writable is None else list(self.writable),
            "read_only": list(self.read_only),
            "user_namespaces": self.user_namespaces,
            "memory": self.memory,
            "tasks": self.tasks,
        }


def merged(sandboxes: Sequence[Sandbox]) -> Sandbox:
    """What all files that state something agree on: of several answers the strictest."""
    stated = [s.writable for s in sandboxes if s.writable is not None]
    writable = tuple(sorted(set(_agreed(stated)))) if stated else None
    namespaces = [s.user_namespaces for s in sandboxes if s.user_namespaces is not None]
    return Sandbox(
        writable,
        tuple(sorted({path for s in sandboxes for path in s.read_only})),
        all(namespaces) if namespaces else None,
        min((s.memory for s in sandboxes if s.memory is not None), default=None),
        min((s.tasks for s in sandboxes if s.tasks is not None), default=None),
    )


def sandbox_of(document: Document, problems: list[Problem]) -> Sandbox:
    """`[sandbox]` of a file that fits the schema; what is wrong all the same goes to `problems`."""
    written = document.data.get("sandbox", {})
    for index, folder in enumerate(written.get("writable", ())):
        problem = None if folder == "." else folder_problem(folder)
        if problem:
            problems.append(document.problem(("sandbox", "writable", index), *problem))
    for index, path in enumerate(written.get("read_only", ())):
        problem = _path_problem(path)
        if problem:
            problems.append(document.problem(("sandbox", "read_only", index), *problem))
    memory = size(written["memory"]) if "memory" in written else None
    if memory is not None and memory < MEMORY_LEAST:
        message = f"{written['memory']!r} is less than {MEMORY_LEAST} bytes"
        problems.append(document.problem(("sandbox", "memory"), message, 'write it as in "2G"'))
    namespaces = written.get("user_namespaces")
    return Sandbox(
        writable=tuple(written["writable"]) if "writable" in written else None,
        read_only=tuple(written.get("read_only", ())),
        user_namespaces=None if namespaces is None else namespaces == "allow",
        memory=memory,
        tasks=written.get("tasks"),
    )


def size(value: str | int) -> int:
    """Bytes, from a number or from text such as 16M, which the schema has checked."""
    if isinstance(value, int):
        return value
    found = SIZE.fullmatch(value)
    assert found is not None
    return int(found[1]) * UNITS[found[2]]


def _path_problem(path: str) -> tuple[str, str] | None:
    """Why a path cannot be kept read-only, and what to do."""
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in path):
        return "contains a control character", "remove it"
    if any(c in path for c in "*?"):
        return f"{path!r} has a wildcard", "name the path itself; all below it is included"
    plain = path[2:] if path.startswith("~/") else path
    if not plain or posixpath.normpath(plain) != plain or plain.startswith("//") or plain == ".":
        return f"{path!r} is not in its normal form", "no . or .., no // and no / at the end"
    if plain == ".." or plain.startswith("../") or (plain != path and plain.startswith("/")):
        return f"{path!r} leaves the folder that it is in", "write NAME, ~/NAME or /NAME"
    return None


def _agreed(stated: Sequence[Sequence[str]]) -> tuple[str, ...]:
    agreed = tuple(stated[0])
    for folders in stated[1:]:
        agreed = _common(agreed, folders)
    return agreed


def _common(some: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """The folders that lie within both lists."""
    both = [a for a in some for b in others if a == b or a.startswith(b + "/")]
    return tuple(both + [b for b in others for a in some if b.startswith(a + "/")])
