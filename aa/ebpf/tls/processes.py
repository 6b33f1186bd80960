"""What is known of governed processes: when to look at their libraries, and where they connected to. No I/O, no clock.

The caller passes the time (seconds, monotonic). Every table is bounded.
"""

from __future__ import annotations

import socket
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from aa.ebpf.events import VIA_DATAGRAM, Event, Exec, Exit, Mapped, Net
from aa.ebpf.tls.records import end

MAX_PROCESSES = 4096
MAX_CONNECTS = 32
"""Connections of one process that a session may be of."""
LOOKS_AFTER_EXEC = (0.05, 0.5, 2.0)
"""A program maps its libraries after it was started; these catch what is mapped before it connects."""
LOOK_PAUSE = 0.2
"""Between two looks at one process, for whatever reason."""
LOOK_AFTER_CONNECT = 1.0
JUDGE_SECONDS = 2.5
"""After a connection to port 443 a TLS library must have shown itself."""
MAX_LOOKS = 8
"""Looks at one process that are waited for."""
NEVER = -1e9
HTTPS = 443
DNS = 53

NO_LIBRARY = "no-known-library"
GONE = "gone-before-look"


@dataclass(slots=True)
class Process:
    pid: int
    run: int
    program: str = ""
    comm: str = ""
    looks: list[float] = field(default_factory=list)
    """When to look at what it has mapped."""
    looked: float = NEVER
    library: bool | None = None
    """Whether a TLS library with probes is mapped; None before the first look."""
    connects: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=MAX_CONNECTS))
    suspects: int = 0
    """Connections to port 443 that no library explains yet."""
    judge_at: float = 0.0
    gone: bool = False

    def look_at(self, *moments: float) -> None:
        if len(self.looks) < MAX_LOOKS:
            self.looks += moments


@dataclass(frozen=True, slots=True)
class Unexplained:
    """Connections to port 443 whose plaintext nobody could have seen."""

    process: Process
    count: int
    reason: str


class Processes:
    def __init__(self, *, limit: int = MAX_PROCESSES) -> None:
        self._limit = limit
        self._processes: OrderedDict[int, Process] = OrderedDict()
        self._unexplained: list[Unexplained] = []

    def __len__(self) -> int:
        return len(self._processes)

    def noticed(self, event: Event, now: float) -> None:
        """An event of the kernel layer, in its order."""
        pid, run = event.head.pid, event.head.cgroup
        if not pid or not run:
            return
        match event:
            case Exec():
                self._replace(Process(pid, run, event.filename, event.head.comm), now)
            case Exit():
                process = self._processes.get(pid)
                if process is not None:
                    process.gone = True
                    process.judge_at = min(process.judge_at, now)
            case Mapped():
                process = self.know(pid, run, event.head.comm)
                process.look_at(now)
                process.looked = NEVER  # it is new to all: no pause before it
            case Net(refused=False, key=key) if (
                key.protocol == socket.IPPROTO_TCP and key.via != VIA_DATAGRAM
            ):
                process = self.know(pid, run, event.head.comm)
                process.connects.append((event.head.time, end(key.address, key.port)))
                process.look_at(now, now + LOOK_AFTER_CONNECT)
                if key.port == HTTPS:
                    process.suspects += 1
                    process.judge_at = now + JUDGE_SECONDS

    def know(self, pid: int, run: int, comm: str = "") -> Process:
        """The process of a pid; a new one if it was not known."""
        process = self._processes.get(pid)
        if process is None or process.run != run or process.gone:
            process = Process(pid, run, comm=comm)
            self._put(process)
        return process

    def look_soon(self, pid: int, run: int, now: float) -> None:
        self.know(pid, run).look_at(now)

    def used(self, pid: int) -> None:
        """A TLS library of the process was seen at work."""
        process = self._processes.get(pid)
        if process is not None:
            process.library = True

    def due(self, now: float, limit: int) -> list[Process]:
        """Processes to look at now; whoever calls tells `looked`."""
        found = []
        for process in self._processes.values():
            if process.gone or not process.looks or now - process.looked < LOOK_PAUSE:
                continue
            if min(process.looks) <= now:
                process.looks = [at for at in process.looks if at > now]
                process.looked = now
                found.append(process)
                if len(found) >= limit:
                    break
        return found

    def judge(self, now: float) -> list[Unexplained]:
        """Connections to port 443 that no TLS library explains, each told once."""
        found, self._unexplained = self._unexplained, []
        for process in list(self._processes.values()):
            if process.suspects and process.judge_at <= now:
                found += self._judge(process)
            if process.gone and not process.suspects and process.judge_at <= now - JUDGE_SECONDS:
                del self._processes[process.pid]
        return found

    def peer(self, pid: int, since: int) -> str:
        """Where a session that began at `since` most likely goes: the process's last connection then."""
        process = self._processes.get(pid)
        if process is None:
            return ""
        ends = [where for at, where in process.connects if at <= since]
        return ends[-1] if ends else ""

    @staticmethod
    def _judge(process: Process) -> list[Unexplained]:
        count, process.suspects = process.suspects, 0
        if process.library:
            return []
        return [Unexplained(process, count, GONE if process.library is None else NO_LIBRARY)]

    def _replace(self, process: Process, now: float) -> None:
        before = self._processes.get(process.pid)
        if before is not None and before.suspects:
            self._unexplained += self._judge(before)
        process.looks = [now + pause for pause in LOOKS_AFTER_EXEC]
        self._put(process)

    def _put(self, process: Process) -> None:
        self._processes[process.pid] = process
        self._processes.move_to_end(process.pid)
        if len(self._processes) > self._limit:
            _, oldest = self._processes.popitem(last=False)
            if oldest.suspects:
                self._unexplained += self._judge(oldest)
