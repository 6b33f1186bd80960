"""Starting runs, on a real systemd: who may, what a run is left with, what it sees, how it ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.harness import Container, Result, eventually
from tests.lab.harness.__main__ import newest_debs

HERE = Path(__file__).parent
TOOLS = "/usr/local/lib/lab"
WORK = "/home/dev/work"
STATUS = "/proc/self/status"
SLICE = "/aa.slice/aa-agents.slice"

CONFIG = """
[launch]
barrier_seconds = 5.0

[[launch.permission]]
users = ["*"]
agents = ["default", "proxied", "watched", "keeper", "bare"]

[[launch.permission]]
users = ["@docker"]
agents = ["lent"]
run_as = ["plain"]
"""

AGENTS = {
    "default": 'layers = ["sdk"]\n',
    "proxied": 'layers = ["proxy"]\n',
    "watched": 'layers = ["kernel"]\n',
    "lent": 'layers = ["sdk"]\nuser = "plain"\n',
    "bare": 'layers = ["sdk"]\ncommand = ["/bin/echo", "from the file"]\n',
    "keeper": """
layers = ["sdk"]
state = ["~/.cache/keeper", "~/.linked"]
environment = ["KEEPER_TOKEN"]
groups = ["video", "audio"]
""",
}

# A client of aa-launch that does what aasm never would. Run as `call.py SCRIPT`.
CLIENT = """
import json, os, socket, sys
from aa.varlink import Client, VarlinkError

def start(argv, *, stdin=0, stdout=1, stderr=2, directory=None, terminal=False, more=True, **named):
    directory = os.open(".", os.O_PATH) if directory is None else directory
    parameters = {"agent": None, "user": None, "argv": argv, "environment": [], "terminal": terminal,
                  "stdin": 0, "stdout": 1, "stderr": 2, "directory": 3, **named}
    with Client("/run/agent-assembly/launch", timeout=30) as client:
        try:
            for reply in client.stream("io.agentassembly.Launch.Start", parameters,
                                       fds=[stdin, stdout, stderr, directory]):
                if reply["event"] == "exited":
                    return f"exit {reply['exit_code']} {reply['reason']}"
        except VarlinkError as e:
            return f"{e.name}: {e.parameters.get('reason')}"

def call(method, **parameters):
    with Client("/run/agent-assembly/launch", timeout=30) as client:
        try:
            return client.call(f"io.agentassembly.Launch.{method}", parameters)
        except VarlinkError as e:
            return f"{e.name}: {e.parameters.get('reason')}"
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        container.install_deb(*newest_debs())
        container.push("/etc/agent-assembly/agent-assembly.toml", CONFIG)
        for name, text in AGENTS.items():
            container.push(f"/etc/agent-assembly/agents.d/{name}.toml", text)
        container.push_file(HERE / "terminal.py", f"{TOOLS}/terminal.py")
        container.push(f"{TOOLS}/client.py", CLIENT)
        container.raw(["install", "-d", "-o", "dev", "-g", "dev", WORK]).check()
        container.raw(["install", "-d", "-m", "777", "/srv/shared"]).check()
        container.run("usermod --append --groups video dev").check()
        container.systemctl("start", "aa-gateway.socket", "aa-launch.socket").check()
        yield container
        assert not runs(container), "every run of these tests has ended"


def run(
    box: Container, command: str | Sequence[str], *, options: Sequence[str] = (), **how: Any
) -> Result:
    """`aasm run` as a person in a project folder; a string is a shell command inside the run."""
    argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
    how.setdefault("user", "dev")
    how.setdefault("cwd", WORK)
    return box.run(["aasm", "run", *options, "--", *argv], **how)


def script(box: Container, text: str, **how: Any) -> str:
    """What a Python script with the client above prints, outside of any run."""
    how.setdefault("user", "dev")
    how.setdefault("cwd", WORK)
    source = f"import sys; sys.path.append({TOOLS!r}); from client import *\n{text}"
    return box.run(["/usr/bin/python3", "-c", source], **how).check().out


def runs(box: Container, **wanted: str) -> list[dict[str, Any]]:
    """Live runs as the gateway tells."""
    told = box.run(["aasm", "runs", "list", "--json"]).check().out
    return [r for r in json.loads(told) if all(r[k] == v for k, v in wanted.items())]


def ended(box: Container) -> dict[str, Any]:
    """The run that ended last."""
    told = json.loads(box.run(["aasm", "runs", "list", "--ended", "--json"]).check().out)
    return max((r for r in told if r["state"] == "ended"), key=lambda r: r["ended"])


def background(box: Container, command: str, *options: str, **how: Any) -> Any:
    """A run that goes on while the test does; returns when the gateway counts it as running."""
    before = {r["id"] for r in runs(box)}
    how.setdefault("user", "dev")
    how.setdefault("cwd", WORK)
    process = box.popen(["aasm", "run", *options, "--", "sh", "-c", command], **how)
    process.run = eventually(
        lambda: next((r["id"] for r in runs(box, state="running") if r["id"] not in before), None),
        what="the run is running",
    )
    return process


def units(box: Container) -> list[str]:
    listed = box.systemctl("list-units", "--plain", "--no-legend", "--all", "aa-agent-*").out
    return [line.split()[0] for line in listed.splitlines()]


