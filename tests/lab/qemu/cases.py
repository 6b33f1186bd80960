"""Runs test files in a guest of a suite, and reads what came of each case.

From a shell, as root: `/usr/bin/python3 -m tests.lab.qemu.cases SUITE [FILE...]`; a file is one of `inside/`,
or any module of tests for a container, which then finds the guest in its place.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.harness import LabError
from tests.lab.harness.__main__ import newest_debs
from tests.lab.harness.container import REPOSITORY
from tests.lab.qemu.guest import GUEST_TIMEOUT, Report, boot
from tests.lab.qemu.image import ENGINES, image

FILES = ("case_debian", "case_package", "case_chain", "case_faults", "case_purge")
"""In this order: the package comes with the second and is gone with the last."""

CASE_TIMEOUT = 600  # seconds for one case in the guest
BOOT_MARGIN = 300.0  # seconds of the guest's time for starting, and for bringing the results home

PROGRAM = """\
#!/bin/sh
cd tree || exit 125
export LAB_SUITE={suite} LAB_RESULTS=/var/lib/lab/out/results.jsonl PYTHONDONTWRITEBYTECODE=1
timeout --kill-after=20 {seconds} python3 -m pytest -p tests.lab.qemu.plugin --verbose --color=no --tb=short \\
    -o timeout={case_timeout} -o timeout_method=signal -o 'python_files=case_*.py test_*.py' {files}
code=$?
systemctl status --no-pager --lines=5 'aa*' > ../out/status.txt 2>&1
cp /var/log/agent-assembly/audit.jsonl ../out/ 2> /dev/null
cp /run/aa-lab/aa-lab-guest/origins/seen.jsonl ../out/
exit $code
"""


@dataclass(frozen=True)
class Case:
    """One case and what came of it; `outcome` is `passed` or says where it went wrong."""

    file: str
    name: str
    outcome: str
    seconds: float
    said: str


@dataclass(frozen=True)
class Outcome:
    """Everything that one guest was made for."""

    suite: str
    kernel: str
    systemd: str
    python: str
    cases: tuple[Case, ...]
    report: Report

    def of(self, file: str) -> list[Case]:
        return [case for case in self.cases if case.file == file]


def inside(file: str) -> str:
    return f"tests/lab/qemu/inside/{file}.py"


def run_cases(
    suite: str,
    files: Sequence[str],
    out: Path,
    *,
    timeout: float = GUEST_TIMEOUT,
    follow: bool = False,
) -> Outcome:
    """Boots a guest with this tree's tests and packages in it; `files` are paths in the tree.

    Raises `LabError` when the guest does not come back; a case that fails is in the outcome.
    """
    program = PROGRAM.format(
        suite=suite,
        seconds=int(timeout - BOOT_MARGIN),
        case_timeout=CASE_TIMEOUT,
        files=" ".join(files),
    )
    tree = {f"tree/{name}": REPOSITORY / name for name in ("tests", "pyproject.toml")}
    packages = {f"tree/dist/{path.name}": path for path in newest_debs(engine=ENGINES[suite])}
    report = boot(image(suite), program, {**tree, **packages}, out, timeout=timeout, follow=follow)
    rows = [json.loads(line) for line in _results(report)]
    cases = tuple(_case(row) for row in rows if "case" in row)
    facts = next(row for row in rows if "kernel" in row)
    return Outcome(suite, facts["kernel"], facts["systemd"], facts["python"], cases, report)


def _results(report: Report) -> list[str]:
    try:
        return (report.out / "results.jsonl").read_text().splitlines()
    except OSError:
        raise LabError(f"no test ran in the guest:\n{report.tail()}") from None


def _case(row: dict[str, object]) -> Case:
    path, _, test = str(row["case"]).partition("::")
    name = test.removeprefix("test_").replace("_", " ").replace("[", " (").replace("]", ")")
    return Case(
        Path(path).stem, name, str(row["outcome"]), float(str(row["seconds"])), str(row["said"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.lab.qemu.cases", description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("files", nargs="*", default=[inside(file) for file in FILES])
    parser.add_argument("--timeout", type=float, default=GUEST_TIMEOUT)
    chosen = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix=f"aa-lab-{chosen.suite}-"))
    outcome = run_cases(chosen.suite, chosen.files, out, timeout=chosen.timeout, follow=True)
    passed = [case for case in outcome.cases if case.outcome == "passed"]
    print(f"{len(passed)} of {len(outcome.cases)} passed; what the guest left: {out}")
    return outcome.report.code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as problem:
        sys.exit(f"lab: {problem}")
