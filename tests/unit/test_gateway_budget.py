"""What one run may cost all others: its budgets, and that a flood of it leaves another run its turn."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from aa.audit.file import AuditFile, read_backwards
from aa.audit.log import AuditLog
from aa.config import Config
from aa.gateway.__main__ import RUN_LIMITS
from aa.gateway.budget import AUDIT_BURST_SECONDS, Budgets
from aa.gateway.gateway import Gateway, TooManyRuns
from aa.gateway.interfaces import run_service
from aa.gateway.runs import RunRegistry
from aa.model import Action, Kind, Layer, RecordType, Report, Run
from aa.varlink import Client, Server
from aa.varlink.codec import encode
from aa.varlink.server import CALLS_PER_TURN

POLICY = """
[policy]
id = "test"
default = { network = "deny", dns = "deny", tool = "allow" }
"""
FLOODERS = 8
AHEAD = 200
VICTIM_CALLS = 60


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_refuses_what_is_over_and_fills_again() -> None:
    clock = Clock()
    budgets = Budgets(lambda: (10.0, 1000.0), clock)
    assert [budgets.over_rate("r") for _ in range(12)] == [False] * 10 + [True] * 2
    assert not budgets.over_rate("another")
    clock.now += 0.5
    assert [budgets.over_rate("r") for _ in range(6)] == [False] * 5 + [True]
    (found,) = budgets.over()
    assert (found[0], found[1].refused) == ("r", 3)
    assert budgets.over() == []


def test_bytes_may_be_spent_in_a_burst_and_then_only_as_they_come() -> None:
    clock = Clock()
    budgets = Budgets(lambda: (10.0, 1000.0), clock)
    budgets.recorded("r", int(1000 * AUDIT_BURST_SECONDS))
    assert not budgets.over_audit("r")
    budgets.recorded("r", 500)
    assert budgets.over_audit("r") and budgets.over_audit("r", happened=True)
    assert not budgets.over_audit("another")
    clock.now += 0.6
    assert not budgets.over_audit("r")
    ((_, spent),) = budgets.over()
    assert (spent.refused_for_audit, spent.not_recorded) == (1, 1)


def test_a_changed_limit_holds_from_the_next_question() -> None:
    limits = [10.0, 1000.0]
    budgets = Budgets(lambda: (limits[0], limits[1]), Clock())
    assert not budgets.over_rate("r")
    limits[0] = 1.0
    assert [budgets.over_rate("r") for _ in range(2)] == [False, True]


def open_gateway(folder: Path, **gateway: Any) -> Gateway:
    (folder / "policy.d").mkdir(exist_ok=True)
    (folder / "policy.d" / "50-test.toml").write_text(POLICY)
    config = Config()
    audit = replace(
        config.audit,
        file=folder / "audit.jsonl",
        bytes_per_second_per_run=gateway.pop("audit", 10**6),
    )
    config = replace(config, audit=audit, gateway=replace(config.gateway, **gateway))
    log = AuditLog(AuditFile(folder / "audit.jsonl", max_bytes=1 << 26, keep=2), None)
    made = Gateway(
        config=config,
        policies=folder / "policy.d",
        registry=RunRegistry(folder / "runs.sqlite"),
        audit=log,
    )
    made.source.reload()
    return made


def start_run(gateway: Gateway, caller: int = 1000) -> Run:
    run = gateway.register(
        Run("", "a", "dev", 1000, layers=frozenset({Layer.SDK}), caller_uid=caller)
    )
    return gateway.start(run.id, f"aa.slice/x/aa-agent-{run.id}.service", hash(run.id) % 10**9)


def tool(size: int = 0) -> Action:
    return Action(Kind.TOOL_CALL, "read", {"args": {"text": "x" * size}})


def test_a_run_that_fills_the_log_is_denied_and_another_is_not(tmp_path: Path) -> None:
    gateway = open_gateway(tmp_path, audit=1024, decisions_per_second=10**6)
    flooding, quiet = start_run(gateway), start_run(gateway)
    rules = [gateway.decide(flooding.id, Layer.SDK, tool(4000)).rule for _ in range(100)]
    refused = rules.count("<limit:audit_bytes_per_second>")
    assert 50 < refused < 95
    assert gateway.decide(quiet.id, Layer.SDK, tool()).permits
    seen = Report(RecordType.OBSERVED, Layer.KERNEL, Kind.EXEC, "/bin/true", 1, run=flooding.id)
    gateway.component_reports("ebpf", 0, [seen] * 7 + [replace(seen, run=quiet.id)])
    gateway.flush_over_budget()
    records = [
        r for r in read_backwards(tmp_path / "audit.jsonl") if r["kind"] in ("guard", "exec")
    ]
    assert [(r["type"], r["run"], r["count"]) for r in records if r["type"] != "lifecycle"] == [
        ("gap", flooding.id, 7),
        ("refusal", flooding.id, refused),
        ("observed", quiet.id, 1),
    ]


def test_one_user_cannot_take_all_runs_and_root_may(tmp_path: Path) -> None:
    gateway = open_gateway(tmp_path, max_runs=6, max_runs_per_user=2)
    for _ in range(2):
        start_run(gateway, caller=1000)
    with pytest.raises(TooManyRuns, match=r"of yours.*gateway\.max_runs_per_user"):
        start_run(gateway, caller=1000)
    for caller in (1001, 0, 0, 0):
        start_run(gateway, caller=caller)
    with pytest.raises(TooManyRuns, match=r"gateway\.max_runs\)"):
        start_run(gateway, caller=1002)


# -- a flood over real sockets


@dataclass
class Served:
    """A gateway in a thread, with the sockets of two runs."""

    gateway: Gateway
    flooding: Run
    quiet: Run
    folder: Path

    def socket(self, run: Run) -> Path:
        return self.folder / run.id


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Served:
        gateway = open_gateway(folder, decisions_per_second=500)
        stage = Served(gateway, start_run(gateway), start_run(gateway), folder)
        for run in (stage.flooding, stage.quiet):
            Server.at(stage.socket(run), run_service(gateway, run.id), limits=RUN_LIMITS)
        return stage

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def flood(path: Path, stop: Any) -> None:
    """Sends many decisions ahead of the answers, again and again."""
    call = {"method": "io.agentassembly.Gateway.Decide", "parameters": {"action": tool().as_json()}}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        while not stop.is_set():
            connection.sendall(encode(call) * AHEAD)
            left = AHEAD
            while left > 0:
                left -= connection.recv(1 << 16).count(b"\0")


def test_a_flooding_run_is_refused_and_another_has_its_turn_at_each_of_its_calls(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as stage:
        context = multiprocessing.get_context("fork")
        stop = context.Event()
        flooders = [
            context.Process(target=flood, args=(stage.socket(stage.flooding), stop), daemon=True)
            for _ in range(FLOODERS)
        ]
        for process in flooders:
            process.start()
        try:
            while stage.gateway.budgets.over_rate(stage.flooding.id) is False:
                pass  # until the flood has used up its second
            between: list[int] = []
            with Client(stage.socket(stage.quiet), timeout=60) as client:
                for _ in range(VICTIM_CALLS):
                    before = answered(stage)
                    reply = client.call(
                        "io.agentassembly.Gateway.Decide", {"action": tool().as_json()}
                    )
                    between.append(answered(stage) - before)
                    assert reply["decision"]["effect"] == "allow"
        finally:
            stop.set()
            for process in flooders:
                process.join(30)
                process.kill()
        # Counted, not timed: at one call of the quiet run each connection of the flood has a turn,
        # or two while the call arrives; a machine that is slow is slow for all of them alike.
        between.sort()
        assert between[VICTIM_CALLS // 2] <= 3 * FLOODERS * CALLS_PER_TURN
        stage.gateway.flush_over_budget()
        found = list(read_backwards(tmp_path / "audit.jsonl"))
        refused = sum(r["count"] for r in found if r["rule"] == "<limit:decisions_per_second>")
        assert refused > 0 and {
            r["run"] for r in found if r["rule"] == "<limit:decisions_per_second>"
        } == {stage.flooding.id}


def answered(stage: Served) -> int:
    """Decisions of the flood that were answered, allowed or refused."""
    spent = stage.gateway.budgets._spent[stage.flooding.id]
    return stage.gateway.decisions + spent.refused