def person(box: Container, steps: list[dict[str, Any]], *argv: str, **how: Any) -> dict[str, Any]:
    """A command at a terminal, as tests/lab/terminal.py plays it."""
    how.setdefault("user", "dev")
    how.setdefault("cwd", WORK)
    how.setdefault("env", {"TERM": "xterm", "HOME": "/home/dev"})
    done = box.run(
        ["/usr/bin/python3", f"{TOOLS}/terminal.py", json.dumps(steps), *argv], **how
    ).check()
    told: dict[str, Any] = json.loads(done.out)
    assert told["problem"] == "", told
    return told


# Exit codes, signals, the end


def test_a_run_ends_with_the_code_of_its_program(box: Container) -> None:
    assert run(box, "exit 0").code == 0
    assert run(box, "exit 7").code == 7
    assert ended(box)["exit_code"] == 7


def test_a_run_that_a_signal_ended_has_the_code_that_a_shell_gives(box: Container) -> None:
    source = "import os; os.kill(os.getpid(), 9)"
    assert run(box, ["/usr/bin/python3", "-c", source]).code == 128 + signal.SIGKILL
    assert ended(box)["signal"] == signal.SIGKILL


def test_a_missing_program_is_127_and_one_that_cannot_be_executed_126(box: Container) -> None:
    missing = run(box, ["no-such-program"])
    assert (missing.code, "not found" in missing.err) == (127, True)
    refused = run(box, ["/etc/passwd"])
    assert (refused.code, "Permission denied" in refused.err) == (126, True)


def test_a_script_without_an_interpreter_line_runs_as_in_a_shell(box: Container) -> None:
    box.push(f"{WORK}/plain-script", "echo ran $1\n", mode=0o755)
    assert run(box, ["./plain-script", "well"]).check().out == "ran well\n"


def test_pipes_pass_through(box: Container) -> None:
    done = run(box, "tr a-z A-Z; echo problem >&2", input="letters").check()
    assert (done.out, done.err) == ("LETTERS", "problem\n")


def test_the_callers_umask_is_kept(box: Container) -> None:
    done = box.run("umask 027; aasm run -- sh -c umask", user="dev", cwd=WORK)
    assert done.check().out == "0027\n"


def test_streams_that_are_closed_become_null(box: Container) -> None:
    done = box.run(
        "aasm run -- sh -c 'cat; echo lost; ls /proc/self/fd' <&- >&-", user="dev", cwd=WORK
    )
    assert (done.code, done.out) == (0, "")


def test_signals_to_the_client_reach_the_run(box: Container) -> None:
    process = background(box, "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done")
    box.raw(["pkill", "-TERM", "-f", "^/usr/bin/python3 .*aasm run"]).check()
    assert process.wait(20) == 9


def test_the_run_ends_when_its_client_is_killed(box: Container) -> None:
    process = background(box, "exec sleep 600")
    box.raw(["pkill", "-KILL", "-f", "^/usr/bin/python3 .*aasm run"]).check()
    process.wait(20)
    eventually(lambda: not units(box), what="the run is over")


def test_a_run_that_ignores_the_hangup_is_stopped_after_a_grace(box: Container) -> None:
    process = background(box, "trap '' HUP TERM; while :; do sleep 0.1; done")
    box.raw(["pkill", "-KILL", "-f", "^/usr/bin/python3 .*aasm run"]).check()
    process.wait(20)
    eventually(lambda: not units(box), timeout=20, what="the run is over")


def test_what_a_run_leaves_behind_ends_with_it(box: Container) -> None:
    assert run(box, "setsid sleep 4321 & exit 3").code == 3
    assert box.raw(["pgrep", "-f", "sleep 4321"]).code != 0
    assert not units(box)


def test_its_user_and_operators_may_kill_a_run_and_others_may_not(box: Container) -> None:
    process = background(box, "exec sleep 600")
    for method in (f"'Kill', run='{process.run}'", f"'Signal', run='{process.run}', signal=9"):
        refused = script(box, f"print(call({method}))", user="plain", cwd="/")
        assert refused.startswith("NotPermitted")
    assert box.run(["aasm", "runs", "kill", process.run], user="dev").code == 0
    assert process.wait(20) == 128 + signal.SIGKILL


def test_a_run_survives_a_restart_of_aa_launch_and_so_does_its_exit_code(box: Container) -> None:
    for how in (["restart", "aa-launch"], ["kill", "--signal=KILL", "aa-launch"]):
        process = background(box, "sleep 2; exit 5")
        box.systemctl(*how).check()
        assert process.wait(30) == 5


def test_a_run_that_ends_while_aa_launch_is_away_is_told_when_it_is_back(box: Container) -> None:
    process = background(box, "sleep 1; exit 6")
    box.systemctl("stop", "aa-launch.socket", "aa-launch.service").check()
    time.sleep(1.5)
    box.systemctl("start", "aa-launch.socket").check()
    assert process.wait(30) == 6
    assert ended(box)["exit_code"] == 6


def test_a_run_survives_a_restart_of_the_gateway(box: Container) -> None:
    process = background(box, "sleep 2; exit 8")
    box.systemctl("restart", "aa-gateway.service").check()
    assert process.wait(30) == 8
    assert ended(box)["exit_code"] == 8


# The kill switch

COUNTING = "n=0; while :; do n=$((n+1)); echo $n > {name}; sleep 0.05; done"


def count(box: Container, name: str) -> int:
    text = box.raw(["sh", "-c", f"cat {WORK}/{name} /srv/shared/{name} 2> /dev/null"]).out.strip()
    return int(text or 0)


def counts_on(box: Container, name: str) -> None:
    before = count(box, name)
    eventually(lambda: count(box, name) > before + 1, what=f"{name} counts on")


def stands_still(box: Container, name: str) -> bool:
    before = count(box, name)
    time.sleep(1)
    return count(box, name) == before


