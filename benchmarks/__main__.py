"""`make bench`: the measures of the demo and of the policy engine, as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import subprocess

from benchmarks import engine, measures
from tests.lab.demo.run import AGENT, configure, start
from tests.lab.harness import Container
from tests.lab.harness.__main__ import newest_debs


def main() -> None:
    subprocess.run([engine.OTHERS, "-m", "benchmarks.engine"], check=True)
    with Container("bench") as box:
        box.install_deb(*newest_debs())
        configure(box)
        start(box)
        measures.prepare(box)
        for found in (
            measures.connections(box, agent=AGENT),
            measures.memory(box),
            measures.starts(box, agent=AGENT),
        ):
            for measure in found:
                print(json.dumps(dataclasses.asdict(measure)), flush=True)


if __name__ == "__main__":
    main()
