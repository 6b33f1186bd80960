"""Approvals: what one is bound to, who may give it, how often it counts, and what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from aa.audit.file import AuditFile, read_backwards
from aa.audit.log import AuditLog, AuditUnavailable
from aa.config import Config
from aa.gateway.__main__ import refuse_governed
from aa.gateway.approvals import (
    ACTION_LIMIT,
    GRANT_SECONDS,
    UNSAID,
    Approval,
    Approvals,
    ApprovalUnknown,
    NotAllowed,
    NotPending,
    Operator,
    State,
    Terms,
)
from aa.gateway.gateway import Gateway
from aa.gateway.interfaces import control_service, enforce_service, operator_of, run_service
from aa.gateway.runs import RunRegistry
from aa.model import Action, Decision, Effect, Kind, Layer, Run
from aa.paths import AGENTS_SLICE
from aa.proxy import ask as proxy_ask
from aa.proxy.ask import Gateway as ProxysGateway
from aa.proxy.ask import GatewayAway
from aa.varlink import AsyncClient, Call, Peer, Server, VarlinkError
from aa.varlink.codec import encode

TOP = Path(__file__).parents[2]
T = TypeVar("T")
ALICE = Operator(1000, "alice", frozenset({"aa-operators"}))
MALLORY = Operator(1001, "mallory", frozenset({"users"}))
ROOT = Operator(0, "root")

POLICY = """
[policy]
id = "test"
default = { network = "deny", dns = "deny", tool = "allow" }

[[rule]]
id = "transfer"
effect = "ask"
reason = "money"
tool = { names = ["transfer"] }

[[rule]]
id = "a-web"
effect = "ask"
network = { hosts = ["*.ask.test"] }

[[rule]]
id = "b-inside"
effect = "ask"
network = { hosts = ["*.ask.test"], cidrs = ["10.0.0.0/8"] }

[[rule]]
id = "open"
effect = "allow"
network = { hosts = ["open.test"] }

[[rule]]
id = "c-range"
effect = "ask"
network = { cidrs = ["9.9.9.0/24"] }

