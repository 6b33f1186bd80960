"""The package on this Debian: it installs, its units are sound, and `systemctl start aa-proxy` starts everything."""

from __future__ import annotations

import json

import pytest

from tests.lab.guarded import SERVICES
from tests.lab.harness import Container, eventually

RUNGS = ("lsm", "fmod_ret", "cgroup")
"""Rungs on which something is enforced."""


def test_apt_installs_it_and_nothing_fails(installed: Container) -> None:
    assert installed.raw(["dpkg", "--audit"]).check().out == ""
    assert installed.systemctl("is-system-running").out.strip() == "running"


def test_systemd_finds_no_fault_in_any_unit(installed: Container) -> None:
    listed = installed.raw(["dpkg", "--listfiles", "agent-assembly"]).check().out.splitlines()
    units = [path for path in listed if "/systemd/system/aa" in path]
    assert len(units) >= 12
    verified = installed.run(["systemd-analyze", "verify", "--man=no", *units])
    assert verified.code == 0 and not verified.out + verified.err, verified.out + verified.err


@pytest.mark.parametrize("service", ["aa-gateway", "aa-proxy"])
def test_sandbox_of_what_parses_strangers_bytes_is_tight(
    installed: Container, service: str
) -> None:
    limit = "--threshold=20"  # tenths: exposure below 2.0
    scored = installed.run(
        ["systemd-analyze", "security", "--no-pager", limit, f"{service}.service"]
    )
    assert scored.ok, scored.out


def test_slices_are_there_and_the_firewall_is_untouched_before_a_start(
    installed: Container,
) -> None:
    for name in ("aa-agents-proxy.slice", "aa-agents-local.slice"):
        assert installed.raw(["test", "-d", f"/sys/fs/cgroup/aa.slice/aa-agents.slice/{name}"]).ok
    assert "AA-" not in installed.raw(["sh", "-c", "iptables-save; ip6tables-save"]).check().out


def test_starting_the_proxy_starts_what_it_needs(guarded: Container) -> None:
    for service in SERVICES:
        if service != "aa-launch":  # starts when somebody calls
            assert guarded.show(f"{service}.service", "ActiveState", "NRestarts") == {
                "ActiveState": "active",
                "NRestarts": "0",
            }
    for tool in ("iptables-save", "ip6tables-save"):
        rules = guarded.raw([tool]).check().out
        assert "AA-REDIRECT" in rules and "AA-FILTER" in rules


def test_status_reports_the_proven_rung(guarded: Container) -> None:
    def rung() -> str | None:
        told = json.loads(guarded.run(["aasm", "status", "--json"]).out)
        return next(
            (c["details"].get("rung") for c in told["components"] if c["name"] == "ebpf"), None
        )

    assert eventually(rung, timeout=20, what="the kernel layer is in the status") in RUNGS
    assert guarded.run(["aasm", "status"]).ok
