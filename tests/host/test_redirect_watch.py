"""The watcher against a host that changes: repairs, re-binding, reloads, crashes, removal."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.host.redirect_lab import (
    CONNECT,
    LISTEN,
    PEER4,
    PEER6,
    PYTHON,
    REPOSITORY,
    Gateway,
    Lab,
    Listener,
    notify_socket,
    run_json,
    stop,
    wait_for,
)

RUN = "0001"
BACKENDS = pytest.mark.parametrize("backend", ["nft", "legacy"])
REPAIR_SECONDS = 2.0
HOST_RULES = (
    ("-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT"),
    ("-A", "OUTPUT", "-p", "tcp", "--dport", "25", "-j", "REJECT"),
    ("-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "81", "-j", "REDIRECT"),
    ("-t", "mangle", "-A", "OUTPUT", "-j", "MARK", "--set-mark", "7"),
)
SLICE = "aa.slice/aa-agents.slice/aa-agents-proxy.slice"
TOOLS = ("iptables", "ip6tables")


@dataclass
class Host:
    lab: Lab
    gateway: Gateway
    log: Path

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """The daemon, ready."""
        path = self.lab.path("/run/notify")
        with notify_socket(path) as notifications:
            daemon = self.lab.daemon(log=self.log, NOTIFY_SOCKET="/run/notify", **environment)
            assert b"READY=1" in notifications.recv(1000), self.log.read_text()
        path.unlink()
        return daemon

    def rules(self, tool: str) -> list[str]:
        return self.lab.saved(f"{tool}-save")

    def confirm(self, run: str = RUN, **changes: Any) -> dict[str, Any]:
        """Announces a run and returns what the daemon said of it."""
        before = len(self.gateway.confirmed)
        self.gateway.set_run(run_json(self.lab, run, state="starting", **changes))
        assert wait_for(lambda: len(self.gateway.confirmed) > before), self.log.read_text()
        return self.gateway.confirmed[before]

    def udp(self, address: str, *, governed: bool, run: str = RUN, times: int = 1) -> list[bool]:
        """Whether each of so many datagrams could be sent."""
        family = "AF_INET6" if ":" in address else "AF_INET"
        argv = (PYTHON, "-c", SEND, family, address, str(times))
        done = self.lab.governed(run, *argv) if governed else self.lab.run(*argv)
        sent: list[bool] = json.loads(done.stdout)
        return sent


SEND = """
import json, socket, sys
s = socket.socket(getattr(socket, sys.argv[1]), socket.SOCK_DGRAM)
def sent():
    try:
        return bool(s.sendto(b"x", (sys.argv[2], 9)))
    except OSError:
        return False
