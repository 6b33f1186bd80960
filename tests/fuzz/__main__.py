"""Fuzzes the targets, some at a time, and says what each found: `python -m tests.fuzz [TARGET...]`.

Ends with 1 if there is a finding. Its input is under build/fuzz/crashes;
`python -m tests.fuzz.replay TARGET FILE` runs it again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import targets

DIRECTORY = Path("build/fuzz")
GRACE_SECONDS = 120
"""For the imports, the seeds and what earlier runs left in the corpus."""
TOLD_LINES = 40
"""Of the engine's output, when there is a finding."""


@dataclass(frozen=True)
class Outcome:
    name: str
    runs: int
    covered: int
    finding: str
    """The end of the engine's output; empty when nothing was found."""

    def __str__(self) -> str:
        verdict = "FOUND" if self.finding else "ok"
        return f"{self.name:<14} {self.runs:>9} inputs  {self.covered:>6} covered  {verdict}"


def fuzz(name: str, seconds: int) -> Outcome:
    """One target in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz.engine", name, str(seconds), str(DIRECTORY)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            timeout=seconds + GRACE_SECONDS,
            check=False,
        )
        said, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as e:
        said = (e.stdout or b"").decode(errors="backslashreplace") if e.stdout else ""
        said, failed = f"{said}\nthe engine itself did not end in time", True
    runs = re.findall(r"number_of_executed_units: (\d+)", said)
    covered = re.findall(r"\bcov: (\d+)", said)
    lines = said.splitlines()
    return Outcome(
        name,
        int(runs[-1]) if runs else 0,
        int(covered[-1]) if covered else 0,
        "\n".join(lines[-TOLD_LINES:]) if failed or not runs else "",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all of them by default")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    wanted = parser.parse_args()
    known = targets.names()
    unknown = set(wanted.targets) - set(known)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    found = 0
    with ThreadPoolExecutor(max_workers=wanted.jobs) as pool:
        todo = [pool.submit(fuzz, name, wanted.seconds) for name in wanted.targets or known]
        for future in todo:
            outcome = future.result()
            print(outcome, flush=True)
            if outcome.finding:
                found += 1
                print(outcome.finding, flush=True)
    if found:
        print(f"{found} targets have findings: their inputs are in {DIRECTORY / 'crashes'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