def shown_state(box: Container, run: str) -> str:
    """What `aasm runs list` shows of a run."""
    lines = box.run(["aasm", "runs", "list"]).check().out.splitlines()
    return next(line.split()[3] for line in lines if line.startswith(run))


def told(box: Container, run: str) -> list[str]:
    """The reasons in the audit records of a run's life."""
    lines = box.raw(["cat", "/var/log/agent-assembly/audit.jsonl"]).out.splitlines()
    found = [json.loads(line) for line in lines]
    return [r["reason"] for r in found if r["run"] == run and r["kind"] == "run"]


def test_a_paused_run_stands_still_until_it_is_resumed_also_over_restarts(box: Container) -> None:
    process = background(box, COUNTING.format(name="paused"), user="plain", cwd="/srv/shared")
    counts_on(box, "paused")
    refused = script(box, f"print(call('Pause', run='{process.run}'))", user="nobody", cwd="/")
    assert refused.startswith("NotPermitted")
    counts_on(box, "paused")
    box.run(["aasm", "runs", "pause", process.run], user="plain").check()
    assert stands_still(box, "paused")
    assert shown_state(box, process.run) == "paused"
    box.systemctl("restart", "aa-launch", "aa-gateway").check()
    assert stands_still(box, "paused")
    eventually(lambda: shown_state(box, process.run) == "paused", what="it is shown as paused")
    box.run(["aasm", "runs", "resume", process.run], user="plain").check()
    counts_on(box, "paused")
    assert shown_state(box, process.run) == "running"
    box.run(["aasm", "runs", "pause", process.run]).check()
    mine = box.run(["aasm", "runs", "resume", process.run], user="plain")
    assert (mine.code, "root paused it" in mine.err) == (4, True)
    assert stands_still(box, "paused")
    box.run(["aasm", "runs", "kill", process.run]).check()
    assert process.wait(20) == 128 + signal.SIGKILL
    words = " ".join(told(box, process.run))
    for what in ("paused by plain", "resumed by plain", "paused by root", "killed by root"):
        assert what in words


def test_the_tree_of_a_run_shows_its_processes_and_no_others(box: Container) -> None:
    process = background(box, "sleep 611 & sleep 612; true")
    asked = ["aasm", "runs", "tree", process.run, "--json"]

    def commands() -> list[list[str]]:
        return [
            p["command"] for p in json.loads(box.run(asked, user="dev").check().out)["processes"]
        ]

    eventually(lambda: len(commands()) == 3, what="both sleeps are there")
    shell, *sleeps = commands()
    assert shell[:2] == ["sh", "-c"]
    assert sorted(sleeps) == [["sleep", "611"], ["sleep", "612"]]
    assert "612" in box.run(["aasm", "runs", "tree", process.run]).check().out
    assert box.run(asked, user="plain", cwd="/").code == 4
    box.run(["aasm", "runs", "kill", process.run]).check()
    process.wait(20)


def test_a_halt_stops_all_runs_and_starts_none_also_over_restarts(box: Container) -> None:
    first = background(box, COUNTING.format(name="first"))
    second = background(box, COUNTING.format(name="second"))
    counts_on(box, "second")
    assert box.run(["aasm", "halt"], user="plain").code == 4
    inside = run(box, ["aasm", "halt"])
    assert inside.code != 0
    counts_on(box, "first")
    box.run(["aasm", "halt", "--reason", "a drill"]).check()
    assert stands_still(box, "first") and stands_still(box, "second")
    refused = run(box, ["true"])
    assert (refused.code, "a drill" in refused.err) == (125, True)
    status = box.run(["aasm", "status"])
    assert status.code == 1 and "a drill" in status.out
    box.systemctl("kill", "--signal=KILL", "aa-launch.service", "aa-gateway.service").check()
    eventually(lambda: "a drill" in run(box, ["true"]).err, what="the halt is still in force")
    assert stands_still(box, "first")
    resumed = box.run(["aasm", "runs", "resume", first.run])
    assert resumed.code != 0 and "aasm halt --release" in resumed.err
    box.run(["aasm", "halt", "--release"]).check()
    counts_on(box, "first")
    counts_on(box, "second")
    assert run(box, ["true"]).code == 0
    for process in (first, second):
        box.run(["aasm", "runs", "kill", process.run]).check()
        process.wait(20)


def test_a_paused_run_can_be_killed_and_its_client_be_lost(box: Container) -> None:
    process = background(box, COUNTING.format(name="lost"))
    counts_on(box, "lost")
    box.run(["aasm", "runs", "pause", process.run]).check()
    box.raw(["pkill", "-KILL", "-f", "^/usr/bin/python3 .*aasm run"]).check()
    process.wait(20)
    assert stands_still(box, "lost")
    assert [r["id"] for r in runs(box)] == [process.run]
    box.run(["aasm", "runs", "resume", process.run]).check()
    eventually(lambda: not runs(box), timeout=20, what="the hang-up ends it once it goes on")


# Who may


def test_nobody_runs_an_agent_as_root(box: Container) -> None:
    as_root = run(box, ["true"], user="root")
    assert (as_root.code, "as root" in as_root.err) == (125, True)
    assert run(box, ["id", "-un"], user="root", options=["--user", "dev"]).check().out == "dev\n"


def test_a_user_needs_a_permission_to_run_as_another(box: Container) -> None:
    refused = run(box, ["id", "-un"], options=["--user", "plain"])
    assert (refused.code, "may not run" in refused.err) == (125, True)
    lent = run(box, ["id", "-un"], options=["--agent", "lent"], cwd="/srv/shared")
    assert lent.check().out == "plain\n"
    assert run(box, ["true"], user="plain", options=["--agent", "lent"], cwd="/").code == 125


