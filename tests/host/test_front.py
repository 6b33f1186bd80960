"""The front with real sockets behind a real redirect: what passes, what is refused, how it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.host.front_world import (
    PEER4,
    PEER6,
    RUN,
    World,
    decision,
    inspected,
    observed,
    timed,
    world,
)
from tests.host.redirect_lab import run_json, wait_for


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def w(shared: World) -> World:
    shared.fresh()
    return shared


TALK = """
import json, socket, sys, time
address, port, first, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
s.settimeout(6)
began = time.monotonic()
out = b""
try:
    s.connect((address, port))
    if "listen-first" in options:
        out += s.recv(100)
    data = first.encode("latin-1").decode("unicode_escape").encode("latin-1")
    s.sendall(data)
    if "close" in options:
        s.shutdown(socket.SHUT_WR)
    while "stay" not in options or len(out) < 9:
        part = s.recv(65536)
        if not part:
            break
        out += part
    error = ""
except OSError as e:
    error = type(e).__name__
print(json.dumps({"out": out.decode("latin-1"), "error": error, "seconds": time.monotonic() - began}))
"""
"""Connects, sends, and tells everything that came back and how it ended."""


def talk(w: World, address: str, port: int, first: str, *options: str) -> dict[str, str]:
    return dict(json.loads(w.python(TALK, address, str(port), first, *options)))


# -- TLS


def test_passes_an_allowed_https_request_with_the_origins_own_certificate(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("https://allowed.test/")
    assert (done.returncode, done.stdout) == (0, "the origin says hello\n"), done.stderr
    assert w.peer.reached("sni") == ["allowed.test"]


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_passes_both_families(w: World, family: str) -> None:
    w.gateway.rules["allowed.test"] = decision()
    assert w.curl(family, "https://allowed.test/").returncode == 0
    original = w.gateway.connects(final=True)[0]["action"]["attributes"]["original"]
    assert original == (PEER4 if family == "-4" else PEER6)


def test_denies_a_host_with_a_tls_alert_and_never_dials_it(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done, seconds = timed(lambda: w.curl("https://denied.test/"))
    assert done.returncode == 35
    assert "alert access denied" in done.stderr
    assert seconds < 1
    assert w.peer.seen == [] and w.peer.queries == []


def test_python_sees_the_alert_too(w: World) -> None:
    told = w.python(
        "import ssl, socket\n"
        "c = ssl.create_default_context()\n"
        f"s = socket.create_connection(('{PEER4}', 443), 5)\n"
        "try: c.wrap_socket(s, server_hostname='denied.test')\n"
        "except ssl.SSLError as e: print(e.reason)\n"
    )
    assert told == "TLSV1_ALERT_ACCESS_DENIED\n"


def test_decides_in_two_steps_with_every_address_in_the_second(w: World) -> None:
    w.gateway.rules["far.test"] = decision()
    w.peer.zone = {("far.test", "A"): [PEER4], ("far.test", "AAAA"): [PEER6]}
    w.curl("-k", "https://far.test/")
    first, second = w.gateway.connects()
    assert (first["final"], second["final"]) == (False, True)
    assert first["run"] == second["run"] == RUN
    assert first["action"]["target"] == second["action"]["target"] == "far.test:443"
    assert "addresses" not in first["action"]["attributes"]
    attributes = second["action"]["attributes"]
    assert sorted(attributes["addresses"]) == [PEER4, PEER6]
    assert (attributes["host"], attributes["port"]) == ("far.test", 443)
    assert (attributes["protocol"], attributes["uid"]) == ("tls", 0)


def test_a_name_that_is_known_here_is_decided_once_with_its_addresses(w: World) -> None:
    """Nobody would be asked for it, so the first step has nothing to keep back."""
    w.gateway.rules["allowed.test"] = decision()
    w.curl("https://allowed.test/")
    w.gateway.asked.clear()
    w.curl("https://allowed.test/")
    (only,) = w.gateway.connects()
    assert only["final"] and only["action"]["attributes"]["addresses"] == [PEER4, PEER6]


def test_a_denied_name_that_only_a_resolver_knows_is_never_resolved(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    w.curl("https://allowed.test/")
    w.curl("--resolve", f"elsewhere.test:443:{PEER4}", "https://elsewhere.test/")
    assert w.gateway.connects()[-1]["action"]["attributes"].get("addresses") is None
    assert w.peer.queries == []


def test_a_denied_address_of_an_allowed_name_denies(w: World) -> None:
    def by_step(action: dict[str, object]) -> object:
        attributes = action["attributes"]
        assert isinstance(attributes, dict)
        return decision("deny" if "addresses" in attributes else "allow")

    w.gateway.rules["allowed.test"] = by_step
    assert "alert access denied" in w.curl("https://allowed.test/").stderr
    assert w.peer.seen == []


def test_dials_its_own_resolution_and_not_the_address_the_client_picked(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("--resolve", "allowed.test:443:192.0.2.55", "https://allowed.test/")
    assert done.returncode == 0, done.stderr
    assert w.gateway.connects(final=True)[0]["action"]["attributes"]["original"] == "192.0.2.55"


def test_a_name_the_host_cannot_resolve_is_a_failure_and_no_connection(w: World) -> None:
    w.gateway.rules["nowhere.test"] = decision()
    done = w.curl("--resolve", f"nowhere.test:443:{PEER4}", "https://nowhere.test/")
    assert "alert internal error" in done.stderr
    assert w.peer.seen == []
    (told,) = w.gateway.reported("observed")
    assert "does not resolve" in told["reason"]


def test_a_connection_without_a_name_is_decided_by_its_address(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    done = w.curl("-k", f"https://{PEER4}/")
    assert (done.returncode, done.stdout) == (0, "the origin says hello\n"), done.stderr
    (asked,) = w.gateway.connects()
    assert asked["final"] and asked["action"]["target"] == f"{PEER4}:443"
    assert asked["action"]["attributes"]["addresses"] == [PEER4]
    assert "host" not in asked["action"]["attributes"]


def test_an_address_that_is_not_allowed_is_denied(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    assert "alert access denied" in w.curl("-k", f"https://[{PEER6}]/").stderr
    assert w.peer.seen == []


HELLO_TWO_NAMES = (
    "import socket\n"
    "def v(d, n): return len(d).to_bytes(n, 'big') + d\n"
    "names = v(b'\\0' + v(b'allowed.test', 2) + b'\\0' + v(b'denied.test', 2), 2)\n"
    "body = (b'\\3\\3' + bytes(32) + v(b'', 1) + v(b'\\x13\\1', 2) + v(b'\\0', 1)"
    " + v(b'\\0\\0' + v(names, 2), 2))\n"
    f"s = socket.create_connection(('{PEER4}', 443), 5)\n"
    "s.sendall(b'\\x16\\3\\1' + v(b'\\1' + v(body, 3), 2))\n"
    "print(s.recv(100).hex())\n"
)


def test_a_hello_with_two_names_is_denied_though_one_is_allowed(w: World) -> None:
    w.gateway.rules.update({"allowed.test": decision(), "denied.test": decision()})
    assert w.python(HELLO_TWO_NAMES) == "15030300020231\n"
    (refused,) = w.gateway.reported("refusal")
    assert refused["rule"] == "<malformed-tls>"
    assert refused["run"] == RUN and refused["effect"] == "deny"
    assert w.peer.seen == []


# -- plain HTTP


def test_passes_an_allowed_http_request(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("http://allowed.test/x?y=1", "-H", "X-Keep: this")
    assert done.stdout == "the origin says hello\n", done.stderr
    (head,) = w.peer.reached("http")
    assert head.startswith(b"GET /x?y=1 HTTP/1.1\r\nHost: allowed.test\r\n")
    assert b"\r\nx-keep: this\r\n" in head and b"\r\nConnection: close\r\n" in head


def test_a_denied_http_request_is_told_why_in_words(w: World) -> None:
    done, seconds = timed(lambda: w.curl("-i", "http://denied.test/"))
    assert done.stdout.startswith("HTTP/1.1 403 Forbidden\n")
    assert "Proxy-Status: aa-proxy; error=http_request_denied\n" in done.stdout
    for word in ("denied.test:80", "the test says deny", "test/deny", "rev-7", RUN, "aasm why"):
        assert word in done.stdout
    assert f"aasm policy explain net.connect denied.test:80 --run {RUN}" in done.stdout
    assert seconds < 1 and w.peer.seen == []


def test_a_denied_http_request_is_told_in_json_to_who_asks_for_it(w: World) -> None:
    done = w.curl("-H", "Accept: application/json", "http://denied.test/")
    told = json.loads(done.stdout)
    assert told["decision"] == "deny" and told["rule"] == "test/deny" and told["run"] == RUN


def test_a_denied_head_request_gets_no_body(w: World) -> None:
    done = w.curl("-I", "http://denied.test/")
    assert "403 Forbidden" in done.stdout and "aasm why" not in done.stdout


def test_an_upstream_that_refuses_is_a_502_with_words(w: World) -> None:
    w.gateway.rules["refusing.test"] = decision()
    done = w.curl("-i", "http://refusing.test:8888/")
    assert done.stdout.startswith("HTTP/1.1 502 Bad Gateway\n")
    assert "error=connection_refused" in done.stdout and "Connection refused" in done.stdout
    (told,) = w.gateway.reported("observed")
    assert told["attributes"]["error"] == "connection_refused"


def test_a_body_with_a_length_arrives_whole(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    body = w.directory / "body"
    body.write_bytes(b"0123456789" * 300_000)
    done = w.curl("--data-binary", f"@{body}", "http://allowed.test/")
    assert done.stdout == "the origin says hello\n", done.stderr
    assert w.peer.reached("body") == [body.read_bytes()]


def test_a_chunked_body_arrives_whole(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("-H", "Transfer-Encoding: chunked", "-d", "0123456789", "http://allowed.test/")
    assert done.stdout == "the origin says hello\n", done.stderr
    assert w.peer.reached("body") == [b"a\r\n0123456789\r\n0\r\n\r\n"]


def test_expect_100_continue_works(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("-i", "-H", "Expect: 100-continue", "-d", "abc", "http://allowed.test/")
    assert done.stdout.startswith("HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\n")
    assert w.peer.reached("body") == [b"abc"]


SMUGGLE = "GET /1 HTTP/1.1\\r\\nHost: allowed.test\\r\\n\\r\\n"


def test_a_second_request_on_a_decided_connection_is_not_forwarded(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    second = "GET /2 HTTP/1.1\\r\\nHost: denied.test\\r\\n\\r\\n"
    told = talk(w, PEER4, 80, SMUGGLE + second)
    assert told["out"].count("HTTP/1.1 200 OK") == 1
    assert len(w.peer.reached("http")) == 1 and w.peer.reached("behind") == []


def test_the_same_first_request_alone_works(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    assert "hello" in talk(w, PEER4, 80, SMUGGLE)["out"]


def test_a_second_request_after_the_first_answer_is_not_forwarded(w: World) -> None:
    """An origin that keeps the connection open, against Connection: close."""
    w.gateway.rules["allowed.test"] = decision()
    script = (
        "import socket\n"
        f"s = socket.create_connection(('{PEER4}', 80), 5)\n"
        "s.sendall(b'GET /keep HTTP/1.1\\r\\nHost: allowed.test\\r\\n\\r\\n')\n"
        "out = b''\n"
        "while b'hello' not in out: out += s.recv(1000)\n"
        "s.sendall(b'GET /2 HTTP/1.1\\r\\nHost: denied.test\\r\\n\\r\\n')\n"
        "s.settimeout(0.5)\n"
        "try: print(s.recv(100))\n"
        "except TimeoutError: print('nothing')\n"
    )
    assert w.python(script) == "nothing\n"
    assert len(w.peer.reached("http")) == 1


def test_half_a_body_never_looks_like_a_whole_request(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    half = "POST / HTTP/1.1\\r\\nHost: allowed.test\\r\\nContent-Length: 10\\r\\n\\r\\nabc"
    talk(w, PEER4, 80, half, "close")
    assert w.peer.reached("body") == []
    (told,) = w.gateway.reported("observed")
    assert told["reason"] == "client: closed inside its request"


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ("GET / HTTP/1.1\\r\\nHost: allowed.test\\r\\nHost: denied.test\\r\\n\\r\\n", "<malformed-http>"),
        ("GET http://allowed.test/ HTTP/1.1\\r\\nHost: denied.test\\r\\n\\r\\n", "<malformed-http>"),
        ("GET / HTTP/1.1\\r\\nHost: allowed.test:8080\\r\\n\\r\\n", "<name-mismatch>"),
        ("GET / HTTP/1.1\\r\\nHost: 192.0.2.1\\r\\n\\r\\n", "<name-mismatch>"),
        ("CONNECT allowed.test:80 HTTP/1.1\\r\\nHost: allowed.test:80\\r\\n\\r\\n", "<connect-inside>"),
        (
            "GET / HTTP/1.1\\r\\nHost: allowed.test\\r\\nConnection: Upgrade\\r\\n"
            "Upgrade: websocket\\r\\n\\r\\n",
            "<upgrade>",
        ),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_is_refused_in_words(w: World, data: str, rule: str) -> None:
    w.gateway.rules.update({"allowed.test": decision(), PEER4: decision()})
    told = talk(w, PEER4, 80, data)
    assert told["out"].startswith("HTTP/1.1 403 Forbidden\r\n") and rule in told["out"]
    assert w.gateway.reported("refusal")[-1]["rule"] == rule
    assert w.peer.seen == []


def test_an_offer_to_upgrade_to_h2c_is_left_out(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("--http2", "http://allowed.test/")
    assert done.stdout == "the origin says hello\n", done.stderr
    assert b"pgrade" not in w.peer.reached("http")[0]


def test_http_1_0_without_a_host_is_decided_by_its_address(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    assert "hello" in talk(w, PEER4, 80, "GET / HTTP/1.0\\r\\n\\r\\n")["out"]
    assert w.gateway.connects()[0]["action"]["target"] == f"{PEER4}:80"


# -- opaque


def test_a_server_that_speaks_first_is_heard_when_its_address_is_allowed(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    told = talk(w, PEER4, 22, "SSH-2.0-me\\r\\n", "listen-first", "close")
    assert told["out"] == "220 speak\r\nSSH-2.0-me\r\nall of it\n"
    assert w.gateway.connects()[0]["action"]["attributes"]["protocol"] == "opaque"


def test_a_server_that_speaks_first_is_refused_at_once_when_it_is_not(w: World) -> None:
    told = talk(w, PEER4, 22, "", "listen-first")
    assert told["error"] == "ConnectionResetError" and float(told["seconds"]) < 1
    assert w.peer.seen == []


def test_an_opaque_client_that_speaks_is_not_waited_for(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    told = talk(w, PEER4, 22, "SSH-2.0-OpenSSH_9.2\\r\\n", "stay")
    assert float(told["seconds"]) < 0.35 and told["out"].startswith("220 speak")


def test_half_close_is_kept_both_ways(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    told = talk(w, PEER4, 7, "ping", "close")
    assert told["out"] == "pingall of it\n" and told["error"] == ""
    (outcome,) = w.gateway.reported("observed")
    assert outcome["reason"] == "closed"
    assert (outcome["attributes"]["sent"], outcome["attributes"]["received"]) == (4, 14)
    assert outcome["attributes"]["upstream"] == PEER4


def test_an_unused_connection_leaves_no_record(w: World) -> None:
    """Clients open v4 and v6 side by side and drop the slower one."""
    w.python(f"import socket; socket.create_connection(('{PEER4}', 443), 5).close()")
    w.gateway.rules["allowed.test"] = decision()
    w.curl("https://allowed.test/")
    assert len(w.gateway.connects(final=True)) == 1 and w.gateway.reports == [
        r for r in w.gateway.reports if r["type"] == "observed"
    ]


# -- moving


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_large_download_arrives_whole(w: World, scheme: str) -> None:
    w.gateway.rules["allowed.test"] = decision()
    size = 40_000_000
    out = w.directory / "download"
    done = w.curl("-o", str(out), f"{scheme}://allowed.test/bytes/{size}")
    assert done.returncode == 0, done.stderr
    data = out.read_bytes()
    assert len(data) == size and data[:512] == bytes(range(256)) * 2
    assert data[-256:] == (bytes(range(256)) * 2)[size % 256 : size % 256 + 256]


def test_a_slow_reader_holds_the_sender_back_and_gets_everything(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("--limit-rate", "20M", "-o", "/dev/null", "-w", "%{size_download}",
                  "http://allowed.test/bytes/30000000")  # fmt: skip
    assert done.stdout == "30000000"


def test_an_upstream_reset_reaches_the_client_as_one(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    script = (
        "import socket, struct\n"
        f"s = socket.create_connection(('{PEER4}', 9), 5)\n"
        "s.sendall(b'x')\n"
        "import time; time.sleep(0.7)\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
        "s.close()\n"
    )
    w.python(script)
    (outcome,) = w.gateway.reported("observed")
    assert outcome["reason"].startswith("client: ")


# -- the explicit port


PROXY = ("--proxy", "http://127.0.0.1:8899")


def test_connect_to_an_allowed_host_works(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl(*PROXY, "https://allowed.test/")
    assert (done.returncode, done.stdout) == (0, "the origin says hello\n"), done.stderr
    assert [a["final"] for a in w.gateway.connects()] == [False, False, True]
    final = w.gateway.connects(final=True)[0]["action"]["attributes"]
    assert (final["protocol"], final["via"], final["host"]) == ("tls", "connect", "allowed.test")


def test_connect_to_a_denied_host_is_a_403_with_the_reason(w: World) -> None:
    done = w.curl(*PROXY, "-i", "https://denied.test/")
    assert done.returncode == 56 and "403" in done.stderr
    told = talk(
        w, "127.0.0.1", 8899, "CONNECT denied.test:443 HTTP/1.1\\r\\nHost: denied.test\\r\\n\\r\\n"
    )
    assert told["out"].startswith("HTTP/1.1 403 Forbidden\r\n") and "test/deny" in told["out"]
    assert w.peer.seen == []


def test_connect_and_sni_that_differ_are_denied(w: World) -> None:
    w.gateway.rules.update({"allowed.test": decision(), "other.test": decision()})
    done = w.curl(*PROXY, "--connect-to", "other.test:443:allowed.test:443", "https://other.test/")
    assert "alert access denied" in done.stderr
    assert w.gateway.reported("refusal")[-1]["rule"] == "<name-mismatch>"
    assert w.peer.seen == []


def test_connect_for_an_opaque_protocol_works(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    told = talk(w, "127.0.0.1", 8899, "CONNECT allowed.test:7 HTTP/1.1\\r\\nHost: allowed.test:7\\r\\n\\r\\nping", "close")  # fmt: skip
    assert told["out"] == "HTTP/1.1 200 Connection established\r\n\r\npingall of it\n"


def test_an_absolute_form_request_works(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl(*PROXY, "http://allowed.test/x")
    assert done.stdout == "the origin says hello\n", done.stderr
    head = w.peer.reached("http")[0]
    assert head.startswith(b"GET /x HTTP/1.1\r\nHost: allowed.test\r\n")
    assert b"roxy-" not in head


def test_a_denied_absolute_form_request_is_a_403(w: World) -> None:
    done = w.curl(*PROXY, "-i", "http://denied.test/x")
    assert done.stdout.startswith("HTTP/1.1 403 Forbidden\n")
    assert w.peer.seen == []


def test_a_request_for_the_proxy_itself_is_a_400(w: World) -> None:
    told = talk(w, "127.0.0.1", 8899, "GET / HTTP/1.1\\r\\nHost: 127.0.0.1:8899\\r\\n\\r\\n")
    assert told["out"].startswith("HTTP/1.1 400 Bad Request\r\n")


def test_a_user_outside_every_run_may_not_use_the_explicit_port(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.lab.run("curl", "-si", *PROXY, "http://allowed.test/")
    assert done.stdout.startswith("HTTP/1.1 403 Forbidden\n")
    assert "no governed run" in done.stdout
    assert w.peer.seen == [] and w.gateway.asked == []


# -- identity


def test_a_run_that_the_gateway_does_not_know_is_denied_and_recorded(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    done = w.curl("https://allowed.test/", run="stranger")
    assert "alert access denied" in done.stderr
    refused = w.gateway.reported("refusal")[-1]
    assert (refused["run"], refused["rule"]) == ("", "<unknown-run>")
    assert w.gateway.asked == [] and w.peer.seen == []


def test_a_cgroup_below_a_runs_own_belongs_to_the_run(w: World) -> None:
    w.gateway.rules["allowed.test"] = decision()
    below = w.lab.make_run(RUN) / "inner"
    below.mkdir(exist_ok=True)
    script = f"echo $$ >{below.relative_to(w.lab.cgroup)}/cgroup.procs; exec curl -s --cacert {w.ca} https://allowed.test/"
    done = w.lab.run("bash", "-c", f"cd /sys/fs/cgroup; {script}")
    assert done.stdout == "the origin says hello\n"
    assert w.gateway.asked[-1]["run"] == RUN


def test_the_front_does_not_lead_to_itself(w: World) -> None:
    w.gateway.rules.update({"127.0.0.1": decision(), "localhost": decision()})
    direct = talk(w, "127.0.0.1", 8898, "GET / HTTP/1.1\\r\\nHost: localhost:8898\\r\\n\\r\\n")
    assert direct["error"] == "ConnectionResetError" and direct["out"] == ""
    round_about = w.curl(*PROXY, "-i", "http://localhost:8898/")
    assert "&lt;front-itself&gt;" in round_about.stdout or "<front-itself>" in round_about.stdout


def test_an_ungoverned_user_is_untouched(w: World) -> None:
    done = w.lab.run("curl", "-s", "--cacert", str(w.ca), "https://denied.test/")
    assert done.stdout == "the origin says hello\n"
    assert w.gateway.asked == [] and w.gateway.reports == []


SAME_PORT = """
import socket, sys
for port in (7, 22):
    s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", int(sys.argv[2])))
    s.settimeout(5)
    s.connect((sys.argv[1], port))
    s.sendall(b"hello\\r\\n")
    print(s.recv(10))
    globals()[f"kept{port}"] = s
