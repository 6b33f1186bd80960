"""What programs outside of a run offer to its user by path: listening sockets and other terminals.

A read-only mount does not keep anybody from connecting to a socket in it, and an ssh control
socket in the home is a way to the network past every decision. So those that are there when the
run starts are covered in its mount namespace. What is made later is the kernel layer's to see.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from aa.launch.landlock import PRIVATE_FOLDERS
from aa.launch.sandbox import HIDDEN, INACCESSIBLE, is_below

UNIX_SOCKETS = Path("/proc/1/net/unix")
"""Those of the host's network namespace, whatever ours is."""
TERMINALS = "/dev/pts"

MAX_CANDIDATES = 4096
"""Paths that are looked at, the user's home first."""
MAX_COVERED = 256
"""Mounts that are spent on it in one run."""

PLAIN_PATH = re.compile(r"/[^\x00-\x1f\x7f]+")


def socket_paths(table: str, home: str) -> list[str]:
    """The paths in the kernel's table of Unix sockets that a run would see, the home's first."""
    found = set()
    for line in table.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and _visible(fields[7]):
            found.add(fields[7])
    return sorted(found, key=lambda path: (not is_below(path, home), path))[:MAX_CANDIDATES]


def _visible(path: str) -> bool:
    """False for abstract names, for what is hidden anyhow, and for what systemd would not take as a path."""
    if not PLAIN_PATH.fullmatch(path) or os.path.normpath(path) != path:
        return False
    return not any(is_below(path, top) for top in (*HIDDEN, *INACCESSIBLE, *PRIVATE_FOLDERS))


def read_socket_paths(home: str) -> list[str]:
    return socket_paths(UNIX_SOCKETS.read_text(encoding="utf-8", errors="replace"), home)


def reachable(paths: Iterable[str], own_terminal: int) -> tuple[list[str], int]:
    """Of these sockets and of all terminals, what this process could open; and how many more there are.

    `own_terminal` is the device number of the run's own, which stays.
    """
    found = [path for path in paths if _is_open_socket(path)]
    try:
        names = sorted(os.listdir(TERMINALS))
    except OSError:
        names = []
    found += [
        f"{TERMINALS}/{name}"
        for name in names
        if name.isdigit() and _is_other_terminal(f"{TERMINALS}/{name}", own_terminal)
    ]
    return found[:MAX_COVERED], max(0, len(found) - MAX_COVERED)


def _is_open_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode) and os.access(path, os.W_OK)
    except OSError:
        return False


def _is_other_terminal(path: str, own: int) -> bool:
    try:
        if os.stat(path).st_rdev == own:
            return False
    except OSError:
        return False
    return os.access(path, os.R_OK) or os.access(path, os.W_OK)
