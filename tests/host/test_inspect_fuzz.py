"""Whole inspected connections with hostile bytes, by their fuzz target, and what one message may cost."""

from __future__ import annotations

import subprocess
import sys

from tests.host.inspect_world import engine
from tests.host.redirect_lab import REPOSITORY


def run(*module: str) -> str:
    engine()
    done = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_origins_get_nothing_but_requests_that_were_allowed_whatever_the_bytes_are() -> None:
    assert "no finding" in run("tests.fuzz.replay", "inspected")


def test_a_websocket_message_costs_by_its_length_and_has_an_end() -> None:
    assert "bounded" in run("tests.host.inspect_bounds")
