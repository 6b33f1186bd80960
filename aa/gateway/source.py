"""Where the policy comes from: files, read when they change, with the last good state kept.

The watch compares what `stat` says of every file, twice a second: that sees an
edit in place, an atomic rename and a removal alike, on every file system.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from aa.policy import Policy, load
from aa.tomlfile import InvalidFile, Problem

WATCH_SECONDS = 0.5

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
        before = (self.revision, self.problems)
        try:
            policy = load(self._directory)
        except InvalidFile as e:
            self.problems = list(e.problems)
        except OSError as e:
            self.problems = [
                Problem(str(self._directory), 0, "", str(e), "make it readable for aa-gateway")
            ]
        else:
            self.policy = policy
            self.problems = []
        if (self.revision, self.problems) != before or before == ("", []):
            self._on_change(self)
        return self.problems

    def reload_if_changed(self) -> None:
        if fingerprint(self._directory) != self._seen:
            self.reload()
