"""Keeps the rules in force while runs live: applies, reads back, notices changes, repairs, reports.

The rules outlive this process. It never takes them away; what it cannot mend it
says, and it confirms no run meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from aa import cgroup, report
from aa.model import Kind, Layer, RecordType, Report, Run
from aa.nflog import NflogError, NflogReader
from aa.paths import CGROUP_ROOT
from aa.redirect import changes, iptables, refusals, v6
from aa.redirect.iptables import Backend, CannotApply
from aa.redirect.ruleset import V4, V6, Family, RuleSet, refused_packets
from aa.sockdiag import SockDiag

POLL_SECONDS = 1.0
"""The longest time between two looks. A repair takes well below a second, so a flush of
tables that tell nothing (legacy) is mended within two."""
SETTLE_SECONDS = 0.02
"""The shortest time between two looks, so that a storm of changes cannot keep us from work."""
FULL_SECONDS = 10.0
"""The tables are read in full this often even when nothing seems to have changed."""
REPAIR_ATTEMPTS = 3
READ_BATCH = 256
"""Refused packets worked on before the loop may do something else."""
DRAIN_BATCHES = 64
COMPLAINT_SECONDS = 60.0
"""The same problem is reported again only after this long."""
MISSING_LIMIT = 16
"""Differences named in one record."""

log = logging.getLogger(__name__)


class CannotGuard(Exception):
    """The rules cannot be brought into force on this host; `hint` says what would help."""

    def __init__(self, what: str, *, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class Reports(Protocol):
    """Where reports and the state go; `aa.report.Reporter` is one."""

    def report(self, report: Report) -> None: ...

    def set_status(self, state: str, details: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Look:
    """One full reading: what is not as it must be, and how many packets were refused."""

    differences: tuple[str, ...]
    counted: Mapping[Family, int]


@dataclass
class Guard:
    """The rules of this host and what is known of them. Everything here blocks."""

    rules: RuleSet
    backend: Backend
    root: Path = CGROUP_ROOT
    state_dir: Path | None = None
    families: tuple[Family, ...] = ()
    bound: int | None = None
    """The id of the cgroup that the rules were written for; None before."""
    accounts: dict[Family, refusals.Account] = field(default_factory=dict)
    missed: int = 0
    """Packets that older rules refused and that no earlier life of this daemon told of."""
    _changes: changes.Changes | None = None
    _mark: object = None
    _read: float = 0.0

    def start(self) -> None:
        """Brings the rules into force. Raises `CannotGuard`."""
        cgroup.require_unified(self.root)
        slice_id = self._slice()
        for family in (V4, V6):
            file = self.state_dir / f"refused-{family.name}" if self.state_dir else None
            self.accounts[family] = refusals.Account(file)
            self.accounts[family].load()
            self._apply_first(family)
        if slice_id != self._slice():
            raise CannotGuard("the slice changed meanwhile", hint="start it again")
        self.bound = slice_id
        self._sweep_other_backends()
        self._changes = self._watch_changes()

    def notifications(self) -> changes.NfTables | None:
        """What becomes readable when the tables change, where the backend tells."""
        return self._changes if isinstance(self._changes, changes.NfTables) else None

    def close(self) -> None:
        if self._changes is not None:
            self._changes.close()

    def looks_unchanged(self) -> bool:
        """True when nothing was changed since the last full reading, which is recent."""
        if self._slice_or_none() != self.bound or time.monotonic() - self._read > FULL_SECONDS:
            return False
        if V6 not in self.families and v6.why_open():
            return False
        mark = self._watermark()
        return mark is not None and mark == self._mark

    def look(self) -> Look:
        """Reads the tables in full. Raises `CannotApply`."""
        mark, slice_id, began = self._watermark(), self._slice_or_none(), time.monotonic()
        tables = {family: self.backend.read(family) for family in self.families}
        found: list[str] = []
        if slice_id is None:
            found.append(f"the cgroup {self.rules.slice} does not exist")
        elif slice_id != self.bound:
            found.append(f"the cgroup {self.rules.slice} was made again")
        for family, present in tables.items():
            found += self.rules.differences(family, present)
        if V6 not in self.families and (why := v6.why_open()):
            found.append(f"there are no v6 rules and v6 is open: {why}")
        if not found:
            self._mark, self._read = mark, began
        counted = {family: refused_packets(present) for family, present in tables.items()}
        return Look(tuple(found), counted)

    def apply(self) -> None:
        """Writes every rule anew, for the cgroup that the slice is now. Raises `CannotApply`."""
        slice_id = self._slice_or_none()
        if slice_id is None:
            raise CannotApply(f"the cgroup {self.rules.slice} does not exist")
        for family in self._wanted():
            iptables.apply(self.backend, self.rules, family)
            self.accounts[family].reset()
            if family not in self.families:
                self.families = (*self.families, family)
        if slice_id == self._slice_or_none():
            self.bound = slice_id

    def replace(self, rules: RuleSet) -> None:
        """Puts other rules in force, for all families or for none. Raises `CannotApply`."""
        before, self.rules = self.rules, rules
        try:
            self.apply()
        except CannotApply:
            self.rules = before
            self.apply()
            raise

    def _wanted(self) -> tuple[Family, ...]:
        return (V4, V6) if V6 in self.families or v6.why_open() else (V4,)

    def _apply_first(self, family: Family) -> None:
        account = self.accounts[family]
        try:
            self.missed += account.missing(refused_packets(self.backend.read(family)))
            iptables.apply(self.backend, self.rules, family)
            account.reset()
            self.families = (*self.families, family)
        except CannotApply as e:
            why = v6.why_open() if family is V6 else "runs speak IPv4"
            if not why:
                return
            raise CannotGuard(
                f"no {family.name} rules: {e}, and {why}",
                hint="install iptables with a kernel that has xt_cgroup, xt_NFLOG and nat"
                + (", or switch IPv6 off for all interfaces" if family is V6 else ""),
            ) from e

    def _sweep_other_backends(self) -> None:
        """Takes rules of ours out that an earlier life wrote with the other tools."""
        for other in iptables.others(self.backend):
            for family in self.families:
                if not iptables.in_use(other, family):
                    continue
                try:
                    iptables.remove(other, family)
                except CannotApply as e:
                    log.warning("old rules of %s stay: %s", other.kind, e)

    def _watch_changes(self) -> changes.Changes | None:
        try:
            if self.backend.kind == iptables.NF_TABLES.kind:
                return changes.NfTables()
            return changes.Legacy(self.families)
        except (changes.CannotTell, OSError) as e:
            log.warning("the tables are read in full each second: %s", e)
            return None

    def _watermark(self) -> object:
        if self._changes is None:
            return None
        try:
            return self._changes.watermark()
        except changes.CannotTell as e:
            log.warning("%s", e)
            return None

    def _slice_or_none(self) -> int | None:
        return cgroup.cgroup_id(self.rules.slice, self.root)

    def _slice(self) -> int:
        found = self._slice_or_none()
        if found is None:
            raise CannotGuard(
                f"the cgroup {self.rules.slice} does not exist",
                hint="systemctl start aa-agents-proxy.slice",
            )
        return found


class Watcher:
    """The daemon's life around a `Guard`: looks, repairs, reads refusals, confirms runs."""

    def __init__(
        self,
        guard: Guard,
        reports: Reports,
        live_runs: Callable[[], Iterable[Run]],
        *,
        on_status: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.guard = guard
        self.runs = refusals.Runs(live_runs, guard.root)
        self.repairs = 0
        self.lost = 0
        self.problems: list[str] = []
        self._reports = reports
        self._on_status = on_status
        self._authors: set[str] = set()
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._merger = refusals.Merger(reports.report)
        self._sockets = SockDiag()
        self._reader: NflogReader | None = None
        self._unlogged = ""
        self._checked = 0
        self._complaint: tuple[str, float] = ("", 0.0)

    async def watch(self) -> None:
        """Until cancelled. The guard has started before."""
        loop = asyncio.get_running_loop()
        notices = self.guard.notifications()
        if self.guard.missed:
            self._report_gap(self.guard.missed, "nobody read the packet log")
            self.guard.missed = 0
        if notices is not None:
            loop.add_reader(notices.fileno(), self._on_notice)
        try:
            while True:
                await self._tick()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._wake.wait()
                self._wake.clear()
                await asyncio.sleep(SETTLE_SECONDS)
        finally:
            if notices is not None:
                loop.remove_reader(notices.fileno())
            self._close_log()
            self._merger.flush_all()
            self._save_accounts()

    async def check(self) -> list[str]:
        """Looks now, repairs what is wrong, and says what stays wrong; empty when all is well."""
        async with self._lock:
            if self.problems or not await asyncio.to_thread(self.guard.looks_unchanged):
                await self._look_and_repair()
            return list(self.problems)

    async def why_not(self, run: Run) -> str:
        """Why this run's packets would not all go to the proxy; "" when they do."""
        problems = await self.check()
        if problems:
            return "; ".join(problems)
        where = self.guard.rules.slice
        if not run.cgroup.startswith(where + "/"):
            return f"its cgroup {run.cgroup!r} is not below {where}"
        found = cgroup.cgroup_id(run.cgroup, self.guard.root)
        if found is None or found != run.cgroup_id:
            return f"its cgroup {run.cgroup} has the id {found}, not {run.cgroup_id}"
        return ""

    async def replace(self, rules: RuleSet) -> None:
        """Other rules, after a reload. Raises `CannotApply`; the old ones stay then."""
        async with self._lock:
            self._settle_accounts((await asyncio.to_thread(self.guard.look)).counted)
            await asyncio.to_thread(self.guard.replace, rules)
            await self._look_and_repair()

    async def _tick(self) -> None:
        self._open_log()
        await self.check()
        self._merger.flush(time.monotonic())
        self._save_accounts()
        self._tell_status()

    def _on_notice(self) -> None:
        self._gather_authors()
        self._wake.set()

    def _gather_authors(self) -> None:
        """Who changed the tables since we last asked, as far as the backend tells."""
        notices = self.guard.notifications()
        if notices is None:
            return
        try:
            self._authors |= notices.authors()
        except changes.CannotTell as e:
            log.warning("%s", e)

    async def _look_and_repair(self) -> None:
        started = time.monotonic()
        self._gather_authors()
        authors, self._authors = self._authors, set()
        first: tuple[str, ...] = ()
        look = Look((), {})
        try:
            for _ in range(REPAIR_ATTEMPTS):
                look = await asyncio.to_thread(self.guard.look)
                self._settle_accounts(look.counted)
                if not look.differences:
                    break
                first = first or look.differences
                await asyncio.to_thread(self.guard.apply)
            self.problems = list(look.differences)
        except CannotApply as e:
            self.problems = list(dict.fromkeys([*first, str(e)]))
        self._checked = report.now()
        if self.problems:
            self._complain(authors)
        elif first:
            self.repairs += 1
            self._report_repair(first, authors, time.monotonic() - started)
        self._gather_authors()
        self._authors.clear()  # these were our own repairs

    def _settle_accounts(self, counted: Mapping[Family, int]) -> None:
        """Makes a gap record when the rules refused more packets than were read from the log."""
        if not self._drain():
            return  # so many come in that the counts cannot be compared now
        for family, packets in counted.items():
            missing = self.guard.accounts[family].missing(packets)
            if missing:
                self._report_gap(missing, self._unlogged or "the packet log overflowed")

    def _report_gap(self, missing: int, why: str) -> None:
        self.lost += missing
        self._reports.report(refusals.gap(missing, why))

    def _open_log(self) -> None:
        if self._reader is not None:
            return
        try:
            self._reader = NflogReader(self.guard.rules.nflog_group)
        except (NflogError, OSError) as e:
            self._unlogged = str(e)
            log.warning("refused packets are counted but not seen: %s", e)
            return
        self._unlogged = ""
        asyncio.get_running_loop().add_reader(self._reader.fileno(), self._read_log)

    def _close_log(self) -> None:
        if self._reader is not None:
            asyncio.get_running_loop().remove_reader(self._reader.fileno())
            self._reader.close()
            self._reader = None

    def _read_log(self) -> None:
        if self._reader is None:
            return
        try:
            batch = self._reader.read(READ_BATCH)
        except NflogError as e:
            log.warning("%s", e)
            self._close_log()
            return
        now = time.monotonic()
        for logged in batch:
            family = V4 if logged.packet.version == 4 else V6
            if family in self.guard.accounts:
                self.guard.accounts[family].read(1)
            culprit = refusals.attribute(logged, self.runs, self._sockets)
            self._merger.take(refusals.refusal(logged, culprit), now)

    def _drain(self) -> bool:
        """Reads the log until nothing waits; False when that does not come to an end."""
        for _ in range(DRAIN_BATCHES):
            self._read_log()
            if self._reader is None or self._reader.drained:
                return True
        return False

    def _save_accounts(self) -> None:
        for account in self.guard.accounts.values():
            try:
                account.save()
            except OSError as e:
                log.warning("the count of refused packets cannot be kept: %s", e)

    def _report_repair(self, missing: Sequence[str], authors: set[str], seconds: float) -> None:
        by = f" by {', '.join(sorted(authors))}" if authors else ""
        reason = f"the firewall was changed{by}: {missing[0]}; put back within {seconds:.2f} s"
        log.warning("%s", reason)
        self._alert(reason, missing, authors)

    def _complain(self, authors: set[str]) -> None:
        text, now = "; ".join(self.problems), time.monotonic()
        if self._complaint[0] == text and now - self._complaint[1] < COMPLAINT_SECONDS:
            return
        self._complaint = (text, now)
        log.error("the rules are not in force: %s", text)
        reason = f"the rules are not in force and no run is confirmed: {text}"
        self._alert(reason, self.problems, authors)

    def _alert(self, reason: str, missing: Sequence[str], authors: set[str]) -> None:
        attributes = {
            "missing": list(missing[:MISSING_LIMIT]),
            "changed_by": sorted(authors)[:MISSING_LIMIT],
            "backend": self.guard.backend.kind,
        }
        self._reports.report(
            Report(
                type=RecordType.ALERT,
                layer=Layer.PROXY,
                kind=Kind.GUARD,
                target="redirect",
                time=report.now(),
                rule=refusals.RULE,
                reason=reason,
                attributes=attributes,
            )
        )

    def _tell_status(self) -> None:
        families = [family.name for family in self.guard.families]
        problems = self.problems + ([self._unlogged] if self._unlogged else [])
        self._reports.set_status(
            "degraded" if problems else "ok",
            {
                "backend": self.guard.backend.kind,
                "families": families,
                "slice": self.guard.rules.slice,
                "checked": self._checked,
                "repairs": self.repairs,
                "lost": self.lost,
                "problems": problems,
            },
        )
        in_force = "rules in force" if not self.problems else "RULES NOT IN FORCE"
        text = f"{in_force} ({self.guard.backend.kind}, {' '.join(families)})"
        if self.repairs:
            text += f", {self.repairs} repairs"
        self._on_status(text + "".join(f"; {problem}" for problem in problems))
