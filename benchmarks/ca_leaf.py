"""What a leaf costs the proxy: made for a new host, and given again for a known one.

    python3 -m benchmarks.ca_leaf

Processor time, medians of several rounds, on this machine and with this machine's python3-cryptography.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from aa.ca import authority, files
from aa.ca.inspected import Inspected, parse
from aa.ca.leaf import MAX_LEAVES, LeafIssuer, utc_now
from aa.ca.places import Places

ROUNDS = 5
LEAVES = 500  # of one round
LIMITED = parse("".join(f"h{n}.example\n" for n in range(256)))
UNLIMITED = parse("**\n")


def make(places: Places, inspected: Inspected) -> None:
    authority.make_directories(places, -1)
    with files.locked(places.root):
        authority.ensure_root(places, host="bench", now=utc_now())
        authority.renew(places, inspected=inspected, host="bench", gid=-1, now=utc_now())


def microseconds(issuer: LeafIssuer, hosts: Iterator[str], count: int) -> float:
    """Processor time of one leaf: the median of the rounds' means."""
    rounds = []
    for _ in range(ROUNDS):
        wanted = list(itertools.islice(hosts, count))
        begin = time.process_time()
        for host in wanted:
            issuer.issue(host)
        rounds.append((time.process_time() - begin) / count * 1e6)
    return statistics.median(rounds)


def measure(directory: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, inspected in (("unlimited", UNLIMITED), ("256 names", LIMITED)):
        places = Places(directory / name / "ca", directory / name / "proxy-ca")
        (directory / name).mkdir(mode=0o755)
        make(places, inspected)
        issuer = LeafIssuer(places.proxy)
        new = (f"a{n}.h1.example" for n in itertools.count())
        found[f"new leaf, {name}, us"] = microseconds(issuer, new, LEAVES)
        known = itertools.repeat("h1.example")
        found[f"known leaf, {name}, us"] = microseconds(issuer, known, LEAVES * 20)
        found[f"chain of one leaf, {name}, bytes"] = len(issuer.issue("h1.example").chain_pem)
        found[f"leaves kept, {name}"] = len(issuer)
        assert len(issuer) <= MAX_LEAVES
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        for name, value in measure(Path(directory)).items():
            line = {"name": name, "value": round(value, 1), "cryptography": version("cryptography")}
            print(json.dumps(line))


if __name__ == "__main__":
    main()
