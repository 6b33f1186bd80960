"""Calls to the gateway's three interfaces, in any order: typed answers, and an audit log that others can read.

Each input has a gateway of its own with one run. What a run sends is hostile; what components and
operators send is not, and must not end in an internal error either.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from aa.audit.file import AuditFile
from aa.audit.journal import Journal
from aa.audit.log import AuditLog
from aa.config import Config
from aa import prices
from aa.gateway.approvals import Approvals
from aa.gateway.counters import Counters
from aa.gateway.gateway import Gateway
from aa.gateway.interfaces import control_service, enforce_service, run_service
from aa.gateway.limits import Limits
from aa.gateway.runs import RunRegistry
from aa.model import Layer, Run
from aa.varlink import Peer, Service
from tests.fuzz.calls import checked, exchange, messages
from tests.fuzz.mutate import json_value

FOLDER = Path(tempfile.mkdtemp(prefix="aa-fuzz-", dir="/dev/shm"))
POLICIES = FOLDER / "policy.d"
AUDIT = FOLDER / "audit.jsonl"
LOOP = asyncio.new_event_loop()
PEER = Peer(os.getpid(), os.getuid(), os.getgid(), "user.slice")
RUN = "THE-RUN"
"""Stands for the id of the run in inputs."""

POLICY = """
[policy]
id = "test"
default = { network = "deny", dns = "deny", tool = "deny" }

[[rule]]
id = "web"
effect = "allow"
network = { hosts = ["allowed.test"], paths = ["/v1/**"] }

[[rule]]
id = "search"
effect = "allow"
tool = { names = ["search"] }

[[rule]]
id = "transfer"
effect = "ask"
tool = { names = ["transfer"], args = { n = { gt = 1 } } }

[[limit]]
id = "calls"
per = "run"
tool = { names = ["search"], per_minute = 3 }

