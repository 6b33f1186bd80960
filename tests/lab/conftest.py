"""The containers that lab tests share. A test leaves the container as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.harness import Container
from tests.lab.harness.__main__ import newest_debs


@pytest.fixture(scope="session")
def installed() -> Iterator[Container]:
    """A container with the package installed and nothing of it configured or started by hand."""
    with Container() as box:
        box.install_deb(*newest_debs())
        yield box
