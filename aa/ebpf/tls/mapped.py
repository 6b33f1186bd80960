"""Which files a process has mapped to execute, and a way to open one that is that file.

A process of an agent chooses what it maps and what its paths are called.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_MAPS_BYTES = 4 << 20
"""Of /proc/PID/maps that are read."""
MAX_FILES = 1024
"""Files of one process that are looked at."""

PROC = Path("/proc")

_LINE = re.compile(
    rb"[0-9a-f]+-[0-9a-f]+ ..x. [0-9a-f]+ ([0-9a-f]+:[0-9a-f]+) (\d+) +(/.*)", re.ASCII
)
_ESCAPE = re.compile(rb"\\012")
_DELETED = b" (deleted)"

FileId = tuple[str, int]
"""Device and inode as /proc/PID/maps names them: a key to remember a file by, no more."""


@dataclass(frozen=True, slots=True)
class MappedFile:
    id: FileId
    path: bytes  # as the process sees it

    @property
    def text(self) -> str:
        return self.path.decode("utf-8", "backslashreplace")


def parse(maps: bytes) -> Iterator[MappedFile]:
    """The files that are mapped to execute, each once, at most `MAX_FILES`."""
    seen: set[FileId] = set()
    for line in maps.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        id = (found[1].decode(), int(found[2]))
        if id in seen:
            continue
        seen.add(id)
        yield MappedFile(id, _ESCAPE.sub(b"\n", found[3]))
        if len(seen) >= MAX_FILES:
            return


def files_of(pid: int, proc: Path = PROC) -> list[MappedFile]:
    """Raises `OSError` when the process is gone. An empty list: it has no memory any more."""
    with open(proc / str(pid) / "maps", "rb") as maps:
        return list(parse(maps.read(MAX_MAPS_BYTES)))


def open_file(pid: int, mapped: MappedFile, proc: Path = PROC) -> int:
    """A descriptor of a mapped file, found the way the process finds it.

    What lies there now may be another file than the one that is mapped: then the
    probes sit where nobody comes by. Raises `OSError`.
    """
    path = mapped.path.removesuffix(_DELETED)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(os.fsencode(proc / str(pid) / "root") + path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{mapped.text} is no plain file")
    return fd
