"""Dead means closed on this Debian: what is killed or flushed opens nothing, and work resumes by itself.

One governed run tries its ways out through all of it; the origins' log is the judge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.guarded import ATTEMPTS, SERVICES, WORK, governed
from tests.lab.harness import Container, eventually
from tests.lab.harness.names import API
from tests.lab.test_faults import undecided

LOG = "/var/tmp/hammer.log"
PROGRAM = "/usr/local/lib/lab/patient-hammer.py"
# Slower than the container's: emulated processors are to be left to the services as well.
HAMMER = f"""
import os, subprocess, sys, threading, time
sys.path.insert(0, os.path.dirname({ATTEMPTS!r}))
import attempts
attempts.PATIENCE = 2
print(os.environ["AA_RUN"], flush=True)
def hammer():
    while True:
        for name in ("tcp-port", "tcp-port-v6", "tls-denied-name", "udp", "udp-v6", "quic", "tcp-fast-open"):
            outcome = attempts.attempt(name)
            print("LEAK" if outcome.startswith("reached") else "held", name, outcome, flush=True)
            time.sleep(0.1)
threading.Thread(target=hammer, daemon=True).start()
while True:
    done = subprocess.run(["curl", "-sS", "-o", "/dev/null", "--max-time", "30", "https://{API}/hammer"])
    print("ok" if done.returncode == 0 else f"failed {{done.returncode}}", flush=True)
    time.sleep(0.5)
"""

FLUSH = "iptables -F; iptables -t nat -F; ip6tables -F; ip6tables -t nat -F"
RULES = "iptables-save; ip6tables-save"
LEGACY = "for t in iptables ip6tables; do update-alternatives --set $t /usr/sbin/$t-legacy; done"
NF_TABLES = "for t in iptables ip6tables; do update-alternatives --auto $t; done"


class Hammer:
    """What the run that hammers has printed so far."""

    def __init__(self, box: Container, mark: int) -> None:
        self.box, self.mark = box, mark

    def lines(self) -> list[str]:
        return self.box.raw(["cat", LOG]).out.splitlines()

    def await_work(self) -> None:
        """Until an allowed request that began after this call has worked, and every way was tried once more."""
        before = self.lines()
        successes, tries = before.count("ok"), len([x for x in before if x.startswith("held")])

        def worked() -> bool:
            now = self.lines()
            return now.count("ok") > successes + 1 and (
                len([x for x in now if x.startswith("held")]) >= tries + 7
            )

        eventually(worked, timeout=30, what="an allowed request works again")

    def assert_nothing_leaked(self) -> None:
        assert not [line for line in self.lines() if line.startswith("LEAK")]
        assert not undecided(self.box, self.mark)


@pytest.fixture(scope="module")
def hammer(guarded: Container) -> Iterator[Hammer]:
    guarded.push(PROGRAM, HAMMER)
    mark = guarded.origins.mark()
    process = guarded.popen(
        f"aasm run --agent sample -- /usr/bin/python3 {PROGRAM} > {LOG} 2>&1", user="dev", cwd=WORK
    )
    try:
        made = Hammer(guarded, mark)
        made.await_work()
        yield made
    finally:
        process.terminate()
        process.wait()


def rules(box: Container) -> list[str]:
    """Our rules, without counters."""
    saved = box.raw(["sh", "-c", RULES]).check().out.splitlines()
    return [line.split(" [")[0] for line in saved if "AA-" in line]


@pytest.mark.parametrize("service", ["aa-proxy", "aa-gateway", "aa-ebpf", "aa-redirect"])
def test_a_killed_daemon_opens_nothing_and_comes_back(hammer: Hammer, service: str) -> None:
    box = hammer.box
    before = box.show(f"{service}.service", "MainPID")["MainPID"]
    box.systemctl("kill", "--signal=KILL", f"{service}.service").check()
    eventually(
        lambda: box.show(f"{service}.service", "MainPID")["MainPID"] not in (before, "0"),
        timeout=20,
        what=f"{service} is back",
    )
    hammer.await_work()
    hammer.assert_nothing_leaked()


def test_a_flushed_firewall_opens_nothing_and_is_repaired(hammer: Hammer) -> None:
    wanted = rules(hammer.box)
    hammer.box.raw(["sh", "-c", FLUSH]).check()
    eventually(lambda: rules(hammer.box) == wanted, what="the rules are back")
    hammer.await_work()
    hammer.assert_nothing_leaked()


def test_a_flush_while_the_watcher_is_stopped_opens_nothing(hammer: Hammer) -> None:
    """The firewall and its keeper are both gone: the kernel's guard is what is left."""
    box = hammer.box
    box.systemctl("stop", "aa-redirect.service").check()
    box.raw(["sh", "-c", FLUSH]).check()
    assert not [line for line in rules(box) if line.startswith("-A")]
    tries = len(hammer.lines())
    eventually(lambda: len(hammer.lines()) > tries + 10, timeout=30, what="the run tries its ways")
    hammer.assert_nothing_leaked()
    box.systemctl("start", "aa-redirect.service").check()
    hammer.await_work()
    hammer.assert_nothing_leaked()


def test_everything_killed_and_flushed_at_once_opens_nothing(hammer: Hammer) -> None:
    for service in SERVICES:
        hammer.box.systemctl("kill", "--signal=KILL", f"{service}.service")
    hammer.box.raw(["sh", "-c", FLUSH]).check()
    hammer.await_work()
    hammer.assert_nothing_leaked()


def test_the_run_and_its_records_survived_all_that(hammer: Hammer) -> None:
    run = hammer.lines()[0]
    listed = json.loads(hammer.box.run(["aasm", "runs", "list", "--json"]).check().out)
    assert run in [r["id"] for r in listed if r["state"] == "running"]
    shown = json.loads(hammer.box.run(["aasm", "runs", "show", run, "--json"]).check().out)
    assert any(d["kind"] == "net.connect" for d in shown["denials"])


def test_the_judge_would_notice_a_leak(guarded: Container) -> None:
    mark = guarded.origins.mark()
    guarded.run(["/usr/bin/python3", ATTEMPTS, "udp", "tcp-port"], user="plain").check()
    kinds = {(e["kind"], e.get("port")) for e in undecided(guarded, mark)}
    assert {("datagram", 9999), ("connection", 9999)} <= kinds


def test_a_host_with_the_legacy_firewall_is_guarded_alike(guarded: Container) -> None:
    guarded.raw(["sh", "-c", LEGACY]).check()
    try:
        guarded.systemctl("restart", "aa-redirect.service").check()
        assert "AA-REDIRECT" in guarded.raw(["iptables-legacy-save"]).check().out
        mark = guarded.origins.mark()
        done = governed(guarded, ["curl", "-sS", "--max-time", "60", f"https://{API}/legacy"])
        assert done.ok, done
        tried = governed(
            guarded, ["/usr/bin/python3", ATTEMPTS, "udp", "tcp-port", "tls-denied-name"]
        ).check()
        assert "reached" not in tried.out
        assert not undecided(guarded, mark)
    finally:
        guarded.raw(["sh", "-c", NF_TABLES]).check()
        guarded.systemctl("restart", "aa-redirect.service").check()