def test_a_user_with_a_privileged_primary_group_gets_no_run(box: Container) -> None:
    box.run("useradd --create-home --gid docker whale").check()
    refused = run(box, ["true"], user="whale", cwd="/home/whale")
    assert (refused.code, "docker" in refused.err) == (125, True)


def test_a_run_cannot_start_or_end_runs(box: Container) -> None:
    inside = run(box, ["aasm", "run", "--", "true"])
    assert (inside.code, "cannot start another run" in inside.err) == (125, True)
    done = box.run(
        ["aasm", "run", "--user", "dev", "--", "true"],
        cwd=WORK,
        properties=["Slice=aa-agents-local.slice"],
    )
    assert (done.code, "a run cannot start" in done.err) == (125, True), done


def test_the_agent_is_the_one_declared_under_the_commands_name(box: Container) -> None:
    assert run(box, "echo $AA_AGENT").out == "default\n"
    box.push(f"{WORK}/keeper", "#!/bin/sh\necho $AA_AGENT\n", mode=0o755)
    assert run(box, ["./keeper"]).out == "keeper\n"
    assert run(box, [], options=["--agent", "bare"]).out == "from the file\n"
    unknown = run(box, ["true"], options=["--agent", "../x"])
    assert (unknown.code, "agent's name" in unknown.err) == (125, True)


def test_a_configuration_that_breaks_leaves_the_last_good_one_in_force(box: Container) -> None:
    assert run(box, ["true"]).code == 0
    box.push("/etc/agent-assembly/agents.d/zz.toml", "layers = 5\n")
    try:
        assert run(box, ["true"]).code == 0
        eventually(lambda: "zz.toml" in box.show("aa-launch", "StatusText")["StatusText"])
    finally:
        box.raw(["rm", "/etc/agent-assembly/agents.d/zz.toml"]).check()
    assert run(box, ["true"]).code == 0
    eventually(lambda: "zz.toml" not in box.show("aa-launch", "StatusText")["StatusText"])


# The barrier


def confirm(box: Container, run_id: str, component: str, ok: bool, reason: str = "") -> None:
    told = json.dumps({"run": run_id, "component": component, "ok": ok, "reason": reason})
    box.run(["aasm", "call", "io.agentassembly.Enforce.ConfirmRun", told]).check()


def starting(box: Container) -> str:
    return str(
        eventually(
            lambda: next((r["id"] for r in runs(box, state="starting")), None),
            timeout=2,
            every=0.01,
            what="a run is starting",
        )
    )


def test_a_layer_that_refuses_keeps_the_program_from_running(box: Container) -> None:
    box.raw(["rm", "-f", f"{WORK}/ran"]).check()
    argv = ["aasm", "run", "--agent", "proxied", "--", "touch", "ran"]
    process = box.popen(argv, user="dev", cwd=WORK, stderr=-1, text=True)
    confirm(box, starting(box), "redirect", False, "the rules are not there")
    _, said = process.communicate(timeout=20)
    assert process.returncode == 125
    assert "redirect" in said and "the rules are not there" in said
    assert box.raw(["test", "-e", f"{WORK}/ran"]).code != 0
    assert "the rules are not there" in json.dumps(ended(box)) or ended(box)["exit_code"] is None


def test_a_layer_that_says_nothing_keeps_the_program_from_running(box: Container) -> None:
    box.raw(["rm", "-f", f"{WORK}/ran"]).check()
    done = run(box, ["touch", "ran"], options=["--agent", "watched"])
    assert done.code == 125
    assert "ebpf" in done.err and done.seconds < 15
    assert box.raw(["test", "-e", f"{WORK}/ran"]).code != 0


def test_a_launch_that_dies_before_the_go_ahead_leaves_nothing_running(box: Container) -> None:
    box.raw(["rm", "-f", f"{WORK}/ran"]).check()
    argv = ["aasm", "run", "--agent", "proxied", "--", "touch", "ran"]
    process = box.popen(argv, user="dev", cwd=WORK, stderr=-1, text=True)
    run_id = starting(box)
    box.systemctl("kill", "--signal=KILL", "aa-launch").check()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 125 and "aa-launch went away" in said
    for component in ("redirect", "proxy"):  # too late for it
        told = json.dumps({"run": run_id, "component": component, "ok": True, "reason": ""})
        box.run(["aasm", "call", "io.agentassembly.Enforce.ConfirmRun", told])
    eventually(lambda: not units(box) and not runs(box), what="the run is over")
    assert box.raw(["test", "-e", f"{WORK}/ran"]).code != 0


def test_the_program_runs_when_every_layer_has_confirmed(box: Container) -> None:
    argv = ["aasm", "run", "--agent", "proxied", "--", "cat", "/proc/self/cgroup"]
    process = box.popen(argv, user="dev", cwd=WORK, stdout=-1, text=True)
    run_id = starting(box)
    for component in ("redirect", "proxy"):
        confirm(box, run_id, component, True)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert f"0::{SLICE}/aa-agents-proxy.slice/aa-agent-{run_id}.service\n" in out


def test_a_run_without_the_proxy_layer_is_in_the_other_slice(box: Container) -> None:
    out = run(box, ["cat", "/proc/self/cgroup"]).check().out
    assert f"0::{SLICE}/aa-agents-local.slice/aa-agent-" in out


