"""A capability that was given up is gone from every set, also for threads that begin later."""

from __future__ import annotations

import subprocess
import sys

from aa.ebpf import capability

PROGRAM = """
import threading
from aa.ebpf import capability
def sets():
    lines = open("/proc/thread-self/status").read().splitlines()
    wanted = ("CapEff", "CapPrm", "CapInh")
    return [int(l.split()[1], 16) >> capability.SYS_ADMIN & 1 for l in lines if l.startswith(wanted)]
capability.give_up(capability.SYS_ADMIN)
capability.give_up(capability.SYS_ADMIN)
found = [sets()]
thread = threading.Thread(target=lambda: found.append(sets()))
thread.start(); thread.join()
print(found)
"""


def test_a_capability_that_was_given_up_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "[[0, 0, 0], [0, 0, 0]]", done.stderr


def test_the_number_is_the_kernels() -> None:
    with open("/usr/include/linux/capability.h") as header:
        assert f"#define CAP_SYS_ADMIN        {capability.SYS_ADMIN}\n" in header.read()
