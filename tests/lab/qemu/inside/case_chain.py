"""A governed run on this Debian: what the policy allows works, what it does not never leaves, both are recorded."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.lab.guarded import ATTEMPTS, attempts, governed, last_sequence, records
from tests.lab.harness import Container, Result, eventually
from tests.lab.harness.container import AUTHORITY_INSIDE
from tests.lab.harness.names import API, DENIED, GIT, V4_ONLY, V6_ONLY

PATIENCE = 60  # seconds that a client waits for an answer which is to come
SETTLING = 30  # seconds until everything of earlier runs is told
SHORT = 4  # seconds that an attempt waits for one which is not

TRY = f"""
import json, os, sys
sys.path.insert(0, os.path.dirname({ATTEMPTS!r}))
import attempts
attempts.PATIENCE = float(sys.argv[1])
print(json.dumps({{name: attempts.attempt(name) for name in sys.argv[2:]}}))
"""

PYTHON = f"""
import urllib.request
with urllib.request.urlopen("https://{API}/python", timeout={PATIENCE}) as r:
    print(r.status, r.read().decode())
"""
NODE = f"""
fetch("https://{API}/node").then(async r => console.log(r.status, await r.text()))
  .catch(e => {{ console.log("error", e.cause || e); process.exit(7); }});
"""
CURL = ["curl", "-sS", "--max-time", str(PATIENCE)]
CLIENTS = {
    "curl-v4": [*CURL, "-4", f"https://{V4_ONLY}/curl4"],
    "curl-v6": [*CURL, "-6", f"https://{V6_ONLY}/curl6"],
    "curl-http": [*CURL, f"http://{API}/plain"],
    "curl-explicit-proxy": [*CURL, "-x", "http://127.0.0.1:8899", f"https://{API}/explicit"],
    "python3": ["/usr/bin/python3", "-c", PYTHON],
    "node": ["env", f"NODE_EXTRA_CA_CERTS={AUTHORITY_INSIDE}", "node", "-e", NODE],
    "git": ["git", "clone", "-q", f"https://{GIT}/project.git", "/tmp/clone"],
}

WAYS = [
    "tcp-port", "tcp-port-v6", "tcp-port-mapped", "tcp-banner", "tcp-fast-open", "tls-denied-name",
    "tls-no-name", "tls-borrowed-address", "http-denied-host", "udp", "udp-v6", "quic", "ping",
    "ping-v6", "hostile-proxy", "dns-denied",
]  # fmt: skip
WAYS_OF_ROOT = ["raw", "packet"]
WAYS_PAST_THE_NETWORK = [
    "vsock",
    "netlink",
    "sctp",
    "io-uring",
    "bus",
    "manager",
    "control",
    "enforce",
]

UNREADABLE = [
    "/var/log/agent-assembly", "/var/log/journal", "/var/lib/agent-assembly",
    "/etc/agent-assembly/policy.d", "/run/agent-assembly/bpf", "/sys/fs/bpf", "/etc/shadow",
]  # fmt: skip
IMPOSSIBLE = [
    "sudo -n true",
    "echo 1 > /sys/fs/cgroup/cgroup.procs",
    "touch /etc/lab-probe",
    "touch /home/dev/.bashrc",
    "systemctl start lab-nothing",
    "systemd-run --user true",
    "aasm runs list",
    "unshare -Ur true",
    "kill -0 1",
    "journalctl -n 1 | grep .",
]


def trying(*names: str, patience: float = SHORT) -> list[str]:
    return ["/usr/bin/python3", "-c", TRY, str(patience), *names]


def ran(done: Result) -> str:
    """The run's id: the first line that its script printed."""
    return done.out.splitlines()[0]


@pytest.mark.parametrize("client", CLIENTS)
def test_an_allowed_request_succeeds(guarded: Container, client: str) -> None:
    mark = guarded.origins.mark()
    done = governed(guarded, CLIENTS[client], timeout=120)
    assert done.ok, done
    assert guarded.origins.since(mark, kind="request"), done


def test_the_origins_own_certificate_is_in_place(guarded: Container) -> None:
    done = governed(guarded, [*CURL, "-v", f"https://{API}/"])
    assert "issuer: CN=Lab origins" in done.err, done


def test_a_denied_name_is_refused_by_name_and_no_query_leaves(guarded: Container) -> None:
    mark, before = guarded.origins.mark(), last_sequence(guarded)
    done = governed(guarded, [*CURL, f"https://{DENIED}/"])
    assert done.code == 6, done  # could not resolve
    assert not guarded.origins.since(mark)
    told = [r for r in records(guarded, kind="dns.query", target=DENIED) if r["seq"] > before]
    assert told and all(r["decision"] == "deny" for r in told)


def test_a_denied_host_is_refused_with_a_reason_and_its_origin_sees_nothing(
    guarded: Container,
) -> None:
    mark = guarded.origins.mark()
    script = (
        f"curl -sS -o /dev/null --max-time {PATIENCE} --resolve {DENIED}:443:10.77.0.20 "
        f"https://{DENIED}/; echo $?; aasm why --json; true"
    )
    done = governed(guarded, script, timeout=120)
    code, why = done.check().out.split("\n", 1)
    assert code == "35" and "alert" in done.err.lower(), done  # a TLS alert, not a timeout
    denial = [d for d in json.loads(why)["denials"] if d["kind"] == "net.connect"][-1]
    assert denial["target"] == f"{DENIED}:443"
    assert denial["rule"] and DENIED in denial["reason"]
    assert not guarded.origins.since(mark, address="10.77.0.20")


