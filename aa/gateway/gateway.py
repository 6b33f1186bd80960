"""The gateway's state and its decisions, without any socket: the interfaces are in front of it."""

from __future__ import annotations

import asyncio
import logging
import pwd
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aa import cgroup
from aa import config as configuration
from aa.audit import record as audit_record
from aa.audit.file import read_backwards
from aa.audit.log import AuditLog, AuditUnavailable
from aa.audit.record import NOBODY, Record, Subject, timestamp
from aa.config import Config
from aa import prices
from aa.gateway.approvals import (
    Approval,
    Approvals,
    ApprovalsUnavailable,
    Operator,
    State,
    TooManyPending,
    question,
)
from aa.gateway.budget import Budgets
from aa.gateway.counters import Counters
from aa.gateway.explained import Explained
from aa.gateway.limits import Limits
from aa.gateway.runs import Halt, RunRegistry
from aa.gateway.source import PolicySource
from aa.model import (
    COMPONENTS,
    Action,
    Decision,
    Effect,
    Kind,
    Layer,
    Mode,
    RecordType,
    Report,
    Run,
    RunState,
    deny,
)
from aa.policy import Policy
from aa.policy.compile import Share
from aa.policy.replay import seen_action
from aa.tomlfile import InvalidFile, Problem

DENIALS_KEPT = 50
"""Recent denials of a run that `aasm why` can show."""
SAME_DENIAL = ("layer", "kind", "target", "rule", "reason")
RECORDS_READ = 20_000
"""Records read back at start, to know again what runs that live on were denied and allowed."""
REGISTERED_SECONDS = 60.0
"""How long a run may stay without a cgroup before it is given up."""
GONE_SECONDS = 15.0
"""How long after its cgroup's end aa-launch, which knows the exit code, is waited for."""
SUBJECTS_KEPT = 1024
USER_RUN_PREFIX = "user/"
USED = (Kind.NET_CONNECT, Kind.LLM_REQUEST)
"""Kinds whose reports tell what a run used."""
NOT_ASKED = (Kind.DNS_QUERY,)
"""Kinds for which an `ask` has no approval of its own: the connection that follows is asked about."""
BUDGETED = (RecordType.OBSERVED,)
"""Reports that are counted instead of kept while their run is over its audit budget. Refusals are
counted by who makes them."""

NO_POLICY_REASON = (
    "no policy is in force, so everything is denied; choose one with "
    "`aasm policy use observe|coding-agent|locked-down`"
)

log = logging.getLogger(__name__)


class RunUnknown(Exception):
    """No run has this id."""


class LayerNotReady(Exception):
    """A component did not confirm a run."""

    def __init__(self, component: str, reason: str) -> None:
        self.component = component
        self.reason = reason
        super().__init__(f"{component}: {reason}")


class TooManyRuns(Exception):
    """A limit of live runs is reached: all, or those that one user started."""

    def __init__(self, reason: str, limit: str) -> None:
        self.limit = limit
        super().__init__(f"{reason} ({limit})")


@dataclass
class Component:
    """What a component last said of itself."""

    name: str
    state: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    seen: int = 0  # nanoseconds since the epoch
    lost: int = 0


