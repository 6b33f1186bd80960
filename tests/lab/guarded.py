"""What lab tests of the whole chain share: a guarded container, its policy, and ways to act in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.harness import Container, Result, eventually

ATTEMPTS = "/usr/local/lib/lab/attempts.py"
WORK = "/home/dev/work"
SERVICES = ("aa-gateway", "aa-launch", "aa-proxy", "aa-redirect", "aa-ebpf")
POLICY_FILE = "/etc/agent-assembly/policy.d/50-lab.toml"

POLICY = """
[policy]
id      = "lab"
default = { network = "deny", dns = "deny" }

[[rule]]
id      = "origins"
effect  = "allow"
network = { hosts = ["**.allowed.test"], cidrs = ["10.77.0.0/24", "fd77::/64"] }
"""

AGENTS = {"proxied": ["proxy"], "watched": ["kernel"], "both": ["proxy", "kernel"]}


def guard(box: Container) -> None:
    """Chooses the lab's policy and starts everything, as an operator would."""
    box.push(POLICY_FILE, POLICY)
    for name, layers in AGENTS.items():
        box.push(f"/etc/agent-assembly/agents.d/{name}.toml", f"layers = {json.dumps(layers)}\n")
    box.push_file(Path(__file__).with_name("attempts.py"), ATTEMPTS)
    box.raw(["install", "-d", "-o", "dev", "-g", "dev", WORK]).check()
    box.systemctl("start", "aa-proxy").check()
    await_services(box)


def await_services(box: Container) -> None:
    """Until every daemon is up and has told the gateway so."""
    for service in SERVICES:
        if service != "aa-launch":  # starts when somebody calls
            eventually(
                lambda: box.show(f"{service}.service", "ActiveState")["ActiveState"] == "active",
                timeout=20,
                what=f"{service} is active",
            )


def governed(
    box: Container,
    command: str | Sequence[str],
    *,
    agent: str = "sample",
    user: str = "dev",
    **how: Any,
) -> Result:
    """Runs a command as a governed agent, the way a person does."""
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    how.setdefault("cwd", WORK)
    return box.run(["aasm", "run", "--agent", agent, "--", *argv], user=user, **how)


def attempts(result: Result) -> dict[str, str]:
    """The outcomes that attempts.py printed."""
    outcomes: dict[str, str] = json.loads(result.check().out)
    return outcomes


def records(box: Container, **fields: str) -> list[dict[str, Any]]:
    """The audit file's records with these values, oldest first."""
    lines = box.raw(["sh", "-c", "cat /var/log/agent-assembly/audit.jsonl"]).out.splitlines()
    found = [json.loads(line) for line in lines]
    return [r for r in found if all(str(r[k]) == v for k, v in fields.items())]


def timeline(box: Container, run: str) -> list[dict[str, Any]]:
    """What one run did, as an operator asks for it."""
    done = box.raw(["aasm", "runs", "show", run, "--timeline", "--json"]).check()
    told: list[dict[str, Any]] = json.loads(done.out)["records"]
    return told


def last_sequence(box: Container) -> int:
    return max((r["seq"] for r in records(box)), default=0)
