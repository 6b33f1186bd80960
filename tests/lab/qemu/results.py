"""The table of what was measured on Debian's own kernels: docs/lab-results.md, written by the run itself."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from tests.lab.harness.container import REPOSITORY
from tests.lab.qemu.cases import Outcome

FILE = REPOSITORY / "docs" / "lab-results.md"

HEAD = """\
# What was seen to work on Debian's own kernels

Written by `make lab-full` on {day}; do not edit. Each suite is a guest of its own under QEMU with
the kernel, the systemd and the packages of that suite, made by debootstrap; the package under test
was installed in it with apt. The cases are in `tests/lab/qemu/inside/`.

The seconds are those of an emulated machine with every deadline of the services set wider. They say
how long a case takes there, and nothing about how fast the software is.

"""


def table(outcomes: Sequence[Outcome], *, day: datetime.date) -> str:
    """The whole page."""
    lines = [
        "| suite | kernel | systemd | Python | passed | of |",
        "|---|---|---|---|---:|---:|",
    ]
    for o in outcomes:
        passed = sum(case.outcome == "passed" for case in o.cases)
        lines.append(
            f"| {o.suite} | {o.kernel} | {o.systemd} | {o.python} | {passed} | {len(o.cases)} |"
        )
    lines += [
        "",
        "| suite | kernel | systemd | case | result | seconds |",
        "|---|---|---|---|---|---:|",
    ]
    for o in outcomes:
        lines += [
            f"| {o.suite} | {o.kernel} | {o.systemd} | {case.file.removeprefix('case_')}: "
            f"{case.name.replace('|', '&#124;')} | {case.outcome} | {case.seconds:.0f} |"
            for case in o.cases
        ]
    return HEAD.format(day=day.isoformat()) + "\n".join(lines) + "\n"


def write(outcomes: Sequence[Outcome]) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    FILE.write_text(table(outcomes, day=today))
