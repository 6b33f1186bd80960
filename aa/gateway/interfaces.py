"""The three Varlink interfaces in front of the gateway: for runs, for enforcing services, for operators."""

from __future__ import annotations

import asyncio
import functools
import grp
import inspect
import os
import pwd
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from aa import __version__
from aa.audit.file import read_backwards
from aa.audit.log import AuditUnavailable, matches, newest
from aa.audit.story import story
from aa.audit.record import Record
from aa.gateway.approvals import (
    Approval,
    ApprovalsUnavailable,
    ApprovalUnknown,
    NotAllowed,
    NotPending,
    Operator,
)
from aa.gateway.gateway import (
    NO_POLICY_REASON,
    Gateway,
    LayerNotReady,
    RunUnknown,
    TooManyRuns,
    denial_json,
    seen_text,
)
from aa.gateway.runs import Halt
from aa.model import (
    Action,
    Layer,
    MalformedValue,
    RecordType,
    Report,
    Run,
    deny,
)
from aa.tomlfile import Problem
from aa.varlink import Call, Service, VarlinkError
from aa.varlink.server import Method, Reply

MAX_FOLLOWERS = 32
"""Operators that follow the audit log at once."""
MAX_BEHIND = 10_000
"""Records or runs that a follower may be behind before it is told so and ended."""
MAX_BARRIER_SECONDS = 120.0
MAX_WAIT_SECONDS = 3600.0
"""Of one call that waits for a person; who waits longer calls again."""
OPERATOR_SECONDS = 5.0
"""How long looking up an operator's groups may take."""
MAX_LINES = 10_000
MAX_RUN_VALUES = 4096
"""Arguments of a run that are kept; a longer command line is refused."""


def _typed_errors(interface: str, function: Callable[..., Any]) -> Method:
    """Turns the gateway's exceptions into the interface's errors."""

    def convert(e: Exception) -> VarlinkError:
        match e:
            case VarlinkError():
                return e
            case RunUnknown():
                return VarlinkError(f"{interface}.RunUnknown", {"reason": str(e)})
            case LayerNotReady():
                return VarlinkError(
                    f"{interface}.LayerNotReady", {"reason": e.reason, "component": e.component}
                )
            case TooManyRuns():
                return VarlinkError(
                    f"{interface}.TooManyRuns", {"reason": str(e), "limit": e.limit}
                )
            case MalformedValue():
                kind = "MalformedReport" if str(e).startswith("report") else "MalformedAction"
                return VarlinkError(f"{interface}.{kind}", {"reason": str(e)})
            case ApprovalUnknown():
                return VarlinkError(f"{interface}.ApprovalUnknown", {"reason": str(e)})
            case NotPending():
                return VarlinkError(f"{interface}.ApprovalNotPending", {"reason": str(e)})
            case NotAllowed():
                return VarlinkError(f"{interface}.NotPermitted", {"reason": str(e)})
            case ApprovalsUnavailable():
                return VarlinkError(f"{interface}.ApprovalsUnavailable", {"reason": str(e)})
            case AuditUnavailable():
                return VarlinkError("io.agentassembly.AuditUnavailable", {"reason": str(e)})
        raise e

    @functools.wraps(function)
    def call(call: Call) -> Any:
        try:
            return function(call)
        except Exception as e:
            raise convert(e) from e

    @functools.wraps(function)
    async def waiting(call: Call) -> Reply:
        try:
            reply: Reply = await function(call)
        except Exception as e:
            raise convert(e) from e
        return reply

    return waiting if inspect.iscoroutinefunction(function) else call


def _service(product: str, interface: str, methods: dict[str, Callable[..., Any]]) -> Service:
    service = Service(product, __version__)
    service.add(interface, {n: _typed_errors(interface, f) for n, f in methods.items()})
    return service