def test_without_a_gateway_nothing_runs(box: Container) -> None:
    box.systemctl("stop", "aa-gateway.socket", "aa-gateway.service").check()
    try:
        done = run(box, ["true"])
        assert (done.code, "gateway" in done.err) == (125, True)
    finally:
        box.systemctl("start", "aa-gateway.socket").check()
    assert run(box, ["true"]).code == 0


# What is left of privileges


def test_a_run_has_no_group_but_its_own_and_no_capability(box: Container) -> None:
    outside = box.run(["id", "-Gn"], user="dev").out.split()
    assert {"docker", "adm", "sudo", "aa-operators"} <= set(outside)
    assert run(box, ["id", "-Gn"]).check().out == "dev\n"
    status = dict(
        line.split(":\t", 1) for line in run(box, ["cat", STATUS]).check().out.splitlines()
    )
    assert status["Groups"].split() == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_a_run_keeps_a_group_only_if_the_agent_may_and_the_user_has_it(box: Container) -> None:
    done = run(box, ["id", "-Gn"], options=["--agent", "keeper"]).check()
    assert set(done.out.split()) == {"dev", "video"}


CONNECT = """
import socket, sys
for path in sys.argv[1:]:
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(path); print("open", path)
    except OSError as e:
        print("closed", path)
"""


def test_sockets_of_buses_daemons_and_the_guard_are_out_of_sight(box: Container) -> None:
    closed = [
        "/run/dbus/system_bus_socket",
        "/run/systemd/private",
        "/run/systemd/journal/stdout",
        "/run/systemd/journal/socket",
        "/var/run/dbus/system_bus_socket",
        "/run/agent-assembly/launch",
        "/run/agent-assembly/enforce",
        "/run/agent-assembly/control",
        "/dev/log",
    ]
    inside = run(box, ["/usr/bin/python3", "-c", CONNECT, *closed]).check().out.split("\n")
    assert [line for line in inside if line] == [f"closed {path}" for path in closed]
    own = run(box, ["/usr/bin/python3", "-c", CONNECT, "/run/agent-assembly/run/gateway"])
    assert own.check().out.startswith("open")
    reachable = ["/run/dbus/system_bus_socket", "/run/agent-assembly/launch"]
    outside = box.run(["/usr/bin/python3", "-c", CONNECT, *reachable], user="dev").out
    assert outside.count("open") == 2


OUTSIDE = """
import os, pty, socket, time
os.chdir(os.path.expanduser("~"))
s = socket.socket(socket.AF_UNIX); s.bind(os.path.abspath("control")); s.listen()
p = socket.socket(socket.AF_UNIX); p.bind(os.path.abspath("work/editor.sock")); p.listen()
master, slave = pty.openpty(); print(os.ttyname(slave), flush=True)
time.sleep(600)
"""


def test_sockets_and_terminals_of_the_users_other_programs_are_covered(box: Container) -> None:
    others = box.popen(["/usr/bin/python3", "-c", OUTSIDE], user="dev", stdout=-1, text=True)
    terminal = others.stdout.readline().strip()
    sockets = ["/home/dev/control", f"{WORK}/editor.sock"]
    connect = ["/usr/bin/python3", "-c", CONNECT, *sockets]
    try:
        assert box.run(connect, user="dev").check().out.count("open") == 2
        assert run(box, connect).check().out.count("closed") == 2
        assert box.run(f"echo x > {terminal}", user="dev").code == 0
        assert run(box, f"echo x > {terminal}").code != 0
        assert run(box, f"head -c 1 {terminal}", timeout=20).code != 0
    finally:
        box.raw(["pkill", "-f", "editor.sock"])
        others.wait(10)
        box.raw(["rm", "-f", *sockets])


def test_a_run_may_make_sockets_and_terminals_of_its_own(box: Container) -> None:
    source = """
import os, socket
l = socket.socket(socket.AF_UNIX); l.bind("own.sock"); l.listen()
c = socket.socket(socket.AF_UNIX); c.connect("own.sock")
m, s = os.openpty(); open(os.ttyname(s), "w").write("x"); print(os.read(m, 1))
os.unlink("own.sock")
"""
    assert run(box, ["/usr/bin/python3", "-c", source]).check().out == "b'x'\n"


SYSTEM_CALLS = """
import ctypes, errno, socket
c = ctypes.CDLL(None, use_errno=True)
print("io_uring", errno.errorcode.get(ctypes.get_errno()) if c.syscall(425, 0, None) < 0 else "made")
for name, family, kind in (("packet", 17, 3), ("vsock", 40, 1), ("netlink", 16, 3), ("alg", 38, 5),
                           ("tcp", 2, 1), ("udp6", 10, 2), ("unix", 1, 1)):
    try:
        socket.socket(family, kind).close(); print(name, "made")
    except OSError as e:
        print(name, errno.errorcode[e.errno])
try:
    socket.socket(2, 3, 1); print("raw made")
except OSError as e:
    print("raw", errno.errorcode[e.errno])
"""


def test_only_ordinary_sockets_can_be_made_and_no_io_uring(box: Container) -> None:
    out = run(box, ["/usr/bin/python3", "-c", SYSTEM_CALLS]).check().out
    found = dict(line.split() for line in out.splitlines())
    assert found == {
        "io_uring": "EPERM",
        "packet": "EAFNOSUPPORT",
        "vsock": "EAFNOSUPPORT",
        "netlink": "EAFNOSUPPORT",
        "alg": "EAFNOSUPPORT",
        "raw": "EPERM",
        "tcp": "made",
        "udp6": "made",
        "unix": "made",
    }
    outside = box.run(["/usr/bin/python3", "-c", SYSTEM_CALLS], user="dev").check().out
    assert "io_uring EPERM" not in outside and "netlink made" in outside


