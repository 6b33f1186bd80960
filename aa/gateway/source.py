"""Where the policy comes from: files, read when they change, with the last good state kept.

The watch compares what `stat` says of every file, twice a second: that sees an
edit in place, an atomic rename and a removal alike, on every file system.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from aa.policy import Policy, load
from aa.tomlfile import InvalidFile, Problem

WATCH_SECONDS = 0.5
SHARE_SECONDS = 0.0002
"""How long decisions wait for their turn, each time, while a policy is read beside them."""

log = logging.getLogger(__name__)

Fingerprint = tuple[tuple[str, int, int, int, int], ...]


def fingerprint(directory: Path) -> Fingerprint:
    """Changes whenever a file of the directory does."""
    found = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".toml"):
                    s = entry.stat()
                    found.append((entry.name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    except OSError:
        return (("", 0, 0, 0, 0),)
    return tuple(sorted(found))


class PolicySource:
    """The policy in force. `problems` is not empty while the files on disk say something else."""

    def __init__(self, directory: Path, on_change: Callable[[PolicySource], None]) -> None:
        self._directory = directory
        self._on_change = on_change
        self._seen: Fingerprint | None = None
        self._reading = asyncio.Lock()
        self.policy: Policy | None = None
        self.problems: list[Problem] = []

    @property
    def state(self) -> str:
        if self.policy is None or not self.policy.rules and not self.policy.files:
            return "none"
        return "degraded" if self.problems else "ok"

    @property
    def revision(self) -> str:
        return self.policy.revision if self.policy else ""

    def reload(self) -> list[Problem]:
        """Reads the files. Returns what is wrong with them; then the last good policy stays."""
        self._seen = fingerprint(self._directory)
        return self._take(_read(self._directory))

    async def reload_beside(self) -> list[Problem]:
        """The same in a thread, while decisions go on with the policy that is in force.

        The collector of cycles stands still meanwhile: a look at all objects of a large policy
        takes longer than a decision may. What was read is not looked at later either.
        """
        async with self._reading:
            self._seen = fingerprint(self._directory)
            usual = sys.getswitchinterval()
            sys.setswitchinterval(SHARE_SECONDS)
            gc.disable()
            try:
                found = await asyncio.to_thread(_read, self._directory)
            finally:
                gc.freeze()
                gc.enable()
                sys.setswitchinterval(usual)
            return self._take(found)

    def reload_if_changed(self) -> None:
        if self.changed:
            self.reload()

    @property
    def changed(self) -> bool:
        """Whether the files are others than those that were read last."""
        return fingerprint(self._directory) != self._seen

    def _take(self, found: Policy | list[Problem]) -> list[Problem]:
        before = (self.revision, self.problems)
        if isinstance(found, Policy):
            self.policy, self.problems = found, []
        else:
            self.problems = found
        if (self.revision, self.problems) != before or before == ("", []):
            self._on_change(self)
        return self.problems


def _read(directory: Path) -> Policy | list[Problem]:
    """The policy, or what is wrong with its files."""
    try:
        return load(directory)
    except InvalidFile as e:
        return list(e.problems)
    except OSError as e:
        return [Problem(str(directory), 0, "", str(e), "make it readable for aa-gateway")]