@dataclass
class Barrier:
    """Who has confirmed a run that starts."""

    needed: frozenset[str]
    confirmed: set[str] = field(default_factory=set)
    refused: tuple[str, str] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Gateway:
    """One object with the state; single-threaded, so every decision sees one policy."""

    def __init__(
        self,
        *,
        config: Config,
        policies: Path,
        registry: RunRegistry,
        audit: AuditLog,
        limits: Limits | None = None,
        approvals: Approvals | None = None,
    ) -> None:
        self.config = config
        self.registry = registry
        self.audit = audit
        self.components: dict[str, Component] = {}
        self.config_problems: list[Problem] = []
        self.decisions = 0
        self.denied = 0
        self.started = time.time()
        self.source = PolicySource(policies, self._policy_changed)
        self._barriers: dict[str, Barrier] = {}
        self._denials: dict[str, deque[Record]] = {}
        self._budget_of: Config | None = None
        self._budget_is = (0.0, 0.0)
        self.budgets = Budgets(self._budget)
        self.limits = limits or Limits(Counters(Path(":memory:")), prices.load)
        self.explained = Explained()
        self._subjects: dict[str, tuple[Run, Subject]] = {}
        self._watchers: set[Callable[[Run], None]] = set()
        self._missing: dict[str, float] = {}
        """Since when a run's cgroup is gone, on the monotonic clock."""
        self.on_status: Callable[[], None] = lambda: None
        self.on_policy: Callable[[Policy], None] = lambda policy: None
        """Called with each policy that comes into force."""
        self._recall()
        self.approvals = approvals or Approvals(Path(":memory:"))
        self.approvals.watch(self._approval_changed)
        self.approvals.withdraw_all_but(lambda run: self.run_for(run) is not None)

    # -- decisions

    def decide(
        self,
        run_id: str,
        layer: Layer,
        action: Action,
        *,
        provisional: bool = False,
        approval: str = "",
    ) -> Decision:
        """Decides and records. Every failure on the way is a denial.

        With `provisional` an allow leaves no record, and nobody is asked: the caller decides again.
        `approval` is the one that an earlier step of the same action had.
        """
        run = self.run_for(run_id)
        if run is None:
            decision = deny("this process belongs to no known run", rule="<unknown-run>")
            return self._record_decision(Subject(run_id), layer, action, decision)
        refused = self.over_budget(run)
        if refused is not None:
            return refused
        try:
            halt = self.registry.halt
            if halt is None:
                decision = self._evaluate(run, layer, action, provisional, approval)
            else:
                decision = self._halted(halt)
        except Exception as e:  # whatever goes wrong inside the engine, the answer is deny
            log.exception("deciding %s %r", action.kind, action.target)
            decision = deny(f"the policy engine failed: {e!r}", rule="<engine-error>")
        if provisional and decision.effect is not Effect.DENY:
            return decision
        return self._record_decision(self._subject(run), layer, action, decision)

    def _subject(self, run: Run) -> Subject:
        """Made once for each state of a run."""
        known = self._subjects.get(run.id)
        if known is None or known[0] is not run:
            if len(self._subjects) >= SUBJECTS_KEPT:
                self._subjects.clear()
            known = self._subjects[run.id] = (run, Subject.of(run))
        return known[1]

    def _evaluate(
        self, run: Run, layer: Layer, action: Action, provisional: bool, approval: str
    ) -> Decision:
        policy = self.source.policy
        if policy is None:
            return deny(NO_POLICY_REASON, rule="<no-policy>")
        now = time.time()
        decision = policy.decide(run, action, now=now)
        if policy.judges_models(run):
            decision = self.limits.unseen(action, decision)
        limits = policy.limits(run)
        if limits:
            decision = self.limits.judge(limits, run, action, decision, now)
        if decision.effect is Effect.ASK and action.kind not in NOT_ASKED:
            decision = self._asked(policy, run, layer, action, decision, provisional, approval)
            if limits and decision.permits:
                decision = self.limits.judge(limits, run, action, decision, now)
        return decision

    def _asked(
        self,
        policy: Policy,
        run: Run,
        layer: Layer,
        action: Action,
        decision: Decision,
        provisional: bool,
        continues: str,
    ) -> Decision:
        """What becomes of an `ask`: a person said yes or no already, or is asked."""
        now = time.time()
        asked = question(run.id, action, decision, lambda less: policy.decide(run, less, now=now))
        try:
            found = self.approvals.find(run.id, asked, continues)
            if provisional and (found is None or found.state is State.PENDING):
                return decision
            if found is None:
                found = self.approvals.ask(
                    run,
                    layer,
                    action,
                    asked,
                    decision,
                    self.approvals.terms(policy, asked.rules),
                    per_run=self.config.gateway.max_pending_approvals_per_run,
                    in_all=self.config.gateway.max_pending_approvals,
                )
            elif not provisional:
                found = self.approvals.use(found)
        except TooManyPending as e:
            reason = f"{decision.reason}; but {e}, so it is denied"
            return replace(decision, effect=Effect.DENY, rule=f"<limit:{e.limit}>", reason=reason)
        except ApprovalsUnavailable as e:
            return replace(decision, effect=Effect.DENY, rule="<approvals>", reason=str(e))
        return _answered(decision, found)

    def _halted(self, halt: Halt) -> Decision:
        return deny(
            f"{halt}; `aasm halt --release` ends that",
            rule="<halted>",
            policy=self.source.revision,
        )

    def _record_decision(
        self, subject: Subject, layer: Layer, action: Action, decision: Decision
    ) -> Decision:
        """The record comes before the answer; without a record nothing is allowed or asked."""
        self.decisions += 1
        record = audit_record.of_decision(subject, layer, action, decision, time.time_ns())
        try:
            size = self.audit.write(record)
        except AuditUnavailable as e:
            self.denied += 1
            if decision.effect is Effect.ASK and decision.approval:
                self._withdraw(decision.approval)
            return deny(f"{e}, so nothing is allowed", rule="<audit>", policy=decision.policy)
        if subject.uid >= 0:
            self.budgets.recorded(subject.run, size)
        if decision.effect is Effect.DENY:
            self.denied += 1
            self._remember_denial(record)
        if decision.permits:
            self.explained.decided(subject.run, action, now=time.time())
        return decision

    def run_for(self, run_id: str) -> Run | None:
        """A live run, or the pseudo-run of a user who may use the explicit proxy port."""
        run = self.registry.get_live(run_id)
        if run is not None or not run_id.startswith(USER_RUN_PREFIX):
            return run
        name = run_id.removeprefix(USER_RUN_PREFIX)
        if name not in self.config.proxy.explicit_users:
            return None
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            return None
        return Run(run_id, "", name, user.pw_uid, user.pw_dir, frozenset((Layer.PROXY,)))

    def _budget(self) -> tuple[float, float]:
        config = self.config
        if self._budget_of is not config:
            self._budget_of = config
            self._budget_is = (
                float(config.gateway.decisions_per_second),
                float(config.audit.bytes_per_second_per_run),
            )
        return self._budget_is

    def over_budget(self, run: Run) -> Decision | None:
        """The denial of a run that asks too much, counted instead of recorded; None for others."""
        refusal = self.budgets.refusal(run.id)
        if not refusal:
            return None
        if refusal == "decisions_per_second":
            limit = self.config.gateway.decisions_per_second
            reason = f"run {run.id} asks for more than {limit} decisions a second; slow down, or "
            reason += "raise gateway.decisions_per_second in agent-assembly.toml"
        else:
            bound = self.config.audit.bytes_per_second_per_run
            reason = (
                f"run {run.id} fills the audit log with more than {bound} bytes a second; slow "
            )
            reason += "down, or raise audit.bytes_per_second_per_run in agent-assembly.toml"
        return deny(reason, rule=f"<limit:{refusal}>", policy=self.source.revision)

    def flush_over_budget(self) -> None:
        """A record per run for what its budgets refused or left out since the last call."""
        for run, spent in self.budgets.over():
            refusals = (
                ("decisions_per_second", "the run asked for more decisions than its limit"),
                ("audit_bytes_per_second", "the run filled the audit log beyond its limit"),
            )
            counts = (spent.refused, spent.refused_for_audit)
            for (limit, reason), count in zip(refusals, counts, strict=True):
                if count:
                    self._write_count(RecordType.REFUSAL, run, limit, reason, count)
            if spent.not_recorded:
                reason = (
                    f"{spent.not_recorded} records of what the run did are left out: it filled "
                )
                reason += "the audit log beyond its limit"
                self._write_count(
                    RecordType.GAP, run, "audit_bytes_per_second", reason, spent.not_recorded
                )
        self.budgets.forget_all_but(lambda run: self.run_for(run) is not None)

    def _write_count(
        self, type_: RecordType, run: str, limit: str, reason: str, count: int
    ) -> None:
        refusal = type_ is RecordType.REFUSAL
        self.write_report(
            Report(
                type=type_,
                layer=Layer.GATEWAY,
                kind=Kind.GUARD,
                target=limit,
                time=time.time_ns(),
                run=run,
                effect=Effect.DENY if refusal else None,
                rule=f"<limit:{limit}>",
                reason=reason,
                count=count,
            )
        )

    # -- approvals

    async def wait_approval(self, run_id: str, approval_id: str, seconds: float) -> Decision:
        """What a person said, decided again with the policy of now; an `ask` while nobody has said
        anything within `seconds`. Raises `ApprovalUnknown`."""
        found = await self.approvals.wait(approval_id, run_id, seconds)
        waiting = Decision(Effect.ASK, found.reason, found.rules[0], found.policy)
        if found.state is State.PENDING:
            return _answered(waiting, found)
        if found.state in (State.APPROVED, State.USED):
            return self.decide(run_id, found.layer, found.action)
        run = self.run_for(run_id)
        refused = self.over_budget(run) if run is not None else None
        if refused is not None:
            return refused
        subject = Subject.of(run) if run is not None else Subject(run_id)
        return self._record_decision(subject, found.layer, found.action, _answered(waiting, found))

    def answer(self, approval_id: str, operator: Operator, *, yes: bool, note: str) -> Approval:
        """An operator's word. It is recorded before it counts.

        Raises `ApprovalUnknown`, `NotPending`, `NotAllowed`, `AuditUnavailable` or
        `ApprovalsUnavailable`.
        """
        approval = self.approvals.answerable(approval_id, operator)
        said = "approved" if yes else "denied"
        because = f": {note}" if note else ""
        self._write_approval(
            approval, f"{said} by {operator.name}{because}", by_uid=operator.uid, by=operator.name
        )
        return self.approvals.answer(approval, operator, yes=yes, note=note)

    def _withdraw(self, approval_id: str) -> None:
        """Takes back a question that has no record."""
        found = self.approvals.get(approval_id)
        if found is not None and found.state is State.PENDING:
            self.approvals.withdraw(found)

    def _approval_changed(self, approval: Approval) -> None:
        """The end of one that nobody ended; what an operator says is recorded before it counts."""
        match approval.state:
            case State.EXPIRED if approval.decided_by:
                what = f"what {approval.decided_by} approved was not used in time"
            case State.EXPIRED:
                what = "nobody answered in time"
            case State.WITHDRAWN:
                what = "withdrawn"
            case _:
                return
        try:
            self._write_approval(approval, what)
        except AuditUnavailable as e:
            log.error("%s: approval %s: %s", e, approval.id, what)

    def _write_approval(self, approval: Approval, reason: str, **more: Any) -> None:
        self.write_report(
            Report(
                type=RecordType.LIFECYCLE,
                layer=Layer.GATEWAY,
                kind=approval.action.kind,
                target=approval.action.target,
                time=time.time_ns(),
                run=approval.run,
                rule=approval.rules[0],
                reason=reason,
                attributes={"approval": approval.id, "digest": approval.digest, **more},
            )
        )

    # -- records

    def write_report(self, report: Report) -> None:
        """Keeps what a component reports. Raises `AuditUnavailable`; then it keeps it itself."""
        run = self.registry.get(report.run) if report.run else None
        budgeted = run is not None and run.live and report.type in BUDGETED
        if budgeted and self.budgets.over_audit(report.run, happened=True):
            return
        subject = Subject.of(run) if run else replace(NOBODY, run=report.run)
        said = self._said_of(run, report) if run else None
        record = audit_record.of_report(subject, report, self.source.revision, said)
        size = self.audit.write(record)
        if budgeted:
            self.budgets.recorded(report.run, size)
        if report.effect is Effect.DENY:
            self.denied += 1
            self._remember_denial(record)

    def _said_of(self, run: Run, report: Report) -> Decision | None:
        """What the policy says of something that was only seen: so what nothing prevented is detected."""
        policy = self.source.policy
        action = seen_action(report)
        if policy is None or action is None:
            return None
        try:
            return policy.decide(run, action, now=report.time / 1e9)
        except Exception as e:  # the record must not be lost with it
            log.exception("judging %s %r", report.kind, report.target)
            return deny(f"the policy engine failed: {e!r}", rule="<engine-error>")

    def write_event(
        self,
        kind: Kind,
        target: str,
        reason: str,
        *,
        run: str = "",
        alert: bool = False,
        **more: Any,
    ) -> None:
        """A record of the guard's own life. It must not stop what it tells of."""
        try:
            self.write_report(
                Report(
                    type=RecordType.ALERT if alert else RecordType.LIFECYCLE,
                    layer=Layer.GATEWAY,
                    kind=kind,
                    target=target,
                    time=time.time_ns(),
                    run=run,
                    reason=reason,
                    attributes=more,
                )
            )
        except AuditUnavailable as e:
            log.error("%s: %s %s: %s", e, kind, target, reason)

    def component_reports(self, name: str, lost: int, reports: list[Report]) -> None:
        component = self._component(name)
        component.lost += lost
        if lost:
            self.write_report(
                Report(
                    type=RecordType.GAP,
                    layer=Layer.GATEWAY,
                    kind=Kind.GUARD,
                    target=name,
                    time=time.time_ns(),
                    reason=f"{name} could not hand over {lost} records",
                    count=lost,
                )
            )
        for report in reports:
            self.write_report(self._judged(self._counted(report)))

    def _judged(self, report: Report) -> Report:
        """What was seen inside TLS is compared with what was decided; an alert comes before its record."""
        run = self.registry.get(report.run) if report.kind is Kind.HTTP_REQUEST else None
        if run is None:
            return report
        judged, alert = self.explained.judge(run, report)
        if alert:
            about = {k: report.attributes.get(k) for k in ("pid", "comm", "host", "peer", "method")}
            self.write_event(report.kind, report.target, alert, run=run.id, alert=True, **about)
        return judged

    def _counted(self, report: Report) -> Report:
        """What a component saw a run use goes to the run's limits first."""
        run = self.run_for(report.run) or self.registry.get(report.run) if report.run else None
        if run is None or report.kind not in USED:
            return report
        policy = self.source.policy
        limits = policy.limits(run) if policy else ()
        counted, alert = self.limits.note(limits, run, report, time.time())
        if alert:
            self.write_event(report.kind, report.target, alert, run=run.id, alert=True)
        return counted

    def denials(self, run_id: str) -> list[Record]:
        """The run's recent denials, oldest first."""
        return list(self._denials.get(run_id, ()))

    def _remember_denial(self, record: Record) -> None:
        """Keeps a denial for `aasm why`; equal ones are one entry with a count, newest last."""
        run_id = record["run"]
        if self.registry.get_live(run_id) is None:
            return
        kept = self._denials.setdefault(run_id, deque(maxlen=DENIALS_KEPT))
        for same in kept:
            if all(same[key] == record[key] for key in SAME_DENIAL):
                kept.remove(same)
                record = {**record, "count": record["count"] + same["count"]}
                break
        kept.append(record)

    def _recall(self) -> None:
        """After a restart `aasm why` still answers for runs that live on, and what they were allowed is known."""
        if not len(self.registry):
            return
        found: list[Record] = []
        complete = True
        for n, record in enumerate(read_backwards(Path(self.config.audit.file))):
            if n >= RECORDS_READ:
                complete = False
                break
            if self.registry.get_live(record.get("run", "")) is not None:
                found.append(record)
        found.reverse()
        for record in found:
            if record.get("decision") == Effect.DENY.value:
                self._remember_denial(record)
        self.explained.recall(found, complete=complete, now=time.time())

    # -- the life of a run

    def register(self, run: Run) -> Run:
        """Gives a new run its id. Raises `TooManyRuns`."""
        if self.registry.halt is not None:
            raise LayerNotReady("halt", str(self.registry.halt))
        limit = self.config.gateway.max_runs
        if len(self.registry) >= limit:
            raise TooManyRuns(f"{limit} runs live already", "gateway.max_runs")
        share = self.config.gateway.max_runs_per_user
        caller = run.caller_uid
        if caller > 0 and self.registry.started_by(caller) >= share:
            raise TooManyRuns(f"{share} runs of yours live already", "gateway.max_runs_per_user")
        registered = replace(
            run, id=self.registry.new_id(), state=RunState.REGISTERED, started=time.time()
        )
        return self.registry.put(registered)

    def start(self, run_id: str, cgroup_path: str, cgroup_id: int) -> Run:
        """The run has a cgroup; the barrier for it is up from here on."""
        run = self._live(run_id)
        needed = frozenset(c for layer in run.layers for c in COMPONENTS.get(layer, ()))
        self._barriers[run_id] = Barrier(needed, {"gateway"})
        run = replace(run, state=RunState.STARTING, cgroup=cgroup_path, cgroup_id=cgroup_id)
        self.registry.put(run)
        self._tell(run)
        return run

    def confirm(self, run_id: str, component: str, ok: bool, reason: str) -> None:
        barrier = self._barriers.get(run_id)
        if barrier is None:
            if self.registry.get(run_id) is None:
                raise RunUnknown(f"no run {run_id}")
            return  # too late: the run waits no more
        if ok:
            barrier.confirmed.add(component)
        else:
            barrier.refused = (component, reason)
        barrier.changed.set()

    async def await_ready(self, run_id: str, deadline: float) -> Run:
        """Waits until every needed component confirmed. Raises `LayerNotReady`, `RunUnknown`."""
        run = self._live(run_id)
        barrier = self._barriers.get(run_id)
        if barrier is None:
            raise RunUnknown(f"run {run_id} is not starting")
        try:
            async with asyncio.timeout(deadline):
                while barrier.refused is None and not barrier.needed <= barrier.confirmed:
                    barrier.changed.clear()
                    await barrier.changed.wait()
        except TimeoutError:
            missing = sorted(barrier.needed - barrier.confirmed)
            raise LayerNotReady(missing[0], self._why_silent(missing, deadline)) from None
        finally:
            self._barriers.pop(run_id, None)
        if barrier.refused is not None:
            raise LayerNotReady(*barrier.refused)
        run = replace(self._live(run_id), state=RunState.RUNNING)
        self.registry.put(run)
        self._tell(run)
        self.write_event(
            Kind.RUN,
            run.agent,
            "started; confirmed by " + ", ".join(sorted(barrier.needed) or ["nobody"]),
            run=run.id,
            argv=list(run.argv),
            directory=run.directory,
            home=run.home,
            tags=list(run.tags),
            layers=sorted(layer.value for layer in run.layers),
            caller_uid=run.caller_uid,
        )
        return run

    def _why_silent(self, missing: list[str], deadline: float) -> str:
        units = ", ".join(f"aa-{name}.service" for name in missing)
        return (
            f"no word from {', '.join(missing)} within {deadline:g} s; "
            f"see `systemctl status {units.replace(', ', ' ')}`"
        )

    def end(
        self, run_id: str, *, exit_code: int | None, signal: int | None, reason: str = ""
    ) -> Run:
        run = self._live(run_id)
        self._barriers.pop(run_id, None)
        was_running = run.state is RunState.RUNNING
        ended = self.registry.end(run, exit_code=exit_code, signal=signal)
        self._denials.pop(run_id, None)
        self.approvals.withdraw_all_but(lambda run: run != run_id)
        self._tell(ended)
        how = f"signal {signal}" if signal else f"exit code {exit_code}"
        told = "ended" if was_running else "never started"
        self.write_event(
            Kind.RUN,
            run.agent,
            f"{told}: {reason or how}",
            run=run_id,
            exit_code=exit_code,
            signal=signal,
            seconds=round(ended.ended - ended.started, 3),
        )
        return ended

    def set_paused(self, run_id: str, paused: bool, uid: int, user: str) -> None:
        """aa-launch froze a run for somebody, or let it go on."""
        run = replace(self._live(run_id), paused_by=uid if paused else -1)
        self.registry.put(run)
        self._tell(run)
        what = "paused" if paused else "resumed"
        self.write_event(
            Kind.RUN, run.agent, f"{what} by {user}", run=run_id, by_uid=uid, by_user=user
        )

    def set_halt(self, halt: Halt | None, uid: int, user: str) -> None:
        """aa-launch stopped every run for somebody, or let them go on. It survives a restart."""
        if halt == self.registry.halt:
            return
        self.registry.put_halt(halt)
        what = str(halt) if halt else f"the halt is over, ended by {user}"
        self.write_event(Kind.GUARD, "halt", what, alert=True, by_uid=uid, by_user=user)
        self.on_status()

    def end_vanished(self) -> list[Run]:
        """Ends runs whose cgroup is gone, for when aa-launch could not tell."""
        vanished = []
        now = time.monotonic()
        missing = {
            run.id
            for run in self.registry.live()
            if run.cgroup and cgroup.cgroup_id(run.cgroup) != run.cgroup_id
        }
        self._missing = {run: self._missing.get(run, now) for run in missing}
        for run in self.registry.live():
            if run.cgroup:
                gone = now - self._missing.get(run.id, now) >= GONE_SECONDS
            else:
                gone = time.time() - run.started > REGISTERED_SECONDS
            if gone:
                reason = "its cgroup is gone" if run.cgroup else "it never got a cgroup"
                vanished.append(self.end(run.id, exit_code=None, signal=None, reason=reason))
        return vanished

    def watch(self, watcher: Callable[[Run], None]) -> Callable[[], None]:
        """Calls `watcher` with each run that changes; returns the function that ends it."""
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    def _tell(self, run: Run) -> None:
        for watcher in list(self._watchers):
            watcher(run)

    def _live(self, run_id: str) -> Run:
        run = self.registry.get_live(run_id)
        if run is None:
            raise RunUnknown(f"no live run {run_id}")
        return run

    # -- state

    def reload_config(self) -> None:
        """Takes limits and agents from the files again; with an error the last good ones stay."""
        try:
            self.config = configuration.load()
            self.config_problems = []
            self.limits.reload()
        except InvalidFile as e:
            self.config_problems = list(e.problems)
            self.write_event(
                Kind.GUARD, "config", f"configuration not changed: {e.problems[0]}", alert=True
            )

    def set_status(self, name: str, state: str, details: dict[str, Any]) -> None:
        component = self._component(name)
        changed = component.state != state
        component.state, component.details = state, details
        if changed:
            self.write_event(Kind.GUARD, name, f"component {name}: {state}", **details)
            self.on_status()

    def _component(self, name: str) -> Component:
        component = self.components.setdefault(name, Component(name))
        component.seen = time.time_ns()
        return component

    @property
    def rung(self) -> str:
        """What the kernel layer last said that it proved."""
        ebpf = self.components.get("ebpf")
        return str(ebpf.details.get("rung", "off")) if ebpf else "off"

    def mode_of(self, run: Run) -> Mode:
        """Whether this run's decisions bind."""
        probe = Action(Kind.RUN, run.agent)
        policy = self.source.policy
        if policy is None:
            return Mode.ENFORCE
        return policy.decide(run, probe, now=time.time()).mode

    def problems(self) -> list[str]:
        """What is not well, in sentences for people."""
        found = [str(p) for p in (*self.source.problems, *self.config_problems)]
        if self.source.state == "none":
            found.insert(0, NO_POLICY_REASON)
        if self.registry.halt is not None:
            found.insert(0, str(self.registry.halt))
        return found + self.state_problems()

    def state_problems(self) -> list[str]:
        """What is not well with what is kept: counters, approvals, records."""
        policy = self.source.policy
        limited = policy is not None and any(file.limits for file in policy.files)
        found = self.limits.problems() if limited else []
        if self.approvals.problem:
            found.append(self.approvals.problem)
        return found + self.audit.problems

    def status_line(self) -> str:
        runs = len(self.registry)
        live = f"{runs} run{'' if runs == 1 else 's'}"
        if self.registry.halt is not None:
            return f"HALTED, everything is denied: {self.registry.halt}; {live}"
        match self.source.state:
            case "none":
                first = f": {self.source.problems[0]}" if self.source.problems else ""
                return f"NO POLICY, everything is denied{first}; {live}"
            case "degraded":
                return (
                    f"DEGRADED, policy {self.source.revision} stays in force: "
                    f"{self.source.problems[0]}; {live}"
                )
        return f"policy {self.source.revision}; {live}"

    def share_of(self, run: Run) -> Share:
        """What the policy in force says of the sandbox of such a run."""
        policy = self.source.policy
        return policy.compile(run).share if policy else Share()

    def pending(self) -> list[str]:
        """Live runs whose sandbox is that of an earlier policy: it is made when a run starts."""
        return sorted(
            run.id
            for run in self.registry.live()
            if run.share and run.share != self.share_of(run).digest
        )

    def _policy_changed(self, source: PolicySource) -> None:
        if source.problems:
            self.write_event(
                Kind.GUARD,
                "policy",
                f"policy not changed, {source.revision or 'none'} stays in force: "
                f"{source.problems[0]}",
                alert=True,
                problems=[str(p) for p in source.problems],
            )
        else:
            self.write_event(
                Kind.GUARD,
                "policy",
                f"policy {source.revision} is in force{_still(self.pending())}",
                pending=self.pending(),
                files=[str(f) for f in source.policy.files] if source.policy else [],
            )
            if source.policy:
                self.on_policy(source.policy)
        self.on_status()


