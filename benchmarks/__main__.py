"""`make bench`: the measures of the demo, of the policy engine and of the gateway, as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import subprocess

from benchmarks import engine, gateway_socket, measures
from tests.lab.demo.run import AGENT, configure, start
from tests.lab.harness import Container
from tests.lab.harness.__main__ import newest_debs


def main() -> None:
    subprocess.run([engine.OTHERS, "-m", "benchmarks.engine"], check=True)
    for found in gateway_socket.measure():
        print(json.dumps(dataclasses.asdict(found)), flush=True)
    with Container("bench") as box:
        box.install_deb(*newest_debs())
        configure(box)
        start(box)
        measures.prepare(box)
        for several in (
            measures.connections(box, agent=AGENT),
            measures.memory(box),
            measures.starts(box, agent=AGENT),
        ):
            for measure in several:
                print(json.dumps(dataclasses.asdict(measure)), flush=True)


if __name__ == "__main__":
    main()
