"""The package goes as it came: a purge ends what runs and leaves nothing of it on this Debian."""

from __future__ import annotations

from tests.lab.guarded import WORK
from tests.lab.harness import Container, eventually


def test_a_purge_ends_what_runs_and_leaves_nothing(guarded: Container) -> None:
    agent = guarded.popen(
        ["aasm", "run", "--agent", "sample", "--", "sleep", "6000"], user="dev", cwd=WORK
    )
    eventually(lambda: guarded.raw(["pgrep", "-x", "sleep"]).ok, what="the agent runs")
    assert "AA-" in guarded.raw(["sh", "-c", "iptables-save; ip6tables-save"]).check().out

    guarded.run(["apt-get", "purge", "--yes", "agent-assembly"], timeout=180).check()

    assert agent.wait(timeout=120) != 0
    assert not guarded.raw(["pgrep", "-x", "sleep"]).ok
    for tool in ("iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save"):
        assert "AA-" not in guarded.raw([tool]).check().out
    for path in (
        "/var/lib/agent-assembly",
        "/var/log/agent-assembly",
        "/run/agent-assembly",
        "/etc/agent-assembly",
    ):
        assert not guarded.raw(["test", "-e", path]).ok, path
    assert not guarded.raw(["test", "-e", "/sys/fs/cgroup/aa.slice"]).ok
    assert "aa-" not in guarded.raw(["sh", "-c", "getent passwd; getent group"]).out
    assert "/run/agent-assembly" not in guarded.raw(["cat", "/proc/self/mounts"]).out
    assert guarded.systemctl("is-system-running").out.strip() == "running"
