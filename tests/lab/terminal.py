"""Plays a person at a terminal: `terminal.py STEPS COMMAND...` runs a command on a pty and follows steps.

STEPS is a JSON list: {"expect": TEXT} waits for output, {"send": TEXT} types, {"resize": [ROWS, COLUMNS]},
{"signal": N} to the command, {"hangup": true} closes the terminal. Prints as JSON what was shown,
how the command ended, and whether the terminal was left as it was found. Runs inside a lab.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from typing import Any

STEP_SECONDS = 15.0
ROWS, COLUMNS = 33, 77


class Person:
    def __init__(self, argv: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            time.sleep(0.1)  # until the size is set
            os.execvp(argv[0], argv)
        self.resize(ROWS, COLUMNS)
        self.settings = termios.tcgetattr(self.fd)
        self.shown = ""
        self.looked = 0

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def read(self, seconds: float) -> bool:
        """False at the end of output."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def expect(self, text: str) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        while (found := self.shown.find(text, self.looked)) < 0:
            if time.monotonic() > deadline or not self.read(0.1):
                raise TimeoutError(f"{text!r} was not shown")
        self.looked = found + len(text)

    def take(self, step: dict[str, Any]) -> None:
        if "expect" in step:
            self.expect(step["expect"])
        elif "send" in step:
            os.write(self.fd, step["send"].encode())
        elif "resize" in step:
            self.resize(*step["resize"])
        elif "signal" in step:
            os.kill(self.pid, step["signal"])
        elif "sleep" in step:
            time.sleep(step["sleep"])
        elif "hangup" in step:
            os.close(self.fd)
            self.fd = -1

    def end(self) -> tuple[int, bool]:
        """The exit status, and whether the terminal's settings are those of the start."""
        deadline = time.monotonic() + STEP_SECONDS
        restored = False
        while time.monotonic() < deadline:
            if self.fd >= 0:
                self.read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                if self.fd >= 0:
                    restored = termios.tcgetattr(self.fd) == self.settings
                    while select.select([self.fd], [], [], 0.1)[0] and self.read(0):
                        pass
                return os.waitstatus_to_exitcode(status), restored
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        return -1000, False


def main(steps: list[dict[str, Any]], argv: list[str]) -> None:
    person = Person(argv)
    problem = ""
    try:
        for step in steps:
            person.take(step)
    except (TimeoutError, OSError) as e:
        problem = str(e)
    code, restored = person.end()
    print(
        json.dumps({"shown": person.shown, "code": code, "restored": restored, "problem": problem})
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
