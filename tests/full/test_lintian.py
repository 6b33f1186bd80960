"""Debian's own checker on the built packages."""

from __future__ import annotations

import subprocess

import pytest

from tests.lab.harness.__main__ import newest_debs


@pytest.mark.parametrize("engine", ["deb12", "deb13"])
@pytest.mark.timeout(300)
def test_lintian_finds_nothing_that_is_not_explained(engine: str) -> None:
    packages = list(map(str, newest_debs(engine=engine)))
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", *packages],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