[[limit]]
id = "transfers"
per = "run"
tool = { names = ["transfer"], per_minute = 2 }
"""
DENIED = POLICY + '\n[[rule]]\nid = "no"\neffect = "deny"\ntool = { names = ["transfer"] }\n'


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_014_400.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("aa.gateway.gateway.time.time", made)
    return made


Open = Callable[..., Gateway]


@pytest.fixture
def open_gateway(tmp_path: Path, clock: Clock) -> Open:
    """The gateway on the same files each time: opening it again is a restart."""

    def open_(policy: str = POLICY, **bounds: int) -> Gateway:
        (tmp_path / "policy.d").mkdir(exist_ok=True)
        (tmp_path / "policy.d" / "50-test.toml").write_text(policy)
        config = Config()
        config = replace(
            config,
            audit=replace(config.audit, file=tmp_path / "audit.jsonl"),
            gateway=replace(config.gateway, **bounds),
        )
        gateway = Gateway(
            config=config,
            policies=tmp_path / "policy.d",
            registry=RunRegistry(tmp_path / "runs.sqlite"),
            audit=AuditLog(AuditFile(tmp_path / "audit.jsonl", max_bytes=1 << 24, keep=2), None),
            approvals=Approvals(tmp_path / "approvals.sqlite", clock),
        )
        gateway.source.reload()
        assert not gateway.source.problems
        return gateway

    return open_


@pytest.fixture
def gateway(open_gateway: Open) -> Gateway:
    return open_gateway()


def remembering(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = replace(UNSAID, remember=True)
    monkeypatch.setattr(gateway.approvals, "terms", lambda *_: terms)


def records(tmp_path: Path) -> list[dict[str, Any]]:
    """Oldest first."""
    return list(reversed(list(read_backwards(tmp_path / "audit.jsonl"))))


def start_run(gateway: Gateway) -> Run:
    run = gateway.register(Run("", "codex", "dev", 1000, layers=frozenset({Layer.SDK})))
    return gateway.start(run.id, f"{AGENTS_SLICE}/aa-agent-{run.id}.service", 4242)


def transfer(amount: int = 5) -> Action:
    return Action(Kind.TOOL_CALL, "transfer", {"args": {"amount": amount}})


def connect(host: str = "x.ask.test", *addresses: str, **more: Any) -> Action:
    attributes: dict[str, Any] = {"host": host, "port": 443, **more}
    if addresses:
        attributes["addresses"] = list(addresses)
    return Action(Kind.NET_CONNECT, f"{host}:443", attributes)


def ask(gateway: Gateway, run: Run, action: Action | None = None, **more: Any) -> Decision:
    return gateway.decide(run.id, Layer.SDK, action or transfer(), **more)


def approve(gateway: Gateway, decision: Decision, who: Operator = ALICE) -> Approval:
    return gateway.answer(decision.approval, who, yes=True, note="")


def settled(gateway: Gateway, run: Run, decision: Decision) -> Decision:
    return asyncio.run(gateway.wait_approval(run.id, decision.approval, 0.05))


# -- asking and answering


def test_an_ask_is_answered_at_once_with_an_id_and_allowed_once_a_person_says_so(
    gateway: Gateway,
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    assert (asked.effect, asked.rule) == (Effect.ASK, "test/transfer")
    assert asked.approval and asked.approval in asked.reason and not asked.permits
    still = settled(gateway, run, asked)
    assert (still.effect, still.approval) == (Effect.ASK, asked.approval)
    approve(gateway, asked)
    done = settled(gateway, run, asked)
    assert (done.effect, done.approval) == (Effect.ALLOW, asked.approval)
    assert "approved by alice" in done.reason


def test_an_approval_is_used_once(gateway: Gateway) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    approve(gateway, asked)
    assert settled(gateway, run, asked).permits
    again = settled(gateway, run, asked)
    assert again.effect is Effect.ASK and again.approval != asked.approval
    assert ask(gateway, run).approval == again.approval


def test_an_approval_that_is_remembered_counts_for_the_rest_of_the_run(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    remembering(gateway, monkeypatch)
    run, other = start_run(gateway), start_run(gateway)
    approve(gateway, ask(gateway, run))
    assert ask(gateway, run).permits
    clock.now += 3600
    gateway.approvals.expire()
    assert ask(gateway, run).permits
    assert ask(gateway, other).effect is Effect.ASK
    gateway.end(run.id, exit_code=0, signal=None)
    assert gateway.approvals.listed() == gateway.approvals.pending()


def test_a_caller_that_left_finds_the_answer_when_it_tries_the_same_again(gateway: Gateway) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    assert ask(gateway, run).approval == asked.approval
    approve(gateway, asked)
    assert ask(gateway, run).permits
    assert ask(gateway, run).effect is Effect.ASK


def test_a_denial_is_told_with_its_note_and_holds_until_the_question_would_have_expired(
    gateway: Gateway, clock: Clock
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    gateway.answer(asked.approval, ALICE, yes=False, note="not on a Friday")
    denied = settled(gateway, run, asked)
    assert (denied.effect, denied.rule) == (Effect.DENY, "test/transfer")
    assert "denied by alice: not on a Friday" in denied.reason
    assert ask(gateway, run).effect is Effect.DENY
    assert ask(gateway, run, transfer(6)).effect is Effect.ASK
    clock.now += UNSAID.timeout + 1
    assert ask(gateway, run).effect is Effect.ASK


def test_what_nobody_answers_in_time_is_denied_and_may_be_asked_again(
    gateway: Gateway, clock: Clock
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    clock.now += UNSAID.timeout + 1
    gateway.approvals.expire()
    with pytest.raises(NotPending):
        approve(gateway, asked)
    denied = settled(gateway, run, asked)
    assert denied.effect is Effect.DENY and "nobody answered within 600 s" in denied.reason
    assert ask(gateway, run).effect is Effect.ASK


def test_an_approval_given_at_the_last_moment_can_still_be_used_for_a_while_and_then_not(
    gateway: Gateway, clock: Clock
) -> None:
    run = start_run(gateway)
    for late, effect in ((GRANT_SECONDS - 1, Effect.ALLOW), (GRANT_SECONDS + 1, Effect.ASK)):
        asked = ask(gateway, run)
        clock.now += UNSAID.timeout - 1
        approve(gateway, asked)
        clock.now += late
        assert ask(gateway, run).effect is effect


def test_a_policy_that_denies_by_then_wins_over_the_approval(
    gateway: Gateway, tmp_path: Path
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    approve(gateway, asked)
    (tmp_path / "policy.d" / "50-test.toml").write_text(DENIED)
    gateway.source.reload_if_changed()
    denied = settled(gateway, run, asked)
    assert (denied.effect, denied.rule) == (Effect.DENY, "test/no")


def test_waiting_for_what_is_not_ones_own_is_an_error(gateway: Gateway) -> None:
    run, other = start_run(gateway), start_run(gateway)
    asked = ask(gateway, run)
    for approval in (asked.approval, "nosuchid"):
        with pytest.raises(ApprovalUnknown):
            asyncio.run(gateway.wait_approval(other.id, approval, 0.01))


def test_a_run_can_look_at_what_waits_for_it_and_not_at_others(gateway: Gateway) -> None:
    run, other = start_run(gateway), start_run(gateway)
    asked = ask(gateway, run)
    ask(gateway, other, transfer(6))
    method = "io.agentassembly.Gateway.GetInfo"
    function, parameters = run_service(gateway, run.id).find({"method": method})
    told = function(Call(method, parameters, False, Peer(1, 2, 3, run.cgroup)))
    assert isinstance(told, dict)
    assert [(w["approval"], w["target"]) for w in told["waiting"]] == [(asked.approval, "transfer")]


def test_a_run_that_ended_waits_for_nothing(gateway: Gateway) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    gateway.end(run.id, exit_code=0, signal=None)
    assert gateway.approvals.pending() == []
    with pytest.raises(NotPending):
        approve(gateway, asked)
    assert settled(gateway, run, asked).effect is Effect.DENY


def test_a_limit_counts_what_was_approved_and_not_what_was_asked(gateway: Gateway) -> None:
    run = start_run(gateway)
    for amount in range(5):
        assert ask(gateway, run, transfer(amount)).effect is Effect.ASK
    for amount in range(2):
        approve(gateway, ask(gateway, run, transfer(amount)))
        assert ask(gateway, run, transfer(amount)).permits
    denied = ask(gateway, run, transfer(3))
    assert (denied.effect, denied.rule) == (Effect.DENY, "test/transfers")


# -- what an approval is bound to


@pytest.mark.parametrize(
    "other",
    [
        transfer(6),
        Action(Kind.TOOL_CALL, "transfer", {"args": {"amount": 5, "to": "x"}}),
        Action(Kind.TOOL_CALL, "transfer", {"args": {"amount": 5}, "more": 1}),
        Action(Kind.TOOL_CALL, "transfer", {}),
    ],
)
def test_an_approval_is_for_no_other_action(gateway: Gateway, other: Action) -> None:
    run = start_run(gateway)
    approve(gateway, ask(gateway, run))
    assert ask(gateway, run, other).effect is Effect.ASK
    assert ask(gateway, run).permits


def test_an_approval_is_for_no_other_run(gateway: Gateway) -> None:
    run, other = start_run(gateway), start_run(gateway)
    approve(gateway, ask(gateway, run))
    assert ask(gateway, other).effect is Effect.ASK


def test_an_approved_name_is_approved_with_its_addresses_but_not_past_another_rule_that_asks(
    gateway: Gateway,
) -> None:
    run = start_run(gateway)
    by_name = ask(gateway, run, connect())
    # The step of names cannot exclude b-inside, so whoever answers is asked for it too.
    assert gateway.approvals.pending()[0].rules == ("test/a-web", "test/b-inside")
    approve(gateway, by_name)
    first = settled(gateway, run, by_name)
    assert first.permits
    then = ask(
        gateway,
        run,
        connect("x.ask.test", "93.184.216.34", protocol="tls"),
        approval=first.approval,
    )
    assert (then.effect, then.approval) == (Effect.ALLOW, first.approval)
    other = ask(gateway, run, connect("x.ask.test", "9.9.9.9"), approval=first.approval)
    assert other.effect is Effect.ASK and other.approval != first.approval
    assert "test/c-range" in gateway.approvals.pending()[-1].rules


def test_where_a_rule_asks_because_of_an_address_the_approval_is_for_that_address(
    gateway: Gateway,
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run, connect("open.test", "9.9.9.9"))
    assert (asked.effect, asked.rule) == (Effect.ASK, "test/c-range")
    approve(gateway, asked)
    assert ask(gateway, run, connect("open.test", "9.9.9.8")).effect is Effect.ASK
    assert ask(gateway, run, connect("open.test", "9.9.9.9")).permits


def test_what_a_person_sees_and_no_rule_looks_at_is_not_part_of_the_approval(
    gateway: Gateway,
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run, connect(uid=1000, original="198.18.0.1"))
    again = ask(gateway, run, connect(uid=1000, original="198.18.0.7"))
    assert asked.approval == again.approval
    told = gateway.approvals.pending()[0].as_json()
    assert told["attributes"]["original"] == "198.18.0.1" and "original" not in told["bound"]


def test_a_later_step_goes_on_with_the_used_approval_of_its_own_run_alone(gateway: Gateway) -> None:
    run, other = start_run(gateway), start_run(gateway)
    approve(gateway, ask(gateway, run, connect()))
    first = ask(gateway, run, connect())
    assert first.permits
    assert ask(gateway, run, connect(), approval=first.approval).permits
    assert ask(gateway, run, connect("y.ask.test"), approval=first.approval).effect is Effect.ASK
    assert ask(gateway, other, connect(), approval=first.approval).effect is Effect.ASK
    assert ask(gateway, run, connect()).effect is Effect.ASK


def test_a_provisional_ask_asks_nobody_and_leaves_no_record(
    gateway: Gateway, tmp_path: Path
) -> None:
    run = start_run(gateway)
    before = len(records(tmp_path))
    asked = ask(gateway, run, connect(), provisional=True)
    assert (asked.effect, asked.approval) == (Effect.ASK, "")
    assert gateway.approvals.pending() == [] and len(records(tmp_path)) == before
    approve(gateway, ask(gateway, run, connect()))
    assert ask(gateway, run, connect(), provisional=True).permits
    assert ask(gateway, run, connect()).permits  # the provisional one did not use it up


def test_a_name_that_only_an_ask_rule_opens_is_asked_about_as_a_connection(
    gateway: Gateway,
) -> None:
    run = start_run(gateway)
    query = ask(gateway, run, Action(Kind.DNS_QUERY, "x.ask.test", {"qtype": "A"}))
    assert (query.effect, query.approval) == (Effect.ASK, "")
    assert gateway.approvals.pending() == []


# -- who may answer


def test_only_whom_the_rules_name_may_answer_and_root(gateway: Gateway) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    with pytest.raises(NotAllowed, match="group:aa-operators, not mallory"):
        approve(gateway, asked, MALLORY)
    with pytest.raises(NotAllowed):
        gateway.answer(asked.approval, MALLORY, yes=False, note="")
    assert gateway.approvals.pending()
    assert approve(gateway, asked, ROOT).decided_by == "root"


def test_whoever_answers_for_two_rules_is_named_by_both() -> None:
    one = Terms((("group:aa-operators",),), 600.0, True)
    two = Terms((("user:bob", "group:security"),), 60.0, False)
    both = Terms.together([one, two, one])
    assert both == Terms((("group:aa-operators",), ("user:bob", "group:security")), 60.0, False)
    approval = Approval(
        "i", "r", "a", "u", Layer.SDK, transfer(), {}, "d", ("t/x",), "", "", both.by, False, 1, 2
    )
    assert not approval.may_be_answered_by(ALICE)
    assert not approval.may_be_answered_by(Operator(1, "bob"))
    assert approval.may_be_answered_by(Operator(1, "bob", frozenset({"aa-operators"})))


def test_a_rule_says_who_may_answer_how_long_it_waits_and_how_long_it_counts(
    open_gateway: Open, clock: Clock
) -> None:
    said = 'approve = { by = ["user:mallory"], timeout = "2h", remember = "run" }'
    gateway = open_gateway(POLICY.replace('reason = "money"', said))
    run = start_run(gateway)
    asked = ask(gateway, run)
    with pytest.raises(NotAllowed, match="user:mallory, not alice"):
        approve(gateway, asked)
    clock.now += 7000
    approve(gateway, asked, MALLORY)
    assert [ask(gateway, run).effect for _ in range(2)] == [Effect.ALLOW] * 2


def test_an_operator_is_who_the_user_database_says_the_uid_is() -> None:
    me = operator_of(os.getuid())
    assert me.name == pwd.getpwuid(os.getuid()).pw_name and me.groups
    nobody = operator_of(3_999_999_999)
    assert nobody.groups == frozenset() and not nobody.is_named(("user:root", "group:root"))


def test_a_run_can_neither_reach_the_control_socket_nor_answer_on_its_own(gateway: Gateway) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    for cgroup in (run.cgroup, f"{run.cgroup}/deeper", None):
        assert refuse_governed(Peer(1, 0, 0, cgroup))
    methods = run_service(gateway, run.id)
    for name in ("Approve", "Deny", "ListApprovals"):
        for interface in ("io.agentassembly.Gateway", "io.agentassembly.Control"):
            with pytest.raises(VarlinkError):
                call = {"id": asked.approval, "note": ""}
                methods.find({"method": f"{interface}.{name}", "parameters": call})
    assert gateway.approvals.pending()


# -- records


def test_every_step_is_in_the_audit_log(gateway: Gateway, tmp_path: Path) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    gateway.answer(asked.approval, ALICE, yes=True, note="checked")
    settled(gateway, run, asked)
    found = [r for r in records(tmp_path) if r["kind"] == "tool.call"]
    assert [(r["type"], r["decision"]) for r in found] == [
        ("decision", "ask"),
        ("lifecycle", ""),
        ("decision", "allow"),
    ]
    assert {r["attributes"]["approval"] for r in found} == {asked.approval}
    said = found[1]
    assert said["reason"] == "approved by alice: checked"
    assert (said["attributes"]["by_uid"], said["run"]) == (1000, run.id)


def test_questions_that_end_by_themselves_are_recorded(
    gateway: Gateway, tmp_path: Path, clock: Clock
) -> None:
    run = start_run(gateway)
    ask(gateway, run)
    clock.now += UNSAID.timeout + 1
    gateway.approvals.expire()
    ask(gateway, run, transfer(6))
    gateway.end(run.id, exit_code=0, signal=None)
    told = [r["reason"] for r in records(tmp_path) if r["type"] == "lifecycle"]
    assert told[-3:-1] == ["nobody answered in time", "withdrawn"]


def test_a_question_is_no_denial_and_an_unanswered_one_is(gateway: Gateway, clock: Clock) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    assert gateway.denials(run.id) == [] and gateway.denied == 0
    clock.now += UNSAID.timeout + 1
    settled(gateway, run, asked)
    assert [r["target"] for r in gateway.denials(run.id)] == ["transfer"]


def test_nobody_is_asked_and_nothing_is_approved_without_a_record(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)

    def full(record: Any) -> int:
        raise AuditUnavailable("the disk is full")

    monkeypatch.setattr(gateway.audit, "write", full)
    with pytest.raises(AuditUnavailable):
        approve(gateway, asked)
    assert [a.id for a in gateway.approvals.pending()] == [asked.approval]
    refused = ask(gateway, run, transfer(6))
    assert (refused.effect, refused.rule) == (Effect.DENY, "<audit>")
    assert [a.id for a in gateway.approvals.pending()] == [asked.approval]


# -- bounds


def test_more_questions_than_the_limits_are_denied_and_another_run_may_still_ask(
    open_gateway: Open,
) -> None:
    gateway = open_gateway(max_pending_approvals_per_run=3, max_pending_approvals=4)
    run, other, third = start_run(gateway), start_run(gateway), start_run(gateway)
    answers = [ask(gateway, run, transfer(n)) for n in range(5)]
    assert [a.effect for a in answers] == [Effect.ASK] * 3 + [Effect.DENY] * 2
    assert answers[3].rule == "<limit:max_pending_approvals_per_run>"
    assert ask(gateway, run, transfer(0)).effect is Effect.ASK  # it is asked already
    assert ask(gateway, other).effect is Effect.ASK
    assert ask(gateway, third).rule == "<limit:max_pending_approvals>"


def test_what_nobody_can_look_through_is_denied(gateway: Gateway) -> None:
    run = start_run(gateway)
    huge = Action(Kind.TOOL_CALL, "transfer", {"args": {"text": "x" * ACTION_LIMIT}})
    assert ask(gateway, run, huge).rule == "<limit:approval_action_size>"


def test_a_list_of_the_largest_questions_fits_into_one_message(open_gateway: Open) -> None:
    gateway = open_gateway(max_pending_approvals_per_run=300, max_pending_approvals=300)
    run = start_run(gateway)
    for n in range(300):
        large = {"args": {"n": n, "text": "\u202e" * 5000}}
        assert ask(gateway, run, Action(Kind.TOOL_CALL, "transfer", large)).approval
    service = control_service(gateway, pid=1)
    method = "io.agentassembly.Control.ListApprovals"
    function, parameters = service.find({"method": method, "parameters": {"closed": False}})
    told = function(Call(method, parameters, False, Peer(1, 0, 0, "")))
    assert isinstance(told, dict) and len(told["approvals"]) == 200
    assert encode(told)


# -- what they survive


def test_approvals_survive_a_restart(gateway: Gateway, open_gateway: Open) -> None:
    run = start_run(gateway)
    pending, given, denied = (ask(gateway, run, transfer(n)) for n in range(3))
    approve(gateway, given)
    gateway.answer(denied.approval, ALICE, yes=False, note="")
    again = open_gateway()
    assert [a.id for a in again.approvals.pending()] == [pending.approval]
    assert ask(again, run, transfer(0)).approval == pending.approval
    assert ask(again, run, transfer(2)).effect is Effect.DENY
    assert ask(again, run, transfer(1)).permits
    third = open_gateway()
    assert ask(third, run, transfer(1)).effect is Effect.ASK  # used before the restart
    approve(third, pending)
    assert settled(third, run, pending).permits


def test_a_restart_withdraws_the_questions_of_runs_that_ended_meanwhile(
    gateway: Gateway, open_gateway: Open, tmp_path: Path
) -> None:
    run = start_run(gateway)
    ask(gateway, run)
    registry = RunRegistry(tmp_path / "runs.sqlite")
    registry.end(run, exit_code=0, signal=None)
    again = open_gateway()
    assert again.approvals.pending() == []
    assert [a.state for a in again.approvals.listed(closed=True)] == [State.WITHDRAWN]


KILLED = """
import os, signal, sys
from pathlib import Path
from aa.gateway.approvals import UNSAID, Approvals, Operator, Question
from aa.model import Action, Decision, Effect, Kind, Layer, Run
store = Approvals(Path(sys.argv[1]))
run = Run("run1", "codex", "dev", 1000)
def ask(n):
    asked = Question({"n": n}, ("t/x",), str(n))
    decision = Decision(Effect.ASK, "", "t/x", "")
    return store.ask(run, Layer.SDK, Action(Kind.TOOL_CALL, "t"), asked, decision, UNSAID,
                     per_run=9, in_all=9)
