"""The part of the kernel layer that sees plaintext. It may fail; then it says so, and the guard goes on without it."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import logging
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from aa.ebpf.events import Event, Exit, MalformedRecord, Mapped
from aa.ebpf.libbpf import BpfError
from aa.ebpf.reader import RingReader
from aa.ebpf.reports import UNKNOWN_RUN
from aa.ebpf.tls import mapped, records
from aa.ebpf.tls.elf import NotReadable
from aa.ebpf.tls.mapped import FileId, MappedFile
from aa.ebpf.tls.probes import Probes, TooManyLibraries
from aa.ebpf.tls.processes import Processes
from aa.ebpf.tls.records import Count
from aa.ebpf.tls.sessions import Seen, Sessions, Unmeasured
from aa.ebpf.tls.telling import request_report, unmeasured_report
from aa.ebpf.tls.worker import Worker
from aa.model import Json, Layer, Report, Run

KNOWN_LIBRARIES = (
    "/usr/lib/*/libssl.so.3",
    "/usr/lib/*/libssl.so.1.1",
    "/usr/lib/*/libgnutls.so.30",
    "/usr/local/lib/libssl.so.3",
    "/usr/local/lib/*/libssl.so.3",
    "/usr/local/lib/libgnutls.so.30",
    "/usr/bin/node",
    "/usr/local/bin/node",
)
"""Files that get their probes before a run starts."""

TICK_SECONDS = 0.1
GATHER_SECONDS = 0.01
"""After a library was mapped: a program maps several in a row."""
ACCOUNT_SECONDS = 1.0
RESCAN_SECONDS = 10.0
"""Between two looks at all processes of all runs."""
PREPARE_SECONDS = 5.0
"""How long a starting run waits for the probes."""
RETRY_SECONDS = 10.0
"""Between two attempts when the known libraries cannot be probed; a run that starts makes one of its own."""
LINGER_SECONDS = 30.0
"""How long the probes stay after the last run."""
STUCK_SECONDS = 20.0
"""A job of the worker that takes longer is a problem to be shown."""
CLOSE_SECONDS = 1.0

MAX_LOOKS = 32
"""Processes that are looked at in one tick."""
MAX_PIDS = 512
"""Processes of one run that a rescan looks at."""
MAX_FILES_KNOWN = 8192
FILE_SECONDS = 60.0
"""How long a file that was examined is not opened again."""

BUDGET_SECONDS = 0.25
"""Time of the event loop, in each second, for records of plaintext."""
MAX_REPORTS = 200
"""Requests of one run that are told in one second; further ones are counted."""
MAX_UNMEASURED = 1024
"""Different things that wait to be told as unmeasured."""

GONE_SECONDS = 0.5
"""After a process has ended its last records may still come."""
MAX_GONE = 4096

OVERLOAD = "overload"
TOO_MANY_REQUESTS = "too-many-requests"

T = TypeVar("T")

log = logging.getLogger(__name__)


class Capture:
    """One life, between `run` and its cancellation. No method raises for a fault of its own."""

    def __init__(
        self,
        probes: Callable[[], Probes],
        *,
        runs: Callable[[], Iterable[Run]],
        run_of: Callable[[int], Run | None],
        cgroups: Path,
        report: Callable[[Report], None],
        gap: Callable[[int, str], None],
        alert: Callable[[str], None],
        boot: Callable[[], int],
    ) -> None:
        """`cgroups`: the root of the paths in the runs. `boot`: the time of the boot since the epoch."""
        self._make_probes = probes
        self._runs = runs
        self._run_of = run_of
        self._cgroups = cgroups
        self._report = report
        self._gap = gap
        self._alert = alert
        self._boot = boot
        self.problem = ""
        """Why there is no plaintext, or not all of it; "" when all is well."""
        self._probes: Probes | None = None
        self._worker: Worker | None = None
        self._reader: RingReader | None = None
        self._attaching = asyncio.Lock()
        self._attached = False
        self._needed = 0.0  # when a run was there last
        self._opened = asyncio.Event()
        self._failed = asyncio.Event()
        self._look_now = asyncio.Event()
        self._processes = Processes()
        self._sessions = Sessions(self._totals)
        self._files: OrderedDict[FileId, tuple[bool, float]] = OrderedDict()
        self._crowded: dict[str, None] = {}  # libraries without room for probes
        self._unmeasured: OrderedDict[tuple[int, str, str, str], tuple[int, int, int]] = (
            OrderedDict()
        )
        self._gone: deque[tuple[float, int]] = deque(maxlen=MAX_GONE)
        self._told: Counter[int] = Counter()
        self._counts = Count()
        self._second = 0.0
        self._spent = 0.0
        self._requests = 0
        self._lost = 0
        self._by_reason: Counter[str] = Counter()

    # -- life

    async def run(self) -> None:
        """Until cancelled. After a fault it waits for that without doing anything."""
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._open()
            tasks = [
                asyncio.create_task(self._look_often()),
                asyncio.create_task(self._tell_often()),
                asyncio.create_task(self._wait_for_fault()),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Exception as e:  # the guard must not end with this
            self._fault(e)
            await self._cease(tasks)
            await asyncio.Event().wait()
        finally:
            await self._cease(tasks)

    async def _open(self) -> None:
        worker = self._worker = Worker()
        probes = self._make_probes()
        await worker.do(probes.open)
        self._probes = probes
        self._reader = RingReader(probes.ring_fd, self._take)
        self._reader.start()
        self._opened.set()

    async def _wait_for_fault(self) -> None:
        await self._failed.wait()

    def _fault(self, error: Exception) -> None:
        self.problem = f"TLS plaintext is not seen: {error}"
        expected = isinstance(error, OSError)  # the kernel or a file says no
        log.error("%s", self.problem, exc_info=None if expected else error)
        self._failed.set()
        self._alert(self.problem)

    async def _cease(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._reader is not None:
            reader, self._reader = self._reader, None
            await reader.stop()
            with contextlib.suppress(Exception):  # the second fault in a row
                self._sessions.close()
                self._tell_outcomes()
                self._flush_unmeasured()
        if self._worker is not None:
            worker, self._worker = self._worker, None
            if self._probes is not None:
                probes, self._probes = self._probes, None
                with contextlib.suppress(TimeoutError):
                    # The kernel takes them out one by one; with the process they all go.
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await worker.do(probes.close)
            worker.stop()

    # -- for the service

    async def prepare(self) -> None:
        """Before a run starts: the probes sit in the known libraries, or `problem` says why not."""
        if self._failed.is_set():
            return
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                await self._opened.wait()
                await self._attach_known()
            self.problem = ""
        except TimeoutError:
            self._trouble("the probes for TLS plaintext take too long to be put in place")
        except OSError as e:
            self._trouble(f"the known TLS libraries cannot be probed: {e}")

    def _trouble(self, text: str) -> None:
        """Something that may be over at the next attempt; told once."""
        if self.problem != text:
            self.problem = text
            log.error("%s", text)
            self._alert(text)

    def noticed(self, event: Event) -> None:
        """An event of the kernel layer's own ring."""
        if self._failed.is_set():
            return
        try:
            now = time.monotonic()
            self._processes.noticed(event, now)
            if isinstance(event, Mapped):
                self._look_now.set()
            if isinstance(event, Exit) and event.head.pid:
                self._gone.append((now + GONE_SECONDS, event.head.pid))
        except Exception as e:  # see run
            self._fault(e)

    def status(self) -> dict[str, Json]:
        probes = self._probes
        return {
            "problem": self.problem,
            "libraries": sorted(lib.path for lib in probes.libraries) if probes else [],
            "sessions": len(self._sessions),
            "requests": self._requests,
            "unmeasured": dict(sorted(self._by_reason.items())),
            "lost": self._lost,
        }

    # -- records

    def _take(self, batch: list[bytes]) -> None:
        if self._failed.is_set():
            return
        try:
            for record in batch:
                self._take_one(record)
            self._tell_outcomes()
        except Exception as e:  # see run
            self._fault(e)

    def _take_one(self, record: bytes) -> None:
        now = time.monotonic()
        if now - self._second >= 1.0:
            self._second, self._spent = now, 0.0
            self._told.clear()
        if self._spent > BUDGET_SECONDS:
            self._count(records.run_of(record), OVERLOAD)
            return
        try:
            data = records.decode(record)
        except MalformedRecord as e:
            log.error("a record that cannot be read: %s", e)
            self._lose(1, "it could not be read")
            return
        self._processes.used(data.head.pid)
        self._sessions.feed(data, now)
        self._spent += time.monotonic() - now

    def _totals(self, key: bytes) -> records.Totals | None:
        return self._probes.totals(key) if self._probes else None

    def _tell_outcomes(self) -> None:
        for outcome in self._sessions.take():
            who = outcome.who
            if isinstance(outcome, Unmeasured):
                self._count(
                    who.run, outcome.reason, comm=who.comm, pid=who.pid, library=who.library
                )
            elif self._observed(who.run):
                self._tell(outcome)

    def _tell(self, seen: Seen) -> None:
        who = seen.who
        self._told[who.run] += 1
        if self._told[who.run] > MAX_REPORTS:
            self._count(who.run, TOO_MANY_REQUESTS, comm=who.comm, pid=who.pid)
            return
        self._requests += not seen.continued
        self._report(
            request_report(
                seen,
                run=self._run_id(who.run),
                library=self._library(who.library),
                inferred="" if who.peer else self._processes.peer(who.pid, seen.time),
                boot=self._boot(),
            )
        )

    def _library(self, number: int) -> str:
        return self._probes.path(number) if self._probes else ""

    def _run_id(self, cgroup: int) -> str:
        run = self._run_of(cgroup)
        return run.id if run else UNKNOWN_RUN

    def _observed(self, cgroup: int) -> bool:
        """False for a run that is guarded, as every proxied one is, but not to be observed."""
        run = self._run_of(cgroup)
        return run is None or Layer.KERNEL in run.layers

    # -- what is not measured

    def _count(
        self,
        run: int,
        reason: str,
        *,
        comm: str = "",
        pid: int = 0,
        library: int = 0,
        count: int = 1,
    ) -> None:
        if not self._observed(run):
            return
        self._by_reason[reason] += count
        key = (run, reason, comm, self._library(library))
        if key not in self._unmeasured and len(self._unmeasured) >= MAX_UNMEASURED:
            key = (run, reason, "", "")
        before, began, first = self._unmeasured.get(key, (0, time.time_ns(), pid))
        self._unmeasured[key] = (before + count, began, first)

    def _flush_unmeasured(self) -> None:
        waiting, self._unmeasured = self._unmeasured, OrderedDict()
        for (run, reason, comm, library), (count, began, pid) in waiting.items():
            about: dict[str, Json] = {"pid": pid, "comm": comm} if pid else {}
            if library:
                about["library"] = library
            self._report(
                unmeasured_report(reason, count, run=self._run_id(run), time=began, about=about)
            )

    def _lose(self, count: int, why: str) -> None:
        self._lost += count
        self._gap(count, why)

    async def _tell_often(self) -> None:
        account = 0.0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if self._reader is not None and self._reader.failure is not None:
                raise self._reader.failure
            while self._gone and self._gone[0][0] <= now:
                self._sessions.gone(self._gone.popleft()[1])
            self._sessions.flush(now)
            self._tell_outcomes()
            for found in self._processes.judge(now):
                who = found.process
                comm = who.program or who.comm
                self._count(who.run, found.reason, comm=comm, pid=who.pid, count=found.count)
            if now >= account:
                account = now + ACCOUNT_SECONDS
                self._settle()
                self._flush_unmeasured()

    def _settle(self) -> None:
        if self._probes is None:
            return
        before, self._counts = self._counts, self._probes.counts()
        if lost := self._counts.lost - before.lost:
            self._lose(lost, "they did not fit into the ring")
        if held_back := self._counts.held_back - before.held_back:
            self._lose(held_back, f"a run sent more than {records.RATE} a second")
        if self._worker is not None and self._worker.busy_seconds() > STUCK_SECONDS:
            self.problem = "the search for TLS libraries hangs at a file"

    # -- libraries

    async def _look_often(self) -> None:
        rescan = retry = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._look_now.wait()
                    await asyncio.sleep(GATHER_SECONDS)
            self._look_now.clear()
            now = time.monotonic()
            runs = [run for run in self._runs() if Layer.KERNEL in run.layers and run.cgroup]
            if runs:
                self._needed = now
                if not self._attached and now >= retry:
                    await self.prepare()
                    retry = time.monotonic() + RETRY_SECONDS
                if now >= rescan:
                    rescan = now + RESCAN_SECONDS
                    await self._rescan(runs)
            elif self._attached and now - self._needed > LINGER_SECONDS:
                await self._detach()
            for process in self._processes.due(now, MAX_LOOKS):
                found = await self._work(partial(self._look, process.pid))
                if found is not None:
                    process.library = bool(process.library) or found

    async def _work(self, job: Callable[[], T]) -> T:
        if self._worker is None:
            raise RuntimeError("no worker")
        return await self._worker.do(job)

    async def _attach_known(self) -> None:
        async with self._attaching:
            self._needed = time.monotonic()
            if not self._attached:
                await self._work(self._probe_known)
                self._attached = True

    async def _detach(self) -> None:
        async with self._attaching:
            if self._probes is not None:
                await self._work(self._probes.detach_all)
            self._attached = False
            self._files.clear()
            self._crowded.clear()

    async def _rescan(self, runs: Iterable[Run]) -> None:
        for run in runs:
            for pid in await self._work(partial(_pids, self._cgroups / run.cgroup)):
                self._processes.look_soon(pid, run.cgroup_id, time.monotonic())

    # -- in the worker's thread

    def _probe_known(self) -> None:
        if self._probes is None:
            return
        for pattern in KNOWN_LIBRARIES:
            for path in sorted(glob.glob(pattern)):
                with contextlib.suppress(FileNotFoundError, NotReadable):
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        self._probes.attach(fd, os.path.realpath(path))
                    finally:
                        os.close(fd)

    def _look(self, pid: int) -> bool | None:
        """Whether a process has a library with probes mapped; None when it is gone."""
        try:
            files = mapped.files_of(pid)
        except OSError:
            return None
        if not files:
            return None  # it is ending
        # No generator: each file is to be examined, also behind one that was found.
        return any([self._has_probes(pid, file) for file in files])

    def _has_probes(self, pid: int, file: MappedFile) -> bool:
        now = time.monotonic()
        known = self._files.get(file.id)
        if known is not None and known[1] > now:
            return known[0]
        try:
            found = self._examine(pid, file)
        except BpfError as e:
            self.problem = f"{file.text} cannot be probed: {e}"
            log.warning("%s", self.problem)
            return False
        except OSError as e:
            log.debug("%s of process %d: %s", file.text, pid, e)
            return False
        self._files[file.id] = (found, now + FILE_SECONDS)
        self._files.move_to_end(file.id)
        if len(self._files) > MAX_FILES_KNOWN:
            self._files.popitem(last=False)
        return found

    def _examine(self, pid: int, file: MappedFile) -> bool:
        """Whether probes sit in a file now. Raises `OSError`."""
        if self._probes is None:
            return False
        fd = mapped.open_file(pid, file)
        try:
            return self._probes.attach(fd, file.text) is not None
        except NotReadable:
            return False
        except TooManyLibraries as e:
            if file.text not in self._crowded and len(self._crowded) < MAX_FILES_KNOWN:
                self._crowded[file.text] = None
                log.warning("%s", e)
                self.problem = str(e)
            return False
        finally:
            os.close(fd)


def _pids(cgroup: Path) -> list[int]:
    """Processes of a cgroup and of those below it, at most `MAX_PIDS`."""
    found: list[int] = []
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError, ValueError):
            found += map(int, (Path(directory) / "cgroup.procs").read_text().split())
        if len(found) >= MAX_PIDS:
            break
    return found[:MAX_PIDS]