[[limit]]
id = "spend"
per = "run"
llm = { usd_per_day = 25.0 }
"""

mutate = json_value


def _call(interface: str, method: str, **parameters: Any) -> dict[str, Any]:
    return {"method": f"io.agentassembly.{interface}.{method}", "parameters": parameters}


def seeds() -> Iterator[bytes]:
    tool = {"kind": "tool.call", "target": "search", "attributes": {"args": {"n": 1.5}}}
    ask = {"kind": "tool.call", "target": "transfer", "attributes": {"args": {"n": 2}}}
    web = {
        "kind": "http.request",
        "target": "allowed.test:443",
        "attributes": {"protocol": "tls", "method": "GET", "path": "/v1/x", "headers": {}},
    }
    report = {
        "type": "observed", "layer": "proxy", "kind": "llm.request", "target": "openai/gpt-4o",
        "time": 10**18, "run": RUN, "effect": None, "rule": "", "reason": "", "count": 1,
        "attributes": {"provider": "openai", "model": "gpt-4o", "input_tokens": 5},
    }  # fmt: skip
    mine = [
        _call("Gateway", "Decide", action=tool),
        _call("Gateway", "Decide", action=ask),
        _call("Gateway", "WaitApproval", approval="x", deadline=0),
        _call("Gateway", "Report", action=tool, outcome="done"),
        _call("Gateway", "GetInfo"),
    ]
    theirs = [
        _call("Enforce", "Decide", run=RUN, layer="proxy", action=web, provisional=True),
        _call("Enforce", "Decide", run=RUN, layer="proxy", action=web),
        _call("Enforce", "Report", component="proxy", sequence=0, lost=2, reports=[report]),
        _call("Enforce", "SetStatus", component="ebpf", state="ok", details={"rung": "cgroup"}),
        _call("Enforce", "GetSandbox", agent="a", user="u", tags=[]),
        _call(
            "Enforce", "RegisterRun", agent="a", user="u", uid=1000, home="/h", layers=["proxy"],
            tags=[], argv=["x"], directory="/h", caller_uid=1000,
        ),
        _call("Enforce", "StartRun", run=RUN, cgroup="aa.slice/x", cgroup_id=7),
        _call("Enforce", "ConfirmRun", run=RUN, component="proxy", ok=False, reason="no"),
        _call("Enforce", "AwaitRun", run=RUN, deadline=0),
        {**_call("Enforce", "WatchRuns"), "more": True},
        _call("Enforce", "SetPaused", run=RUN, paused=True, uid=0, user="root"),
        _call("Enforce", "SetHalt", halted=True, uid=0, user="root", reason="x", since=1.5),
        _call("Enforce", "EndRun", run=RUN, exit_code=1, signal=None, reason=""),
    ]  # fmt: skip
    operators = [
        _call("Control", "GetStatus"),
        _call("Control", "ListRuns", ended=True),
        _call("Control", "GetRun", run=RUN),
        _call("Control", "ShowPolicy"),
        _call("Control", "ExplainPolicy", run=RUN, **web),
        _call("Control", "ShowLimits"),
        _call("Control", "ListApprovals", closed=True),
        _call("Control", "Approve", id="x", note="n"),
        {**_call("Control", "WatchApprovals"), "more": True},
        {**_call("Control", "TailAudit", lines=5, follow=True, fields={"run": RUN}), "more": True},
    ]
    for calls in (mine, theirs, operators):
        yield json.dumps(
            [calls if calls is group else [] for group in (mine, theirs, operators)]
        ).encode()
    for call in (*mine, *theirs, *operators):
        at = 0 if call in mine else 1 if call in theirs else 2
        yield json.dumps([[call, call] if n == at else [] for n in range(3)]).encode()
    yield json.dumps([[mine[1]], [], operators[6:9]]).encode()
    yield json.dumps(
        [['{"method":1}', '{"a":NaN}', "[[[", '{"method":"x","a":1e999}'], [], []]
    ).encode()


def one(data: bytes) -> None:
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(asked, list) or len(asked) != 3:
        return
    for file in FOLDER.glob("*.*"):
        if file.is_file():
            file.unlink()
    POLICIES.mkdir(exist_ok=True)
    (POLICIES / "p.toml").write_text(POLICY)
    LOOP.run_until_complete(_asked(asked))
    lines = AUDIT.read_bytes().splitlines()
    numbers = [json.loads(line, parse_constant=_refuse)["seq"] for line in lines]
    assert numbers == sorted(numbers)


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} in the audit log is not JSON")


async def _asked(asked: list[Any]) -> None:
    with contextlib.ExitStack() as open_:
        await _asked_of(_gateway(open_), asked)


async def _asked_of(gateway: Gateway, asked: list[Any]) -> None:
    run = gateway.register(Run("", "agent", "dev", 1000, layers=frozenset({Layer.PROXY})))
    gateway.start(run.id, "aa.slice/x", 4242)
    for service, calls in zip(_services(gateway, run), asked, strict=True):
        sent = [m.replace(RUN.encode(), run.id.encode()) for m in messages(calls)]
        await exchange(service, PEER, sent)
    gateway.flush_over_budget()
    gateway.approvals.expire()


def _services(gateway: Gateway, run: Run) -> tuple[Service, ...]:
    return (
        checked(run_service(gateway, run.id)),
        checked(enforce_service(gateway, open_run=lambda run: None, close_run=lambda run: None)),
        checked(control_service(gateway, pid=1)),
    )


def _gateway(open_: contextlib.ExitStack) -> Gateway:
    def opened(thing: Any) -> Any:
        open_.callback(thing.close)
        return thing

    config = Config()
    config = replace(
        config,
        audit=replace(config.audit, file=str(AUDIT)),
        gateway=replace(config.gateway, max_runs=8),
    )
    file = opened(AuditFile(AUDIT, max_bytes=1 << 20, keep=0))
    gateway = Gateway(
        config=config,
        policies=POLICIES,
        registry=opened(RunRegistry(FOLDER / "runs.sqlite")),
        audit=AuditLog(file, opened(Journal(FOLDER / "none"))),
        limits=Limits(opened(Counters(FOLDER / "limits.sqlite")), prices.load),
        approvals=opened(Approvals(FOLDER / "approvals.sqlite")),
    )
    gateway.source.reload()
    assert gateway.source.policy is not None, gateway.source.problems
    return gateway
