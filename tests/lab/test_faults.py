"""Dead means closed: whatever is killed, stopped or flushed, nothing undecided gets through, and work resumes.

One governed run hammers at every way out for as long as the faults last; the origins' log is the
judge, because it sees packets and not intentions.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab.guarded import ATTEMPTS, SERVICES, WORK, governed, guard, last_sequence, records
from tests.lab.harness import Container, LabError, eventually
from tests.lab.harness.__main__ import newest_debs
from tests.lab.harness.names import API, DENIED

HAMMER = f"""
import json, os, subprocess, sys, threading, time
sys.path.insert(0, os.path.dirname({ATTEMPTS!r}))
import attempts
attempts.PATIENCE = 0.4
ways = ["tcp-port", "tcp-port-v6", "tls-denied-name", "tls-no-name", "udp", "udp-v6", "quic",
        "tcp-banner", "tcp-fast-open", "http-denied-host"]
print(os.environ["AA_RUN"], flush=True)
def hammer(name):
    while True:
        outcome = attempts.attempt(name)
        if outcome.startswith("reached"):
            print("LEAK", name, outcome, flush=True)
for name in ways:
    threading.Thread(target=hammer, args=(name,), daemon=True).start()
while True:
    done = subprocess.run(["curl", "-sS", "-o", "/dev/null", "--max-time", "2", "https://{API}/hammer"],
                          capture_output=True, text=True)
    print("ok" if done.returncode == 0 else "failed " + str(done.returncode), flush=True)
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        container.install_deb(*newest_debs())
        guard(container)
        yield container


class Hammer:
    """A governed run that tries every way out, and one allowed request after the other."""

    def __init__(self, box: Container) -> None:
        self._box = box
        box.push("/usr/local/lib/lab/hammer.py", HAMMER)
        self._log = "/var/tmp/hammer.log"
        self._process = box.popen(
            f"aasm run --agent sample -- /usr/bin/python3 /usr/local/lib/lab/hammer.py > {self._log} 2>&1",
            user="dev",
            cwd=WORK,
        )
        self.run = eventually(lambda: self.lines()[:1], timeout=15, what="the hammer runs")[0]

    def lines(self) -> list[str]:
        return self._box.raw(["cat", self._log]).out.splitlines()

    def leaks(self) -> list[str]:
        return [line for line in self.lines() if line.startswith("LEAK")]

    def successes(self) -> int:
        return self.lines().count("ok")

    def await_success(self) -> None:
        """Until an allowed request that began after this call has worked."""
        before = self.successes()
        try:
            eventually(
                lambda: self.successes() > before + 1,
                timeout=20,
                what="an allowed request works again",
            )
        except LabError as e:
            raise LabError(f"{e}\n{self._evidence()}") from None

    def _evidence(self) -> str:
        """What a person would look at first."""
        tried = " ".join(self.lines()[-12:])
        seen = self._box.run(["sh", "-c", "aasm status; systemctl list-units --all 'aa*'"])
        denied = self._box.run(["aasm", "runs", "show", self.run])
        said = self._box.run(["journalctl", "-n", "40", "-o", "short-precise", "-u", "aa-*"])
        return "\n".join((f"tried: {tried}", seen.out, denied.out, said.out))

    def end(self) -> None:
        self._box.run(["aasm", "runs", "kill", self.run])
        self._process.wait(15)
        self._box.raw(["rm", "-f", self._log])


@contextmanager
def hammering(box: Container) -> Iterator[Hammer]:
    """While it lasts, the only things that may reach the origins are DNS and requests to API."""
    mark = box.origins.mark()
    hammer = Hammer(box)
    try:
        hammer.await_success()
        yield hammer
        hammer.await_success()
        assert not hammer.leaks()
    finally:
        hammer.end()
    assert not undecided(box, mark)


def undecided(box: Container, mark: int) -> list[dict[str, Any]]:
    """What reached the origins that no decision of the lab's policy allows."""
    wrong = []
    for event in box.origins.since(mark):
        match event["kind"]:
            case "request":
                good = event["host"] == API
            case "connection":
                good = event["port"] in (443, 53) and event["address"] not in (
                    "10.77.0.20",
                    "fd77::20",
                )
            case "dns":
                good = event["name"] == API
            case "packet":
                good = is_decided_packet(event)
            case "broken":
                good = True
            case _:
                good = False
        if not good:
            wrong.append(event)
    return wrong


def is_decided_packet(event: dict[str, Any]) -> bool:
    """SYNs to an allowed origin's HTTPS port, and DNS to the configured server; nothing else."""
    flow = (event.get("protocol"), event.get("port"))
    if flow == (socket.IPPROTO_TCP, 443):
        return event["target"] not in ("10.77.0.20", "fd77::20")
    return flow in ((socket.IPPROTO_UDP, 53), (socket.IPPROTO_TCP, 53))


def test_the_judge_would_notice_a_leak(box: Container) -> None:
    mark = box.origins.mark()
    box.run(
        ["/usr/bin/python3", ATTEMPTS, "udp", "tls-denied-name", "quic", "tcp-port"], user="plain"
    ).check()
    kinds = {(e["kind"], e.get("port")) for e in undecided(box, mark)}
    assert {
        ("datagram", 9999),
        ("connection", 9999),
        ("connection", 443),
        ("datagram", 443),
    } <= kinds


