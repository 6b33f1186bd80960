"""One governed run, end to end, with real programs against real origins in another namespace."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.guarded import (
    ATTEMPTS,
    POLICY_FILE,
    WORK,
    attempts,
    governed,
    guard,
    last_sequence,
    records,
    timeline,
)
from tests.lab.harness import Container, eventually
from tests.lab.harness.__main__ import newest_debs
from tests.lab.harness.names import API, DENIED, GIT, MIXED, OTHER, REBOUND, V4_ONLY, V6_ONLY

CA = "/usr/local/share/ca-certificates/lab-origins.crt"
NODE = """
const https = require("https");
fetch("https://%s/node").then(async r => { console.log(r.status, await r.text()); })
  .catch(e => { console.log("error", e.cause ? e.cause.code || e.cause.message : e.message); process.exit(7); });
"""
PYTHON = """
import ssl, sys, urllib.request
with urllib.request.urlopen("https://%s/python", timeout=10) as r:
    print(r.status, r.read().decode())
"""
OUTSIDE = """
import socket, threading
def serve(s):
    s.listen(8)
    while True:
        c, _ = s.accept(); c.sendall(b"outside\\n"); c.close()
a = socket.socket(socket.AF_UNIX); a.bind("/run/lab-outside.sock")
b = socket.socket(socket.AF_UNIX); b.bind("/tmp/lab-outside.sock")
t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); t.bind(("127.0.0.1", 7777))
import os; os.chmod("/run/lab-outside.sock", 0o666); os.chmod("/tmp/lab-outside.sock", 0o666)
for s in (a, b): threading.Thread(target=serve, args=(s,), daemon=True).start()
serve(t)
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        container.install_deb(*newest_debs())
        guard(container)
        container.raw(
            ["systemd-run", "--quiet", "--unit=lab-outside", "/usr/bin/python3", "-c", OUTSIDE]
        ).check()
        yield container


# -- 1. what is allowed works, with the origin's own certificate

CLIENTS = {
    "curl": ["curl", "-sS", "--max-time", "10", f"https://{API}/curl"],
    "curl-v4": ["curl", "-sS", "-4", "--max-time", "10", f"https://{V4_ONLY}/curl4"],
    "curl-v6": ["curl", "-sS", "-6", "--max-time", "10", f"https://{V6_ONLY}/curl6"],
    "curl-http": ["curl", "-sS", "--max-time", "10", f"http://{API}/plain"],
    "curl-proxy": ["curl", "-sS", "-x", "http://127.0.0.1:8899", f"https://{API}/explicit"],
    "python3": ["/usr/bin/python3", "-c", PYTHON % API],
    "node": ["env", f"NODE_EXTRA_CA_CERTS={CA}", "node", "-e", NODE % API],
    "git": ["git", "-c", "http.sslCAInfo=/etc/ssl/certs/ca-certificates.crt", "clone", "-q",
            f"https://{GIT}/project.git", "/tmp/clone"],
}  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_an_allowed_request_succeeds(box: Container, client: str) -> None:
    mark = box.origins.mark()
    done = governed(box, CLIENTS[client])
    assert done.ok, done
    assert box.origins.since(mark, kind="request"), done


def test_the_origins_own_certificate_is_in_place(box: Container) -> None:
    done = governed(box, ["curl", "-sSv", "--max-time", "10", f"https://{API}/"])
    assert "issuer: CN=Lab origins" in done.err


def test_a_large_body_arrives_whole(box: Container) -> None:
    done = governed(
        box,
        f"curl -sS --max-time 30 https://{API}/bytes/20000000 | sha256sum; head -c 20000000 /dev/zero | sha256sum",
    )
    first, second = done.check().out.splitlines()
    assert first == second


# -- 2. what is denied is refused at once, readably, and nothing reaches the origin


def test_a_denied_name_is_refused_by_name_and_no_query_leaves(box: Container) -> None:
    mark, before = box.origins.mark(), last_sequence(box)
    done = governed(box, ["curl", "-sS", "--max-time", "10", f"https://{DENIED}/"])
    assert done.code == 6, done  # could not resolve
    assert not box.origins.since(mark, kind="dns", name=DENIED)
    told = [r for r in records(box, kind="dns.query", target=DENIED) if r["seq"] > before]
    assert told and all(r["decision"] == "deny" for r in told)


