"""The gateway without sockets: what it decides, what it records before it answers, how runs live and end."""

from __future__ import annotations

import asyncio
import gc
import json
import sqlite3
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aa.audit.file import AuditFile, read_backwards
from aa.audit.journal import Journal
from aa.audit.log import AuditLog, AuditUnavailable
from aa.config import Config
from aa.gateway import source
from aa.gateway.__main__ import tell_authority
from aa.gateway.gateway import Gateway, LayerNotReady, RunUnknown, TooManyRuns
from aa.gateway.interfaces import enforce_service, run_service
from aa.gateway.runs import Halt, RegistryCorrupt, RunRegistry
from aa.model import Action, Effect, Kind, Layer, Mode, RecordType, Report, Run, RunState
from aa.varlink import Call, Peer, VarlinkError

POLICY = """
[policy]
id = "test"
default = { network = "deny", dns = "deny", tool = "deny" }

[[rule]]
id = "web"
effect = "allow"
network = { hosts = ["allowed.test"] }

[[rule]]
id = "search"
effect = "allow"
tool = { names = ["search"] }

[[rule]]
id = "transfer"
effect = "ask"
tool = { names = ["transfer"] }
"""
PUBLIC = ["93.184.216.34"]


def connect(host: str, addresses: list[str] | None = None) -> Action:
    attributes: dict[str, Any] = {"host": host, "port": 443, "protocol": "tls"}
    if addresses is not None:
        attributes["addresses"] = addresses
    return Action(Kind.NET_CONNECT, f"{host}:443", attributes)


def tool(name: str) -> Action:
    return Action(Kind.TOOL_CALL, name, {"args": {}})


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    directory = tmp_path / "policy.d"
    directory.mkdir()
    return directory


Open = Callable[[], Gateway]


@pytest.fixture
def open_gateway(tmp_path: Path, policies: Path) -> Open:
    """Opens the gateway on the same files each time: calling it again is a restart."""

    def open_() -> Gateway:
        config = Config()
        config = replace(
            config,
            audit=replace(config.audit, file=str(tmp_path / "audit.jsonl")),
            gateway=replace(config.gateway, max_runs=3, decisions_per_second=100),
        )
        audit = AuditLog(
            AuditFile(tmp_path / "audit.jsonl", max_bytes=1 << 20, keep=2),
            Journal(tmp_path / "no-journal"),
        )
        gateway = Gateway(
            config=config,
            policies=policies,
            registry=RunRegistry(tmp_path / "runs.sqlite"),
            audit=audit,
        )
        gateway.source.reload()
        return gateway

    return open_


@pytest.fixture
def gateway(open_gateway: Open, policies: Path) -> Gateway:
    (policies / "50-test.toml").write_text(POLICY)
    return open_gateway()


@pytest.fixture
def records(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """The records on disk, oldest first."""
    return lambda: list(reversed(list(read_backwards(tmp_path / "audit.jsonl"))))


def start_run(gateway: Gateway, layers: frozenset[Layer] = frozenset({Layer.PROXY})) -> Run:
    run = gateway.register(Run("", "claude-code", "dev", 1000, layers=layers))
    return gateway.start(run.id, f"aa.slice/x/aa-agent-{run.id}.service", 4242 + len(run.id))


def test_allows_and_denies_as_the_policy_says(gateway: Gateway) -> None:
    run = start_run(gateway)
    allowed = gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC))
    denied = gateway.decide(run.id, Layer.PROXY, connect("denied.test", PUBLIC))
    assert (allowed.effect, allowed.rule) == (Effect.ALLOW, "test/web")
    assert denied.effect is Effect.DENY
    assert "denied.test" in denied.reason


def test_a_decision_is_recorded_before_it_is_answered(gateway: Gateway, records: Any) -> None:
    run = start_run(gateway)
    decision = gateway.decide(run.id, Layer.PROXY, connect("denied.test", PUBLIC))
    last = records()[-1]
    assert (last["type"], last["decision"], last["run"]) == ("decision", "deny", run.id)
    assert (last["rule"], last["reason"], last["policy"]) == (
        decision.rule,
        decision.reason,
        decision.policy,
    )