"""


@pytest.mark.parametrize("address", [PEER4, PEER6])
def test_one_source_port_towards_two_destinations_is_one_run(w: World, address: str) -> None:
    """After the redirect the two would look alike, so conntrack changes the second's port."""
    w.gateway.set_run(run_json(w.lab, "second", state="running"))
    w.gateway.rules[address] = decision()
    hold = f"import socket, time; s = socket.create_connection(('{address}', 22)); s.send(b'x\\r\\n'); time.sleep(4)"
    other = w.lab.start_governed("second", "/usr/bin/python3", "-c", hold)
    assert wait_for(lambda: [a for a in w.gateway.asked if a["run"] == "second"])
    assert w.python(SAME_PORT, address, "45678") == "b'hello\\r\\n'\nb'220 speak\\r'\n"
    assert [a["run"] for a in w.gateway.asked if a["run"] != "second"] == [RUN, RUN]
    other.kill()


# -- modes and obligations


def test_an_observed_run_passes_and_goes_where_it_would_have_gone(w: World) -> None:
    w.gateway.rules["denied.test"] = observed()
    for _ in range(2):  # a run that was enforced a moment ago, and then as an observed one
        done = w.curl("--resolve", f"denied.test:443:{PEER6}", "https://denied.test/")
        assert done.returncode == 0, done.stderr
    assert [r["attributes"]["upstream"] for r in w.gateway.reported("observed", 2)] == [PEER6] * 2
    assert w.gateway.connects(final=True)[1]["action"]["attributes"]["addresses"] == [PEER6]


