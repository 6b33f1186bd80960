"""What is cheap to look at tells every change that matters, and none that does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.host.redirect_lab import PYTHON, REPOSITORY, Lab

WATCH = {
    "nft": """
from aa.redirect.changes import NfTables
watch = NfTables()
""",
    "legacy": """
from aa.redirect.changes import Legacy
from aa.redirect.ruleset import V4, V6
watch = Legacy((V4, V6))
""",
}
ASK = """
import sys
for _ in sys.stdin:
    print(hash(watch.watermark()), flush=True)
"""


class Watch:
    def __init__(self, lab: Lab) -> None:
        script = WATCH[lab.backend] + ASK
        self._process = lab.start(
            PYTHON, "-c", script, env={"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "0"}
        )

    def mark(self) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line
        return line


@pytest.fixture(params=["nft", "legacy"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(request.param) as one:
        yield one


SETUP = (
    ("-N", "AA-FILTER"),
    ("-A", "AA-FILTER", "-p", "udp", "-j", "DROP"),
    ("-A", "OUTPUT", "-j", "AA-FILTER"),
    ("-t", "nat", "-N", "AA-REDIRECT"),
    ("-t", "nat", "-A", "AA-REDIRECT", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "8898"),
    ("-t", "nat", "-A", "OUTPUT", "-j", "AA-REDIRECT"),
)
CHANGES = (
    ("-I", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"),
    ("-A", "INPUT", "-j", "ACCEPT"),
    ("-R", "AA-FILTER", "1", "-p", "udp", "-j", "ACCEPT"),
    ("-I", "AA-FILTER", "-p", "udp", "--dport", "53", "-j", "RETURN"),
    ("-t", "nat", "-R", "AA-REDIRECT", "1", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "8899"),
    ("-t", "nat", "-D", "OUTPUT", "-j", "AA-REDIRECT"),
    ("-D", "OUTPUT", "-j", "AA-FILTER"),
    ("-F", "AA-FILTER"),
    ("-X", "AA-FILTER"),
)


@pytest.mark.parametrize("tool", ["iptables", "ip6tables"])
def test_each_change_of_our_chains_and_before_them_is_noticed(lab: Lab, tool: str) -> None:
    for other in ("iptables", "ip6tables"):
        for rule in SETUP:
            lab.run(other, *rule)
    watch = Watch(lab)
    before = watch.mark()
    assert watch.mark() == before
    for change in CHANGES:
        lab.run(tool, *change)
        after = watch.mark()
        assert after != before, change
        before = after


def test_packets_that_are_counted_are_no_change(lab: Lab) -> None:
    for rule in SETUP:
        lab.run("iptables", *rule)
    watch = Watch(lab)
    before = watch.mark()
    lab.run("ping", "-c1", "-W1", "127.0.0.1")
    counted = lab.run("iptables", "-L", "OUTPUT", "-vn", "-x").stdout
    assert " 0 0 AA-FILTER" not in " ".join(counted.split())
    assert watch.mark() == before