def run_service(gateway: Gateway, run_id: str) -> Service:
    """What one run may ask. The run is the listener's, whatever a call says."""

    def live() -> Run:
        run = gateway.registry.get_live(run_id)
        if run is None:
            raise RunUnknown(f"run {run_id} is over")
        return run

    def decide(call: Call) -> Reply:
        action = Action.from_json(call.parameters["action"])
        return {"decision": gateway.decide(run_id, Layer.SDK, action).as_json()}

    async def wait_approval(call: Call) -> Reply:
        p = call.parameters
        decision = await gateway.wait_approval(run_id, p["approval"], _wait(p["deadline"]))
        return {"decision": decision.as_json()}

    def report(call: Call) -> Reply:
        action = Action.from_json(call.parameters["action"])
        refused = gateway.over_budget(live())
        if refused is not None:
            raise VarlinkError("io.agentassembly.PermissionDenied", {"reason": refused.reason})
        gateway.write_report(
            Report(
                type=RecordType.OBSERVED,
                layer=Layer.SDK,
                kind=action.kind,
                target=action.target,
                time=time.time_ns(),
                run=live().id,
                reason=call.parameters["outcome"],
                attributes=action.attributes,
            )
        )
        return {}

    def get_info(call: Call) -> Reply:
        run = live()
        return {
            "run": run.id,
            "agent": run.agent,
            "user": run.user,
            "layers": sorted(layer.value for layer in run.layers),
            "mode": gateway.mode_of(run).value,
            "policy": gateway.source.revision,
            "rung": gateway.rung,
            "problems": gateway.problems(),
            "denials": [denial_json(r) for r in gateway.denials(run.id)],
            "waiting": [
                {
                    "approval": a.id,
                    "kind": a.action.kind.value,
                    "target": a.action.target,
                    "rule": a.rules[0],
                    "expires": a.expires,
                }
                for a in gateway.approvals.pending()
                if a.run == run.id
            ],
        }

    return _service(
        "aa-gateway",
        "io.agentassembly.Gateway",
        {
            "Decide": decide,
            "WaitApproval": wait_approval,
            "Report": report,
            "GetInfo": get_info,
        },
    )