@pytest.mark.parametrize("service", ["aa-proxy", "aa-gateway", "aa-ebpf", "aa-redirect"])
def test_a_killed_daemon_opens_nothing_and_comes_back(box: Container, service: str) -> None:
    with hammering(box) as hammer:
        for _ in range(2):
            before = box.show(f"{service}.service", "MainPID")["MainPID"]
            box.systemctl("kill", "--signal=KILL", f"{service}.service").check()
            eventually(
                lambda: box.show(f"{service}.service", "MainPID")["MainPID"] not in (before, "0"),
                timeout=15,
                what=f"{service} is back",
            )
            hammer.await_success()


@pytest.mark.parametrize("service", ["aa-proxy", "aa-gateway", "aa-ebpf", "aa-redirect"])
def test_a_stopped_daemon_opens_nothing(box: Container, service: str) -> None:
    with hammering(box):
        box.systemctl("stop", f"{service}.service").check()
        time.sleep(2)
        box.systemctl("start", f"{service}.service", "aa-proxy.service").check()


FLUSHES = [
    "iptables -F; ip6tables -F",
    "iptables -t nat -F; ip6tables -t nat -F",
    "iptables -F; iptables -t nat -F; ip6tables -F; ip6tables -t nat -F",
    "iptables -I OUTPUT -j ACCEPT; ip6tables -I OUTPUT -j ACCEPT",
    "iptables -D OUTPUT 1; ip6tables -D OUTPUT 1",
    "nft flush ruleset",
]


SAVE = "; ".join(f"{x}-save -t {t}" for x in ("iptables", "ip6tables") for t in ("nat", "filter"))


def guards_rules(box: Container) -> list[str]:
    """The guard's own rules and chains as the kernel has them now, without counters, and whatever
    stands in front of its jumps."""
    saved = box.raw(["sh", "-c", SAVE]).check().out
    found, others = [], []
    for line in saved.splitlines():
        if "AA-" in line:
            found += others if line.startswith("-A OUTPUT") else []
            found.append(line.split(" [")[0])
        others = [*others, line] if line.startswith("-A OUTPUT") else []
    return found


def flush(box: Container, command: str, wanted: list[str], *, within: float) -> None:
    """Does it, and waits until the rules are as they were."""
    box.raw(["sh", "-c", command]).check()
    started = time.monotonic()
    while (now := guards_rules(box)) != wanted and time.monotonic() - started < within:
        time.sleep(0.05)
    assert now == wanted


@pytest.mark.parametrize("command", FLUSHES)
def test_a_flushed_firewall_is_repaired_within_two_seconds(box: Container, command: str) -> None:
    wanted = guards_rules(box)
    assert len(wanted) > 20
    before = last_sequence(box)
    try:
        flush(box, command, wanted, within=2.0)
    finally:
        box.raw(["sh", "-c", "iptables -D OUTPUT -j ACCEPT; ip6tables -D OUTPUT -j ACCEPT"])
    eventually(
        lambda: [r for r in records(box, type="alert", kind="guard") if r["seq"] > before],
        what="the repair is told of in an alert",
    )


@pytest.mark.parametrize("command", FLUSHES)
def test_a_flushed_firewall_opens_nothing(box: Container, command: str) -> None:
    """Under the hammer the machine is busy, so the repair may take longer; nothing leaks meanwhile."""
    wanted = guards_rules(box)
    try:
        with hammering(box):
            flush(box, command, wanted, within=20.0)
    finally:
        box.raw(["sh", "-c", "iptables -D OUTPUT -j ACCEPT; ip6tables -D OUTPUT -j ACCEPT"])


def test_a_flush_while_the_watcher_is_dead_opens_nothing(box: Container) -> None:
    """The firewall and its keeper are both gone: the kernel's guard is what is left."""
    with hammering(box):
        box.systemctl("stop", "aa-redirect.service").check()
        box.raw(["sh", "-c", FLUSHES[2]])
        time.sleep(2)
        box.systemctl("start", "aa-redirect.service").check()


def test_everything_killed_at_once_opens_nothing(box: Container) -> None:
    with hammering(box) as hammer:
        for service in SERVICES:
            box.systemctl("kill", "--signal=KILL", f"{service}.service")
        box.raw(["sh", "-c", FLUSHES[2]])
        hammer.await_success()


def test_runs_their_sockets_and_records_survive(box: Container) -> None:
    with hammering(box) as hammer:
        for service in ("aa-proxy", "aa-gateway", "aa-ebpf"):
            box.systemctl("kill", "--signal=KILL", f"{service}.service").check()
            hammer.await_success()
        listed = json.loads(box.run(["aasm", "runs", "list", "--json"]).check().out)
        assert hammer.run in [r["id"] for r in listed if r["state"] == "running"]
        shown = json.loads(box.run(["aasm", "runs", "show", hammer.run, "--json"]).check().out)
        assert any(d["target"] == f"{DENIED}:443" for d in shown["denials"])
        numbers = [r["seq"] for r in records(box)]
        assert numbers == sorted(set(numbers))


def test_a_new_run_works_after_all_that(box: Container) -> None:
    assert governed(box, ["curl", "-sS", "--max-time", "10", f"https://{API}/after"]).ok
