"""Programs in a run accept this host's authority once agent-assembly-inspect is installed, and only then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.clients import QUICK, Client
from tests.lab.harness import Container
from tests.lab.trusting import ask, prepare


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        prepare(container)
        yield container


@pytest.mark.parametrize("client", QUICK, ids=lambda c: c.name)
def test_a_program_in_a_run_accepts_an_inspected_host(box: Container, client: Client) -> None:
    done, asked = ask(box, client)
    assert done.ok and asked, done.out + done.err


def test_without_the_root_none_of_them_does(box: Container) -> None:
    box.run(["aasm", "proxy", "uninstall-ca"], timeout=120).check()
    try:
        accepted = [client.name for client in QUICK if ask(box, client)[1]]
    finally:
        box.run(["aasm", "proxy", "install-ca"], timeout=120).check()
    assert accepted == []
