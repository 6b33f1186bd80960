"""What the cases in a guest share: one machine, and one installation of the package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.guarded import guard
from tests.lab.harness import Container
from tests.lab.harness.__main__ import newest_debs


@pytest.fixture(scope="session")
def machine() -> Iterator[Container]:
    """This machine with origins beside it."""
    with Container() as box:
        yield box


@pytest.fixture(scope="session")
def installed(machine: Container) -> Container:
    """With the package installed and nothing of it started by hand."""
    machine.install_deb(*newest_debs())
    return machine


@pytest.fixture(scope="session")
def guarded(installed: Container) -> Container:
    """With the lab's policy chosen and everything started."""
    guard(installed)
    return installed
