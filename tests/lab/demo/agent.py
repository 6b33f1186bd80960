"""The sample agent: makes the attempts in the file it is given and says what it saw of each.

agent.py ATTEMPTS.json prints one JSON line for each attempt. It is an ordinary program of an
ordinary user: it knows nothing of who watches it.
"""

import json
import subprocess
import sys
import time

SECONDS = 12.0  # for one attempt
PAUSE = 0.1  # seconds between two, so that their records can be told apart by time


def attempt(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {SECONDS:.0f} s"
    except OSError as problem:
        return 127, str(problem)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode, said[-1].strip() if said else ""


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        attempts = json.load(file)
    for number, command in enumerate(attempts):
        begun = time.time()
        code, said = attempt(command)
        ended = time.time()
        print(
            json.dumps(
                {"number": number, "code": code, "said": said, "begun": begun, "ended": ended}
            ),
            flush=True,
        )
        time.sleep(PAUSE)


if __name__ == "__main__":
    main(sys.argv[1])
