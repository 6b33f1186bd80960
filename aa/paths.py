"""Where things are: directories, sockets, ports and slices that more than one process names."""

from __future__ import annotations

from pathlib import Path

CONFIG_DIR = Path("/etc/agent-assembly")
CONFIG_FILE = CONFIG_DIR / "agent-assembly.toml"
POLICY_DIR = CONFIG_DIR / "policy.d"
AGENTS_DIR = CONFIG_DIR / "agents.d"

RUNTIME_DIR = Path("/run/agent-assembly")
ENFORCE_SOCKET = RUNTIME_DIR / "enforce"
CONTROL_SOCKET = RUNTIME_DIR / "control"
LAUNCH_SOCKET = RUNTIME_DIR / "launch"
RUNS_DIR = RUNTIME_DIR / "runs"
"""One directory per run, with that run's gateway socket in it."""

RUN_VIEW = RUNTIME_DIR / "run"
"""Where a run sees its own directory: `RUNS_DIR/ID` is bound there in its mount namespace."""

RUN_GATEWAY_SOCKET = RUN_VIEW / "gateway"

STATE_DIR = Path("/var/lib/agent-assembly")
GATEWAY_STATE_DIR = STATE_DIR / "gateway"
LOG_DIR = Path("/var/log/agent-assembly")
AUDIT_FILE = LOG_DIR / "audit.jsonl"

LIB_DIR = Path("/usr/lib/agent-assembly")
SHIM = LIB_DIR / "shim"
BPF_OBJECTS_DIR = LIB_DIR / "bpf"
INSPECT_DIR = LIB_DIR / "inspect"
"""mitmproxy and what it needs, of the package agent-assembly-inspect."""
TEMPLATES_DIR = Path("/usr/share/agent-assembly/policies")

CGROUP_ROOT = Path("/sys/fs/cgroup")
AGENTS_SLICE = "aa.slice/aa-agents.slice"
PROXY_SLICE = AGENTS_SLICE + "/aa-agents-proxy.slice"
LOCAL_SLICE = AGENTS_SLICE + "/aa-agents-local.slice"
"""Slices as paths below the cgroup2 root."""

FRONT_PORT = 8898
EXPLICIT_PORT = 8899
DNS_PORT = 8853
NFLOG_GROUP = 83


def run_unit(run: str) -> str:
    """The systemd unit of a run."""
    return f"aa-agent-{run}.service"


def run_directory(run: str) -> Path:
    return RUNS_DIR / run
