"""The project's systemd units as `aasm` sees them: states by pystemd, changes by `systemctl`."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from pystemd.systemd1 import Unit

from aa.cli.errors import NOT_PERMITTED, Failure

UNITS = (
    "aa-gateway.service",
    "aa-launch.socket",
    "aa-proxy.socket",
    "aa-proxy.service",
    "aa-redirect.service",
    "aa-ebpf.service",
)
SYSTEMCTL_SECONDS = 60


def unit_states(units: Sequence[str]) -> dict[str, str]:
    """The ActiveState of each unit; `unknown` when systemd cannot be asked."""
    states = {}
    for name in units:
        try:
            with Unit(name.encode()) as unit:
                states[name] = unit.Unit.ActiveState.decode()
        except Exception as e:  # pystemd raises a type of its own for each D-Bus error
            states[name] = f"unknown ({type(e).__name__})"
    return states


def systemctl(*arguments: str) -> None:
    """Runs systemctl, so that polkit and its messages work as people know them."""
    try:
        done = subprocess.run(
            ["systemctl", *arguments],
            stdin=None,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SYSTEMCTL_SECONDS,
        )
    except FileNotFoundError:
        raise Failure("systemctl is not installed", hint="this needs a systemd host") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"systemctl {' '.join(arguments)} takes too long") from None
    if done.returncode:
        denied = "Access denied" in done.stderr or "authentication" in done.stderr.lower()
        raise Failure(
            f"systemctl {' '.join(arguments)}: {done.stderr.strip()}",
            hint="use sudo" if denied else "see `journalctl -xe`",
            code=NOT_PERMITTED if denied else 1,
        )
