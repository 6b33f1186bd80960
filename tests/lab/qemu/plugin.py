"""A pytest plugin for a guest: tests get the machine they run on where they ask for a container.

`python3 -m pytest -p tests.lab.qemu.plugin ...` in a guest. LAB_RESULTS names a file that gets one JSON object a
line: first what this machine is, then the outcome of each case.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab import harness
from tests.lab.qemu import machine

# Before any module of tests is imported, which take these names from the harness.
vars(harness).update(Container=machine.Machine, eventually=machine.eventually)

RESULTS = Path(os.environ["LAB_RESULTS"])


def _write(row: dict[str, Any]) -> None:
    with RESULTS.open("a") as results:
        results.write(json.dumps(row) + "\n")


def pytest_sessionstart() -> None:
    told = subprocess.run(
        ["systemctl", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    # "systemd 252 (252.39-1~deb12u2)": what is in brackets is Debian's version
    systemd = told.stdout.splitlines()[0].partition("(")[2].rstrip(")")
    _write({"kernel": platform.release(), "systemd": systemd, "python": platform.python_version()})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line for each case: for its call, or for the step before or after it that failed."""
    if report.when != "call" and report.passed:
        return
    outcome = report.outcome if report.when == "call" else f"{report.when} {report.outcome}"
    _write(
        {
            "case": report.nodeid,
            "outcome": outcome,
            "seconds": report.duration,
            "said": report.longreprtext if report.failed else "",
        }
    )