def test_a_denied_host_gets_an_alert_and_aasm_why_says_why(box: Container) -> None:
    mark = box.origins.mark()
    script = (
        f"curl -sS -o /dev/null -w '%{{time_total}}' --max-time 10 "
        f"--resolve {DENIED}:443:10.77.0.20 https://{DENIED}/; echo; aasm why --json; true"
    )
    done = governed(box, script)
    assert float(done.out.splitlines()[0]) < 1.0, done
    assert "alert" in done.err.lower(), done
    why = json.loads(done.out.split("\n", 1)[1])
    denial = [d for d in why["denials"] if d["kind"] == "net.connect"][-1]
    assert denial["target"] == f"{DENIED}:443"
    assert denial["rule"] and DENIED in denial["reason"]
    assert not box.origins.since(mark, address="10.77.0.20")


def test_a_denied_http_host_answers_403_with_the_reason(box: Container) -> None:
    done = governed(
        box,
        [
            "curl",
            "-sS",
            "--max-time",
            "5",
            "--resolve",
            f"{DENIED}:80:10.77.0.20",
            f"http://{DENIED}/",
        ],
    )
    assert DENIED in done.out and "aasm" in done.out, done


def test_a_denied_connect_answers_403_with_the_reason(box: Container) -> None:
    done = governed(
        box,
        ["curl", "-sSv", "--max-time", "5", "-x", "http://127.0.0.1:8899", f"https://{DENIED}/"],
    )
    assert "403" in done.err, done


@pytest.mark.parametrize("name", [MIXED, REBOUND])
def test_one_guarded_address_denies_an_allowed_name(box: Container, name: str) -> None:
    mark = box.origins.mark()
    done = governed(box, ["curl", "-sS", "--max-time", "5", f"https://{name}/"])
    assert not done.ok
    assert not box.origins.since(mark, kind="request")


# -- 3 and 4. every other way is refused inside, and works outside without a record

NETWORK_WAYS = [
    "tcp-port", "tcp-port-v6", "tcp-port-mapped", "tcp-banner", "tcp-fast-open", "tls-denied-name",
    "tls-no-name", "tls-borrowed-address", "http-denied-host", "udp", "udp-v6", "quic", "ping",
    "ping-v6", "hostile-proxy", "dns-denied", "loopback-service",
]  # fmt: skip
PRIVILEGED_WAYS = ["raw", "packet"]
OTHER_WAYS = ["vsock", "netlink", "io-uring", "bus", "manager", "journal", "outside-socket"]


def test_no_way_leads_out_of_a_run(box: Container) -> None:
    mark = box.origins.mark()
    ways = NETWORK_WAYS + PRIVILEGED_WAYS + OTHER_WAYS + ["sctp", "control", "enforce", "launch"]
    ways += ["dns-tunnel", "dns-other-server", "shared-tmp-socket"]
    outcomes = attempts(governed(box, ["/usr/bin/python3", ATTEMPTS, *ways], timeout=120))
    # The run may reach aa-launch's socket in no way that starts anything; it is not even there.
    reached = {n: o for n, o in outcomes.items() if o.startswith("reached")}
    assert not reached
    assert set(outcomes) == set(ways)
    assert not [e for e in box.origins.since(mark) if e["kind"] != "dns"]
    assert not box.origins.since(mark, kind="dns")


def test_the_same_ways_work_for_an_ungoverned_user_and_leave_no_record(box: Container) -> None:
    assert json.loads(box.run(["aasm", "runs", "list", "--json"]).check().out) == []
    time.sleep(2.5)  # what is still to be told of earlier runs
    before = last_sequence(box)
    outcomes = attempts(
        box.run(
            ["/usr/bin/python3", ATTEMPTS, *NETWORK_WAYS, *OTHER_WAYS], user="plain", timeout=120
        )
    )
    refused = {n: o for n, o in outcomes.items() if not o.startswith("reached")}
    assert set(refused) <= {"manager"}, refused  # systemd's private socket is root's alone
    privileged = attempts(box.run(["/usr/bin/python3", ATTEMPTS, *PRIVILEGED_WAYS]))
    assert all(o.startswith("reached") for o in privileged.values()), privileged
    time.sleep(2.5)
    assert [r for r in records(box) if r["seq"] > before] == []


