"""The halt of this host: who stopped everything and why, in a file that survives every restart."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from aa.paths import STATE_DIR

HALT_FILE = STATE_DIR / "launch" / "halted"
MAX_REASON = 500
"""Characters of the reason that are kept."""


@dataclass(frozen=True, slots=True)
class Halt:
    """Nothing runs and nothing starts, since then, by that user's word."""

    uid: int
    user: str
    reason: str
    since: float  # seconds since the epoch

    @classmethod
    def now(cls, uid: int, user: str, reason: str) -> Halt:
        return cls(uid, user, reason[:MAX_REASON], time.time())

    def __str__(self) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        why = f": {self.reason}" if self.reason else ""
        return f"this host is halted by {self.user} since {moment}{why}"


def read(path: Path = HALT_FILE) -> Halt | None:
    """The halt in force. A file that is there and makes no sense is a halt."""
    try:
        told = json.loads(path.read_bytes())
        return Halt(int(told["uid"]), str(told["user"]), str(told["reason"]), float(told["since"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        return Halt(-1, "nobody known", f"{path} cannot be read ({e})", 0.0)


def write(halt: Halt, path: Path = HALT_FILE) -> None:
    """On disk when it returns. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(asdict(halt), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _settle(path.parent)


def remove(path: Path = HALT_FILE) -> None:
    """Gone from the disk when it returns. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        _settle(path.parent)


def _settle(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
