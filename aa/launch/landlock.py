"""What the sandbox means for Landlock: a list of paths and of what may be done below them. Pure.

The shim turns it into rights of the kernel's ABI and applies it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from aa.launch import shim
from aa.launch.sandbox import Sandbox
from aa.policy.sandbox import NEEDED


class Access(enum.StrEnum):
    """What may be done below a path; the shim has the same words."""

    LOOK = "look"  # read
    READ = "read"  # and execute
    CHANGE = (
        "change"  # read and write; also rename between such folders; device nodes are never made
    )
    WRITE = "write"  # and execute
    DEVICE = "device"  # read, write and ioctl what is there


assert set(Access) == set(shim.ACCESS)

LOADERS = (
    "/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1", "/lib/ld-linux-armhf.so.3",
    "/lib/ld-linux.so.2",
)  # fmt: skip
"""What the kernel executes besides a program to start it."""


@dataclass(frozen=True, slots=True)
class Rule:
    path: str
    access: Access
    optional: bool = False
    """What is missing is not granted."""


def rules(box: Sandbox) -> tuple[Rule, ...]:
    """Read and execute everywhere, write in the run's private folders and its writable ones, unless
    the policy's defaults say less or more.

    /proc is writable as far as the mount and the file's owner allow: programs set their own
    oom_score_adj and the like. Later rules add to earlier ones.
    """
    runs = box.exec == "allow"
    look, change = (Access.READ, Access.WRITE) if runs else (Access.LOOK, Access.CHANGE)
    base = _all(NEEDED, look, optional=True) if box.file == "deny" else (Rule("/", look),)
    if box.file == "allow":
        base = (*base, Rule("/", change))
    return (
        *base,
        Rule("/dev", Access.DEVICE),
        Rule("/proc", Access.DEVICE),
        *_all((*box.private, *box.writable), change),
        *_all((d.path for d in box.readable), look),
        *_all((d.path for d in box.executable), Access.READ),
        *(() if runs else _all(LOADERS, Access.READ, optional=True)),
    )


def _all(paths: Iterable[str], access: Access, *, optional: bool = False) -> tuple[Rule, ...]:
    return tuple(Rule(path, access, optional) for path in paths)