def test_no_way_leads_out_of_a_run(guarded: Container) -> None:
    mark = guarded.origins.mark()
    ways = [*WAYS, *WAYS_OF_ROOT, *WAYS_PAST_THE_NETWORK, "dns-tunnel", "dns-other-server"]
    outcomes = attempts(governed(guarded, trying(*ways), timeout=300))
    assert set(outcomes) == set(ways)
    assert {n: o for n, o in outcomes.items() if o.startswith("reached")} == {}
    assert not guarded.origins.since(mark)


def test_the_same_ways_work_for_an_ungoverned_user_and_leave_no_record(
    guarded: Container,
) -> None:
    time.sleep(SETTLING)  # what is still to be told of earlier runs
    before = last_sequence(guarded)
    mine = guarded.run(trying(*WAYS, patience=PATIENCE), user="plain", timeout=300)
    roots = guarded.run(trying(*WAYS_OF_ROOT, patience=PATIENCE), timeout=300)
    outcomes = attempts(mine) | attempts(roots)
    assert {n: o for n, o in outcomes.items() if not o.startswith("reached")} == {}
    time.sleep(SETTLING)
    assert [r for r in records(guarded) if r["seq"] > before] == []


def test_refused_packets_have_records_of_their_run(guarded: Container) -> None:
    before = last_sequence(guarded)
    governed(guarded, trying("udp", "udp-v6"), timeout=120).check()

    def told() -> bool:
        targets = {
            r["target"].split("/")[0]
            for r in records(guarded, type="refusal", decision="deny")
            if r["seq"] > before and r["run"]
        }
        return {"10.77.0.10:9999", "[fd77::10]:9999"} <= targets

    eventually(told, what="both refusals are recorded with their run")


def test_the_run_has_none_of_its_users_groups_and_no_capability(guarded: Container) -> None:
    outside = guarded.run("id -Gn", user="dev").check().out.split()
    assert {"docker", "adm", "sudo", "aa-operators"} <= set(outside)
    inside = governed(
        guarded, "id -Gn; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status"
    ).check()
    first, *status = inside.out.splitlines()
    assert first.split() == ["dev"]
    told = dict(re.split(r":\s*", line, maxsplit=1) for line in status)
    assert {told[c] for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")


def test_the_run_can_neither_read_what_is_the_guards_nor_act_for_its_user(
    guarded: Container,
) -> None:
    tries = [f"cat {p} || ls {p}/ | grep ." for p in UNREADABLE] + IMPOSSIBLE
    script = "\n".join(f"( {t} ) > /dev/null 2>&1 && echo {t!r}" for t in tries) + "\necho end"
    assert governed(guarded, script, timeout=120).check().out == "end\n"


def test_the_run_can_work_where_it_should(guarded: Container) -> None:
    script = "echo kept > made && echo tmp > /tmp/x && cat made /tmp/x && test -r /etc/passwd"
    assert governed(guarded, script).check().out == "kept\ntmp\n"
    assert not guarded.raw(["test", "-e", "/tmp/x"]).ok


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_is_the_programs_own(guarded: Container, code: int) -> None:
    assert governed(guarded, f"exit {code}").code == code


def test_a_run_with_the_proxy_layer_is_redirected_and_not_observed(guarded: Container) -> None:
    script = f"echo $AA_RUN; cat /proc/self/cgroup; curl -sS -o /dev/null https://{API}/ && echo got; curl -sS https://{DENIED}/"
    done = governed(guarded, script, agent="proxied", timeout=120)
    assert "/aa-agents-proxy.slice/" in done.out and "got" in done.out and done.code == 6, done
    assert not records(guarded, run=ran(done), layer="kernel", kind="exec")


def test_a_run_with_the_kernel_layer_is_observed_and_not_redirected(guarded: Container) -> None:
    mark = guarded.origins.mark()
    script = f"echo $AA_RUN; cat /proc/self/cgroup; curl -sS https://{DENIED}/"
    done = governed(guarded, script, agent="watched", timeout=120).check()
    assert "/aa-agents-local.slice/" in done.out
    assert guarded.origins.since(mark, kind="request", host=DENIED)
    seen = eventually(
        lambda: [r for r in records(guarded, run=ran(done), layer="kernel", kind="net.connect")],
        what="its connect is observed",
    )
    assert any("443" in r["target"] for r in seen)
    assert not records(guarded, run=ran(done), type="decision")


def test_exec_and_connect_of_a_run_with_both_are_recorded(guarded: Container) -> None:
    script = f"echo $AA_RUN; curl -sS -o /dev/null https://{API}/seen"
    done = governed(guarded, script, agent="both", timeout=120).check()

    def argvs() -> list[list[str]]:
        execs = records(guarded, run=ran(done), layer="kernel", kind="exec")
        return [r["attributes"].get("argv") or [] for r in execs]

    eventually(
        lambda: any(f"https://{API}/seen" in argv for argv in argvs()), what="its exec is recorded"
    )
    assert records(guarded, run=ran(done), layer="proxy", decision="allow")


def test_the_journal_and_the_file_tell_the_same(guarded: Container) -> None:
    done = governed(guarded, f"echo $AA_RUN; curl -sS https://{DENIED}/")

    def ended() -> bool:
        return bool(records(guarded, run=ran(done), type="lifecycle", kind="run")[1:])

    eventually(ended, what="the run's end is recorded")
    keys = ("seq", "layer", "kind", "target", "rule", "reason")
    file = [
        tuple(str(r[k] or "") for k in keys)
        for r in records(guarded, run=ran(done), decision="deny")
    ]
    journal = [
        tuple(e.get(f"AA_{k.upper()}") or "" for k in keys)
        for e in guarded.journal("AA_DECISION=deny", f"AA_RUN={ran(done)}")
    ]
    assert file and journal == file
