"""Equal events become one report with a count; what cannot be named yet waits a moment; what is too much is
told by directory. No I/O, no clock.

Every table here is bounded. The caller passes the time (seconds, monotonic) and a
sink; nothing is ever dropped: a full table lets go of its oldest entry early.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

WINDOW_SECONDS = 0.5
"""Events that are equal to one of so long ago are counted with it."""
MAX_MERGED = 2048
"""Different events that wait for equals."""

HOLD_SECONDS = 2.0
"""How long an event waits for its run to become known."""
MAX_HELD = 2048

RECENT_SECONDS = 60.0
"""How long a run's last events are still named after it has ended."""
MAX_RECENT = 512

DETAIL_SECONDS = 1.0
MAX_FILES_TOLD = 100
"""Different files of one run that are told one by one in this time. With the directories it is well
below what a run may fill of the audit log, above which its actions would be denied."""
MAX_DIRECTORIES_TOLD = 50
"""Directories that further ones are gathered in; then there is one number for the run."""
MAX_DETAILED = 512


@dataclass(slots=True)
class Merged(Generic[T]):
    first: T
    last: T
    count: int
    due: float


class Merger(Generic[T]):
    """Collects equal events for a window that begins with the first of them."""

    def __init__(self, *, window: float = WINDOW_SECONDS, limit: int = MAX_MERGED) -> None:
        self._window = window
        self._limit = limit
        self._waiting: OrderedDict[Hashable, Merged[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: Hashable) -> bool:
        """Whether an equal event waits."""
        return key in self._waiting

    def add(self, key: Hashable, event: T, count: int, now: float) -> Merged[T] | None:
        """Adds an event. Returns one that had to go because the table was full."""
        merged = self._waiting.get(key)
        if merged is not None:
            merged.count += count
            merged.last = event
            return None
        self._waiting[key] = Merged(event, event, count, now + self._window)
        if len(self._waiting) > self._limit:
            return self._waiting.popitem(last=False)[1]
        return None

    def due(self, now: float) -> Iterator[Merged[T]]:
        """What has waited its time, oldest first; it is taken out."""
        while self._waiting:
            merged = next(iter(self._waiting.values()))
            if merged.due > now:
                return
            self._waiting.popitem(last=False)
            yield merged


class Hold(Generic[T]):
    """Events whose run is not known yet."""

    def __init__(self, *, seconds: float = HOLD_SECONDS, limit: int = MAX_HELD) -> None:
        self._seconds = seconds
        self._limit = limit
        self._held: deque[tuple[float, int, T]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, cgroup: int, event: T, now: float) -> T | None:
        """Adds an event. Returns one that had to go because too many wait."""
        self._held.append((now + self._seconds, cgroup, event))
        if len(self._held) > self._limit:
            return self._held.popleft()[2]
        return None

    def ready(self, known: Callable[[int], bool], now: float) -> list[T]:
        """Events whose run is known now or that have waited long enough, in their order."""
        ready = [e for due, cgroup, e in self._held if due <= now or known(cgroup)]
        if ready:
            self._held = deque(
                (due, cgroup, e) for due, cgroup, e in self._held if due > now and not known(cgroup)
            )
        return ready


class RecentRuns(Generic[T]):
    """Runs that have ended, by cgroup id: their last events come after their end."""

    def __init__(self, *, seconds: float = RECENT_SECONDS, limit: int = MAX_RECENT) -> None:
        self._seconds = seconds
        self._limit = limit
        self._runs: OrderedDict[int, tuple[float, T]] = OrderedDict()

    def add(self, cgroup: int, run: T, now: float) -> None:
        self._runs[cgroup] = (now + self._seconds, run)
        self._runs.move_to_end(cgroup)
        while len(self._runs) > self._limit or next(iter(self._runs.values()))[0] <= now:
            self._runs.popitem(last=False)
            if not self._runs:
                return

    def get(self, cgroup: int) -> T | None:
        found = self._runs.get(cgroup)
        return found[1] if found else None


@dataclass(slots=True)
class _Spent:
    since: float
    files: int = 0
    directories: int = 0


class Detail:
    """How precisely the files of each run are told: a share for each, renewed every moment."""

    def __init__(
        self,
        *,
        files: int = MAX_FILES_TOLD,
        directories: int = MAX_DIRECTORIES_TOLD,
        seconds: float = DETAIL_SECONDS,
        limit: int = MAX_DETAILED,
    ) -> None:
        self._files = files
        self._directories = directories
        self._seconds = seconds
        self._limit = limit
        self._spent: OrderedDict[int, _Spent] = OrderedDict()

    def __len__(self) -> int:
        return len(self._spent)

    def file(self, cgroup: int, now: float) -> bool:
        """Whether one more file may be told by itself; it counts as told."""
        spent = self._of(cgroup, now)
        spent.files += 1
        return spent.files <= self._files

    def directory(self, cgroup: int, now: float) -> bool:
        """Whether one more directory may be."""
        spent = self._of(cgroup, now)
        spent.directories += 1
        return spent.directories <= self._directories

    def _of(self, cgroup: int, now: float) -> _Spent:
        spent = self._spent.get(cgroup)
        if spent is None or now - spent.since >= self._seconds:
            spent = self._spent[cgroup] = _Spent(now)
        self._spent.move_to_end(cgroup)
        if len(self._spent) > self._limit:
            self._spent.popitem(last=False)
        return spent