alice = Operator(0, "root")
pending, given, used = ask(0), ask(1), ask(2)
store.answer(given, alice, yes=True, note="")
store.use(store.answer(used, alice, yes=True, note=""))
print(pending.id, given.id, used.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_approvals_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "approvals.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    store = Approvals(path)
    states = []
    for approval in done.stdout.split():
        found = store.get(approval)
        assert found is not None
        states.append(found.state)
    assert states == [State.PENDING, State.APPROVED, State.USED]


@pytest.mark.parametrize(
    "damage", [b"this is no database" * 1000, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_corrupt_file_denies_and_says_so(
    open_gateway: Open, tmp_path: Path, damage: bytes
) -> None:
    (tmp_path / "approvals.sqlite").write_bytes(damage)
    gateway = open_gateway()
    run = start_run(gateway)
    denied = ask(gateway, run)
    assert (denied.effect, denied.rule) == (Effect.DENY, "<approvals>")
    assert "move it away" in denied.reason
    assert ask(gateway, run, Action(Kind.TOOL_CALL, "read", {})).permits
    assert any("approvals.sqlite" in p for p in gateway.problems())


def test_a_record_of_another_shape_is_corruption(
    gateway: Gateway, open_gateway: Open, tmp_path: Path
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    db = gateway.approvals._db
    assert db is not None
    db.execute("update approval set json = '{\"id\": 1}' where id = ?", (asked.approval,))
    assert ask(open_gateway(), run).rule == "<approvals>"


def test_a_disk_that_takes_nothing_asks_nobody_and_gives_no_approval(
    gateway: Gateway,
) -> None:
    run = start_run(gateway)
    asked = ask(gateway, run)
    approve(gateway, asked)
    db = gateway.approvals._db
    assert db is not None
    db.execute("pragma query_only = on")
    assert ask(gateway, run, transfer(6)).rule == "<approvals>"
    assert ask(gateway, run).rule == "<approvals>"  # its use could not be noted
    db.execute("pragma query_only = off")
    assert ask(gateway, run).permits
    assert not any("approvals" in problem for problem in gateway.problems())


# -- over sockets


@contextlib.asynccontextmanager
async def served(gateway: Gateway, folder: Path) -> Any:
    """The three sockets of a gateway, as it serves them."""
    nothing: Callable[[Any], None] = lambda _: None  # noqa: E731
    servers = [
        Server.at(
            folder / "enforce", enforce_service(gateway, open_run=nothing, close_run=nothing)
        ),
        Server.at(folder / "control", control_service(gateway, pid=1)),
    ]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def run_async(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 60))


async def until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def test_the_proxy_waits_for_a_person_without_keeping_another_decision_waiting(
    gateway: Gateway, tmp_path: Path
) -> None:
    async def scenario() -> None:
        run = start_run(gateway)
        async with served(gateway, tmp_path):
            proxy = ProxysGateway(socket=tmp_path / "enforce")
            asked = await proxy.decide(run.id, connect())
            waiting = [asyncio.create_task(proxy.settle(run.id, connect(), asked))]
            await until(lambda: gateway.approvals._changed)
            assert proxy.waiting == 1
            for _ in range(20):
                assert (await proxy.decide(run.id, connect("open.test"))).permits
            assert not waiting[0].done()
            operator = await AsyncClient.connect(tmp_path / "control")
            listed = await operator.call(
                "io.agentassembly.Control.ListApprovals", {"closed": False}
            )
            (one,) = listed["approvals"]
            assert one["id"] == asked.approval
            answer = {"id": one["id"], "note": ""}
            told = await operator.call("io.agentassembly.Control.Approve", answer)
            assert told["approval"]["state"] == "approved"
            with pytest.raises(VarlinkError) as e:
                await operator.call("io.agentassembly.Control.Deny", answer)
            assert e.value.name == "ApprovalNotPending"
            decision = await waiting[0]
            assert decision.permits and proxy.waiting == 0
            await operator.close()
            await proxy.close()

    run_async(scenario())


def test_the_proxy_goes_on_waiting_over_a_restart_of_the_gateway(
    gateway: Gateway, open_gateway: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_ask, "AGAIN_SECONDS", 0.01)

    async def scenario() -> None:
        run = start_run(gateway)
        proxy = ProxysGateway(socket=tmp_path / "enforce")
        async with served(gateway, tmp_path):
            asked = await proxy.decide(run.id, connect())
            waiting = asyncio.create_task(proxy.settle(run.id, connect(), asked))
            await until(lambda: gateway.approvals._changed)
        again = open_gateway()
        async with served(again, tmp_path):
            await until(lambda: again.approvals._changed)
            approve(again, asked)
            assert (await waiting).permits
        await proxy.close()

    run_async(scenario())


def test_the_proxy_denies_when_the_gateway_stays_away(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_ask, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(proxy_ask, "AWAY_SECONDS", 0.05)

    async def scenario() -> None:
        asked = Decision(Effect.ASK, "", "t/x", "", approval="someid")
        proxy = ProxysGateway(socket=tmp_path / "nobody")
        with pytest.raises(GatewayAway) as e:
            await proxy.settle("run1", connect(), asked)
        assert e.value.decision.rule == "<gateway-unreachable>"

    run_async(scenario())


def test_no_more_than_a_limit_wait_and_an_ask_without_an_approval_is_a_denial(
    gateway: Gateway, tmp_path: Path
) -> None:
    async def scenario() -> None:
        run = start_run(gateway)
        async with served(gateway, tmp_path):
            proxy = ProxysGateway(socket=tmp_path / "enforce", max_waiting=1)
            asked = await proxy.decide(run.id, connect())
            waiting = asyncio.create_task(proxy.settle(run.id, connect(), asked))
            await until(lambda: gateway.approvals._changed)
            with pytest.raises(GatewayAway) as e:
                await proxy.settle(run.id, connect(), asked)
            assert e.value.decision.rule == "<limit:max_waiting>"
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert proxy.waiting == 0
            provisional = await proxy.decide(run.id, connect(), provisional=True)
            with pytest.raises(GatewayAway):
                await proxy.settle(run.id, connect(), provisional)
            await proxy.close()

    run_async(scenario())


def test_watching_begins_with_what_waits_and_goes_on_with_each_change(
    gateway: Gateway, tmp_path: Path
) -> None:
    async def scenario() -> None:
        run = start_run(gateway)
        first = ask(gateway, run)
        async with served(gateway, tmp_path):
            operator = await AsyncClient.connect(tmp_path / "control")
            stream = operator.stream("io.agentassembly.Control.WatchApprovals")
            seen = [(await anext(stream))["approval"]]
            second = ask(gateway, run, transfer(6))
            approve(gateway, first)
            seen += [(await anext(stream))["approval"] for _ in range(2)]
            assert [(a["id"], a["state"]) for a in seen] == [
                (first.approval, "pending"),
                (second.approval, "pending"),
                (first.approval, "approved"),
            ]
            await operator.close()

    run_async(scenario())
