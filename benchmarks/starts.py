"""Times how long a command takes to begin and end: starts.py COUNT CMD..., one JSON line in milliseconds."""

import json
import subprocess
import sys
import time


def main(count: int, command: list[str]) -> None:
    times = []
    for _ in range(count + 1):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)
        times.append(1000 * (time.perf_counter() - begun))
    # The first is warm-up.
    print(json.dumps(times[1:]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
