"""The front when things go wrong: no gateway, a slow one, limits, silence, kills. Denied, in time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.host.front_world import PEER4, RUN, World, decision, timed, world
from tests.host.redirect_lab import run_json, wait_for
from tests.host.test_front import talk

CONFIG = """
[proxy]
decide_seconds = 1.0
peek_seconds = 1.0
connect_seconds = 1.0
idle_seconds = 1.5
max_connections = 24
max_connections_per_run = 8
explicit_users = ["games"]
"""
CONFIG_FILE = "/etc/agent-assembly/agent-assembly.toml"
GAMES_UID = 5


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with world(CONFIG) as made:
        yield made


@pytest.fixture
def w(shared: World) -> World:
    shared.fresh()
    return shared


def https(w: World) -> str:
    done = w.curl("https://allowed.test/")
    return done.stdout if done.returncode == 0 else done.stderr


# -- the gateway


def test_denies_while_nobody_listens_and_works_again_when_somebody_does(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    w.gateway.stop()
    try:
        done, seconds = timed(lambda: w.curl("-i", "http://allowed.test/"))
    finally:
        w.gateway.start()
    assert "403 Forbidden" in done.stdout and "gateway" in done.stdout
    assert seconds < 1 and w.peer.seen == []
    assert "hello" in https(w)
    refused = w.gateway.reported("refusal")
    assert refused[0]["rule"] == "<gateway-unreachable>" and refused[0]["run"] == RUN


def test_a_gateway_that_restarted_is_asked_again(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    assert "hello" in https(w)
    w.gateway.stop()
    w.gateway.start()
    assert "hello" in https(w)


def test_a_gateway_that_is_too_slow_is_a_denial_at_the_deadline(w: World) -> None:
    async def slow(_: Any) -> Any:
        await asyncio.sleep(3)
        return decision()

    w.gateway.rules["allowed.test"] = lambda _: slow(_)
    done, seconds = timed(lambda: w.curl("-i", "http://allowed.test/"))
    assert "403 Forbidden" in done.stdout and "within 1 s" in done.stdout
    assert 1 <= seconds < 2 and w.peer.seen == []
    w.gateway.rules["allowed.test"] = decision()
    assert "hello" in https(w)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"effect": "allow"},
        {**decision().as_json(), "effect": "permit"},
        {**decision().as_json(), "mode": "off"},
        {**decision().as_json(), "obligations": "none"},
        [],
        None,
    ],
)
def test_an_answer_that_is_no_decision_is_a_denial(w: World, answer: Any) -> None:
    w.gateway.rules["allowed.test"] = lambda _: answer
    done = w.curl("-i", "http://allowed.test/")
    assert "403 Forbidden" in done.stdout and "no usable answer" in done.stdout
    assert w.peer.seen == []


def test_an_error_of_the_gateway_is_a_denial(w: World) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("the test says so")

    w.gateway.rules["allowed.test"] = fail
    assert "403 Forbidden" in w.curl("-i", "http://allowed.test/").stdout
    assert w.peer.seen == []


def test_an_ask_is_not_an_allow(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision("ask")
    assert "403 Forbidden" in w.curl("-i", "http://allowed.test/").stdout
    assert w.peer.seen == []


# -- silence and slowness


def test_half_a_hello_is_refused_at_the_deadline(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    told = talk(w, PEER4, 443, "\\x16\\x03\\x01\\x02\\x00\\x01", "wait")
    assert told["out"] == "\x15\x03\x03\0\x02\x02\x31"
    assert 0.9 < float(told["seconds"]) < 3 and w.peer.seen == []


def test_half_a_request_is_refused_at_the_deadline_in_words(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    told = talk(w, PEER4, 80, "GET / HTTP/1.1\\r\\nHost: allo", "wait")
    assert told["out"].startswith("HTTP/1.1 403 Forbidden\r\n") and "not complete" in told["out"]
    assert w.peer.seen == []


def test_a_silent_client_on_a_tls_port_is_decided_by_address(w: World) -> None:
    told = talk(w, PEER4, 443, "", "wait")
    assert told["error"] == "ConnectionResetError"
    assert w.gateway.connects()[0]["action"]["attributes"]["protocol"] == "opaque"


def test_an_upstream_that_does_not_answer_is_a_failure_at_the_deadline(w: World) -> None:
    w.lab.run("ip", "neigh", "replace", "10.77.0.99", "lladdr", "02:00:00:00:00:99", "dev", "ve-c")
    w.gateway.rules["10.77.0.99"] = decision()
    done, seconds = timed(lambda: w.curl("-i", "http://10.77.0.99/"))
    assert "504 Gateway Timeout" in done.stdout and "no answer from 10.77.0.99" in done.stdout
    assert 1 <= seconds < 2.5


def test_an_address_that_does_not_answer_holds_up_the_next_only_a_little(w: World) -> None:
    w.lab.run("ip", "neigh", "replace", "10.77.0.99", "lladdr", "02:00:00:00:00:99", "dev", "ve-c")
    hosts = w.lab.path("/etc/hosts").read_text()
    w.write("/etc/hosts", f"{hosts}10.77.0.99 half.test\n{PEER4} half.test\n")
    w.gateway.rules["half.test"] = decision()
    done, seconds = timed(lambda: w.curl("http://half.test/"))
    assert done.stdout == "the origin says hello\n" and 0.2 < seconds < 0.9
    assert w.gateway.reported("observed")[-1]["attributes"]["upstream"] == PEER4


def test_an_idle_connection_is_ended(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    told = talk(w, PEER4, 9, "x", "wait")
    assert told["error"] == "ConnectionResetError"
    outcome = next(r for r in w.gateway.reported("observed") if r["target"] == f"{PEER4}:9")
    assert outcome["reason"] == "idle" and outcome["attributes"]["seconds"] >= 1.5


# -- limits


HOLD = """
import socket, sys, time
count, ports = int(sys.argv[2]), [int(p) for p in sys.argv[3:]]
held = []
for i in range(count):
    s = socket.socket(); s.settimeout(3)
    try: s.connect((sys.argv[1], ports[i % len(ports)]))
    except ConnectionResetError: s.close()  # turned away before connect had returned
    held.append(s)
    time.sleep(0.01)