def test_without_a_place_for_its_record_nothing_is_allowed(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(gateway)

    def full(record: Any) -> None:
        raise AuditUnavailable("the disk is full")

    monkeypatch.setattr(gateway.audit, "write", full)
    decision = gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC))
    assert (decision.effect, decision.rule) == (Effect.DENY, "<audit>")


def test_an_unknown_run_is_denied_and_recorded(gateway: Gateway, records: Any) -> None:
    decision = gateway.decide("nosuchrun", Layer.PROXY, connect("allowed.test", PUBLIC))
    assert (decision.effect, decision.rule) == (Effect.DENY, "<unknown-run>")
    assert records()[-1]["run"] == "nosuchrun"


def test_an_engine_that_fails_denies(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start_run(gateway)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(gateway.source.policy), "decide", fail)
    decision = gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC))
    assert (decision.effect, decision.rule) == (Effect.DENY, "<engine-error>")


def test_a_provisional_allow_leaves_no_record_and_a_denial_does(
    gateway: Gateway, records: Any
) -> None:
    run = start_run(gateway)
    before = len(records())
    assert gateway.decide(run.id, Layer.PROXY, connect("allowed.test"), provisional=True).permits
    assert len(records()) == before
    assert not gateway.decide(run.id, Layer.PROXY, connect("denied.test"), provisional=True).permits
    assert len(records()) == before + 1


def test_an_ask_is_no_permission_and_is_recorded(gateway: Gateway, records: Any) -> None:
    run = start_run(gateway)
    assert gateway.decide(run.id, Layer.SDK, tool("search")).permits
    decision = gateway.decide(run.id, Layer.SDK, tool("transfer"))
    assert (decision.effect, decision.rule) == (Effect.ASK, "test/transfer")
    assert decision.approval and not decision.permits
    assert records()[-1]["attributes"]["approval"] == decision.approval


def test_with_no_policy_everything_is_denied_with_what_to_do(open_gateway: Open) -> None:
    gateway = open_gateway()
    run = start_run(gateway)
    decision = gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC))
    assert decision.effect is Effect.DENY
    assert "aasm policy use" in decision.reason
    assert gateway.source.state == "none"
    assert "everything is denied" in gateway.status_line()


def test_a_broken_file_changes_nothing_but_the_status(
    gateway: Gateway, policies: Path, records: Any
) -> None:
    run = start_run(gateway)
    revision = gateway.source.revision
    (policies / "60-broken.toml").write_text('[policy]\nid = "x"\nunknown_key = 1\n')
    gateway.source.reload_if_changed()
    assert gateway.source.revision == revision
    assert gateway.source.state == "degraded"
    assert "60-broken.toml" in gateway.status_line()
    assert records()[-1]["type"] == "alert"
    assert gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits
    (policies / "60-broken.toml").unlink()
    gateway.source.reload_if_changed()
    assert (gateway.source.state, gateway.source.revision) == ("ok", revision)


def test_a_file_that_is_replaced_by_rename_is_noticed(gateway: Gateway, policies: Path) -> None:
    run = start_run(gateway)
    new = policies / ".new"
    new.write_text(POLICY.replace("allowed.test", "other.test"))
    new.rename(policies / "50-test.toml")
    gateway.source.reload_if_changed()
    assert not gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits
    assert gateway.decide(run.id, Layer.PROXY, connect("other.test", PUBLIC)).permits


