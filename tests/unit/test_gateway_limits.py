"""Limits: what is counted, what an exhausted one denies, what survives, and what a broken counter means."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aa.audit.file import AuditFile, read_backwards
from aa.audit.log import AuditLog
from aa.config import Config
from aa.gateway import gateway as gateway_module
from aa import prices
from aa.gateway.counters import Counters
from aa.gateway.gateway import Gateway
from aa.gateway.interfaces import control_service
from aa.gateway.limits import MAX_TOKENS, Limits, usage_of
from aa.prices import Prices, Usage
from aa.gateway.runs import RunRegistry
from aa.model import Action, Decision, Effect, Kind, Layer, Obligation, RecordType, Report, Run
from aa.policy import loads
from aa.tomlfile import InvalidFile
from aa.varlink import Call, Peer

TOP = Path(__file__).parents[2]
PRICES = TOP / "etc/agent-assembly/prices.toml"
NOON = 1_800_014_400.0  # 2027-01-15 12:00 UTC

POLICY = """
[policy]
id = "test"
default = { network = "deny", dns = "deny", tool = "allow" }

[[rule]]
id = "web"
effect = "allow"
network = { hosts = ["**"] }

[[limit]]
id = "searches"
per = "run"
tool = { names = ["web_*", "find"], per_minute = 3 }

[[limit]]
id = "upload"
per = "user"
network = { bytes_out_per_hour = 1000 }