time.sleep(0.3)
ended = 0
for s in held:
    try:
        s.setblocking(False)
        s.recv(1); ended += 1
    except BlockingIOError: pass
    except OSError: ended += 1
time.sleep(0.3)
print(count - ended)
"""


def test_a_run_has_no_more_connections_than_its_limit(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    assert w.python(HOLD, PEER4, "12", "443") == "8\n"
    rules = [r["rule"] for r in w.gateway.reported("refusal")]
    assert set(rules) == {"<limit:max_connections_per_run>"}
    assert wait_for(lambda: sum(r["count"] for r in w.gateway.reported("refusal")) == 4)


def test_a_run_at_its_limit_leaves_others_room(w: World) -> None:
    w.gateway.set_run(run_json(w.lab, "second", state="running"))
    w.gateway.rules["allowed.test"] = decision()
    holding = w.lab.start_governed(RUN, "/usr/bin/python3", "-c", HOLD, PEER4, "12", "443")
    time.sleep(0.5)
    assert w.curl("https://allowed.test/", run="second").stdout == "the origin says hello\n"
    holding.wait(10)
    assert "hello" in https(w)


def test_over_the_total_connections_are_reset_and_counted(w: World) -> None:
    runs = [f"many{i}" for i in range(4)]
    for run in runs:
        w.gateway.set_run(run_json(w.lab, run, state="running"))
    holding = [
        w.lab.start_governed(run, "/usr/bin/python3", "-c", HOLD, PEER4, "8", "443") for run in runs
    ]
    for one in holding:
        one.wait(10)
    assert wait_for(lambda: any(r["rule"] == "<limit:max_connections>" for r in w.gateway.reports))
    w.gateway.rules["allowed.test"] = decision()
    assert "hello" in https(w)


@contextmanager
def reloaded(w: World, change: str) -> Iterator[None]:
    """[proxy] with one more line, by SIGHUP, and back."""
    for text in (CONFIG.replace("[proxy]\n", f"[proxy]\n{change}\n"), CONFIG):
        w.write(CONFIG_FILE, text)
        before = w.log.read_text().count("[proxy] is read again")
        w.kill_proxy(signal.SIGHUP)
        assert wait_for(lambda: w.log.read_text().count("[proxy] is read again") > before)
        if text is not CONFIG:
            yield


def test_a_user_has_no_more_connections_than_the_limit_that_was_reloaded(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    pid = w.proxy_pid
    with reloaded(w, "max_connections_per_user = 5"):
        assert w.python(HOLD, PEER4, "7", "443") == "5\n"
        rules = [r["rule"] for r in w.gateway.reported("refusal")]
        assert "<limit:max_connections_per_user>" in rules
    assert w.python(HOLD, PEER4, "7", "443") == "7\n"
    assert w.proxy_pid == pid


def test_a_configuration_that_is_wrong_changes_nothing(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    w.write(CONFIG_FILE, CONFIG + "\nmax_conections_per_user = 1\n")
    try:
        w.kill_proxy(signal.SIGHUP)
        assert wait_for(lambda: "configuration not changed" in w.log.read_text())
        assert w.python(HOLD, PEER4, "7", "443") == "7\n"
    finally:
        w.write(CONFIG_FILE, CONFIG)


# -- users outside a run


def test_a_user_whom_the_config_names_may_use_the_explicit_port(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    argv = ["curl", "-s", "--proxy", "http://127.0.0.1:8899", "http://allowed.test/"]
    as_games = ["setpriv", f"--reuid={GAMES_UID}", "--clear-groups"]
    assert w.lab.run(*as_games, *argv).stdout == "the origin says hello\n"
    assert w.gateway.asked[0]["run"] == "user/games"
    assert "no governed run" in w.lab.run(*argv).stdout


def test_inside_an_unknown_run_that_user_may_not(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    argv = ["curl", "-s", "--proxy", "http://127.0.0.1:8899", "http://allowed.test/"]
    told = w.lab.governed("stranger", *argv, uid=GAMES_UID).stdout
    assert "a run that is not known" in told and w.peer.seen == []


# -- the proxy's own end


def test_a_killed_proxy_lets_nothing_through_and_connections_wait_for_the_next(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    w.kill_proxy(signal.SIGKILL)
    curl = ["curl", "-s", "--max-time", "15", "--cacert", str(w.ca)]
    waiting = w.lab.start_governed(RUN, *curl, "https://allowed.test/")
    refused = w.lab.start_governed(RUN, *curl, "https://denied.test/")
    time.sleep(0.5)
    assert waiting.poll() is None and refused.poll() is None and w.peer.seen == []
    w.restart_proxy()
    assert waiting.communicate(timeout=10)[0] == "the origin says hello\n"
    assert refused.wait(10) == 35


def test_a_stopping_proxy_lets_a_busy_download_end(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    out = w.directory / "slow"
    url = "http://allowed.test/bytes/8000000"
    busy = w.lab.start_governed(RUN, "curl", "-s", "--limit-rate", "4M", "-o", str(out), url)
    assert wait_for(lambda: out.exists() and out.stat().st_size > 100_000)
    w.kill_proxy(signal.SIGTERM)
    try:
        assert busy.wait(10) == 0 and out.stat().st_size == 8_000_000
    finally:
        w.restart_proxy()
    assert "hello" in https(w)


def test_a_stopping_proxy_does_not_wait_for_an_idle_connection(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    script = f"import socket; s = socket.create_connection(('{PEER4}', 9)); s.send(b'x'); s.recv(1)"
    idle = w.lab.start_governed(RUN, "/usr/bin/python3", "-c", script)
    assert wait_for(lambda: w.peer.reached("keep"))
    time.sleep(0.6)
    began = time.monotonic()
    w.kill_proxy(signal.SIGTERM)
    idle.wait(10)
    assert time.monotonic() - began < 2
    w.restart_proxy()
    assert w.gateway.reported("observed")[-1]["reason"] == "the proxy stopped"


def test_no_descriptor_and_no_pipe_is_left_behind(w: World) -> None:
    w.gateway.rules.update({"allowed.test": decision(), PEER4: decision()})
    https(w)
    descriptors = Path(f"/proc/{w.proxy_pid}/fd")
    before = len(os.listdir(descriptors))
    for _ in range(5):
        https(w)
        w.curl("https://denied.test/")
        w.curl("http://allowed.test/bytes/300000", "-o", "/dev/null", "--max-time", "0.01")
        talk(w, PEER4, 7, "ping", "close")
    assert wait_for(lambda: len(os.listdir(descriptors)) <= before + 4, 4)


def test_every_line_that_is_logged_is_no_traceback(w: World) -> None:
    assert "Traceback" not in w.log.read_text(), json.dumps(w.log.read_text())