def enforce_service(
    gateway: Gateway,
    *,
    open_run: Callable[[Run], None],
    close_run: Callable[[str], None],
) -> Service:
    """For proxy, redirect, eBPF loader and launch. `open_run` makes a run's own socket."""

    def decide(call: Call) -> Reply:
        p = call.parameters
        action = Action.from_json(p["action"])
        layer = _layer(p["layer"])
        decision = gateway.decide(
            p["run"],
            layer,
            action,
            provisional=p.get("provisional") is True,
            approval=p.get("approval") or "",
        )
        return {"decision": decision.as_json()}

    async def wait_approval(call: Call) -> Reply:
        p = call.parameters
        decision = await gateway.wait_approval(p["run"], p["approval"], _wait(p["deadline"]))
        return {"decision": decision.as_json()}

    def report(call: Call) -> Reply:
        p = call.parameters
        reports = [Report.from_json(r) for r in p["reports"]]
        gateway.component_reports(p["component"], max(0, p["lost"]), reports)
        return {}

    def set_status(call: Call) -> Reply:
        p = call.parameters
        gateway.set_status(p["component"], p["state"], p["details"])
        return {}

    def get_sandbox(call: Call) -> Reply:
        p = call.parameters
        run = Run("", p["agent"], p["user"], -1, tags=tuple(p["tags"]))
        return {"share": gateway.share_of(run).as_json()}

    def register(call: Call) -> Reply:
        p = call.parameters
        if len(p["argv"]) > MAX_RUN_VALUES:
            raise MalformedValue(f"a command line of more than {MAX_RUN_VALUES} arguments")
        run = gateway.register(
            Run(
                id="",
                agent=p["agent"],
                user=p["user"],
                uid=p["uid"],
                home=p["home"],
                layers=frozenset(_layer(x) for x in p["layers"]),
                tags=tuple(p["tags"]),
                argv=tuple(p["argv"]),
                directory=p["directory"],
                caller_uid=p["caller_uid"],
                share=p["share"],
            )
        )
        open_run(run)
        return {"run": run.as_json()}

    def start(call: Call) -> Reply:
        p = call.parameters
        return {"run": gateway.start(p["run"], p["cgroup"], p["cgroup_id"]).as_json()}

    def confirm(call: Call) -> Reply:
        p = call.parameters
        gateway.confirm(p["run"], p["component"], p["ok"], p["reason"])
        return {}

    async def await_run(call: Call) -> Reply:
        p = call.parameters
        deadline = min(max(0, p["deadline"]) / 1000, MAX_BARRIER_SECONDS)
        return {"run": (await gateway.await_ready(p["run"], deadline)).as_json()}

    def end(call: Call) -> Reply:
        p = call.parameters
        gateway.end(
            p["run"], exit_code=p.get("exit_code"), signal=p.get("signal"), reason=p["reason"]
        )
        close_run(p["run"])
        return {}

    def set_paused(call: Call) -> Reply:
        _refuse_all_but_root(call)
        p = call.parameters
        gateway.set_paused(p["run"], p["paused"], p["uid"], p["user"])
        return {}

    def set_halt(call: Call) -> Reply:
        _refuse_all_but_root(call)
        p = call.parameters
        halt = Halt(p["user"], p["reason"], p["since"]) if p["halted"] else None
        gateway.set_halt(halt, p["uid"], p["user"])
        return {}

    async def watch_runs(call: Call) -> AsyncIterator[Reply]:
        changes: asyncio.Queue[Run] = asyncio.Queue()
        unwatch = gateway.watch(changes.put_nowait)
        try:
            snapshot = [r.as_json() for r in gateway.registry.live()]
            yield {"event": "snapshot", "runs": snapshot}
            while True:
                run = await changes.get()
                if changes.qsize() > MAX_BEHIND:
                    return  # it connects again and gets a snapshot
                yield {"event": "changed", "runs": [run.as_json()]}
        finally:
            unwatch()

    return _service(
        "aa-gateway",
        "io.agentassembly.Enforce",
        {
            "Decide": decide,
            "WaitApproval": wait_approval,
            "Report": report,
            "SetStatus": set_status,
            "GetSandbox": get_sandbox,
            "RegisterRun": register,
            "StartRun": start,
            "ConfirmRun": confirm,
            "AwaitRun": await_run,
            "EndRun": end,
            "SetPaused": set_paused,
            "SetHalt": set_halt,
            "WatchRuns": watch_runs,
        },
    )


