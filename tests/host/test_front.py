"""The front with real sockets behind a real redirect: what passes, what is refused, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.host.front_world import PEER4, PEER6, RUN, World, decision, inspected, observed, timed, world


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def w(shared: World) -> World:
    shared.gateway.forget()
    shared.peer.seen.clear()
    shared.peer.queries.clear()
    return shared


def test_passes_an_allowed_https_request_with_the_origins_own_certificate(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("https://allowed.test/")
    assert (done.returncode, done.stdout) == (0, "the origin says hello\n"), done.stderr
    assert w.peer.reached("sni") == ["allowed.test"]


def test_denies_a_host_with_a_tls_alert_and_never_dials_it(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done, seconds = timed(lambda: w.curl("https://denied.test/"))
    assert done.returncode == 35
    assert "alert access denied" in done.stderr
    assert seconds < 1
    assert w.peer.seen == [] and w.peer.queries == []
