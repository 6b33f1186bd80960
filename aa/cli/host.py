"""What this host has that a policy can be enforced with, as far as who asks may know."""

from __future__ import annotations

from aa.cli.errors import Failure, control
from aa.launch.shim import landlock_abi
from aa.model import Rung
from aa.paths import INSPECT_DIR
from aa.policy.enforcement import Host

ASK_SECONDS = 2.0
"""For the gateway, which need not run."""


def this_host() -> Host:
    """The kernel's Landlock, the engine of inspection, and the rung that the kernel layer proved."""
    return Host(_rung(), landlock_abi(), INSPECT_DIR.is_dir())


def _rung() -> Rung | None:
    try:
        with control(timeout=ASK_SECONDS) as client:
            told = client.call("io.agentassembly.Control.GetStatus")
        details = {c["name"]: c["details"] for c in told["components"]}
        return Rung(details["ebpf"]["rung"])
    except (Failure, KeyError, ValueError):
        return None