def test_namespaces_and_mounts_are_refused(box: Container) -> None:
    assert run(box, ["unshare", "--user", "--map-root-user", "true"]).code != 0
    assert run(box, ["unshare", "--mount", "true"]).code != 0


def test_a_run_cannot_leave_its_cgroup_or_touch_the_daemons(box: Container) -> None:
    pid = box.show("aa-gateway", "MainPID")["MainPID"]
    tries = (
        "echo 0 > /sys/fs/cgroup/cgroup.procs",
        "mkdir /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup | tail -n 1)/sub",
        f"kill -TERM {pid}",
        "cat /etc/agent-assembly/agent-assembly.toml",
        "ls /var/lib/agent-assembly",
        "ls /var/log/agent-assembly",
        "ls /var/log/journal",
        "ls /sys/fs/bpf",
        "journalctl --lines=1 --quiet | grep .",
    )
    for command in tries:
        assert run(box, command).code != 0, command
    outside = box.run("cat /etc/agent-assembly/agent-assembly.toml", user="dev")
    assert outside.code == 0


# Descriptors


def test_a_connected_network_socket_is_refused_as_a_stream(box: Container) -> None:
    out = script(
        box,
        """
l = socket.create_server(("127.0.0.1", 0)); s = socket.create_connection(l.getsockname())
for name in ("stdin", "stdout", "stderr"):
    print(start(["true"], **{name: s.fileno()}))
n = socket.socket(socket.AF_UNIX); n.connect("/run/dbus/system_bus_socket")
print(start(["true"], stdin=n.fileno()))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect(("127.0.0.1", 9))
print(start(["true"], stdin=u.fileno()))
print(start(["true"], stdin=os.open("/tmp", os.O_RDONLY)))
print(start(["true"], stdin=os.eventfd(0)))
print(start(["true"], directory=os.open("/dev/null", os.O_RDONLY)))
""",
    ).splitlines()
    assert all(line.startswith("BadRequest: ") for line in out) and len(out) == 8
    assert all("network socket" in line for line in out[:3] + out[4:5])
    assert "connected to a service" in out[3]


def test_a_socket_pair_and_a_pipe_are_streams(box: Container) -> None:
    out = script(
        box,
        """
a, b = socket.socketpair(); b.sendall(b"over a pair"); b.shutdown(socket.SHUT_WR)
print(start(["cat"], stdin=a.fileno()), flush=True)
r, w = os.pipe(); os.write(w, b"over a pipe"); os.close(w)
print(start(["cat"], stdin=r))
""",
    )
    assert "over a pair" in out and "over a pipe" in out and out.count("exit 0") == 2


def test_other_descriptors_of_the_caller_do_not_reach_the_run(box: Container) -> None:
    out = script(
        box,
        """
l = socket.create_server(("127.0.0.1", 0)); s = socket.create_connection(l.getsockname())
import subprocess
os.dup2(s.fileno(), 9)
subprocess.run(["aasm", "run", "--", "sh", "-c", "ls /proc/self/fd; ls -l /proc/self/fd | grep -c socket: "],
               pass_fds=[9])
""",
    )
    assert out.split() == ["0", "1", "2", "3", "0"]


def test_the_callers_own_terminal_is_refused_and_one_made_for_the_run_is_not(
    box: Container,
) -> None:
    source = (
        f"import sys; sys.path.append({TOOLS!r}); from client import *\n"
        "print(start(['tty'], terminal=True))\n"
        "m, s = os.openpty()\n"
        "print(start(['true'], stdin=s, stdout=s, stderr=s, terminal=True))\n"
    )
    told = person(box, [], "/usr/bin/python3", "-c", source)
    assert "the caller's own terminal" in told["shown"]
    assert "exit 0" in told["shown"]


def test_a_file_that_came_read_only_is_not_opened_for_writing_again(box: Container) -> None:
    box.push("/home/dev/notes", "kept\n", owner="dev:dev")
    again = "echo overwritten > /proc/self/fd/0"
    refused = box.run(f"aasm run -- sh -c '{again}' < /home/dev/notes", user="dev", cwd=WORK)
    assert refused.code != 0
    assert box.pull("/home/dev/notes") == "kept\n"
    assert box.run(f"sh -c '{again}' < /home/dev/notes", user="dev").code == 0
    assert box.pull("/home/dev/notes") == "overwritten\n"


# Environment


def test_the_environment_is_what_is_allowed_and_nothing_hostile(box: Container) -> None:
    hostile = {
        "LD_PRELOAD": "/tmp/evil.so",
        "PYTHONPATH": "/tmp",
        "PYTHONSTARTUP": "/tmp/x.py",
        "BASH_ENV": "/tmp/rc",
        "https_proxy": "http://127.0.0.1:9",
        "AA_RUN": "another",
        "HOME": "/tmp",
        "PATH": "/tmp/evil:/usr/bin:/bin",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "XDG_RUNTIME_DIR": "/run/user/2000",
        "KEEPER_TOKEN": "secret-of-the-caller",
    }
    harmless = {"TERM": "screen", "LC_TIME": "C", "TZ": "UTC", "NO_COLOR": "1"}
    out = run(box, ["env"], env={**hostile, **harmless}).check().out
    found = dict(line.split("=", 1) for line in out.splitlines())
    assert not set(found) & (set(hostile) - {"AA_RUN", "HOME", "PATH"})
    assert {k: found[k] for k in harmless} == harmless
    assert (found["HOME"], found["USER"], found["LOGNAME"]) == ("/home/dev", "dev", "dev")
    assert "/tmp" not in found["PATH"] and found["AA_RUN"] == ended(box)["id"]


