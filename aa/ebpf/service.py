"""The service: follows runs and slices, proves its rung again and again, and reports what the kernel tells."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from aa import cgroup, paths
from aa.config import Config
from aa.daemon import CannotStart, Daemon
from aa.ebpf import capability, events, libbpf, tables
from aa.ebpf.canary import Canary, Proof
from aa.ebpf.events import Event, Exec, Exit, File, Files, MalformedRecord, Mapped, Net, Recorded
from aa.ebpf.ledger import Ledger
from aa.ebpf.loader import PIN_DIR, AlreadyRunning, Loader, NoPinDirectory, Place, Slices
from aa.ebpf.merge import Detail, Hold, Merged, Merger, RecentRuns
from aa.ebpf.reader import RingReader
from aa.ebpf.reports import UNKNOWN_RUN, equal_key, to_report
from aa.ebpf.tls.capture import Capture
from aa.ebpf.tls.probes import Probes
from aa.ebpf.told import Told
from aa.model import Kind, Layer, RecordType, Report, Run, Rung, RunState
from aa.report import Reporter, RunTable, Unreachable, confirm_run
from aa.varlink import VarlinkError

COMPONENT = "ebpf"

WATCH_SECONDS = 1.0
"""Between two looks at the slices and the counters."""
FLUSH_SECONDS = 0.1
"""Between two looks at events that wait to be merged or named."""
CANARY_SECONDS = 60.0
CANARY_RETRY_SECONDS = 5.0
"""After a canary that proved less than the one before could."""
FIRST_PROOF_SECONDS = 8.0
"""How long a starting run may wait for the first canary."""
LINGER_SECONDS = 30.0
"""How long file calls are still watched after the last run: it costs every task of the machine."""
FRESH_PROOF_SECONDS = 8.0
"""How long it waits for a further canary before it is refused."""
MAX_BEGUN = 4096
MAX_PROGRAMS_KNOWN = 4096
"""Processes whose program is remembered until they exit."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things are; the defaults are those of an installed host."""

    pins: Path = PIN_DIR
    objects: Path = paths.BPF_OBJECTS_DIR
    slices: Slices = field(default_factory=Slices)
    gateway: Path = paths.ENFORCE_SOCKET
    ends: tuple[tables.End, ...] = field(default_factory=tables.proxy_ends)
    dns_port: int = paths.DNS_PORT
    linger: float = LINGER_SECONDS


def settings_from(config: Config) -> Settings:
    """Settings of a host with this configuration. Raises `CannotStart`."""
    try:
        ends = tables.proxy_ends(config.listen)
    except ValueError as e:
        raise CannotStart(str(e), hint="mend [listen] in agent-assembly.toml") from e
    return Settings(gateway=config.gateway.socket, dns_port=config.listen.dns_port, ends=ends)


