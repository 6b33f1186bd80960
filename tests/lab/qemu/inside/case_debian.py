"""The guest is the Debian it is said to be, and has what the package needs of a kernel."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = {"bookworm": "6.1.", "trixie": "6.12."}
SYSTEMDS = {"bookworm": "systemd 252 ", "trixie": "systemd 257 "}
PYTHONS = {"bookworm": (3, 11), "trixie": (3, 13)}

TOOLS = ["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"]


def output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def suite() -> str:
    return os.environ["LAB_SUITE"]


@pytest.fixture
def cgroup() -> Iterator[str]:
    """A cgroup for rules to name, relative to the root."""
    made = Path("/sys/fs/cgroup/lab.slice/probe")
    made.mkdir(parents=True)
    yield "lab.slice/probe"
    made.rmdir()
    made.parent.rmdir()


def test_the_kernel_is_the_suites_own(suite: str) -> None:
    assert platform.release().startswith(KERNELS[suite])
    assert "Debian" in platform.version()


def test_systemd_and_python_are_the_suites_own(suite: str) -> None:
    assert output("systemctl", "--version").startswith(SYSTEMDS[suite])
    assert tuple(map(int, platform.python_version_tuple()[:2])) == PYTHONS[suite]


def test_nothing_failed_while_it_started() -> None:
    assert output("systemctl", "is-system-running", "--wait").strip() == "running"


def test_cgroups_are_unified() -> None:
    assert output("stat", "--file-system", "--format=%T", "/sys/fs/cgroup").strip() == "cgroup2fs"
    assert "memory" in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()


def test_bpf_is_among_the_security_modules_and_types_are_there() -> None:
    assert "bpf" in Path("/sys/kernel/security/lsm").read_text().split(",")
    assert Path("/sys/kernel/btf/vmlinux").stat().st_size > 1_000_000


def test_a_bpf_file_system_can_be_mounted(tmp_path: Path) -> None:
    output("mount", "-t", "bpf", "bpf", str(tmp_path))
    output("umount", str(tmp_path))


@pytest.mark.parametrize("tool", TOOLS)
def test_rules_can_name_a_cgroup(tool: str, cgroup: str) -> None:
    rules = [
        f"-t nat {{}} OUTPUT -m cgroup --path {cgroup} -p tcp -j REDIRECT --to-ports 8898",
        f"-t filter {{}} OUTPUT -m cgroup --path {cgroup} -j NFLOG --nflog-group 83",
        f"-t filter {{}} OUTPUT -m cgroup --path {cgroup} -j REJECT",
    ]
    for change in ("-A", "-C", "-D"):
        for rule in rules:
            output(tool, *rule.format(change).split())