def control_service(gateway: Gateway, *, pid: int) -> Service:
    """For operators."""
    followers: set[object] = set()

    def get_status(call: Call) -> Reply:
        source = gateway.source
        return {
            "version": __version__,
            "policy": source.revision,
            "policy_state": source.state,
            "problems": [p.as_json() for p in (*source.problems, *gateway.config_problems)]
            + [Problem("", 0, "", text, "").as_json() for text in gateway.state_problems()],
            "components": [
                {
                    "name": c.name,
                    "state": c.state,
                    "seen": seen_text(c),
                    "details": {**c.details, "lost": c.lost},
                }
                for _, c in sorted(gateway.components.items())
            ],
            "runs": len(gateway.registry),
            "decisions": gateway.decisions,
            "denials": gateway.denied,
            "records": gateway.audit.records,
            "gaps": gateway.audit.gaps,
            "pid": pid,
            "started": gateway.started,
            "halted": str(gateway.registry.halt or ""),
            "pending": gateway.pending(),
        }

    def list_runs(call: Call) -> Reply:
        runs = sorted(gateway.registry.live(), key=lambda r: -r.started)
        if call.parameters["ended"]:
            runs += gateway.registry.ended()
        return {"runs": [r.as_json() for r in runs], "pending": gateway.pending()}

    def get_run(call: Call) -> Reply:
        run = gateway.registry.get(call.parameters["run"])
        if run is None:
            raise RunUnknown(f"no run {call.parameters['run']}")
        denials = gateway.denials(run.id) or newest(
            read_backwards(Path(gateway.config.audit.file)),
            {"run": run.id, "decision": "deny"},
            50,
        )
        return {
            "run": run.as_json(),
            "denials": [denial_json(r) for r in denials],
            "share": gateway.share_of(run).as_json(),
            "pending": run.id in gateway.pending(),
        }

    def show_policy(call: Call) -> Reply:
        policy = gateway.source.policy
        files = [f.as_json() for f in policy.files] if policy else []
        return {"revision": gateway.source.revision, "files": files}

    def explain(call: Call) -> Reply:
        p = call.parameters
        action = Action.from_json(
            {"kind": p["kind"], "target": p["target"], "attributes": p["attributes"]}
        )
        policy = gateway.source.policy
        if policy is None:
            decision = deny(NO_POLICY_REASON, rule="<no-policy>")
            return {"decision": decision.as_json(), "steps": []}
        run = _explained_run(gateway, p)
        explanation = policy.explain(run, action, now=time.time())
        told = explanation.as_json()
        return {"decision": told["decision"], "steps": told["steps"]}

    async def reload(call: Call) -> Reply:
        gateway.reload_config()
        problems = [*gateway.config_problems, *await gateway.source.reload_beside()]
        if problems:
            raise VarlinkError(
                "io.agentassembly.Control.PolicyInvalid",
                {"reason": str(problems[0]), "problems": [p.as_json() for p in problems]},
            )
        return {"revision": gateway.source.revision}

    def show_limits(call: Call) -> Reply:
        policy = gateway.source.policy
        limits = [limit for file in policy.files for limit in file.limits] if policy else []
        return {
            "limits": [u.as_json() for u in gateway.limits.uses(limits, time.time())],
            "problems": gateway.limits.problems() if limits else [],
        }

    def list_approvals(call: Call) -> Reply:
        found = gateway.approvals.listed(closed=call.parameters["closed"])
        return {"approvals": [a.summary() for a in found]}

    def get_approval(call: Call) -> Reply:
        found = gateway.approvals.get(call.parameters["id"])
        if found is None:
            raise ApprovalUnknown(f"no approval {call.parameters['id']}")
        return {"approval": found.as_json()}

    async def answer(call: Call, *, yes: bool) -> Reply:
        p = call.parameters
        async with asyncio.timeout(OPERATOR_SECONDS):  # a user database may be slow
            operator = await asyncio.to_thread(operator_of, call.peer.uid)
        return {"approval": gateway.answer(p["id"], operator, yes=yes, note=p["note"]).as_json()}

    async def watch_approvals(call: Call) -> AsyncIterator[Reply]:
        changes: asyncio.Queue[Approval] = asyncio.Queue()
        token = _follow(followers)
        unwatch = gateway.approvals.watch(changes.put_nowait)
        try:
            for approval in reversed(gateway.approvals.pending()):
                yield {"approval": approval.as_json()}
            while call.more:
                approval = await changes.get()
                if changes.qsize() > MAX_BEHIND:
                    return
                yield {"approval": approval.as_json()}
        finally:
            unwatch()
            followers.discard(token)

    async def timeline(call: Call) -> AsyncIterator[Reply]:
        p = call.parameters
        run = gateway.registry.get(p["run"])
        token = _follow(followers)  # a search is no smaller thing than to follow
        try:
            # A thread: a large log is nothing that decisions wait for.
            found = await asyncio.to_thread(
                story,
                Path(gateway.config.audit.file),
                p["run"],
                started=run.started if run else 0.0,
                kinds=frozenset(p["kinds"]),
                limit=min(max(1, p["limit"]), MAX_LINES),
            )
            if run is None and not found.records:
                raise RunUnknown(f"no run {p['run']}")
            for start in range(0, max(1, len(found.records)), 200):
                yield {"records": found.records[start : start + 200], "cut": found.cut}
        finally:
            followers.discard(token)

    async def tail(call: Call) -> AsyncIterator[Reply]:
        p = call.parameters
        fields: dict[str, str] = p["fields"]
        behind: asyncio.Queue[Record] = asyncio.Queue()
        token = _follow(followers)
        unfollow = gateway.audit.follow(behind.put_nowait) if p["follow"] else lambda: None
        try:
            lines = min(max(0, p["lines"]), MAX_LINES)
            found = newest(read_backwards(Path(gateway.config.audit.file)), fields, lines)
            for start in range(0, max(1, len(found)), 200):
                yield {"records": found[start : start + 200]}
            while p["follow"] and call.more:
                record = await behind.get()
                if behind.qsize() > MAX_BEHIND:
                    return
                if matches(record, fields):
                    yield {"records": [record]}
        finally:
            unfollow()
            followers.discard(token)

    return _service(
        "aa-gateway",
        "io.agentassembly.Control",
        {
            "GetStatus": get_status,
            "ListRuns": list_runs,
            "GetRun": get_run,
            "ShowPolicy": show_policy,
            "ExplainPolicy": explain,
            "ReloadPolicy": reload,
            "ShowLimits": show_limits,
            "ListApprovals": list_approvals,
            "GetApproval": get_approval,
            "Approve": functools.partial(answer, yes=True),
            "Deny": functools.partial(answer, yes=False),
            "WatchApprovals": watch_approvals,
            "GetTimeline": timeline,
            "TailAudit": tail,
        },
    )


