"""The lab: throw-away containers with a real systemd, and origins that write down what reaches them.

From a shell, as root: `/usr/bin/python3 -m tests.lab.harness --help`.
From Python: see `tests.lab.harness.container`.
"""

from tests.lab.harness.container import (
    Container,
    LabError,
    Origins,
    Result,
    destroy,
    eventually,
    sweep,
)

__all__ = ["Container", "LabError", "Origins", "Result", "destroy", "eventually", "sweep"]
