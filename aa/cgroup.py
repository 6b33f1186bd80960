"""Reading the cgroup2 tree: ids, the cgroup of a process, and whether this host has one tree at all."""

from __future__ import annotations

import os
from pathlib import Path

from aa.paths import AGENTS_SLICE, CGROUP_ROOT

UNIFIED_FIX = (
    "boot with systemd.unified_cgroup_hierarchy=1 on the kernel command line "
    "(and without systemd.legacy_systemd_cgroup_controller)"
)


class NoUnifiedCgroup(Exception):
    """The host mounts cgroup v1 or hybrid hierarchies; says how to mend it."""


def require_unified(root: Path = CGROUP_ROOT) -> None:
    """Raises `NoUnifiedCgroup` unless `root` itself is a cgroup2 mount."""
    if not (root / "cgroup.controllers").exists():
        raise NoUnifiedCgroup(
            f"{root} is not a cgroup2 mount (this host runs cgroup v1 or hybrid): {UNIFIED_FIX}"
        )


def cgroup_id(path: str, root: Path = CGROUP_ROOT) -> int | None:
    """The kernel's id of the cgroup at `path` below `root`, or None while it does not exist.

    The id is the inode number of its directory (kernfs, 64 bit).
    """
    try:
        return os.stat(root / path).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


def of_process(pid: int, proc: Path = Path("/proc")) -> str | None:
    """The cgroup2 path of a process below the root, without a leading slash; None when it is gone."""
    try:
        text = (proc / str(pid) / "cgroup").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:].removeprefix("/").removesuffix(" (deleted)")
    return None


def is_governed(path: str | None) -> bool:
    """True when a cgroup path lies below the agents' slice; an unknown path counts as governed.

    The answer guards operator sockets, so what cannot be read is refused.
    """
    if path is None:
        return True
    return path == AGENTS_SLICE or path.startswith(AGENTS_SLICE + "/")


def find_by_id(wanted: int, below: str = AGENTS_SLICE, root: Path = CGROUP_ROOT) -> str | None:
    """The path below `root` of the cgroup with that id, looked for below one slice only."""
    for directory, _, _ in os.walk(root / below):
        try:
            if os.stat(directory).st_ino == wanted:
                return str(Path(directory).relative_to(root))
        except FileNotFoundError:
            continue
    return None