def test_an_agent_may_declare_variables_and_systemd_does_not_show_them(box: Container) -> None:
    env = {"KEEPER_TOKEN": "secret-of-the-caller"}
    process = background(
        box, "echo $KEEPER_TOKEN; sleep 600", "--agent", "keeper", env=env, stdout=-1
    )
    unit = f"aa-agent-{process.run}.service"
    assert "secret-of-the-caller" not in box.systemctl("show", unit).out
    box.run(["aasm", "runs", "kill", process.run]).check()
    assert process.communicate(timeout=20)[0] == b"secret-of-the-caller\n"


# Folders


def test_the_working_directory_is_writable_and_the_rest_is_not(box: Container) -> None:
    done = run(box, "pwd; touch here && echo wrote; mkdir -p a/b; mv here a/b/there && echo moved")
    assert done.check().out == f"{WORK}\nwrote\nmoved\n" and done.err == ""
    for place in ("/home/dev/x", "/etc/x", "/usr/local/x", "/var/x", "/opt/x", "/srv/x", "/x"):
        assert run(box, ["touch", place]).code != 0, place
    assert run(box, ["cat", "/home/dev/.bashrc"]).code == 0


def test_home_and_system_folders_stay_read_only_and_a_note_says_so(box: Container) -> None:
    for place in ("/home/dev", "/home", "/", "/etc", "/usr/lib"):
        done = run(box, "pwd; touch x", cwd=place)
        assert (done.code, done.out) == (1, f"{place}\n")
        assert f"aasm run: {place} is read-only" in done.err, place


def test_declared_state_folders_are_made_and_writable(box: Container) -> None:
    box.run("rm -rf ~/.cache/keeper ~/.linked; ln -s /home/dev ~/.linked", user="dev").check()
    done = run(
        box,
        "touch ~/.cache/keeper/x && echo wrote; touch ~/.cache/y || touch ~/.linked/z",
        options=["--agent", "keeper"],
        cwd="/home/dev",
    )
    assert (done.code, done.out) == (1, "wrote\n"), done
    assert "state folder ~/.linked stays read-only" in done.err
    owner = box.raw(["stat", "-c", "%U %a", "/home/dev/.cache/keeper"]).out
    assert owner == "dev 700\n"


def test_shared_temporary_folders_are_private_but_a_project_in_them_is_there(
    box: Container,
) -> None:
    box.run(
        "mkdir -p /tmp/project /var/tmp/project; touch /tmp/outside /dev/shm/outside", user="dev"
    )
    for place in ("/tmp/project", "/var/tmp/project"):
        done = run(box, "touch inside; ls -A ..; ls -A /dev/shm", cwd=place).check()
        assert done.out == "project\n" and done.err == ""
        assert box.raw(["test", "-e", f"{place}/inside"]).code == 0
    own = run(box, "pwd; ls -A; touch x; touch /dev/shm/x /var/tmp/x", cwd="/tmp").check()
    assert own.out == "/tmp\n" and "the run's own" in own.err
    assert box.raw(["test", "-e", "/tmp/x"]).code != 0


def test_a_folder_with_an_odd_name_is_a_working_directory_too(box: Container) -> None:
    for name in ("a b:c%d\\e'f", "-x", "ü"):
        for parent in (WORK, "/tmp"):
            place = f"{parent}/{name}"
            box.run(["mkdir", "-p", place], user="dev").check()
            source = f"import os; os.chdir({place!r}); os.execvp('aasm', ['aasm', 'run', '--', 'sh', '-c', 'pwd; touch x'])"
            done = box.run(["/usr/bin/python3", "-c", source], user="dev")
            assert done.check().out == f"{place}\n"
            assert box.raw(["test", "-e", f"{place}/x"]).code == 0


def test_a_folder_that_the_runs_user_cannot_enter_is_refused(box: Container) -> None:
    refused = run(box, ["true"], user="root", options=["--user", "dev"], cwd="/home/plain")
    assert (refused.code, "cannot enter" in refused.err) == (125, True)
    hidden = run(box, ["true"], user="root", options=["--user", "dev"], cwd="/run")
    assert (hidden.code, "not visible" in hidden.err) == (125, True)
    guard = run(box, ["true"], user="root", options=["--user", "dev"], cwd="/etc/agent-assembly")
    assert guard.code == 125


def test_a_folder_swapped_for_a_link_is_noticed(box: Container) -> None:
    out = script(
        box,
        """
os.makedirs("swap", exist_ok=True); fd = os.open("swap", os.O_PATH)
print(start(["true"], directory=fd))
os.rename("swap", "swapped"); os.symlink("/home/dev", "swap")
print(start(["true"], directory=fd))
os.unlink("swap"); os.mkdir("swap")
print(start(["true"], directory=fd))
os.rmdir("swap"); os.rmdir("swapped")
print(start(["true"], directory=fd))
""",
    ).splitlines()
    assert out[0] == "exit 0 " and out[1] == "exit 0 "  # by its new name
    assert out[2] == "exit 0 " and out[3].startswith("BadRequest: ")


