"""Connections that a person is asked about: held with nothing resolved, then on, refused or dropped."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

import pytest

from aa.proxy.placeholder import NETWORK
from tests.host.front_world import (
    PEER4,
    RUN,
    World,
    decision,
    observed,
    world,
)
from tests.host.redirect_lab import run_json, wait_for

WAITING = 3
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with world(f"[proxy]\nmax_waiting_per_run = {WAITING}\n") as made:
        yield made


@pytest.fixture
def w(shared: World) -> World:
    shared.fresh()
    assert wait_for(lambda: shared.gateway.waiting == 0, 10)
    return shared


@pytest.fixture
def name(w: World) -> str:
    """A name that a person is asked about; a new one each time, for answers are kept a while."""
    made = f"n{next(NUMBERS)}.far.test"
    w.peer.zone = {(made, "A"): [PEER4]}
    w.gateway.rules[made] = asks(w)
    return made


def asks(w: World, approval: str = "ap1") -> Any:
    """A rule that asks, until the connection has its approval."""

    def answer(action: Mapping[str, Any]) -> Any:
        last = w.gateway.asked[-1]
        if last["approval"] == approval:
            return decision(approval=approval)
        if action["kind"] == "dns.query" or not last["final"]:
            return decision("ask")
        return decision("ask", approval=approval)

    return answer


def held(w: World, count: int = 1) -> None:
    assert wait_for(lambda: len(w.gateway.waits) >= count, 10)


def done(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=40)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("arguments", "reached"),
    [
        (["http://{}/"], "http"),
        (["https://{}/"], "sni"),
        (["-x", "http://127.0.0.1:8899", "http://{}/"], "http"),
        (["-p", "-x", "http://127.0.0.1:8899", "https://{}/"], "sni"),
    ],
    ids=["http", "tls", "explicit", "connect"],
)
def test_is_held_with_nothing_resolved_and_goes_on_once_a_person_says_so(
    w: World, name: str, arguments: list[str], reached: str
) -> None:
    client = w.start_curl(*(a.format(name) for a in arguments))
    held(w)
    assert w.peer.queries == [] and w.peer.seen == []
    assert client.poll() is None
    assert [(p["run"], p["approval"]) for p in w.gateway.waits] == [(RUN, "ap1")]
    w.gateway.answers["ap1"] = decision(approval="ap1")
    assert done(client)[:2] == (0, "the origin says hello\n")
    assert (name, "A") in w.peer.queries
    assert w.peer.reached(reached)
    last = w.gateway.connects(final=True)[-1]
    assert last["approval"] == "ap1" and last["action"]["attributes"]["addresses"] == [PEER4]
    assert len(w.gateway.waits) == 1


def test_other_connections_of_the_run_do_not_wait_for_it(w: World, name: str) -> None:
    w.gateway.rules["allowed.test"] = decision()
    client = w.start_curl(f"https://{name}/")
    held(w)
    assert w.curl("https://allowed.test/").returncode == 0
    client.kill()
    client.wait()


def test_a_denial_is_told_with_its_reason(w: World, name: str) -> None:
    web, tls = w.start_curl(f"http://{name}/"), w.start_curl(f"https://{name}/")
    held(w, 2)
    w.gateway.answers["ap1"] = decision("deny", reason="denied by alice: not today")
    code, out, _ = done(web)
    assert code == 0 and "denied by alice: not today" in out and "aasm why" in out
    assert "alert access denied" in done(tls)[2]
    assert w.peer.queries == [] and w.peer.seen == []


def test_a_policy_that_denies_the_address_by_then_wins(w: World, name: str) -> None:
    def until_addresses(action: Mapping[str, Any]) -> Any:
        if "addresses" in (action.get("attributes") or {}):
            return decision("deny", reason="a guarded address")
        return asks(w)(action)

    w.gateway.rules[name] = until_addresses
    client = w.start_curl(f"http://{name}/")
    held(w)
    w.gateway.answers["ap1"] = decision(approval="ap1")
    assert "a guarded address" in done(client)[1]
    assert w.peer.seen == []


def test_one_whose_client_left_is_dropped_and_nothing_is_sent(w: World, name: str) -> None:
    client = w.start_curl(f"http://{name}/")
    held(w)
    client.kill()
    client.wait()
    assert wait_for(lambda: w.gateway.waiting == 0, 15)
    w.gateway.answers["ap1"] = decision(approval="ap1")
    assert w.curl(f"http://{name}/").stdout == "the origin says hello\n"
    assert [s for s, _ in w.peer.seen].count("http") == 1


def test_more_than_the_limit_of_a_run_are_refused(w: World, name: str) -> None:
    clients = [w.start_curl(f"http://{name}/") for _ in range(WAITING)]
    held(w, WAITING)
    refused = w.curl(f"http://{name}/")
    assert "max_waiting_per_run" in refused.stdout
    for client in clients:
        client.kill()
        client.wait()


def test_a_placeholder_is_for_its_run_and_its_name_alone(w: World, name: str) -> None:
    script = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"
    address = w.python(script, name).strip()
    assert ip_address(address) in NETWORK
    assert w.python(script, name).strip() == address
    other = w.start_curl("--resolve", f"elsewhere.test:443:{address}", "https://elsewhere.test/")
    assert "alert access denied" in done(other)[2]
    (told,) = w.gateway.reported("refusal")
    assert told["rule"] == "<name-mismatch>"
    w.gateway.set_run(run_json(w.lab, "front2", state="running"))
    stranger = w.start_curl(f"http://{address}/", run="front2")
    assert "denied this connection" in done(stranger)[1]
    assert w.gateway.connects()[-1]["action"]["target"] == f"{address}:80"
    assert w.peer.seen == [] and w.peer.queries == []


@pytest.mark.parametrize("kind", ["AAAA", "TXT", "HTTPS"])
def test_other_questions_about_such_a_name_have_no_data_and_leave_nothing(
    w: World, name: str, kind: str
) -> None:
    script = (
        "import dns.message, dns.query, json, sys\n"
        "q = dns.message.make_query(sys.argv[1], sys.argv[2], use_edns=0)\n"
        f"a = dns.query.udp(q, '{PEER4}', timeout=7)\n"
        "print(json.dumps([a.rcode(), len(a.answer), [o.text for o in a.options]]))\n"
    )
    code, records, told = json.loads(w.python(script, name, kind))
    assert (code, records) == (0, 0) and "when it is connected to" in told[0]
    assert w.peer.queries == []


def test_where_nothing_names_the_host_the_placeholder_does(w: World, name: str) -> None:
    script = (
        "import socket, sys\n"
        "s = socket.create_connection((sys.argv[1], 22), 20)\n"
        "s.sendall(b'EHLO\\r\\n')\n"
        "print(s.recv(100).decode(), end='')\n"
    )
    client = w.lab.start_governed(RUN, "/usr/bin/python3", "-c", script, name)
    held(w)
    asked = w.gateway.connects(final=True)[0]["action"]
    assert (asked["target"], asked["attributes"]["protocol"]) == (f"{name}:22", "opaque")
    assert w.peer.queries == []
    w.gateway.answers["ap1"] = decision(approval="ap1")
    assert done(client)[1].startswith("220 speak")


def test_in_observe_mode_nothing_is_held(w: World, name: str) -> None:
    w.gateway.rules[name] = observed("ask")
    assert w.curl(f"http://{name}/").stdout == "the origin says hello\n"
    assert w.gateway.waits == []
    script = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"
    assert w.python(script, name).strip() == PEER4


def test_a_placeholder_from_before_the_run_was_only_observed_is_not_dialled(
    w: World, name: str
) -> None:
    script = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"
    address = w.python(script, name).strip()
    w.gateway.rules[name] = observed("ask")
    done_ = w.curl("--resolve", f"{name}:80:{address}", f"http://{name}/")
    assert done_.stdout == "the origin says hello\n"
    assert [r["attributes"]["upstream"] for r in w.gateway.reported("observed")] == [PEER4]