def test_refused_packets_have_records_of_their_run(box: Container) -> None:
    before = last_sequence(box)
    governed(box, ["/usr/bin/python3", ATTEMPTS, "udp", "udp-v6"]).check()

    def told() -> bool:
        targets = {
            r["target"].split("/")[0]
            for r in records(box, type="refusal")
            if r["seq"] > before and r["run"] and r["decision"] == "deny"
        }
        return {"10.77.0.10:9999", "[fd77::10]:9999"} <= targets

    eventually(told, what="both refusals are recorded with their run")


def test_a_socket_that_was_connected_outside_does_not_come_in(box: Container) -> None:
    mark = box.origins.mark()
    script = (
        "import socket, os\n"
        "s = socket.create_connection(('10.77.0.10', 9999)); os.dup2(s.fileno(), 0)\n"
        f"os.execvp('aasm', ['aasm', 'run', '--agent', 'sample', '--', '/usr/bin/python3', '{ATTEMPTS}', 'inherited'])\n"
    )
    done = box.run(["/usr/bin/python3", "-c", script], user="dev", cwd=WORK)
    assert done.code == 125 and "socket" in done.err, done
    assert not [e for e in box.origins.since(mark, kind="packet") if e.get("bytes")]


def test_an_ordinary_pipe_on_the_same_descriptor_comes_in(box: Container) -> None:
    assert governed(box, ["cat"], input="through the pipe\n").check().out == "through the pipe\n"


# -- 5. the run has none of its user's power