def test_a_folder_swapped_while_the_sandbox_is_made_opens_nothing(box: Container) -> None:
    out = script(
        box,
        """
import threading, time
os.makedirs("race", exist_ok=True)
stop = threading.Event()
def swap():
    while not stop.is_set():
        os.rename("race", "race.away"); os.symlink("/home/dev", "race")
        time.sleep(0.002)
        os.unlink("race"); os.rename("race.away", "race")
        time.sleep(0.004)
thread = threading.Thread(target=swap); thread.start()
told = []
for _ in range(15):
    fd = None
    while fd is None:
        try: fd = os.open("race", os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError: pass
    told.append(start(["touch", "/home/dev/escaped"], directory=fd)); os.close(fd)
stop.set(); thread.join()
print(json.dumps(told))
""",
        timeout=120,
    )
    told = json.loads(out.splitlines()[-1])
    assert len(told) == 15 and all(not line.startswith("exit 0") for line in told), told
    assert box.raw(["test", "-e", "/home/dev/escaped"]).code != 0


# Terminals


def test_a_run_has_a_terminal_of_the_right_size_that_follows_the_window(box: Container) -> None:
    inner = (
        "trap 'stty size' WINCH; tty; stty size; "
        "while ! read -t 0.1 -n1 key; do :; done; echo got $key; exit 5"
    )
    steps: list[dict[str, Any]] = [
        {"expect": "33 77"},
        {"resize": [20, 50]},
        {"expect": "20 50"},
        {"send": "q"},
        {"expect": "got q"},
    ]
    told = person(box, steps, "aasm", "run", "--", "bash", "-c", inner)
    assert "/dev/pts/" in told["shown"]
    assert (told["code"], told["restored"]) == (5, True)


def test_keys_interrupt_quit_and_end_input_as_at_any_terminal(box: Container) -> None:
    for key, code in (("\x03", 130), ("\x1c", 131)):
        steps = [{"expect": "ready"}, {"send": key}]
        told = person(box, steps, "aasm", "run", "--", "sh", "-c", "echo ready; exec sleep 60")
        assert (told["code"], told["restored"]) == (code, True), told
    steps = [
        {"expect": "ready"},
        {"send": "line\n"},
        {"expect": "line"},
        {"expect": "line"},
        {"send": "\x04"},
    ]
    told = person(box, steps, "aasm", "run", "--", "sh", "-c", "echo ready; cat")
    assert (told["code"], told["restored"]) == (0, True)


def test_the_suspend_key_does_not_wedge_the_terminal(box: Container) -> None:
    steps = [{"expect": "ready"}, {"send": "\x1a"}, {"sleep": 0.5}, {"send": "\x03"}]
    told = person(box, steps, "aasm", "run", "--", "sh", "-c", "echo ready; exec sleep 60")
    assert (told["code"], told["restored"]) == (130, True)


def test_a_shell_in_a_run_has_job_control(box: Container) -> None:
    steps = [
        {"expect": "bash-"},
        {"send": "sleep 50\n"},
        {"sleep": 1.0},
        {"send": "\x1a"},
        {"expect": "Stopped"},
        {"send": "fg\n"},
        {"sleep": 1.0},
        {"send": "\x03"},
        {"expect": "bash-"},
        {"send": "exit 4\n"},
    ]
    told = person(box, steps, "aasm", "run", "--", "bash", "--norc", "-i")
    assert told["code"] == 4 and "no job control" not in told["shown"], told


def test_a_closed_terminal_ends_the_run(box: Container) -> None:
    person(
        box,
        [{"expect": "ready"}, {"hangup": True}],
        "aasm", "run", "--", "sh", "-c", "echo ready; sleep 600; :",
    )  # fmt: skip
    eventually(lambda: not units(box), what="the run is over")


def test_a_program_that_fails_to_start_leaves_the_terminal_as_it_was(box: Container) -> None:
    told = person(box, [], "aasm", "run", "--", "no-such-program")
    assert (told["code"], told["restored"]) == (127, True)
    told = person(box, [], "aasm", "run", "--user", "plain", "--", "true")
    assert (told["code"], told["restored"]) == (125, True)


def test_terminals_and_pipes_may_be_mixed(box: Container) -> None:
    inner = "test ! -t 0 && test -t 1 && test -t 2 && cat"
    told = person(box, [], "sh", "-c", f"echo from a pipe | aasm run -- sh -c '{inner}'")
    assert told["code"] == 0 and "from a pipe" in told["shown"]

    inner = "test -t 0 && test ! -t 1 && read line && echo $line"
    steps: list[dict[str, Any]] = [{"sleep": 1.0}, {"send": "typed\n"}, {"expect": "[typed]"}]
    told = person(box, steps, "sh", "-c", f"aasm run -- sh -c '{inner}' | sed 's/.*/[&]/'")
    assert (told["code"], told["restored"]) == (0, True)

    steps = [{"expect": "ready"}, {"send": "\x03"}]
    inner = "echo ready >&2; exec sleep 60"
    told = person(box, steps, "sh", "-c", f"exec aasm run -- sh -c '{inner}' > /dev/null")
    assert told["code"] == 130


def test_many_bytes_pass_a_terminal_unharmed(box: Container) -> None:
    inner = "stty -opost; seq 1 20000; echo end-of-it"
    told = person(box, [{"expect": "end-of-it"}], "aasm", "run", "--", "sh", "-c", inner)
    lines = told["shown"].split("\n")
    assert [line for line in lines if line.isdigit()] == [str(n) for n in range(1, 20001)]


def test_another_users_run_owns_its_terminal(box: Container) -> None:
    inner = "test -w $(tty) && stat -c %U $(tty)"
    told = person(
        box,
        [{"expect": "plain"}],
        "aasm", "run", "--agent", "lent", "--", "sh", "-c", inner,
        cwd="/srv/shared",
    )  # fmt: skip
    assert told["code"] == 0