def _answered(decision: Decision, approval: Approval) -> Decision:
    """An `ask` with what became of its approval."""
    match approval.state:
        case State.PENDING:
            until = time.strftime("%H:%M:%S UTC", time.gmtime(approval.expires))
            effect = Effect.ASK
            told = f"approval {approval.id} waits for {approval.whom} until {until}"
        case State.APPROVED | State.USED:
            effect = Effect.ALLOW
            told = f"approved by {approval.decided_by}"
            told += ", for the rest of the run" if approval.remember else ""
        case State.DENIED:
            effect = Effect.DENY
            because = f": {approval.note}" if approval.note else ""
            told = f"denied by {approval.decided_by}{because}"
        case State.EXPIRED if approval.decided_by:
            effect = Effect.DENY
            told = f"what {approval.decided_by} approved was not used in time"
        case State.EXPIRED:
            effect = Effect.DENY
            asked = approval.expires - approval.created
            told = f"nobody answered within {asked:g} s (approval {approval.id})"
        case State.WITHDRAWN:
            effect = Effect.DENY
            told = f"approval {approval.id} is withdrawn"
    return replace(
        decision, effect=effect, reason=f"{decision.reason}; {told}", approval=approval.id
    )


def _still(pending: list[str]) -> str:
    if not pending:
        return ""
    runs = "1 run has" if len(pending) == 1 else f"{len(pending)} runs have"
    return f"; {runs} the sandbox of an earlier one until started again"


def denial_json(record: Record) -> dict[str, Any]:
    """A denial as the run itself may see it."""
    return {k: record[k] for k in ("time", "layer", "kind", "target", "rule", "reason", "count")}


def seen_text(component: Component) -> str:
    return timestamp(component.seen) if component.seen else ""
