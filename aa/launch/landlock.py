"""What the sandbox means for Landlock: a list of paths and of what may be done below them.

The shim turns it into rights of the kernel's ABI and applies it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from aa.launch import shim


class Access(enum.StrEnum):
    """What may be done below a path; the shim has the same words."""

    READ = "read"  # and execute
    WRITE = "write"  # also rename between such folders; device nodes are never made
    DEVICE = "device"  # read, write and ioctl what is there


assert set(Access) == set(shim.ACCESS)

PRIVATE_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue")
"""The run's own: nobody else sees what it writes there."""


@dataclass(frozen=True, slots=True)
class Rule:
    path: str
    access: Access


def rules(writable: Iterable[str]) -> tuple[Rule, ...]:
    """Read and execute everywhere, write in the run's private folders and in `writable`.

    /proc is writable as far as the mount and the file's owner allow: programs set their own
    oom_score_adj and the like. Later rules add to earlier ones.
    """
    return (
        Rule("/", Access.READ),
        Rule("/dev", Access.DEVICE),
        Rule("/proc", Access.DEVICE),
        *(Rule(path, Access.WRITE) for path in (*PRIVATE_FOLDERS, *writable)),
    )