def test_the_run_has_none_of_its_users_groups(box: Container) -> None:
    outside = box.run("id -Gn", user="dev").check().out.split()
    assert {"docker", "adm", "sudo", "aa-operators"} <= set(outside)
    inside = governed(
        box, "id -Gn; grep -E '^(Groups|Cap|NoNewPrivs|Seccomp:)' /proc/self/status"
    ).check()
    first, *status = inside.out.splitlines()
    assert first.split() == ["dev"]
    told = dict(re.split(r":\s*", line, maxsplit=1) for line in status)
    assert told["Groups"].strip() in ("", "2000")
    assert {told[c] for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize(
    "path",
    [
        "/var/log/agent-assembly/audit.jsonl",
        "/var/log/agent-assembly",
        "/var/log/journal",
        "/var/lib/agent-assembly",
        "/etc/agent-assembly/policy.d",
        "/run/agent-assembly/bpf",
        "/sys/fs/bpf",
        "/etc/shadow",
    ],
)
def test_the_run_cannot_read_what_is_the_guards(box: Container, path: str) -> None:
    assert not governed(box, f"cat {path} 2>/dev/null || ls {path}/ | grep .").ok


@pytest.mark.parametrize(
    "command",
    [
        "sudo -n true",
        "echo 1 > /sys/fs/cgroup/cgroup.procs",
        "touch /etc/lab-probe",
        "touch /home/dev/.bashrc",
        "systemctl start lab-nothing",
        "systemd-run --user true",
        "aasm runs list",
        "aasm run -- true",
        "unshare -Ur true",
        "kill -0 1",
        "journalctl -n 1 | grep .",
    ],
)
def test_the_run_cannot_act_for_its_user(box: Container, command: str) -> None:
    assert not governed(box, f"{command} 2>/dev/null").ok


def test_the_run_can_work_where_it_should(box: Container) -> None:
    script = "echo kept > made && echo tmp > /tmp/x && cat made /tmp/x && test -r /etc/passwd && ls /usr/bin > /dev/null"
    assert governed(box, script).check().out == "kept\ntmp\n"
    assert box.pull(f"{WORK}/made") == "kept\n"
    assert not box.raw(["test", "-e", "/tmp/x"]).ok


# -- exit codes and signals


@pytest.mark.parametrize(
    ("command", "code"), [("exit 0", 0), ("exit 7", 7), ("true; sh -c 'kill -9 $PPID'; true", 137)]
)
def test_the_exit_code_is_the_programs_own(box: Container, command: str, code: int) -> None:
    assert governed(box, command).code == code


# -- 7. the two logs tell one story


def test_the_journal_and_the_file_tell_the_same(box: Container) -> None:
    governed(box, ["/usr/bin/python3", ATTEMPTS, "dns-denied", "tls-denied-name", "udp"]).check()
    eventually(lambda: records(box, type="lifecycle", kind="run")[-1]["reason"].startswith("ended"))
    journal = box.journal("AA_DECISION=deny")
    file = records(box, decision="deny")
    assert file

    def story(entries: list[dict[str, str]], prefix: str = "") -> list[tuple[str, ...]]:
        keys = ("seq", "layer", "kind", "target", "rule", "run", "reason")
        return [
            tuple(str(e.get(prefix + (k.upper() if prefix else k)) or "") for k in keys)
            for e in entries
        ]

    assert story(journal, "AA_") == story(file)


FLOOD = """
import os, sys
sys.path.insert(0, "/usr/lib/python3/dist-packages")
from aa.varlink import Client
action = {"kind": "tool.call", "target": "flood", "attributes": {"args": {}}}
asked = 0
with Client("/run/agent-assembly/run/gateway") as gateway:
    while asked < 10_500:
        gateway.call("io.agentassembly.Gateway.Decide", {"action": action})
        asked += 1
print(os.environ["AA_RUN"], asked)
"""


def test_a_flood_of_decisions_is_whole_in_both_logs(box: Container) -> None:
    """More records than journald's own rate limit lets a service write (10,000 in 30 s)."""
    before = last_sequence(box)
    flooding = governed(box, ["/usr/bin/python3", "-c", FLOOD], timeout=120)
    run, asked = flooding.check().out.split()

    def told() -> int:
        limit = records(box, run=run, target="decisions_per_second")
        return sum(r["count"] for r in records(box, run=run, kind="tool.call") + limit)

    eventually(lambda: told() == int(asked), what="the file has every decision")
    entries = [e for e in box.journal(f"AA_RUN={run}") if e["AA_TYPE"] in ("decision", "refusal")]
    gaps = [e for e in box.journal("AA_TYPE=gap", "AA_TARGET=journal") if int(e["AA_SEQ"]) > before]
    assert sum(int(e["AA_COUNT"]) for e in entries + gaps) == int(asked)
    assert not gaps, "journald was too slow even for a bounded wait"


def test_exec_and_connect_are_in_the_audit_with_the_right_run(box: Container) -> None:
    done = governed(
        box, f"echo $AA_RUN; exec curl -sS --max-time 10 https://{API}/seen", agent="both"
    )
    run = done.check().out.splitlines()[0]

    def seen() -> bool:
        found = {(r["kind"], r["target"]) for r in records(box, run=run, type="observed")}
        executed = [t for k, t in found if k == "exec" and t.endswith("/curl")]
        connected = [t for k, t in found if k == "net.connect" and t.endswith(":443")]
        return bool(executed and connected)

    eventually(seen, what=f"exec and connect of run {run} are recorded")
    argv = [r["attributes"].get("argv") for r in records(box, run=run, kind="exec")]
    assert any(f"https://{API}/seen" in (a or []) for a in argv)


def test_the_timeline_tells_a_run_in_order(box: Container) -> None:
    """Exec, file, connection, request and plaintext, each with what is known of it."""
    script = (
        "echo $AA_RUN; echo one > notes; mv notes kept; "
        f"curl -sS --max-time 10 'https://{API}/story?token=secret' >/dev/null; rm kept; sleep 2"
    )
    run = governed(box, script, agent="both").check().out.strip()

    def story() -> list[tuple[str, str, str]]:
        return [(r["type"], r["kind"], r["target"]) for r in timeline(box, run)]

    notes, kept = f"{WORK}/notes", f"{WORK}/kept"
    wanted = [
        ("observed", "exec", "/bin/sh"),
        ("observed", "file.open", notes),
        ("observed", "file.rename", notes),
        ("decision", "dns.query", API),
        ("decision", "net.connect", f"{API}:443"),
        ("observed", "http.request", f"https://{API}/story"),
        ("observed", "file.unlink", kept),
    ]
    eventually(lambda: set(wanted) <= set(story()), what=f"{wanted} in {story()}")
    found = story()
    assert sorted(wanted, key=found.index) == wanted, found
    told = timeline(box, run)
    assert [r["time"] for r in told] == sorted(r["time"] for r in told)
    (seen,) = (r for r in told if r["target"] == f"https://{API}/story")
    assert seen["attributes"]["source"] == "tls-probe" and seen["attributes"]["decided"] is True
    assert "secret" not in json.dumps(seen), "no query of what is inside TLS is kept"
    (renamed,) = (r for r in told if r["kind"] == "file.rename")
    assert renamed["attributes"]["to"] == kept and "error" not in renamed["attributes"]
    shown = box.raw(["aasm", "runs", "show", run, "--timeline", "--kind", "http.request"]).check()
    assert "plaintext" in shown.out and "/story" in shown.out and "notes" not in shown.out


def test_a_request_under_another_name_raises_an_alert(box: Container) -> None:
    """Fronting: the connection was decided for one host, what was sent through it is for another."""
    honest = f"curl -sS --max-time 10 https://{API}/honest >/dev/null"
    script = (
        f"echo $AA_RUN; {honest}; "
        f"curl -sS --max-time 10 -H 'Host: hidden.test' https://{API}/fronted >/dev/null; sleep 2"
    )
    run = governed(box, script, agent="both").check().out.strip()

    def requests() -> dict[str, Any]:
        of_run = records(box, run=run, kind="http.request", type="observed")
        return {r["target"]: r["attributes"].get("decided") for r in of_run}

    wanted = {f"https://{API}/honest": True, "https://hidden.test/fronted": False}
    eventually(lambda: requests() == wanted, what=f"{wanted} and {requests()}")
    (alert,) = records(box, run=run, type="alert")
    assert "hidden.test" in alert["reason"] and alert["attributes"]["comm"] == "curl"


def test_what_systemd_does_to_make_a_sandbox_is_no_act_of_the_run(box: Container) -> None:
    run = governed(box, "echo $AA_RUN; echo > written", agent="both").check().out.splitlines()[0]

    def files() -> list[str]:
        found = [r for r in records(box, run=run) if r["kind"].startswith("file.")]
        return [r["target"] for r in found]

    eventually(lambda: any(f.endswith("/written") for f in files()), what="its own file is there")
    assert not [f for f in files() if f.startswith("/run/systemd/") or "/namespace-dev-" in f]


# -- 8. an invalid file changes nothing


def test_an_invalid_file_changes_nothing_but_what_is_said(box: Container) -> None:
    broken = "/etc/agent-assembly/policy.d/60-broken.toml"
    revision = json.loads(box.run(["aasm", "status", "--json"]).out)["policy"]
    box.push(broken, '[policy]\nid = "broken"\nnetwrok = true\n')
    try:
        eventually(
            lambda: "DEGRADED" in box.show("aa-gateway.service", "StatusText")["StatusText"],
            what="the status line says so",
        )
        status = box.show("aa-gateway.service", "StatusText")["StatusText"]
        assert "60-broken.toml:3" in status and "netwrok" in status and revision in status
        checked = box.run(["aasm", "policy", "check"])
        assert checked.code == 1 and "netwrok" in checked.out
        assert box.journal("AA_TYPE=alert", "AA_TARGET=policy")
        assert governed(box, ["curl", "-sS", "--max-time", "10", f"https://{API}/"]).ok
        assert not governed(box, ["curl", "-sS", "--max-time", "10", f"https://{DENIED}/"]).ok
    finally:
        box.raw(["rm", broken])
    eventually(
        lambda: "DEGRADED" not in box.show("aa-gateway.service", "StatusText")["StatusText"],
        what="the status line is well again",
    )
    assert box.run(["aasm", "policy", "check"]).ok


def test_a_changed_policy_is_in_force_without_a_restart(box: Container) -> None:
    before = box.pull(POLICY_FILE)
    assert not governed(box, ["curl", "-sS", "--max-time", "5", "https://other.test/"]).ok
    box.push(POLICY_FILE, before.replace('"**.allowed.test"', '"**.allowed.test", "other.test"'))
    try:
        box.run(["aasm", "policy", "reload"]).check()
        assert governed(box, ["curl", "-sS", "--max-time", "5", "https://other.test/"]).ok
    finally:
        box.push(POLICY_FILE, before)
        box.run(["aasm", "policy", "reload"]).check()


def test_a_person_is_asked_before_anything_is_resolved_and_the_connection_goes_on(
    box: Container,
) -> None:
    before, mark = box.pull(POLICY_FILE), box.origins.mark()
    asks = (
        '\n[[rule]]\nid = "asks"\neffect = "ask"\n'
        f'network = {{ hosts = ["{OTHER}"], cidrs = ["10.77.0.0/24", "fd77::/64"] }}\n'
    )
    box.push(POLICY_FILE, before + asks)
    list_ = ["aasm", "approvals", "list", "--json"]
    try:
        # What an earlier test had resolved, the proxy would not ask for again.
        box.systemctl("restart", "aa-proxy.service").check()
        box.run(["aasm", "policy", "reload"]).check()
        curl = ["curl", "-sS", "--max-time", "60", f"https://{OTHER}/"]
        command = ["aasm", "run", "--agent", "sample", "--", *curl]
        client = box.popen(command, user="dev", cwd=WORK)
        (one,) = eventually(
            lambda: json.loads(box.run(list_).check().out), timeout=20, what="a question waits"
        )
        assert (one["target"], one["rules"]) == (f"{OTHER}:443", ["lab/asks"])
        assert not box.origins.since(mark, kind="dns", name=OTHER)
        approve = ["aasm", "approvals", "approve", one["id"]]
        assert not governed(box, approve).ok and not box.run(approve, user="plain").ok
        assert client.poll() is None
        box.run([*approve, "--note", "the lab"]).check()
        assert client.wait(timeout=30) == 0
        assert box.origins.since(mark, kind="dns", name=OTHER)
        told = [r for r in records(box) if r["attributes"].get("approval") == one["id"]]
        assert [r["decision"] for r in told] == ["ask", "", "allow", "allow"]
        assert told[1]["reason"] == "approved by root: the lab"
        assert json.loads(box.run(list_).check().out) == []
    finally:
        box.push(POLICY_FILE, before)
        box.run(["aasm", "policy", "reload"]).check()


def test_the_policy_says_where_a_run_may_write(box: Container) -> None:
    before = box.pull(POLICY_FILE)
    script = "touch here 2>/dev/null && echo here; touch ~/notes/there && echo there"
    assert governed(box, "touch here && echo here").check().out == "here\n"
    box.push(POLICY_FILE, before + '\n[sandbox]\nwritable = ["~/notes"]\n')
    try:
        box.run(["aasm", "policy", "reload"]).check()
        done = governed(box, script)
        assert done.out == "there\n", done
        assert "read-only, because the policy" in done.err
    finally:
        box.push(POLICY_FILE, before)
        box.run(["aasm", "policy", "reload"]).check()


# -- 9. layers are chosen per agent


def test_a_run_with_the_proxy_layer_is_redirected_and_not_observed(box: Container) -> None:
    script = f"echo $AA_RUN; grep ^0:: /proc/self/cgroup; curl -sS --max-time 5 https://{API}/; curl -sS https://{DENIED}/"
    done = governed(box, script, agent="proxied")
    run, cgroup, *rest = done.out.splitlines()
    assert "/aa-agents-proxy.slice/" in cgroup
    assert rest and done.code == 6
    assert not records(box, run=run, layer="kernel", kind="exec")


def test_a_run_with_the_kernel_layer_is_observed_and_not_redirected(box: Container) -> None:
    mark = box.origins.mark()
    script = f"echo $AA_RUN; grep ^0:: /proc/self/cgroup; curl -sS --max-time 5 https://{DENIED}/"
    done = governed(box, script, agent="watched")
    run, cgroup, *rest = done.check().out.splitlines()
    assert "/aa-agents-local.slice/" in cgroup
    assert box.origins.since(mark, kind="request", host=DENIED)
    eventually(
        lambda: {"exec", "net.connect"}
        <= {r["kind"] for r in records(box, run=run, layer="kernel")},
        what="exec and connect are observed",
    )
    assert not records(box, run=run, type="decision")


def test_a_run_with_both_is_redirected_and_observed(box: Container) -> None:
    script = f"echo $AA_RUN; curl -sS --max-time 5 https://{API}/; curl -sS https://{DENIED}/"
    done = governed(box, script, agent="both")
    assert done.code == 6
    run = done.out.splitlines()[0]
    eventually(lambda: records(box, run=run, layer="kernel", kind="exec"), what="exec is observed")
    assert records(box, run=run, layer="proxy", decision="allow")


# -- the commands of an operator


def test_the_proxy_says_whether_it_runs(box: Container) -> None:
    assert box.run(["aasm", "proxy", "status"]).check().out.startswith("running")
    box.run(["aasm", "proxy", "stop"]).check()
    try:
        stopped = box.run(["aasm", "proxy", "status"])
        assert (stopped.code, stopped.out.splitlines()[0]) == (3, "not running")
        assert not governed(box, ["true"]).ok  # its layers cannot confirm a run
    finally:
        box.run(["aasm", "proxy", "start"]).check()
    assert governed(box, ["curl", "-sS", "--max-time", "10", f"https://{API}/"]).ok


def test_the_explicit_proxy_can_listen_elsewhere(box: Container) -> None:
    try:
        box.run(["aasm", "proxy", "start", "--listen", "127.0.0.1:3128"]).check()
        request = [
            "curl",
            "-sS",
            "--max-time",
            "5",
            "-x",
            "http://127.0.0.1:3128",
            f"https://{API}/",
        ]
        done = governed(box, request)
        assert done.ok, done
    finally:
        box.run(["aasm", "proxy", "start"]).check()
    assert governed(box, CLIENTS["curl-proxy"]).ok


def test_the_configuration_can_move_every_listener(box: Container) -> None:
    """Front, forwarder, rules and guard have to agree, or nothing works."""
    config = "/etc/agent-assembly/agent-assembly.toml"
    before = box.pull(config)
    box.push(config, "[listen]\nfront_port = 9898\nexplicit_port = 9899\ndns_port = 9853\n")
    try:
        box.run(["aasm", "proxy", "start"]).check()
        request = ["curl", "-sS", "--max-time", "5", f"https://{API}/"]
        assert governed(box, request).ok
        assert governed(box, [*request, "-x", "http://127.0.0.1:9899"]).ok
        assert not governed(box, ["curl", "-sS", "--max-time", "5", f"https://{DENIED}/"]).ok
    finally:
        box.push(config, before)
        box.run(["aasm", "proxy", "start"]).check()
    assert governed(box, CLIENTS["curl-proxy"]).ok


def test_an_operator_sees_and_ends_a_run(box: Container) -> None:
    running = box.popen(
        ["aasm", "run", "--agent", "sample", "--", "sleep", "60"], user="dev", cwd=WORK
    )
    try:
        (run,) = eventually(
            lambda: [
                r
                for r in json.loads(
                    box.run(["aasm", "runs", "list", "--json"], user="dev").check().out
                )
                if r["argv"][:1] == ["sleep"] and r["state"] == "running"
            ],
            what="the run is listed",
        )
        box.run(["aasm", "runs", "show", run["id"]], user="dev").check()
        box.run(["aasm", "runs", "kill", run["id"]], user="dev").check()
        assert running.wait(10) == 137
    finally:
        running.kill()
        running.wait()


def test_a_call_answers_as_json(box: Container) -> None:
    status = json.loads(box.run(["aasm", "call", "io.agentassembly.Control.GetStatus"]).check().out)
    assert status["policy_state"] == "ok"
    assert {c["name"] for c in status["components"]} >= {"ebpf", "proxy", "redirect"}