def test_an_observed_run_may_break_the_rules_of_a_protocol(w: World) -> None:
    """Once the gateway said so: a run whose mode is not known is asked for."""
    w.gateway.rules[PEER4] = observed()
    odd = "GET / HTTP/1.1\\r\\nHost: a.test\\r\\nHost: b.test\\r\\nConnection: close\\r\\n\\r\\n"
    w.gateway.rules["allowed.test"] = observed("allow")
    w.curl("https://allowed.test/")
    assert "hello" in talk(w, PEER4, 80, odd)["out"]
    final = w.gateway.connects(final=True)[-1]["action"]["attributes"]
    assert "violation" in final


def test_the_same_is_refused_in_an_enforced_run(w: World) -> None:
    w.gateway.rules[PEER4] = decision()
    odd = "GET / HTTP/1.1\\r\\nHost: a.test\\r\\nHost: b.test\\r\\nConnection: close\\r\\n\\r\\n"
    assert "403 Forbidden" in talk(w, PEER4, 80, odd)["out"]
    assert w.peer.seen == []


def test_what_needs_inspection_is_denied_and_says_what_is_missing(w: World) -> None:
    w.gateway.rules["inspected.test"] = inspected()
    done = w.curl("-i", "http://inspected.test/")
    assert "403 Forbidden" in done.stdout and "agent-assembly-inspect" in done.stdout
    assert w.peer.seen == [] and w.gateway.reported("refusal")


# -- runs


def test_confirms_a_run_that_starts(w: World) -> None:
    w.gateway.set_run(run_json(w.lab, "starts", state="starting"))
    assert wait_for(lambda: w.gateway.confirmed)
    assert w.gateway.confirmed == [
        {"run": "starts", "component": "proxy", "ok": True, "reason": ""}
    ]


def test_leaves_a_run_without_the_proxy_layer_alone(w: World) -> None:
    w.gateway.set_run(run_json(w.lab, "other", state="starting", layers=["kernel"]))
    w.gateway.set_run(run_json(w.lab, "starts", state="starting"))
    assert wait_for(lambda: w.gateway.confirmed)
    assert [c["run"] for c in w.gateway.confirmed] == ["starts"]


def test_tells_the_gateway_its_listeners_and_counts(w: World) -> None:
    status = w.gateway.status
    assert status["component"] == "proxy" and status["state"] == "running"
    assert "127.0.0.1:8898" in status["details"]["listeners"]
    assert "[::1]:8898" in status["details"]["listeners"]
