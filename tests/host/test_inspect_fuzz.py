"""The fuzz target of whole inspected connections, without its engine: every seed and changes of each."""

from __future__ import annotations

import subprocess
import sys

from tests.host.inspect_world import engine
from tests.host.redirect_lab import REPOSITORY


def test_origins_get_nothing_but_requests_that_were_allowed_whatever_the_bytes_are() -> None:
    engine()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.replay", "inspected"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "no finding" in done.stdout