def operator_of(uid: int) -> Operator:
    """The user behind a uid, with the groups that the user database gives them. Blocks."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return Operator(uid, f"uid {uid}")
    groups = set()
    for gid in os.getgrouplist(user.pw_name, user.pw_gid):
        try:
            groups.add(grp.getgrgid(gid).gr_name)
        except KeyError:
            continue
    return Operator(uid, user.pw_name, frozenset(groups))


def _follow(followers: set[object]) -> object:
    """A place among those who follow; the caller gives it back."""
    if len(followers) >= MAX_FOLLOWERS:
        raise VarlinkError(
            "io.agentassembly.Control.TooManyFollowers",
            {"reason": f"{MAX_FOLLOWERS} follow already", "limit": "MAX_FOLLOWERS"},
        )
    token = object()
    followers.add(token)
    return token


def _wait(milliseconds: int) -> float:
    return min(max(0, milliseconds) / 1000, MAX_WAIT_SECONDS)


def _refuse_all_but_root(call: Call) -> None:
    """aa-launch is root; the other services, and whoever takes one of them over, are not."""
    if call.peer.uid not in (0, os.geteuid()):
        raise VarlinkError(
            "io.agentassembly.PermissionDenied", {"reason": "this is for aa-launch alone"}
        )


def _explained_run(gateway: Gateway, parameters: dict[str, Any]) -> Run:
    """The run that a question is about: a real one, or one that would be."""
    if parameters.get("run"):
        run = gateway.registry.get(parameters["run"]) or gateway.run_for(parameters["run"])
        if run is None:
            raise RunUnknown(f"no run {parameters['run']}")
        return run
    agent = gateway.config.agent(parameters.get("agent") or "default")
    return Run(
        "", agent.name, parameters.get("user") or "", -1, "", frozenset(agent.layers), agent.tags
    )


def _layer(text: str) -> Layer:
    layer = _LAYERS.get(text)
    if layer is None:
        raise MalformedValue(f"layer {text!r} is not one")
    return layer


_LAYERS = {layer.value: layer for layer in Layer}