def test_while_a_policy_is_read_decisions_go_on_with_the_one_in_force(
    gateway: Gateway, policies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(gateway)
    go_on = threading.Event()
    load = source.load

    def slow(directory: Path) -> Any:
        assert go_on.wait(30)
        return load(directory)

    def ask(host: str) -> bool:
        return gateway.decide(run.id, Layer.PROXY, connect(host, PUBLIC)).permits

    async def scenario() -> None:
        (policies / "50-test.toml").write_text(POLICY.replace("allowed.test", "other.test"))
        assert gateway.source.changed
        reading = asyncio.create_task(gateway.source.reload_beside())
        for _ in range(20):
            await asyncio.sleep(0.001)
            assert ask("allowed.test") and not ask("other.test") and not reading.done()
        go_on.set()
        assert await reading == []
        assert ask("other.test") and not ask("allowed.test") and not gateway.source.changed

    monkeypatch.setattr(source, "load", slow)
    interval = sys.getswitchinterval()
    asyncio.run(scenario())
    assert gc.isenabled() and sys.getswitchinterval() == interval


def test_a_policy_that_cannot_be_read_beside_leaves_the_last_good_one(
    gateway: Gateway, policies: Path
) -> None:
    run = start_run(gateway)
    (policies / "60-broken.toml").write_text("[policy]\n")
    problems = asyncio.run(gateway.source.reload_beside())
    assert problems and gateway.source.state == "degraded"
    assert gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits


def test_a_policy_that_was_removed_denies(gateway: Gateway, policies: Path) -> None:
    run = start_run(gateway)
    (policies / "50-test.toml").unlink()
    gateway.source.reload_if_changed()
    assert not gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits


def test_a_run_that_floods_is_denied_and_told_once(gateway: Gateway, records: Any) -> None:
    flooding, quiet = start_run(gateway), start_run(gateway)
    answers = [
        gateway.decide(flooding.id, Layer.PROXY, connect("allowed.test", PUBLIC)).rule
        for _ in range(300)
    ]
    refused = answers.count("<limit:decisions_per_second>")
    assert 150 < refused < 220
    assert gateway.decide(quiet.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits
    gateway.flush_over_budget()
    told = [r for r in records() if r["rule"] == "<limit:decisions_per_second>"]
    assert [(r["run"], r["count"]) for r in told] == [(flooding.id, refused)]


def test_reports_of_a_run_are_under_the_same_limit_and_cannot_fill_the_log(
    gateway: Gateway, records: Any
) -> None:
    flooding, quiet = start_run(gateway), start_run(gateway)
    method = "io.agentassembly.Gateway.Report"
    said = {"action": tool("read").as_json(), "outcome": "done"}

    def report(run: Run, count: int) -> int:
        function, parameters = run_service(gateway, run.id).find(
            {"method": method, "parameters": said}
        )
        refused = 0
        for _ in range(count):
            try:
                function(Call(method, parameters, False, Peer(1, 2, 3, run.cgroup)))
            except VarlinkError:
                refused += 1
        return refused

    refused = report(flooding, 300)
    assert 150 < refused < 220
    assert report(quiet, 50) == 0
    gateway.flush_over_budget()
    of = [r for r in records() if r["run"] == flooding.id and r["type"] != "lifecycle"]
    assert sum(r["count"] for r in of if r["type"] == "observed") == 300 - refused
    assert sum(r["count"] for r in of if r["type"] == "refusal") == refused


def test_a_run_starts_when_every_component_of_its_layers_confirmed(gateway: Gateway) -> None:
    async def scenario() -> None:
        run = start_run(gateway, frozenset({Layer.PROXY, Layer.KERNEL}))
        waiting = asyncio.create_task(gateway.await_ready(run.id, 5))
        for component in ("redirect", "proxy"):
            await asyncio.sleep(0)
            gateway.confirm(run.id, component, True, "")
        await asyncio.sleep(0.02)
        assert not waiting.done()
        gateway.confirm(run.id, "ebpf", True, "")
        assert (await waiting).state is RunState.RUNNING

    asyncio.run(scenario())


def test_a_run_does_not_start_when_a_component_refuses(gateway: Gateway) -> None:
    async def scenario() -> None:
        run = start_run(gateway)
        waiting = asyncio.create_task(gateway.await_ready(run.id, 5))
        await asyncio.sleep(0)
        gateway.confirm(run.id, "proxy", True, "")
        gateway.confirm(run.id, "redirect", False, "the rules are gone")
        with pytest.raises(LayerNotReady) as e:
            await waiting
        assert (e.value.component, e.value.reason) == ("redirect", "the rules are gone")

    asyncio.run(scenario())


def test_a_component_that_is_silent_fails_the_run_by_name(gateway: Gateway) -> None:
    async def scenario() -> None:
        run = start_run(gateway)
        gateway.confirm(run.id, "proxy", True, "")
        with pytest.raises(LayerNotReady) as e:
            await gateway.await_ready(run.id, 0.05)
        assert e.value.component == "redirect"
        assert "systemctl status aa-redirect.service" in e.value.reason

    asyncio.run(scenario())


def test_runs_survive_a_restart_with_their_denials(gateway: Gateway, open_gateway: Open) -> None:
    run = start_run(gateway)
    gateway.decide(run.id, Layer.PROXY, connect("denied.test", PUBLIC))
    again = open_gateway()
    assert again.registry.get_live(run.id) == run
    assert [d["target"] for d in again.denials(run.id)] == ["denied.test:443"]
    assert again.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits


def test_an_ended_run_decides_nothing_any_more(gateway: Gateway) -> None:
    run = start_run(gateway)
    ended = gateway.end(run.id, exit_code=3, signal=None)
    assert (ended.state, ended.exit_code) == (RunState.ENDED, 3)
    assert not gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits
    assert [r.id for r in gateway.registry.ended()] == [run.id]
    with pytest.raises(RunUnknown):
        gateway.end(run.id, exit_code=0, signal=None)


def test_a_run_whose_cgroup_is_gone_is_ended_unless_launch_tells_its_end_first(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(gateway)
    assert gateway.end_vanished() == []
    monkeypatch.setattr("aa.gateway.gateway.GONE_SECONDS", 0.0)
    assert [r.id for r in gateway.end_vanished()] == [run.id]
    assert gateway.registry.get_live(run.id) is None


def test_more_runs_than_the_limit_are_refused(gateway: Gateway) -> None:
    for _ in range(3):
        start_run(gateway)
    with pytest.raises(TooManyRuns):
        start_run(gateway)


def test_watchers_see_each_change_of_a_run(gateway: Gateway) -> None:
    seen: list[tuple[str, RunState]] = []
    unwatch = gateway.watch(lambda run: seen.append((run.id, run.state)))
    run = start_run(gateway)
    gateway.end(run.id, exit_code=0, signal=None)
    unwatch()
    start_run(gateway)
    assert seen == [(run.id, RunState.STARTING), (run.id, RunState.ENDED)]


def test_lost_reports_become_a_gap_record_with_their_number(gateway: Gateway, records: Any) -> None:
    report = Report(RecordType.OBSERVED, Layer.KERNEL, Kind.EXEC, "/bin/true", 1, count=4)
    gateway.component_reports("ebpf", 17, [report])
    gap, observed = records()[-2:]
    assert (gap["type"], gap["target"], gap["count"]) == ("gap", "ebpf", 17)
    assert (observed["type"], observed["count"]) == ("observed", 4)


def test_a_corrupt_registry_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(RegistryCorrupt, match="move it away"):
        RunRegistry(path)


def test_a_registry_with_a_run_of_another_shape_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    RunRegistry(path).close()
    with sqlite3.connect(path) as db:
        db.execute("insert into run values ('x', 'running', 0, 0, ?)", (json.dumps({"id": "x"}),))
    with pytest.raises(RegistryCorrupt):
        RunRegistry(path)


def test_in_observe_mode_everything_passes_and_says_what_would_be(
    gateway: Gateway, policies: Path, records: Any
) -> None:
    (policies / "50-test.toml").write_text(
        POLICY.replace('id = "test"', 'id = "test"\nmode = "observe"')
    )
    gateway.source.reload_if_changed()
    run = start_run(gateway)
    decision = gateway.decide(run.id, Layer.PROXY, connect("denied.test", PUBLIC))
    assert (decision.effect, decision.would) == (Effect.ALLOW, Effect.DENY)
    assert (records()[-1]["decision"], records()[-1]["would"]) == ("allow", "deny")
    assert gateway.mode_of(run) is Mode.OBSERVE


def test_while_halted_everything_is_denied_visibly_and_no_run_is_registered(
    gateway: Gateway, open_gateway: Open, records: Any
) -> None:
    run = start_run(gateway)
    asked = connect("allowed.test", PUBLIC)
    gateway.set_halt(Halt("root", "a drill", 1.0), 0, "root")
    denied = gateway.decide(run.id, Layer.PROXY, asked)
    assert (denied.effect, denied.rule) == (Effect.DENY, "<halted>")
    assert "a drill" in denied.reason and "aasm halt --release" in denied.reason
    with pytest.raises(LayerNotReady, match="a drill"):
        start_run(gateway)
    restarted = open_gateway()
    assert restarted.decide(run.id, Layer.PROXY, asked).rule == "<halted>"
    assert "HALTED" in restarted.status_line()
    restarted.set_halt(None, 0, "root")
    assert restarted.decide(run.id, Layer.PROXY, asked).permits
    assert open_gateway().decide(run.id, Layer.PROXY, asked).permits
    told = [r for r in records() if r["target"] == "halt"]
    assert [(r["type"], r["attributes"]["by_uid"]) for r in told] == [("alert", 0), ("alert", 0)]


def test_a_paused_run_is_still_decided_for_and_shown_as_paused_after_a_restart(
    gateway: Gateway, open_gateway: Open, records: Any
) -> None:
    run = start_run(gateway)
    gateway.set_paused(run.id, True, 1000, "dev")
    assert gateway.decide(run.id, Layer.PROXY, connect("allowed.test", PUBLIC)).permits
    restarted = open_gateway()
    again = restarted.registry.get_live(run.id)
    assert again is not None and (again.paused_by, again.state) == (1000, RunState.STARTING)
    restarted.set_paused(run.id, False, 0, "root")
    assert restarted.registry.live()[0].paused_by == -1
    told = [r["reason"] for r in records() if r["kind"] == "run" and r["run"] == run.id]
    assert told == ["paused by dev", "resumed by root"]
    with pytest.raises(RunUnknown):
        gateway.set_paused("nobody", True, 0, "root")


def test_only_root_and_the_gateway_itself_may_say_that_the_host_is_halted(
    gateway: Gateway,
) -> None:
    service = enforce_service(gateway, open_run=lambda run: None, close_run=lambda run: None)
    parameters = {"halted": True, "uid": 0, "user": "root", "reason": "", "since": 1.0}
    method, _ = service.find(
        {"method": "io.agentassembly.Enforce.SetHalt", "parameters": parameters}
    )
    with pytest.raises(VarlinkError, match="PermissionDenied"):
        method(Call("SetHalt", parameters, False, Peer(1, 4711, 4711, "x")))
    assert gateway.registry.halt is None
    method(Call("SetHalt", parameters, False, Peer(1, 0, 0, "x")))
    assert gateway.registry.halt is not None


# -- what only the sandbox and the kernel can hold a run to

FILES = """
[[rule]]
id = "no-sudo"
effect = "deny"
exec = { paths = ["/usr/bin/sudo"] }

[[rule]]
id = "keys"
effect = "deny"
file = { paths = ["~/.ssh/**"] }
"""


def saw(kind: Kind, target: str, run: Run, **attributes: Any) -> Report:
    return Report(
        RecordType.OBSERVED, Layer.KERNEL, kind, target, 10**18, run.id, attributes=attributes
    )


def policy_is(gateway: Gateway, policies: Path, text: str) -> None:
    (policies / "50-test.toml").write_text(text)
    assert gateway.source.reload() == []


def started(gateway: Gateway) -> Run:
    share = gateway.share_of(Run("", "claude-code", "dev", 1000)).digest
    return gateway.register(
        Run("", "claude-code", "dev", 1000, home="/home/dev", directory="/w", share=share)
    )


def test_what_the_kernel_saw_is_recorded_with_what_the_policy_says_of_it(
    gateway: Gateway, policies: Path, records: Any
) -> None:
    policy_is(gateway, policies, POLICY + FILES)
    run = started(gateway)
    for report in (
        saw(Kind.EXEC, "/usr/bin/sudo", run, argv=["sudo", "id"]),
        saw(Kind.EXEC, "/usr/bin/git", run),
        saw(Kind.FILE_OPEN, "/home/dev/.ssh/new", run, access="create"),
        saw(Kind.FILE_OPEN, "/w/file", run, access="write"),
        saw(Kind.FILE_RENAME, "/w/file", run, to="/home/dev/.ssh/config"),
        saw(Kind.FILE_UNLINK, "/w/x/../../home/dev/.ssh/id", run),
        saw(Kind.FILE_UNLINK, "…/id", run),
        saw(Kind.NET_CONNECT, "1.2.3.4:5", run),
    ):
        gateway.write_report(report)
    told = [(r["decision"], r["would"], r["rule"], r["mode"]) for r in records()[-8:]]
    assert told == [
        ("", "deny", "test/no-sudo", "enforce"),
        ("", "allow", "<default>", "enforce"),
        ("", "deny", "test/keys", "enforce"),
        ("", "allow", "<default>", "enforce"),
        ("", "deny", "test/keys", "enforce"),
        ("", "deny", "test/keys", "enforce"),
        ("", "", "", ""),
        ("", "", "", ""),
    ]
    assert "denies /usr/bin/sudo" in records()[-8]["reason"]


def test_a_refusal_keeps_its_own_rule_and_an_engine_that_fails_loses_no_record(
    gateway: Gateway, policies: Path, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy_is(gateway, policies, POLICY + FILES)
    run = started(gateway)
    refusal = replace(
        saw(Kind.EXEC, "/usr/bin/sudo", run),
        type=RecordType.REFUSAL,
        effect=Effect.DENY,
        rule="<kernel-guard>",
    )
    gateway.write_report(refusal)
    assert (records()[-1]["rule"], records()[-1]["would"]) == ("<kernel-guard>", "")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(gateway.source.policy), "decide", fail)
    gateway.write_report(saw(Kind.EXEC, "/usr/bin/sudo", run))
    assert (records()[-1]["rule"], records()[-1]["would"]) == ("<engine-error>", "deny")


def test_a_run_whose_sandbox_is_of_an_earlier_policy_is_pending_until_it_ends(
    gateway: Gateway, policies: Path, open_gateway: Open, records: Any
) -> None:
    old = started(gateway)
    assert gateway.pending() == []
    policy_is(gateway, policies, POLICY.replace("allowed.test", "other.test"))
    assert gateway.pending() == [], "the network follows at once"
    policy_is(gateway, policies, POLICY + FILES)
    assert gateway.pending() == [old.id]
    told = records()[-1]
    assert "1 run has the sandbox of an earlier one" in told["reason"]
    assert told["attributes"]["pending"] == [old.id]
    new = started(gateway)
    assert gateway.pending() == open_gateway().pending() == [old.id]
    policy_is(gateway, policies, POLICY)
    assert gateway.pending() == [new.id]
    gateway.end(new.id, exit_code=0, signal=None)
    assert gateway.pending() == []


def test_without_a_policy_the_share_is_the_usual_sandbox(open_gateway: Open) -> None:
    assert open_gateway().share_of(Run("", "a", "dev", 1000)).as_json()["closed"] == []


INSPECTING = """
[[rule]]
id      = "reads"
effect  = "allow"
network = { hosts = ["api.allowed.test"], methods = ["GET"] }
"""


def test_the_authority_learns_which_hosts_each_policy_inspects(
    gateway: Gateway, policies: Path, tmp_path: Path
) -> None:
    published = tmp_path / "inspected" / "hosts"
    published.parent.mkdir()
    gateway.on_policy = lambda policy: tell_authority(gateway, policy, published)
    (policies / "60-more.toml").write_text('[policy]\nid = "more"\n' + INSPECTING)
    gateway.source.reload()
    assert published.read_text() == "api.allowed.test\n"
    (policies / "60-more.toml").write_text("broken")
    gateway.source.reload()
    assert published.read_text() == "api.allowed.test\n", "the last good policy is in force"
    (policies / "60-more.toml").unlink()
    gateway.source.reload()
    assert published.read_text() == ""


def test_a_list_that_cannot_be_published_is_told(
    gateway: Gateway, policies: Path, tmp_path: Path, records: Any
) -> None:
    gateway.on_policy = lambda policy: tell_authority(gateway, policy, tmp_path / "none" / "hosts")
    (policies / "60-more.toml").write_text('[policy]\nid = "more"\n' + INSPECTING)
    gateway.source.reload()
    last = records()[-1]
    assert (last["kind"], last["target"]) == ("guard", "ca") and "inspected" in last["reason"]