[[limit]]
id = "spend"
per = "agent"
llm = { usd_per_day = 1.0, tokens_per_hour = 1_000_000 }
"""


class Clock:
    def __init__(self) -> None:
        self.now = NOON

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

    def open_(policy: str = POLICY) -> Gateway:
        (tmp_path / "policy.d").mkdir(exist_ok=True)
        (tmp_path / "policy.d" / "50-test.toml").write_text(policy)
        config = replace(Config(), audit=replace(Config().audit, file=tmp_path / "audit.jsonl"))
        gateway = Gateway(
            config=config,
            policies=tmp_path / "policy.d",
            registry=RunRegistry(tmp_path / "runs.sqlite"),
            audit=AuditLog(AuditFile(tmp_path / "audit.jsonl", max_bytes=1 << 22, keep=2), None),
            limits=Limits(Counters(tmp_path / "limits.sqlite"), lambda: prices.load(PRICES)),
        )
        gateway.source.reload()
        assert not gateway.source.problems
        return gateway

    return open_


def start_run(gateway: Gateway, agent: str = "codex", user: str = "dev") -> Run:
    run = gateway.register(Run("", agent, user, 1000, layers=frozenset({Layer.PROXY})))
    return gateway.start(run.id, f"aa.slice/x/aa-agent-{run.id}.service", 4242)


def tool(gateway: Gateway, run: Run, name: str = "web_search") -> Decision:
    return gateway.decide(run.id, Layer.SDK, Action(Kind.TOOL_CALL, name, {"args": {}}))


def connect(gateway: Gateway, run: Run, host: str = "example.org") -> Decision:
    attributes = {"host": host, "port": 443, "protocol": "tls", "addresses": ["93.184.216.34"]}
    action = Action(Kind.NET_CONNECT, f"{host}:443", attributes)
    return gateway.decide(run.id, Layer.PROXY, action)


def request(gateway: Gateway, run: Run, host: str) -> Decision:
    """What the limits make of one request of an inspected connection that a rule allows."""
    policy = gateway.source.policy
    assert policy is not None
    attributes = {"host": host, "port": 443, "protocol": "tls", "method": "POST", "path": "/v1"}
    action = Action(Kind.HTTP_REQUEST, f"https://{host}/v1", attributes)
    allow = Decision(Effect.ALLOW, "", "test/web", policy.revision)
    now = gateway_module.time.time()
    return gateway.limits.judge(policy.limits(run), run, action, allow, now)


def report(gateway: Gateway, run: Run, kind: Kind, target: str, **attributes: Any) -> None:
    seen = Report(
        RecordType.OBSERVED, Layer.PROXY, kind, target, 1, run=run.id, attributes=attributes
    )
    gateway.component_reports("proxy", 0, [seen])


def spend(gateway: Gateway, run: Run, model: str = "claude-sonnet-4-5", **tokens: int) -> None:
    attributes = {"provider": "anthropic", "model": model, **tokens}
    report(gateway, run, Kind.LLM_REQUEST, f"anthropic/{model}", **attributes)


def test_calls_are_counted_per_run_and_begin_anew_in_the_next_minute(
    open_gateway: Open, clock: Clock
) -> None:
    gateway = open_gateway()
    one, other = start_run(gateway), start_run(gateway)
    answers = [tool(gateway, one, name) for name in ("web_search", "find", "web_get", "find")]
    assert [a.effect for a in answers] == [Effect.ALLOW] * 3 + [Effect.DENY]
    assert answers[3].rule == "test/searches"
    assert "3 of 3 calls in this minute" in answers[3].reason
    assert "2027-01-15 12:01 UTC" in answers[3].reason
    assert tool(gateway, one, "read").permits
    assert tool(gateway, other).permits
    clock.now += 60
    assert tool(gateway, one).permits


def test_bytes_out_are_counted_per_user_from_what_the_front_reports(
    open_gateway: Open, clock: Clock
) -> None:
    gateway = open_gateway()
    one, same, other = (
        start_run(gateway),
        start_run(gateway, "claude"),
        start_run(gateway, "x", "ann"),
    )
    report(gateway, one, Kind.NET_CONNECT, "example.org:443", sent=600, received=10_000)
    assert connect(gateway, same).permits
    report(gateway, same, Kind.NET_CONNECT, "example.org:443", sent=400)
    denied = connect(gateway, one)
    assert (denied.effect, denied.rule) == (Effect.DENY, "test/upload")
    assert "1000 of 1000 bytes sent in this hour for user dev" in denied.reason
    assert connect(gateway, other).permits
    clock.now += 3600
    assert connect(gateway, one).permits


def test_money_is_counted_from_what_providers_answered_and_closes_their_hosts(
    open_gateway: Open, clock: Clock
) -> None:
    gateway = open_gateway()
    run, other = start_run(gateway), start_run(gateway, "claude")
    spend(gateway, run, input_tokens=100_000, output_tokens=40_000)  # 0.30 + 0.60 USD
    assert request(gateway, run, "api.anthropic.com").permits
    spend(gateway, run, input_tokens=40_000)
    denied = request(gateway, run, "api.anthropic.com")
    assert (denied.effect, denied.rule) == (Effect.DENY, "test/spend")
    assert "1.02 of 1 USD today for agent codex" in denied.reason
    assert "2027-01-16 00:00 UTC" in denied.reason
    assert request(gateway, run, "api.openai.com").effect is Effect.DENY
    assert request(gateway, run, "example.org").permits
    assert request(gateway, other, "api.anthropic.com").permits
    clock.now += 12 * 3600
    assert request(gateway, run, "api.anthropic.com").permits


def test_tokens_of_every_kind_count(open_gateway: Open) -> None:
    gateway = open_gateway(POLICY.replace("usd_per_day = 1.0, ", ""))
    run = start_run(gateway)
    spend(gateway, run, cache_read_tokens=900_000, cache_write_tokens=99_999)
    assert request(gateway, run, "api.anthropic.com").permits
    spend(gateway, run, output_tokens=1)
    denied = request(gateway, run, "api.anthropic.com")
    assert "1000000 of 1000000 tokens in this hour" in denied.reason


def test_a_connection_in_which_nothing_can_be_counted_is_denied_under_a_model_limit(
    open_gateway: Open,
) -> None:
    gateway = open_gateway()
    run = start_run(gateway)
    denied = connect(gateway, run, "api.anthropic.com")
    assert denied.rule == "test/spend" and "without inspection" in denied.reason
    assert connect(gateway, run, "example.org").permits
    policy = gateway.source.policy
    assert policy is not None
    action = Action(Kind.NET_CONNECT, "api.anthropic.com:443", {"host": "api.anthropic.com"})
    allow = Decision(Effect.ALLOW, "", "test/web", "", obligations=(Obligation("inspect"),))
    assert gateway.limits.judge(policy.limits(run), run, action, allow, NOON) is allow


MODELS = """
[policy]
id = "models"
default = { llm = "deny" }
[[rule]]
id = "web"
effect = "allow"
network = { hosts = ["example.org", "api.anthropic.com"] }
[[rule]]
id = "inspected"
effect = "allow"
network = { hosts = ["api.openai.com"], inspect = true }
[[rule]]
id = "small"
effect = "allow"
llm = { model = "claude-haiku-*" }
"""


def test_a_connection_in_which_no_model_can_be_seen_is_denied_where_rules_judge_models(
    open_gateway: Open,
) -> None:
    gateway = open_gateway(MODELS)
    run = start_run(gateway)
    denied = connect(gateway, run, "api.anthropic.com")
    assert (denied.effect, denied.rule) == (Effect.DENY, "<not-inspected>")
    assert "inspect = true" in denied.reason
    assert connect(gateway, run, "example.org").permits
    assert connect(gateway, run, "api.openai.com").permits
    watching = open_gateway(MODELS.replace('id = "models"', 'id = "models"\nmode = "observe"'))
    assert connect(watching, start_run(watching), "api.anthropic.com").permits
    silent = open_gateway(
        MODELS.replace('llm = "deny"', 'dns = "deny"').split('[[rule]]\nid = "small')[0]
    )
    assert connect(silent, start_run(silent), "api.anthropic.com").permits


def test_what_a_run_says_of_itself_is_not_counted(open_gateway: Open) -> None:
    gateway = open_gateway()
    run = start_run(gateway)
    seen = Report(
        RecordType.OBSERVED, Layer.SDK, Kind.LLM_REQUEST, "anthropic/x", 1, run=run.id,
        attributes={"provider": "anthropic", "model": "x", "input_tokens": 10**9},
    )  # fmt: skip
    gateway.component_reports("sdk", 0, [seen])
    assert request(gateway, run, "api.anthropic.com").permits


def test_a_model_without_a_price_is_charged_as_the_dearest_and_reported_once(
    open_gateway: Open, tmp_path: Path
) -> None:
    gateway = open_gateway()
    run = start_run(gateway)
    for _ in range(2):
        spend(gateway, run, model="claude-next", output_tokens=10_000)
    records = list(read_backwards(tmp_path / "audit.jsonl"))
    costs = [r["attributes"]["usd"] for r in records if r["type"] == "observed"]
    assert costs == [0.75, 0.75]
    alerts = [r["reason"] for r in records if r["type"] == "alert" and r["kind"] == "llm.request"]
    assert alerts == [
        "anthropic/claude-next has no price and is charged as the dearest of its provider"
    ]


def test_an_unknown_provider_is_charged_as_the_dearest_of_all() -> None:
    known = prices.load(PRICES)
    assert known.problem == ""
    unknown = Usage("somebody", "m", 1_000_000, 1_000_000, 0, 0)
    assert known.cost(unknown) == (15.0 + 75.0, False)
    assert known.cost(replace(unknown, provider="openai", model="gpt-4o-mini-2024")) == (0.75, True)
    assert known.cost(replace(unknown, provider="openai", model="new")) == (2.5 + 10.0, False)


@pytest.mark.parametrize("text", ["", "[[provider]]\nid = 'a'\n", "provider = 3", None])
def test_without_usable_prices_runs_under_a_model_limit_are_denied_and_others_are_not(
    open_gateway: Open, tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "prices.toml"
    if text is not None:
        file.write_text(text)
    narrowed = POLICY.replace('id = "test"', 'id = "test"\napplies_to = { agents = ["codex"] }')
    gateway = open_gateway(narrowed)
    gateway.limits = Limits(Counters(tmp_path / "other.sqlite"), lambda: prices.load(file))
    run = start_run(gateway)
    denied = request(gateway, run, "api.anthropic.com")
    assert denied.rule == "test/spend" and "prices.toml" in denied.reason
    assert tool(gateway, run).permits
    assert any("prices.toml" in p for p in gateway.problems())
    file.write_text(PRICES.read_text())
    gateway.limits.reload()
    assert request(gateway, run, "api.anthropic.com").permits
    file.write_text("not toml")
    gateway.limits.reload()
    assert request(gateway, run, "api.anthropic.com").permits
    assert any("prices not changed" in p for p in gateway.problems())


def test_counters_survive_a_restart(open_gateway: Open) -> None:
    gateway = open_gateway()
    run = start_run(gateway)
    assert [tool(gateway, run).permits for _ in range(2)] == [True, True]
    again = open_gateway()
    assert [tool(again, run).permits for _ in range(2)] == [True, False]


def test_counters_survive_kill_9_with_nothing_lost(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from aa.gateway.counters import Counters
counters = Counters(Path(sys.argv[1]))
for n in range(500):
    counters.add(("a/b", "per_minute", "run"), 60, 1)
    os.write(1, b".")
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "limits.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(TOP)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"." * 500)
    assert Counters(path).used(("a/b", "per_minute", "run"), 60) == 500


def test_corrupt_counters_deny_what_is_limited_and_say_so(
    open_gateway: Open, tmp_path: Path
) -> None:
    (tmp_path / "limits.sqlite").write_bytes(b"this is no database" * 1000)
    gateway = open_gateway()
    run = start_run(gateway)
    denied = tool(gateway, run)
    assert denied.rule == "test/searches"
    assert "limits.sqlite" in denied.reason and "move it away" in denied.reason
    assert any("limits.sqlite" in p for p in gateway.problems())
    assert tool(gateway, run, "read").permits


def test_a_counter_that_cannot_be_written_denies_until_it_can(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "limits.sqlite")
    key = ("a/b", "per_minute", "run")
    blocker = sqlite3.connect(tmp_path / "limits.sqlite", isolation_level=None)
    blocker.execute("begin immediate")
    counters._db.execute("pragma busy_timeout = 10")  # type: ignore[union-attr]
    counters.add(key, 60, 5)
    assert "locked" in counters.problem and counters.used(key, 60) == 5
    blocker.execute("rollback")
    counters.forget_before(0)
    assert counters.problem == ""
    assert Counters(tmp_path / "limits.sqlite").used(key, 60) == 5


def test_in_observe_mode_a_limit_only_says_what_it_would_do(open_gateway: Open) -> None:
    gateway = open_gateway(POLICY.replace('id = "test"', 'id = "test"\nmode = "observe"'))
    run = start_run(gateway)
    for _ in range(3):
        assert tool(gateway, run).would is not Effect.DENY
    over = tool(gateway, run)
    assert (over.effect, over.would) == (Effect.ALLOW, Effect.DENY)
    assert "test/searches" in over.reason


def test_a_limit_is_of_the_runs_that_its_policy_applies_to(open_gateway: Open) -> None:
    narrowed = POLICY.replace('id = "test"', 'id = "test"\napplies_to = { agents = ["codex"] }')
    gateway = open_gateway(narrowed + "")
    policy = gateway.source.policy
    assert policy is not None
    assert len(policy.limits(Run("r", "codex", "dev", 1))) == 4
    assert policy.limits(Run("r", "claude", "dev", 1)) == ()


def test_limits_are_shown_with_what_was_used(open_gateway: Open) -> None:
    gateway = open_gateway()
    run = start_run(gateway)
    tool(gateway, run)
    method, _ = control_service(gateway, pid=1).find(
        {"method": "io.agentassembly.Control.ShowLimits", "parameters": {}}
    )
    told = method(Call("ShowLimits", {}, False, Peer(1, 0, 0, "x")))
    assert isinstance(told, dict) and told["problems"] == []
    shown = {(x["ref"], x["measure"]): x for x in told["limits"]}
    assert len(shown) == 4
    searches = shown["test/searches", "per_minute"]
    assert (searches["subject"], searches["used"], searches["most"]) == (run.id, 1.0, 3.0)
    assert shown["test/spend", "usd_per_day"]["used"] == 0.0


def test_nonsense_in_a_usage_is_charged_as_the_most() -> None:
    for wrong in (-1, 1.5, "3", True, None, 1 << 62, [1]):
        assert usage_of({"input_tokens": wrong}).input_tokens == MAX_TOKENS
    assert usage_of({"provider": "p", "input_tokens": 7}) == Usage("p", "", 7, 0, 0, 0)


@pytest.mark.parametrize(
    "limit",
    [
        "id = 'x'\nper = 'run'",
        "id = 'x'\nper = 'run'\ntool = {}",
        "id = 'x'\nper = 'run'\ntool = { names = [], per_minute = 3 }",
        "id = 'x'\nper = 'run'\ntool = { names = ['a'], per_minute = 0 }",
        "id = 'x'\nper = 'moon'\ntool = { names = ['a'], per_minute = 1 }",
        "id = 'x'\ntool = { names = ['a'], per_minute = 1 }",
        "id = 'x'\nper = 'run'\nllm = {}",
        "id = 'x'\nper = 'run'\nllm = { usd_per_day = 0 }",
        "id = 'x'\nper = 'run'\nllm = { usd_per_day = nan }",
        "id = 'x'\nper = 'run'\nllm = { usd_per_month = 5 }",
        "id = 'x'\nper = 'run'\nllm = { usd_per_day = 5 }\nnetwork = { bytes_out_per_day = 5 }",
        "id = 'x'\nper = 'run'\nllm = { usd_per_day = 5 }\n[[limit]]\nid = 'x'\nper = 'run'\n"
        "llm = { usd_per_day = 5 }",
    ],
)
def test_a_limit_that_limits_nothing_or_two_things_is_an_error(limit: str) -> None:
    head = '[policy]\nid = "p"\n'
    with pytest.raises(InvalidFile) as refused:
        loads({"p.toml": f"{head}[[limit]]\n{limit}\n"})
    assert all(p.line >= 3 for p in refused.value.problems)
    good = "id = 'x'\nper = 'run'\nllm = { usd_per_day = 5 }\n"
    assert len(loads({"p.toml": f"{head}[[limit]]\n{good}"}).files[0].limits) == 1


def test_the_shipped_prices_are_valid_and_say_that_they_are_examples() -> None:
    known: Prices = prices.load(PRICES)
    assert set(known.providers) == {"anthropic", "openai"} and known.is_provider("api.openai.com")
    assert "examples" in PRICES.read_text()