print(json.dumps([sent() for _ in range(int(sys.argv[3]))]))
"""


def host_of(backend: str, tmp_path: Path) -> Iterator[Host]:
    with Lab(backend) as lab, Gateway(lab.path("/run/agent-assembly/enforce")) as gateway:
        yield Host(lab, gateway, tmp_path / "log")


@pytest.fixture
def host(backend: str, tmp_path: Path) -> Iterator[Host]:
    yield from host_of(backend, tmp_path)


@pytest.fixture
def nft_host(tmp_path: Path) -> Iterator[Host]:
    yield from host_of("nft", tmp_path)


JUMP = ("-m", "cgroup", "--path", SLICE)
DAMAGE: dict[str, list[tuple[str, ...]]] = {
    "flush": [("-F",)],
    "flush of nat": [("-t", "nat", "-F")],
    "everything deleted": [("-F",), ("-X",), ("-t", "nat", "-F"), ("-t", "nat", "-X")],
    "jump deleted": [("-D", "OUTPUT", *JUMP, "-j", "AA-FILTER")],
    "jump of nat deleted": [("-t", "nat", "-D", "OUTPUT", *JUMP, "-j", "AA-REDIRECT")],
    "inbound jump deleted": [
        ("-D", "INPUT", *JUMP, "-m", "conntrack", "--ctdir", "ORIGINAL", "-j", "AA-INBOUND")
    ],
    "accept before the jump": [("-I", "OUTPUT", "-j", "ACCEPT")],
    "accept in our chain": [("-I", "AA-FILTER", "-j", "ACCEPT")],
    "return before the redirect": [("-t", "nat", "-I", "AA-REDIRECT", "-j", "RETURN")],
    "last rule deleted": [("-D", "AA-FILTER", "10")],
    "rule replaced": [("-R", "AA-FILTER", "7", "-p", "udp", "-j", "ACCEPT")],
}


@BACKENDS
def test_any_change_to_our_rules_is_repaired_and_reported(host: Host) -> None:
    daemon = host.start()
    good = {tool: host.rules(tool) for tool in TOOLS}
    for name, commands in DAMAGE.items():
        alerts = len(host.gateway.of_type("alert"))
        kept = {tool: [r for r in host.rules(tool) if "AA-" not in r] for tool in TOOLS}
        for command in commands:
            host.lab.run("iptables", *command, check=False)  # a repair may come first
            # there is no explicit proxy on v6, so the last rule has another number
            v6 = ("9" if word == "10" else word for word in command)
            host.lab.run("ip6tables", *v6, check=False)
        began = time.monotonic()
        for tool in TOOLS:
            assert wait_for(lambda t=tool: all_there(host.rules(t), good[t])), f"{tool}: {name}"
            assert time.monotonic() - began < REPAIR_SECONDS, f"{tool}: {name}"
            lost = [r for r in kept[tool] if r not in host.rules(tool)]
            assert not lost, f"{tool}: {name}: {lost}"
        assert wait_for(lambda n=alerts: len(host.gateway.of_type("alert")) > n), name
        for tool in TOOLS:
            host.lab.run(tool, "-D", "OUTPUT", "-j", "ACCEPT", check=False)
    assert wait_for(lambda: host.gateway.status["details"]["repairs"] >= len(DAMAGE))
    assert stop(daemon) == 0


def all_there(rules: list[str], good: list[str]) -> bool:
    """All of ours as they were, and our jumps first."""
    ours = [r for r in rules if "AA-" in r]
    first = {r.split()[1]: r for r in reversed([r for r in rules if r.startswith("-A ")])}
    jumps_lead = all("AA-" in first[c] for c in ("OUTPUT", "INPUT") if c in first)
    return sorted(ours) == sorted(r for r in good if "AA-" in r) and jumps_lead


@BACKENDS
def test_a_flush_is_over_within_two_seconds_for_real_packets(host: Host) -> None:
    host.start()
    assert host.confirm()["ok"]
    for address in (PEER4, PEER6):
        assert host.udp(address, governed=True) == [False]
    for tool in TOOLS:
        host.lab.run(tool, "-F")
    time.sleep(REPAIR_SECONDS)
    for address in (PEER4, PEER6):
        assert host.udp(address, governed=True) == [False]
        assert host.udp(address, governed=False) == [True]


def test_the_alert_names_the_program_that_changed_the_rules(nft_host: Host) -> None:
    nft_host.start()
    nft_host.lab.run("iptables", "-F")
    assert wait_for(lambda: nft_host.gateway.of_type("alert"))
    alert = nft_host.gateway.of_type("alert")[0]
    assert alert["kind"] == "guard" and alert["layer"] == "proxy"
    assert [author.split()[0] for author in alert["attributes"]["changed_by"]] == ["iptables"]
    assert any("AA-FILTER" in line for line in alert["attributes"]["missing"])


@BACKENDS
def test_changes_of_the_host_elsewhere_are_none_of_our_business(host: Host) -> None:
    host.start()
    for tool in TOOLS:
        for rule in HOST_RULES:
            host.lab.run(tool, *rule)
    time.sleep(1.5)
    assert host.gateway.of_type("alert") == []
    assert host.gateway.status["details"]["repairs"] == 0


@BACKENDS
def test_rules_are_bound_anew_when_the_slice_was_made_again(host: Host) -> None:
    host.start()
    assert host.confirm()["ok"]
    assert host.udp(PEER4, governed=True) == [False]
    remake_slice(host.lab)
    assert host.confirm("0002")["ok"]  # asked at once, before any poll
    for address in (PEER4, PEER6):
        assert host.udp(address, governed=True, run="0002") == [False]
        assert host.udp(address, governed=False) == [True]


@BACKENDS
def test_a_new_slice_is_noticed_without_a_run(host: Host) -> None:
    host.start()
    remake_slice(host.lab)
    time.sleep(REPAIR_SECONDS)
    assert host.udp(PEER4, governed=True) == [False]
    assert wait_for(lambda: host.gateway.of_type("alert"))
    assert "made again" in host.gateway.of_type("alert")[0]["reason"]


def remake_slice(lab: Lab) -> None:
    for directory in [*lab.slice.iterdir(), lab.slice]:
        if directory.is_dir():
            assert wait_for(lambda d=directory: removed(d)), directory
    lab.slice.mkdir()


def removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return False
    return True


@BACKENDS
def test_no_run_is_confirmed_while_the_rules_cannot_be_put_in_force(host: Host) -> None:
    daemon = host.start()
    cgroup = host.lab.slice.stat().st_ino
    assert removed(host.lab.slice)
    outside = {"cgroup": "elsewhere", "cgroup_id": cgroup}
    host.gateway.set_run({**plain_run(), **outside})
    assert wait_for(lambda: host.gateway.confirmed)
    said = host.gateway.confirmed[0]
    assert not said["ok"] and "does not exist" in said["reason"]
    assert wait_for(lambda: host.gateway.status["state"] == "degraded")
    assert "does not exist" in host.gateway.of_type("alert")[0]["reason"]
    time.sleep(2.5)
    assert len(host.gateway.of_type("alert")) == 1  # said once, not at each look
    host.lab.slice.mkdir()
    assert wait_for(lambda: host.gateway.status["state"] == "ok", REPAIR_SECONDS)
    assert host.confirm()["ok"]
    assert daemon.poll() is None


def plain_run() -> dict[str, Any]:
    keys = ("agent", "user", "home", "directory", "cgroup")
    numbers = {"uid": 0, "cgroup_id": 0, "caller_uid": 0, "started": 1.0, "ended": 0.0}
    lists: dict[str, Any] = {"layers": ["proxy"], "tags": [], "argv": []}
    given = {"id": "0009", "state": "starting", "exit_code": None, "signal": None}
    return {**dict.fromkeys(keys, ""), **numbers, **lists, **given}


def test_a_run_is_confirmed_only_where_the_rules_reach_it(nft_host: Host) -> None:
    nft_host.start()
    assert nft_host.confirm()["ok"]
    elsewhere = nft_host.confirm("0002", cgroup="aa.slice/aa-agents.slice/x.service")
    assert not elsewhere["ok"] and "not below" in elsewhere["reason"]
    beside = nft_host.confirm("0003", cgroup=f"{SLICE}-other/x.service")
    assert not beside["ok"]
    other = nft_host.confirm("0004", cgroup_id=1)
    assert not other["ok"] and "not 1" in other["reason"]
    gone = nft_host.confirm("0005", cgroup=f"{SLICE}/gone.service")
    assert not gone["ok"]


def test_runs_without_the_proxy_layer_are_not_ours_to_confirm(nft_host: Host) -> None:
    nft_host.start()
    nft_host.gateway.set_run(
        run_json(nft_host.lab, "0002", state="starting", layers=["kernel", "sdk"])
    )
    assert nft_host.confirm()["run"] == RUN
    assert [c["run"] for c in nft_host.gateway.confirmed] == [RUN]


@BACKENDS
def test_removing_leaves_every_other_rule_as_it_was(host: Host) -> None:
    for tool in TOOLS:
        for rule in HOST_RULES:
            host.lab.run(tool, *rule)
    before = {tool: host.rules(tool) for tool in TOOLS}
    daemon = host.start()
    assert all("AA-FILTER" in "\n".join(host.rules(tool)) for tool in TOOLS)
    assert stop(daemon) == 0
    assert all("AA-FILTER" in "\n".join(host.rules(tool)) for tool in TOOLS)
    for _ in range(2):  # the second time there is nothing to remove
        remove = (PYTHON, "-m", "aa.redirect", "--remove")
        host.lab.run(*remove, env={"PYTHONPATH": str(REPOSITORY)})
        assert {tool: host.rules(tool) for tool in TOOLS} == before


@BACKENDS
def test_starting_again_changes_nothing(host: Host) -> None:
    for tool in TOOLS:
        for rule in HOST_RULES:
            host.lab.run(tool, *rule)
    assert stop(host.start()) == 0
    once = {tool: host.rules(tool) for tool in TOOLS}
    assert stop(host.start()) == 0
    assert {tool: host.rules(tool) for tool in TOOLS} == once


def test_rules_of_the_other_backend_are_swept_up(tmp_path: Path) -> None:
    with Lab("legacy") as lab, Gateway(lab.path("/run/agent-assembly/enforce")) as gateway:
        host = Host(lab, gateway, tmp_path / "log")
        assert stop(host.start()) == 0
        lab.run("iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
        for tool in ("iptables", "ip6tables"):
            for part in ("", "-save", "-restore"):
                link = f"/etc/alternatives/{tool}{part}"
                lab.run("ln", "-sf", f"/usr/sbin/{tool}-nft{part}", link)
        host.start()
        legacy = lab.saved("iptables-legacy-save")
        assert "AA-" not in "\n".join(legacy) and any("--dport 22" in r for r in legacy)
        assert "AA-FILTER" in "\n".join(lab.saved("iptables-nft-save"))
        assert "AA-" not in "\n".join(lab.saved("ip6tables-legacy-save"))


@BACKENDS
def test_a_killed_watcher_leaves_the_rules_and_the_next_counts_what_it_missed(host: Host) -> None:
    daemon = host.start()
    assert host.confirm()["ok"]
    assert host.udp(PEER4, governed=True) == [False]
    assert wait_for(lambda: host.gateway.refusals())
    time.sleep(1.5)  # so that what was read is written down
    stop(daemon, signal.SIGKILL)
    assert host.udp(PEER4, governed=True, times=7) == [False] * 7
    assert host.udp(PEER4, governed=False) == [True]
    host.start()
    assert wait_for(lambda: host.gateway.of_type("gap"))
    assert [g["count"] for g in host.gateway.of_type("gap")] == [7]


@BACKENDS
def test_records_and_gaps_add_up_under_a_flood(host: Host) -> None:
    host.start()
    assert host.confirm()["ok"]
    sent = 5_000
    assert not any(host.udp(PEER4, governed=True, times=sent))

    def accounted() -> int:
        told = host.gateway.refusals() + host.gateway.of_type("gap")
        return sum(int(r["count"]) for r in told)

    assert wait_for(lambda: accounted() >= sent, 25.0), accounted()
    assert accounted() == sent
    assert len(host.gateway.reports) < 40


def test_a_reader_that_is_there_already_does_not_stop_enforcement(nft_host: Host) -> None:
    holder = nft_host.lab.start(
        PYTHON,
        "-c",
        "import sys\nfrom aa.nflog import NflogReader\nr = NflogReader(83)\n"
        "print('bound', flush=True)\nsys.stdin.read()\n",
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    assert holder.stdout is not None and holder.stdout.readline() == "bound\n"
    nft_host.start()
    assert nft_host.confirm()["ok"]
    assert nft_host.udp(PEER4, governed=True, times=3) == [False] * 3
    assert wait_for(lambda: nft_host.gateway.status.get("state") == "degraded")
    assert "another program" in nft_host.gateway.status["details"]["problems"][0]
    assert wait_for(lambda: nft_host.gateway.of_type("gap"), 15.0)
    assert nft_host.gateway.of_type("gap")[0]["count"] == 3
    holder.kill()
    assert wait_for(lambda: nft_host.gateway.status["state"] == "ok")
    nft_host.udp(PEER6, governed=True)
    assert wait_for(lambda: nft_host.gateway.refusals())


@BACKENDS
def test_a_reload_brings_other_ports_into_force(host: Host) -> None:
    daemon = host.start()
    assert host.confirm()["ok"]
    front = Listener(
        host.lab.start(PYTHON, "-c", LISTEN, "AF_INET", "SOCK_STREAM", "127.0.0.1", "7777")
    )
    connect = (PYTHON, "-c", CONNECT, "AF_INET", "SOCK_STREAM", PEER4, "443", "hello")
    assert "error" in json.loads(host.lab.governed(RUN, *connect).stdout)
    host.lab.config().write_text("[listen]\nfront_port = 7777\n")
    daemon.send_signal(signal.SIGHUP)
    assert wait_for(lambda: "--to-ports 7777" in "\n".join(host.rules("ip6tables")))
    assert wait_for(lambda: "--to-ports 7777" in "\n".join(host.rules("iptables")))
    assert json.loads(host.lab.governed(RUN, *connect).stdout)["answer"] == "here"
    assert len(front.told(1)) == 1
    assert host.gateway.of_type("alert") == []


@pytest.mark.parametrize(
    "text", ["[listen]\nfront_port = 8853\n", "[listen]\nfront_prot = 7777\n", "[listen", "x = 1\n"]
)
def test_a_reload_of_a_bad_file_keeps_the_rules(nft_host: Host, text: str) -> None:
    daemon = nft_host.start()
    before = {tool: nft_host.rules(tool) for tool in TOOLS}
    nft_host.lab.config().write_text(text)
    daemon.send_signal(signal.SIGHUP)
    assert wait_for(lambda: "not reloaded" in nft_host.log.read_text())
    assert {tool: nft_host.rules(tool) for tool in TOOLS} == before
    assert nft_host.confirm()["ok"] and daemon.poll() is None


def test_a_reload_that_cannot_be_written_keeps_the_old_rules(nft_host: Host) -> None:
    daemon = nft_host.start()
    before = {tool: nft_host.rules(tool) for tool in TOOLS}
    nft_host.lab.config().write_text("[listen]\nfront_port = 7777\n")
    nft_host.lab.run("mount", "--bind", "/bin/false", "/usr/sbin/xtables-nft-multi")
    daemon.send_signal(signal.SIGHUP)
    assert wait_for(lambda: "not reloaded" in nft_host.log.read_text(), 20.0)
    nft_host.lab.run("umount", "/usr/sbin/xtables-nft-multi")
    assert {tool: nft_host.rules(tool) for tool in TOOLS} == before
    assert wait_for(lambda: nft_host.gateway.status["state"] == "ok")
    assert nft_host.confirm()["ok"]


def failing_start(host: Host) -> str:
    daemon = host.lab.daemon(log=host.log)
    assert daemon.wait(20) == 1
    return host.log.read_text()


def test_refuses_to_start_without_the_slice(nft_host: Host) -> None:
    assert removed(nft_host.lab.slice)
    assert "systemctl start aa-agents-proxy.slice" in failing_start(nft_host)


def test_refuses_to_start_on_a_host_without_unified_cgroups(nft_host: Host) -> None:
    nft_host.lab.run("umount", "/sys/fs/cgroup")
    assert "systemd.unified_cgroup_hierarchy=1" in failing_start(nft_host)


def test_refuses_to_start_without_iptables(nft_host: Host) -> None:
    nft_host.lab.run("mount", "--bind", "/bin/false", "/usr/sbin/xtables-nft-multi")
    assert "iptables" in failing_start(nft_host)


def test_refuses_to_start_when_v6_is_open_and_has_no_rules(nft_host: Host) -> None:
    break_ip6tables(nft_host.lab)
    said = failing_start(nft_host)
    assert "no ip6 rules" in said and "IPv6 address" in said


def test_starts_with_v4_where_v6_is_proved_closed_and_notices_when_it_opens(
    nft_host: Host,
) -> None:
    break_ip6tables(nft_host.lab)
    disable_v6(nft_host.lab, "1")
    nft_host.start()
    assert nft_host.confirm()["ok"]
    assert nft_host.gateway.status["details"]["families"] == ["ip"]
    assert nft_host.udp(PEER4, governed=True) == [False]
    assert nft_host.udp(PEER6, governed=True) == [False]
    disable_v6(nft_host.lab, "0")
    assert wait_for(lambda: nft_host.gateway.status["state"] == "degraded", 15.0)
    opened = nft_host.confirm("0002")
    assert not opened["ok"] and "v6 is open" in opened["reason"]


def break_ip6tables(lab: Lab) -> None:
    for tool in ("ip6tables-nft-restore", "ip6tables-nft-save"):
        lab.run("rm", f"/usr/sbin/{tool}")


def disable_v6(lab: Lab, value: str) -> None:
    for interface in ("all", "default", "lo", "ve-c"):
        lab.run("sysctl", "-q", "-w", f"net.ipv6.conf.{interface}.disable_ipv6={value}")
