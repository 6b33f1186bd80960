"""What programs outside of a run offer to its user by path: listening sockets and other terminals.

A read-only mount does not keep anybody from connecting to a socket in it, and an ssh control
socket in the home is a way to the network past every decision. So those that are there when the
run starts are covered in its mount namespace. What is made later is the kernel layer's to see.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from aa.launch.sandbox import HIDDEN, INACCESSIBLE, is_below
from aa.policy.sandbox import PRIVATE

UNIX_SOCKETS = Path("/proc/1/net/unix")
"""Those of the host's network namespace, whatever ours is."""
TERMINALS = "/dev/pts"

MAX_CANDIDATES = 4096
"""Paths that are looked at, the user's home first."""
MAX_COVERED = 256
"""Mounts that are spent on it in one run."""
MAX_FOLDERS = 2048
"""Folders that are looked through for sockets whose path the kernel's table does not have."""
MAX_DEPTH = 3
"""Levels below the home and the working directory that are looked through for them."""
SEARCH_SECONDS = 0.5

PLAIN_PATH = re.compile(r"/[^\x00-\x1f\x7f]+")


def socket_paths(table: str, home: str) -> list[str]:
    """The paths in the kernel's table of Unix sockets that a run would see, the home's first."""
    found = {name for name in _names(table) if _visible(name)}
    return _home_first(found, home)


def _names(table: str) -> Iterator[str]:
    for line in table.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and not fields[7].startswith("@"):
            yield fields[7]


def _home_first(paths: Iterable[str], home: str) -> list[str]:
    return sorted(paths, key=lambda path: (not is_below(path, home), path))[:MAX_CANDIDATES]


def _visible(path: str) -> bool:
    """False for abstract names, for what is hidden anyhow, and for what systemd would not take as a path."""
    if not PLAIN_PATH.fullmatch(path) or os.path.normpath(path) != path:
        return False
    return not any(is_below(path, top) for top in (*HIDDEN, *INACCESSIBLE, *PRIVATE))


def read_socket_paths(home: str, directory: str) -> tuple[list[str], bool]:
    """Paths of sockets that a run would see, and whether all places for them were looked through.

    The kernel knows a socket by the name that it was bound to. ssh links its control socket to
    its real place and removes that name, and a relative name says nothing of where it is: such
    sockets are searched for, next to the name, in the home and in the working directory.
    """
    table = UNIX_SOCKETS.read_text(encoding="utf-8", errors="replace")
    found = set(socket_paths(table, home))
    beside, moved = _strays(table)
    searched, complete = search(beside, (home, directory) if moved else ())
    return _home_first(found | searched, home), complete


def _strays(table: str) -> tuple[list[str], bool]:
    """The folders of names that may not be the only ones of their sockets, and whether a socket is
    somewhere else than its name says."""
    beside: dict[str, None] = {}
    moved = False
    for name in _names(table):
        if not name.startswith("/"):
            moved = True
        elif _visible(name):
            try:
                status = os.lstat(name)
                if stat.S_ISSOCK(status.st_mode) and status.st_nlink == 1:
                    continue
            except FileNotFoundError:
                pass
            except OSError:
                continue  # its user cannot get there
            moved = True
            beside[os.path.dirname(name)] = None
    return list(beside), moved


def search(folders: Sequence[str], tops: Sequence[str]) -> tuple[set[str], bool]:
    """Sockets in these folders, and `MAX_DEPTH` levels below these tops; False when not all was seen."""
    deadline = time.monotonic() + SEARCH_SECONDS
    queue = deque([(folder, 0) for folder in folders] + [(top, MAX_DEPTH) for top in tops])
    seen: set[str] = set()
    found: set[str] = set()
    while queue:
        folder, depth = queue.popleft()
        if folder in seen and depth == 0:
            continue
        if len(seen) >= MAX_FOLDERS or time.monotonic() > deadline:
            return found, False
        seen.add(folder)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if depth > 0:
                            queue.append((entry.path, depth - 1))
                    elif not entry.is_file(follow_symlinks=False) and _visible(entry.path):
                        if _is_open_socket(entry.path):
                            found.add(entry.path)
        except OSError:
            continue  # its user cannot list it, or it is gone
    return found, True


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
