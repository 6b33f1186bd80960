"""The descriptors that come with a call: the three streams and the working directory."""

from __future__ import annotations

import os
import re
import stat
import termios
from collections.abc import Sequence
from typing import Any

from aa.launch import shim
from aa.launch.sandbox import Directory
from aa.varlink import Call

PTY_SLAVE_MAJORS = range(136, 144)  # Documentation/admin-guide/devices.txt

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""systemd writes the paths of a unit to a file that it reads again at a reload: a line end in
one would begin a setting of its own, and a root command with it."""


class BadStream(ValueError):
    """A descriptor that cannot be handed to a run, and why."""


class Descriptors:
    """Takes the descriptors out of a call; they are closed by `close`, or when nobody has this any more."""

    def __init__(self, call: Call) -> None:
        self._fds = list(call.fds)
        call.fds.clear()

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < len(self._fds):
            raise BadStream(f"there is no descriptor at position {position}")
        return self._fds[position]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    __del__ = close


def refuse_streams(fds: Sequence[int], *, caller_terminal: int) -> None:
    """Raises `BadStream` for what the shim would refuse, and for the caller's own terminal.

    With its caller's terminal a run could push keys into the shell behind it.
    """
    for name, fd in zip(("stdin", "stdout", "stderr"), fds, strict=True):
        refusal = shim.stream_refusal(fd)
        if refusal is not None:
            raise BadStream(f"{name} cannot be handed to a run: {refusal}")
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and os.isatty(fd):
            if os.major(status.st_rdev) not in PTY_SLAVE_MAJORS:
                raise BadStream(f"{name} is a terminal, but not one made for the run")
            if status.st_rdev == caller_terminal:
                raise BadStream(f"{name} is the caller's own terminal; make one for the run")


def terminal_of(pid: int) -> int:
    """The device number of a process's controlling terminal, 0 for none or when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[4]) & 0xFFFFFFFF
    except (OSError, ValueError, IndexError):
        return 0


def terminal_among(fds: Sequence[int]) -> int | None:
    return next((fd for fd in fds if os.isatty(fd)), None)


def attributes_of(fd: int) -> list[Any]:
    """A terminal's settings as JSON."""
    *flags, characters = termios.tcgetattr(fd)
    return [*flags, [c if isinstance(c, int) else c[0] for c in characters]]


def give_terminal(fd: int, *, owner: int, to: int) -> None:
    """Makes a terminal that `owner` made belong to the run's user."""
    status = os.fstat(fd)
    if status.st_uid == owner != to:
        os.fchown(fd, to, -1)


def directory_of(fd: int) -> Directory:
    """The folder behind an O_PATH descriptor by the path that the kernel has for it."""
    status = os.fstat(fd)
    if not stat.S_ISDIR(status.st_mode):
        raise BadStream("the working directory is not a folder")
    path = os.readlink(f"/proc/self/fd/{fd}")
    if not path.startswith("/") or path.endswith(" (deleted)"):
        raise BadStream(f"the working directory has no path here: {path}")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise BadStream("the working directory's path is not UTF-8") from None
    if CONTROL.search(path):
        raise BadStream(f"the working directory's path holds a control character: {path!r}")
    return Directory(path, status.st_dev, status.st_ino)


def umask_of(pid: int, default: int = 0o022) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            found = next(line for line in file if line.startswith("Umask:"))
        return int(found.split()[1], 8)
    except (OSError, ValueError, StopIteration):
        return default
