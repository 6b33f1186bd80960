"""What guarding costs, measured in a container where the package is installed and the proxy runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.harness import Container, names

HERE = Path(__file__).resolve().parent
INSIDE = "/usr/local/lib/lab"

CONNECTIONS = 30  # of one round
ROUNDS = 2  # governed and direct take turns
STARTS = 10
TIMEOUT = 120.0  # seconds for one round

DAEMONS = ("aa-gateway", "aa-launch", "aa-proxy", "aa-redirect", "aa-ebpf")


@dataclass(frozen=True, slots=True)
class Measure:
    """One number for people: what it is, its value with the unit, and how it came about."""

    name: str
    value: str
    how: str


def prepare(box: Container) -> None:
    """Puts the programs that measure into the container."""
    for program in ("new_connections.py", "starts.py"):
        box.push_file(HERE / program, f"{INSIDE}/{program}")


def connections(box: Container, *, agent: str, host: str = names.API) -> Iterator[Measure]:
    """A new HTTPS connection: governed against direct, medians of the same minutes."""
    measured: dict[bool, dict[str, list[float]]] = {
        governed: {"lookups": [], "connections": []} for governed in (True, False)
    }
    program = ["/usr/bin/python3", "-I", f"{INSIDE}/new_connections.py", host, str(CONNECTIONS)]
    for _ in range(ROUNDS):
        for governed in (True, False):
            prefix = ["aasm", "run", "--agent", agent, "--"] if governed else []
            user = "dev" if governed else "plain"
            done = box.run(
                [*prefix, *program], user=user, cwd=f"/home/{user}", timeout=TIMEOUT
            ).check()
            for what, times in json.loads(done.out).items():
                measured[governed][what] += times
    for what, title in (("connections", "new HTTPS connection"), ("lookups", "name lookup")):
        through, direct = (
            statistics.median(measured[governed][what]) for governed in (True, False)
        )
        yield Measure(
            f"{title}, added",
            f"{through - direct:+.2f} ms",
            f"{through:.2f} ms governed, {direct:.2f} ms direct; medians of {CONNECTIONS * ROUNDS}",
        )


def memory(box: Container) -> Iterator[Measure]:
    """Resident memory of each daemon's main process, and of the proxy's inspection workers.

    PSS counts shared pages by share.
    """
    for daemon in DAEMONS:
        pid = box.show(f"{daemon}.service", "MainPID")["MainPID"]
        if pid == "0":
            yield Measure(f"memory of {daemon}", "not running", "")
            continue
        yield _memory_of(box, pid, daemon)
        if daemon == "aa-proxy":
            workers = box.raw(["cat", f"/proc/{pid}/task/{pid}/children"]).check().out.split()
            for worker in workers:
                yield _memory_of(box, worker, "an inspection worker")


def _memory_of(box: Container, pid: str, name: str) -> Measure:
    sizes = _fields(box.raw(["cat", f"/proc/{pid}/smaps_rollup"]).check().out)
    return Measure(
        f"memory of {name}", f"{sizes['Rss'] / 1024:.1f} MiB", f"PSS {sizes['Pss'] / 1024:.1f} MiB"
    )


def starts(box: Container, *, agent: str) -> Iterator[Measure]:
    """`aasm run -- true` against `systemd-run --wait --pipe true`."""
    timer = ["/usr/bin/python3", "-I", f"{INSIDE}/starts.py", str(STARTS)]
    systemd = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe", "--uid=dev", "true"]
    governed = ["aasm", "run", "--agent", agent, "--", "true"]
    medians = {}
    for command, user in ((systemd, "root"), (governed, "dev")):
        done = box.run([*timer, *command], user=user, cwd="/home/dev", timeout=TIMEOUT).check()
        medians[command[0]] = statistics.median(json.loads(done.out))
    yield Measure(
        "aasm run -- true",
        f"{medians['aasm']:.0f} ms",
        f"systemd-run --wait --pipe true: {medians['systemd-run']:.0f} ms; medians of {STARTS}",
    )


def _fields(text: str) -> dict[str, int]:
    """The kB numbers of a file like smaps_rollup."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}