class KernelLayer:
    """One life of the service, between `start` and `stop`."""

    def __init__(self, settings: Settings, daemon: Daemon) -> None:
        self._settings = settings
        self._daemon = daemon
        self.loader = Loader(pins=settings.pins, objects=settings.objects, slices=settings.slices)
        self.reporter = Reporter(COMPONENT, socket=settings.gateway)
        self.runs = RunTable(socket=settings.gateway, on_run=self._on_run)
        self.canary = Canary(self.loader, settings.dns_port)
        self.rung = Rung.OFF
        self.problems: tuple[str, ...] = ("not proved yet",)
        self._proof: Proof | None = None
        self._proved = asyncio.Event()
        self._prove_now = asyncio.Event()
        self._landed = asyncio.Event()
        """Of the canary that flies now; the next has another."""
        self._flights = 0
        self._begun: OrderedDict[int, None] = OrderedDict()
        """Runs of which an exec was seen; before that systemd makes their sandbox."""
        self._merger: Merger[Recorded] = Merger()
        self._detail = Detail()
        self._waiting = asyncio.Event()
        """Set while an event waits to be merged or named."""
        self._hold: Hold[tuple[Recorded, int]] = Hold()
        self._recent: RecentRuns[Run] = RecentRuns()
        self._programs: OrderedDict[int, str] = OrderedDict()
        self._missed = 0
        self._lost = 0
        self._swept = -1
        self._needed = time.monotonic()
        """When a run that is observed was there last."""
        self._told_runs = False
        """Whether the gateway has told which runs there are; until then there may be some."""
        self._probes_together = False
        self._boot = _boot_time()
        self.tls = Capture(
            lambda: Probes(
                settings.objects, self.loader.shared_maps(), together=self._probes_together
            ),
            runs=lambda: self.runs,
            run_of=self._run_of,
            cgroups=settings.slices.root,
            report=self.reporter.report,
            gap=self._tls_gap,
            alert=partial(self._lifecycle, alert=True),
            boot=lambda: self._boot,
        )

    # -- life

    async def run(self) -> None:
        """Until the daemon is to stop. Raises `CannotStart`."""
        self._start()
        reader = RingReader(self.loader.ring_fd, self.take)
        self._reader = reader
        reader.start()
        tasks = [
            asyncio.create_task(coroutine, name=name)
            for name, coroutine in (
                ("reporter", self.reporter.run()),
                ("runs", self.runs.follow()),
                ("watch", self._watch()),
                ("flush", self._flush_often()),
                ("canary", self._prove_often()),
                ("tls", self.tls.run()),
            )
        ]
        stop = asyncio.create_task(self._daemon.stop.wait())
        try:
            await self._first_proof()
            self._daemon.ready(self._status_text())
            done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                raise task.exception() or RuntimeError(f"{task.get_name()} ended")
        finally:
            stop.cancel()
            await self._stop(reader, tasks)

    def _start(self) -> None:
        try:
            cgroup.require_unified(self._settings.slices.root)
            self.loader.open()
        except (cgroup.NoUnifiedCgroup, NoPinDirectory, AlreadyRunning) as e:
            raise CannotStart(str(e)) from e
        self._probes_together = libbpf.has_uprobe_multi()
        if self._probes_together:
            # Older kernels want it for each probe in a library, newer ones for nothing that we do.
            capability.give_up(capability.SYS_ADMIN)
        try:
            self.loader.load(self._settings.ends)
            self._told = Told(self.loader)
            self._ledger = Ledger(self._told.reported())
        except (OSError, KeyError) as e:
            raise CannotStart(
                f"the BPF programs cannot be loaded: {e}",
                hint="the kernel must have BTF (/sys/kernel/btf/vmlinux) and cgroup BPF",
            ) from e

    async def _stop(self, reader: RingReader, tasks: Iterable[asyncio.Task[None]]) -> None:
        """Ends in order: read, report, close. What is pinned stays."""
        await reader.stop()
        self._flush(float("inf"))
        tasks = list(tasks)
        for task in tasks:
            if task.get_name() == "tls":  # tells its last requests
                task.cancel()
                await asyncio.wait([task])
        await self.reporter.close()
        self._save()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._told_runs and not self._observing:
            self.loader.watch_files(False)
        self.loader.close()

    # -- events

    def take(self, batch: list[bytes]) -> None:
        """Records of the ring, in its order."""
        malformed = 0
        now = time.monotonic()
        for record in batch:
            try:
                self._accept(events.decode(record), now)
            except MalformedRecord as e:
                malformed += 1
                log.error("a record that cannot be read: %s", e)
        if malformed:
            self.reporter.lost(malformed)

    def _accept(self, event: Event, now: float) -> None:
        count = 1
        if isinstance(event, Net) and event.total:
            count = self._told.more(event.raw_key, event.total)
        self._account(self._ledger.read, event, count)
        self._remember(event)
        self.tls.noticed(event)
        if (
            isinstance(event, Mapped)
            or self.canary.saw(event.head.cgroup, event)
            or self._is_preparation(event)
        ):
            self._account(self._ledger.dismiss, event, count)
        elif count:
            self._name(event, count, now)

    def _is_preparation(self, event: Event) -> bool:
        """Whether it is systemd that makes a run's sandbox, in the run's cgroup: that is over with
        the first exec there, and no act of the run."""
        cgroup_id = event.head.cgroup
        if isinstance(event, Exec):
            self._begun[cgroup_id] = None
            if len(self._begun) > MAX_BEGUN:
                self._begun.popitem(last=False)
        if not isinstance(event, File) or cgroup_id in self._begun or not self.runs.synchronised:
            return False
        run = self._run_of(cgroup_id)
        return run is None or run.state in (RunState.REGISTERED, RunState.STARTING)

    def _remember(self, event: Event) -> None:
        if isinstance(event, Exec) and event.head.pid:
            self._programs[event.head.pid] = event.filename
            self._programs.move_to_end(event.head.pid)
            if len(self._programs) > MAX_PROGRAMS_KNOWN:
                self._programs.popitem(last=False)

    def _program(self, event: Recorded) -> str:
        return self._programs.get(event.head.pid, "")

    def _name(self, event: Recorded, count: int, now: float) -> None:
        """Merges an event whose run is known; the others wait for the run table."""
        self._waiting.set()
        cgroup_id = event.head.cgroup
        if cgroup_id and self._run_of(cgroup_id) is None:
            overflow = self._hold.add(cgroup_id, (event, count), now)
            if overflow is not None:
                self._merge(*overflow, now)
            return
        if len(self._hold):
            self._release(now)  # what the same run did earlier comes first
        self._merge(event, count, now)

    def _release(self, now: float) -> None:
        for event, count in self._hold.ready(lambda c: self._run_of(c) is not None, now):
            self._merge(event, count, now)

    def _run_of(self, cgroup_id: int) -> Run | None:
        return self.runs.by_cgroup(cgroup_id) or self._recent.get(cgroup_id)

    def _merge(self, event: Recorded, count: int, now: float) -> None:
        run = self._run_of(event.head.cgroup)
        refused = isinstance(event, Net) and event.refused
        if run is not None and Layer.KERNEL not in run.layers and not refused:
            # Guarded as every proxied run is, but not to be observed.
            self._account(self._ledger.dismiss, event, count)
            return
        if isinstance(event, File):
            event = self._as_told(event, now)
        key = equal_key(event, self._program(event))
        full = self._merger.add(key, event, count, now)
        if full is not None:
            self._report(full)

    def _as_told(self, event: File, now: float) -> File:
        """The event itself, or, when its run touches too many files, what stands for it."""
        cgroup_id = event.head.cgroup
        if equal_key(event, "") in self._merger or self._detail.file(cgroup_id, now):
            return event
        event = event.of_directory()
        if equal_key(event, "") in self._merger or self._detail.directory(cgroup_id, now):
            return event
        return event.of_run()

    def _report(self, merged: Merged[Recorded]) -> None:
        event = merged.first
        run = self._run_of(event.head.cgroup)
        self.reporter.report(
            to_report(
                merged,
                run=run.id if run else UNKNOWN_RUN,
                program=self._program(event),
                boot=self._boot,
            )
        )
        self._account(self._ledger.report, event, merged.count)
        if isinstance(event, Exit):
            self._programs.pop(event.head.pid, None)

    @staticmethod
    def _account(book: Callable[..., None], event: Event, count: int) -> None:
        """Enters an event in one of the ledger's books, in the column that the kernel counts it in."""
        tallied = isinstance(event, Net | Files) and event.total
        column = "tallied" if tallied else "events"
        book(events.kind_of(event), **{column: count})

    def _flush(self, now: float) -> None:
        self._release(now)
        for merged in self._merger.due(now):
            self._report(merged)

    async def _flush_often(self) -> None:
        while True:
            await self._waiting.wait()
            await asyncio.sleep(FLUSH_SECONDS)
            self._flush(time.monotonic())
            if not len(self._merger) and not len(self._hold):
                self._waiting.clear()

    # -- accounts

    def _sweep_tallies(self, counts: dict[int, tables.Count]) -> None:
        """Takes what the tallies counted beyond what the ring told."""
        tallied = sum(c.tallied for c in counts.values())
        if tallied == self._swept:
            return
        self._swept = tallied
        now, at = time.monotonic(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for raw, count in self._told.sweep(self.loader.tallies()):
            event = events.of_tally(raw, count, at)
            self._account(self._ledger.read, event, count)
            if self.canary.saw(event.head.cgroup, None):
                self._account(self._ledger.dismiss, event, count)
            else:
                self._name(event, count, now)

    def _settle(self) -> None:
        """Compares accounts with the kernel; what is missing becomes a gap."""
        counts = self.loader.counts()
        self._sweep_tallies(counts)
        for gap in self._ledger.gaps(counts, idle=self._reader.idle):
            self._lost += gap.count
            log.warning(
                "%d events (%s) are missing: %s",
                gap.count,
                events.KIND_NAMES.get(gap.kind, gap.kind),
                gap.why,
            )
            self._gap(gap.count, events.KIND_NAMES.get(gap.kind, "event"), gap.why)
        missed = self.loader.missed()
        if missed > self._missed:
            self._gap(missed - self._missed, "tracing", "a program was busy on that CPU")
            self._lost += missed - self._missed
        self._missed = missed
        self._save()

    def _gap(self, count: int, what: str, why: str) -> None:
        self.reporter.report(
            Report(
                type=RecordType.GAP,
                layer=Layer.KERNEL,
                kind=Kind.GUARD,
                target=COMPONENT,
                time=time.time_ns(),
                count=count,
                reason=f"{count} {what} events lost: {why}",
            )
        )

    def _tls_gap(self, count: int, why: str) -> None:
        self._gap(count, "TLS", why)

    def _save(self) -> None:
        """What the gateway has answered for need not be a gap when we are killed."""
        if not self.reporter.spooled:
            self._ledger.settle()
        self._told.save(self._ledger.settled)

    # -- slices and rung

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._reader.failure is not None:
                raise self._reader.failure
            self._boot = _boot_time()  # the clock may have been set
            self._follow_slices()
            self._watch_files()
            self._settle()
            self._tell()

    def _follow_slices(self) -> None:
        done = self.loader.refresh()
        if not done:
            return
        text = "; ".join(done)
        log.warning("%s", text)
        self._lifecycle(f"attached again: {text}", alert=False)
        self._prove_now.set()

    @property
    def _observing(self) -> bool:
        """Whether there is a run to be observed, as far as the gateway told."""
        return any(Layer.KERNEL in run.layers for run in self.runs)

    def _watch_files(self) -> None:
        """File calls are seen while there is a run to be observed."""
        now = time.monotonic()
        self._told_runs |= self.runs.synchronised
        wanted = self._observing
        if wanted:
            self._needed = now
        elif self.loader.files_watched:
            wanted = not self._told_runs or now - self._needed < self._settings.linger
        if self.loader.watch_files(wanted):
            self._prove_now.set()

    async def _prove_often(self) -> None:
        while True:
            self._prove_now.clear()
            before = self.rung
            self._proof = await self.canary.fly()
            self._judge()
            self._proved.set()
            self._flights += 1
            self._landed.set()
            self._landed = asyncio.Event()
            pause = CANARY_SECONDS if not self.problems else CANARY_RETRY_SECONDS
            if before != self.rung:
                self._tell()
            try:
                async with asyncio.timeout(pause):
                    await self._prove_now.wait()
            except TimeoutError:
                continue

    async def _first_proof(self) -> None:
        try:
            async with asyncio.timeout(FIRST_PROOF_SECONDS):
                await self._proved.wait()
        except TimeoutError:
            log.warning("no canary has come back yet")

    async def _prove_anew(self) -> None:
        """Waits for a canary that is sent out after this call, for a while."""
        under_way = self._flights + 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FRESH_PROOF_SECONDS):
                while self._flights <= under_way:
                    self._prove_now.set()
                    await self._landed.wait()

    def _judge(self) -> None:
        """The rung that is proved and in place now, and what keeps it from being higher."""
        seeing = self._problems(Place.TRACEPOINT, Place.CALLS, Place.AGENTS)
        guarding = self._problems(Place.PROXY)
        if self._proof is not None:
            seeing += self._proof.observe
            guarding += self._proof.guard
        else:
            seeing += ("not proved yet",)
        before = self.rung
        if seeing:
            self.rung = Rung.OFF
        else:
            self.rung = Rung.OBSERVE if guarding else Rung.CGROUP
        self.problems = tuple(dict.fromkeys(seeing + guarding))
        if before != self.rung:
            ladder = list(Rung)
            worse = ladder.index(self.rung) > ladder.index(before)
            why = f": {'; '.join(self.problems)}" if self.problems else ""
            log.log(logging.ERROR if worse else logging.INFO, "rung %s%s", self.rung, why)
            self._lifecycle(f"rung {before} became {self.rung}{why}", alert=worse)

    def _problems(self, *places: Place) -> tuple[str, ...]:
        return tuple(p for place in places for p in self.loader.problems(place))

    def _lifecycle(self, text: str, *, alert: bool) -> None:
        self.reporter.report(
            Report(
                type=RecordType.ALERT if alert else RecordType.LIFECYCLE,
                layer=Layer.KERNEL,
                kind=Kind.GUARD,
                target=COMPONENT,
                time=time.time_ns(),
                reason=text,
            )
        )

    def _tell(self) -> None:
        self._judge()
        details = {
            "rung": self.rung.value,
            "problems": [*self.problems, *filter(None, [self.tls.problem])],
            "tls": self.tls.status(),
            "refused_programs": dict(self.loader.refused),
            "ends": sorted(str(end) for end in self._settings.ends),
            "events_lost": self._lost,
            "libbpf": libbpf.version(),
        }
        self.reporter.set_status(f"rung {self.rung.value}", details)
        self._daemon.status(self._status_text())

    def _status_text(self) -> str:
        text = f"rung {self.rung.value}"
        if self.problems:
            text += f": {self.problems[0]}"
            if len(self.problems) > 1:
                text += f" (and {len(self.problems) - 1} more)"
        if self._lost:
            text += f"; {self._lost} events lost"
        return text

    # -- runs

    async def _on_run(self, run: Run) -> None:
        if run.state is RunState.ENDED:
            self._recent.add(run.cgroup_id, run, time.monotonic())
        elif run.state is RunState.STARTING and Layer.KERNEL in run.layers:
            await self._confirm(run)

    async def _confirm(self, run: Run) -> None:
        await self._first_proof()
        await self.tls.prepare()
        reason = self.verify(run)
        if reason:  # what was not seen in a bad moment may be seen now
            await self._prove_anew()
            reason = self.verify(run)
        try:
            await confirm_run(run.id, COMPONENT, not reason, reason, socket=self._settings.gateway)
        except (*Unreachable, VarlinkError) as e:
            log.warning("run %s could not be confirmed: %s", run.id, e)

    def verify(self, run: Run) -> str:
        """Why the kernel layer cannot vouch for a run; "" when it does."""
        slices = self._settings.slices
        self._follow_slices()
        self._watch_files()
        self._judge()
        if not run.cgroup.startswith(slices.agents + "/"):
            return f"its cgroup {run.cgroup} is not below {slices.agents}"
        if cgroup.cgroup_id(run.cgroup, slices.root) != run.cgroup_id:
            return f"its cgroup {run.cgroup} is another one than was announced"
        if self.rung is Rung.OFF:
            return f"the kernel layer is off: {'; '.join(self.problems)}"
        if run.cgroup.startswith(slices.proxy + "/") and self.rung is not Rung.CGROUP:
            return f"the egress guard is not proved: {'; '.join(self.problems)}"
        return ""


def _boot_time() -> int:
    """The time of the boot, in nanoseconds since the epoch, as the clocks say now."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
