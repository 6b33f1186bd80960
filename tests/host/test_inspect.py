"""Inspection with real workers: what passes, what is refused, how it is told, and what the origin saw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from aa.model import Decision, Obligation
from tests.host.front_world import RUN, decision, observed, world
from tests.host.inspect_world import InspectingWorld, by_path, inspect, requests
from tests.host.redirect_lab import wait_for

ONE, TWO = "--http1.1", "--http2"
VERSIONS = pytest.mark.parametrize("version", [ONE, TWO])


@pytest.fixture(scope="module")
def shared() -> Iterator[InspectingWorld]:
    with world(kind=InspectingWorld) as made:
        assert isinstance(made, InspectingWorld)
        made.started_workers()
        yield made


@pytest.fixture
def w(shared: InspectingWorld) -> InspectingWorld:
    shared.fresh()
    return shared


# -- allowed and denied, side by side


@VERSIONS
def test_an_allowed_path_passes_and_a_denied_one_of_the_same_host_is_told_why(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    passed = w.curl(version, "https://allowed.test/x?secret=1")
    by = " by 2" if version == TWO else ""
    assert (passed.returncode, passed.stdout) == (0, f"GET /x?secret=1{by}\n"), passed.stderr
    w.peer.seen.clear()
    denied = w.curl(version, "-i", "https://allowed.test/denied/x?secret=1")
    assert denied.stdout.split(None, 2)[1] == "403"
    for word in ("denied this request", "allowed.test:443", "the test says deny", "test/deny", RUN):
        assert word in denied.stdout
    assert w.peer.seen == []  # not even a connection


@VERSIONS
def test_the_client_sees_our_leaf_and_the_origin_is_asked_for_its_one_name(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    done = w.curl(version, "-v", "https://allowed.test/x")
    assert 'host "allowed.test" matched cert' in done.stderr
    assert "Agent Assembly" in next(x for x in done.stderr.split("\n") if "issuer:" in x)
    assert w.peer.reached("sni") == ["allowed.test"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_decides_by_the_method(w: InspectingWorld, method: str) -> None:
    def judge(attributes: Mapping[str, Any]) -> Decision:
        return decision("allow" if attributes["method"] == method else "deny")

    w.gateway.rules["allowed.test"] = requests(judge)
    form = ["-I"] if method == "HEAD" else ["-X", method]
    assert w.curl(*form, "-f", "https://allowed.test/").returncode == 0
    other = "GET" if method != "GET" else "POST"
    assert w.curl("-X", other, "-f", "https://allowed.test/").returncode == 22
    assert [a["method"] for a in w.asked()] == [method, other]


@VERSIONS
def test_tells_the_headers_that_rules_mention_and_no_other(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path, headers=["x-api-version", "x-absent"])
    headers = ["-H", "X-Api-Version: 2024-01", "-H", "X-Api-Version: b", "-H", "Cookie: k=v"]
    done = w.curl(version, *headers, "-H", "Authorization: Bearer t0p", "https://allowed.test/x")
    assert done.returncode == 0, done.stderr
    (asked,) = w.asked()
    assert asked["headers"] == {"x-api-version": "2024-01, b"}
    told = json.dumps([w.gateway.asked, w.told()])
    assert "t0p" not in told and "k=v" not in told
    ((_, seen),) = [s for s in w.peer.seen if s[0] in ("http", "http2")]
    assert "t0p" in str(seen)  # the origin gets all of them


@VERSIONS
def test_asks_with_what_the_policy_needs_and_without_the_query(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    w.curl(version, "https://allowed.test/a%2Fb/./c?q=hidden", "--path-as-is")
    (asked,) = w.asked()
    addresses = asked.pop("addresses")
    assert len(addresses) == 2
    assert asked == {
        "host": "allowed.test",
        "port": 443,
        "protocol": "tls",
        "method": "GET",
        "path": "/a%2Fb/./c",
        "headers": {},
        "http": "2" if version == TWO else "1.1",
    }
    assert "hidden" not in json.dumps([w.gateway.asked, w.told()])
    ((_, seen),) = [s for s in w.peer.seen if s[0] in ("http", "http2")]
    assert "/a%2Fb/./c?q=hidden" in str(seen)


@VERSIONS
def test_each_request_of_a_connection_is_decided_by_itself(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    urls = [f"https://allowed.test/{p}" for p in ("one", "denied", "two", "denied/x", "three")]
    done = w.curl(version, "-w", "%{http_code} %{num_connects}\n", "-o", "/dev/null", *urls)
    codes = [line.split()[0] for line in done.stdout.split("\n") if line[:3].isdigit()]
    assert [a["path"] for a in w.asked()] == ["/one", "/denied", "/two", "/denied/x", "/three"]
    assert len(w.gateway.connects(final=True)) == 1
    seen = str(w.peer.seen)
    assert "/one" in seen and "/three" in seen and "denied" not in seen
    assert codes.count("403") in (0, 2)


def test_streams_of_one_http2_connection_are_decided_each(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    script = (
        "import ssl, socket, sys, json, h2.connection, h2.config, h2.events\n"
        "c = ssl.create_default_context(cafile=sys.argv[1]); c.set_alpn_protocols(['h2'])\n"
        "s = c.wrap_socket(socket.create_connection((sys.argv[2], 443), 5),"
        " server_hostname='allowed.test')\n"
        "k = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding='latin-1'))\n"
        "k.initiate_connection(); out = {}\n"
        "for n, (path, name) in enumerate([('/a', 'allowed.test'), ('/denied', 'allowed.test'),"
        " ('/b', 'other.test'), ('/c', 'allowed.test')]):\n"
        "    k.send_headers(1 + 2 * n, [(':method', 'GET'), (':scheme', 'https'),"
        " (':path', path), (':authority', name)], end_stream=True)\n"
        "s.sendall(k.data_to_send())\n"
        "done = 0\n"
        "while done < 4:\n"
        "    for e in k.receive_data(s.recv(65536)):\n"
        "        if isinstance(e, h2.events.ResponseReceived):\n"
        "            out[e.stream_id] = dict(e.headers)[':status']\n"
        "        done += isinstance(e, (h2.events.StreamEnded, h2.events.StreamReset))\n"
        "    s.sendall(k.data_to_send())\n"
        "print(json.dumps(out))\n"
    )
    told = json.loads(w.python(script, str(w.root), _address(w)))
    assert told == {"1": "200", "3": "403", "5": "403", "7": "200"}
    assert sorted(a["path"] for a in w.asked()) == ["/a", "/c", "/denied"]
    assert [r["rule"] for r in w.refused()] == ["<name-mismatch>"]
    assert "/b" not in str(w.peer.seen) and "denied" not in str(w.peer.seen)


def _address(w: InspectingWorld) -> str:
    from tests.host import front_world

    return front_world.PEER4


def test_plain_http_is_inspected_too(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    done = w.curl("-f", "http://allowed.test/x", "http://allowed.test/y")
    assert done.stdout == "GET /x\nGET /y\n", done.stderr
    assert w.curl("-i", "http://allowed.test/denied").stdout.startswith("HTTP/1.1 403 Forbidden\n")
    assert {a["protocol"] for a in w.asked()} == {"http"}
    assert "denied" not in str(w.peer.seen)


def test_the_explicit_proxy_inspects_as_well(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    proxy = ("--proxy", "http://127.0.0.1:8899")
    assert w.curl(*proxy, ONE, "https://allowed.test/x").stdout == "GET /x\n"
    assert w.curl(*proxy, "http://allowed.test/y").stdout == "GET /y\n"
    assert "403" in w.curl(*proxy, "-i", "https://allowed.test/denied").stdout
    assert "403" in w.curl(*proxy, "-i", "http://allowed.test/denied").stdout
    assert b"roxy-" not in b"".join(w.peer.reached("http"))


def test_a_whole_url_to_the_explicit_port_is_one_request(w: InspectingWorld) -> None:
    """The next one may be for another host."""
    w.gateway.rules["allowed.test"] = requests(by_path)
    proxy = ("--proxy", "http://127.0.0.1:8899")
    done = w.curl(*proxy, "-v", "http://allowed.test/x", "http://allowed.test/y")
    assert done.stdout == "GET /x\nGET /y\n"
    assert len(w.gateway.connects(final=True)) == 2


# -- what is told


@VERSIONS
def test_each_request_leaves_one_record_with_its_bytes_and_status(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    w.curl(version, "-d", "x" * 100, "https://allowed.test/x")
    (told,) = w.told()
    attributes = told["attributes"]
    assert (told["target"], told["run"], told["reason"]) == ("allowed.test:443", RUN, "closed")
    assert (attributes["method"], attributes["path"], attributes["status"]) == ("POST", "/x", 200)
    length = len("POST /x by 2\n" if version == TWO else "POST /x\n")
    assert (attributes["sent"], attributes["received"]) == (100, length)
    (connection,) = w.told("net.connect")
    assert connection["attributes"]["inspected"] is True
    assert connection["attributes"]["requests"] == 1
    assert connection["attributes"]["upstream"]


def test_a_gateway_that_does_not_answer_denies_in_words(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(lambda a: {"effect": "perhaps"})  # type: ignore
    done = w.curl("-i", ONE, "https://allowed.test/x")
    assert "403 Forbidden" in done.stdout and "gave no usable answer" in done.stdout
    assert w.refused()[-1]["rule"] == "<gateway-unreachable>"
    assert w.peer.seen == []


def test_an_obligation_that_is_not_known_denies(w: InspectingWorld) -> None:
    odd = decision(obligations=(Obligation("whiten"),))
    w.gateway.rules["allowed.test"] = requests(lambda a: odd)
    done = w.curl("-i", ONE, "https://allowed.test/x")
    assert "403 Forbidden" in done.stdout and "cannot meet whiten" in done.stdout
    assert w.peer.seen == []
    w.gateway.rules["allowed.test"] = inspect(colours=True)
    assert "alert access denied" in w.curl("https://allowed.test/x").stderr
    assert w.peer.seen == []


def test_an_ask_without_anybody_to_ask_denies(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(lambda a: decision("ask"))
    done = w.curl("-i", ONE, "https://allowed.test/x")
    assert "403 Forbidden" in done.stdout and w.peer.seen == []


def test_a_run_that_is_only_observed_is_inspected_without_blocking(w: InspectingWorld) -> None:
    from dataclasses import replace

    def answer(action: Mapping[str, Any]) -> Decision:
        made = observed()
        if action["kind"] == "net.connect":
            return replace(made, obligations=(Obligation("inspect"),))
        return made

    w.gateway.rules["allowed.test"] = answer
    assert w.curl(ONE, "https://allowed.test/denied").stdout == "GET /denied\n"
    assert len(w.asked()) == 1


# -- a client that does not trust us


def test_a_client_that_refuses_our_certificate_is_recorded_as_pinned(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    done = w.curl("--cacert", str(w.ca), "https://allowed.test/x")
    assert done.returncode == 60
    (refused,) = w.refused()
    assert refused["rule"] == "<pinned>" and refused["run"] == RUN
    assert "aasm ca show" in refused["reason"] and "without methods" in refused["reason"]
    assert w.peer.seen == []
    w.gateway.rules["allowed.test"] = decision()  # the rule that the reason names
    assert w.curl(ONE, "--cacert", str(w.ca), "https://allowed.test/x").stdout == "GET /x\n"


def test_what_is_not_http_inside_tls_is_denied(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    script = (
        "import ssl, socket, sys\n"
        "c = ssl.create_default_context(cafile=sys.argv[1])\n"
        "s = c.wrap_socket(socket.create_connection((sys.argv[2], 443), 5),"
        " server_hostname='allowed.test')\n"
        "s.sendall(b'SSH-2.0-x\\r\\n' if len(sys.argv) < 4 else b'GET / HTTP/1.1\\r\\n'"
        " b'Host: allowed.test\\r\\n\\r\\n')\n"
        "try: print(len(s.recv(1000)) > 0)\n"
        "except OSError as e: print(type(e).__name__)\n"
    )
    assert w.python(script, str(w.root), _address(w)).strip() in ("ConnectionResetError", "False")
    (refused,) = w.refused()
    assert refused["rule"] == "<not-http>"
    assert w.peer.seen == []
    assert w.python(script, str(w.root), _address(w), "http") == "True\n"


def test_an_opaque_connection_that_a_rule_wants_inspected_is_denied(w: InspectingWorld) -> None:
    from tests.host import front_world

    w.gateway.rules[front_world.PEER4] = inspect()
    script = (
        "import socket, sys\n"
        "s = socket.create_connection((sys.argv[1], 7), 5); s.sendall(b'hello\\r\\n')\n"
        "try: print(s.recv(10))\n"
        "except OSError as e: print(type(e).__name__)\n"
    )
    assert w.python(script, _address(w)) == "ConnectionResetError\n"
    assert w.refused()[-1]["rule"] == "<not-inspectable>"
    assert w.peer.seen == []


# -- bodies and streams


@VERSIONS
def test_a_large_body_arrives_whole_in_both_directions(w: InspectingWorld, version: str) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    body = w.directory / "body"
    size = 20_000_000
    body.write_bytes(bytes(range(256)) * (size // 256))
    up = w.curl(version, "--data-binary", f"@{body}", "https://allowed.test:8443/x")
    assert up.returncode == 0, up.stderr
    assert w.peer.reached("size") == [body.stat().st_size]
    out = w.directory / "out"
    down = w.curl(version, "-o", str(out), f"https://allowed.test:8443/bytes/{size}")
    assert down.returncode == 0, down.stderr
    data = out.read_bytes()
    assert len(data) == size and data[:256] == bytes(range(256)) and data[-1] == (size - 1) % 256
    assert [t["attributes"]["received"] for t in w.told(count=2)][1] == size


def test_a_streamed_request_keeps_its_chunks(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    for version in (ONE, TWO):  # of the second the origin speaks 1.1 alone
        w.peer.seen.clear()
        done = w.curl(
            version, "-T", "-", "https://allowed.test:8443/x", "-H", "Expect:", input="a" * 70_000
        )
        assert done.stdout == "PUT /x\n", done.stderr
        assert w.peer.reached("size") == [70_000]
        assert len(w.peer.reached("http")) == 1


EVENTS = """
import http.client, ssl, sys, time, json
c = ssl.create_default_context(cafile=sys.argv[1])
h = http.client.HTTPSConnection("allowed.test", context=c)
h._create_connection = lambda a, *k: __import__("socket").create_connection((sys.argv[2], 443), 5)
began = time.monotonic()
h.request("GET", "/events")
r = h.getresponse()
times = []
while line := r.readline():
    if line.startswith(b"data"):
        times.append(time.monotonic() - began)
print(json.dumps(times))
"""


def test_events_come_when_they_are_sent(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    times = json.loads(w.python(EVENTS, str(w.root), _address(w)))
    assert len(times) == 3
    assert times[1] - times[0] > 0.2 and times[2] - times[1] > 0.2  # 0.4 s apart at the origin


def test_small_answers_do_not_wait_for_acknowledgements(w: InspectingWorld) -> None:
    """Headers and body are two writes; where the kernel held the second back each took 40 ms."""
    w.gateway.rules["allowed.test"] = requests(by_path)
    script = (
        "import http.client, socket, ssl, sys, time\n"
        "c = ssl.create_default_context(cafile=sys.argv[1])\n"
        "h = http.client.HTTPSConnection('allowed.test', context=c)\n"
        "h._create_connection = lambda a, *k: socket.create_connection((sys.argv[2], 443), 5)\n"
        "began = time.monotonic()\n"
        "for _ in range(100):\n"
        "    h.request('GET', '/x'); h.getresponse().read()\n"
        "print(time.monotonic() - began)\n"
    )
    assert float(w.python(script, str(w.root), _address(w))) < 3.5


def test_an_answer_without_a_length_ends_properly(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    for url in ("http://allowed.test/until-end", "https://allowed.test/trailers"):
        done = w.curl(ONE, url)
        assert done.returncode == 0 and done.stdout in ("no length\n", "hello"), done.stderr


def test_early_hints_are_left_out(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    assert w.curl(ONE, "https://allowed.test/early").stdout == "early\n"


@VERSIONS
def test_a_denied_upload_is_answered_before_its_body(w: InspectingWorld, version: str) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    body = w.directory / "body"
    body.write_bytes(b"x" * 4_000_000)
    done = w.curl(
        version, "-i", "--data-binary", f"@{body}", "https://allowed.test/denied", "--max-time", "8"
    )
    assert "403" in done.stdout and "denied this request" in done.stdout
    assert w.peer.seen == []


# -- bodies that are judged


def held(attributes: Mapping[str, Any]) -> Decision:
    """Wants to see the body for a text; denies with it."""
    if "body" in attributes:
        return decision("deny" if attributes["body"]["texts"] else "allow")
    wanted = {"body": {"secrets": ["any"], "texts": ["*DROP TABLE*"]}, "limit": 100_000}
    return decision(obligations=(Obligation("inspect", wanted),))


@VERSIONS
def test_a_body_is_judged_before_a_byte_of_it_leaves(w: InspectingWorld, version: str) -> None:
    w.gateway.rules["allowed.test"] = requests(held)
    done = w.curl(version, "-d", "SELECT 1", "https://allowed.test:8443/x")
    assert done.stdout == "POST /x\n", done.stderr
    assert w.peer.reached("body") == [b"SELECT 1"]
    w.peer.seen.clear()
    done = w.curl(version, "-i", "-d", "SELECT 1; DROP TABLE x", "https://allowed.test:8443/x")
    assert "403" in done.stdout and w.peer.seen == []
    facts = [a["body"] for a in w.asked() if "body" in a]
    assert facts[1] == {"secrets": [], "texts": ["*DROP TABLE*"], "bytes": 22}
    assert "SELECT" not in json.dumps([w.gateway.asked, w.gateway.reports])


@VERSIONS
def test_a_body_above_the_limit_is_denied_and_not_scanned_in_part(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = requests(held)
    body = w.directory / "body"
    body.write_bytes(b"x" * 100_000)
    assert (
        w.curl(version, "-f", "--data-binary", f"@{body}", "https://allowed.test/x").returncode == 0
    )
    w.peer.seen.clear()
    body.write_bytes(b"x" * 100_001)
    done = w.curl(version, "-i", "--data-binary", f"@{body}", "https://allowed.test/x")
    assert "limit:inspect_limit" in done.stdout and w.peer.seen == []
    assert w.refused()[-1]["rule"] == "<limit:inspect_limit>"


def test_an_encoded_body_cannot_be_judged(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(held)
    done = w.curl("-i", "-d", "x", "-H", "Content-Encoding: br", "https://allowed.test/x")
    assert "403" in done.stdout and "encoded" in done.stdout and w.peer.seen == []


# -- models


def models(action: Mapping[str, Any]) -> Decision:
    """Small models alone."""
    if action["kind"] == "net.connect":
        return inspect(llm=True)
    return decision("deny" if action["attributes"].get("model") == "large" else "allow")


def ask_model(w: InspectingWorld, *more: str, model: str = "small", **how: Any) -> Any:
    body = json.dumps({"model": model, "messages": ["hello"], **how})
    url = "https://allowed.test:8443/v1/messages"
    return w.curl(*more, "-i", "--json", body, url)


@VERSIONS
def test_a_model_is_decided_by_its_name_before_the_request_leaves(
    w: InspectingWorld, version: str
) -> None:
    w.gateway.rules["allowed.test"] = w.gateway.rules["maker/large"] = models
    assert "200" in ask_model(w, version).stdout
    assert len(w.peer.reached("http")) == 1
    denied = ask_model(w, version, model="large").stdout
    assert "403" in denied and "test/deny" in denied
    assert len(w.peer.reached("http")) == 1
    asked = w.asked("llm.request")
    assert asked[0] == {"provider": "maker", "model": "small", "host": "allowed.test"}
    assert "hello" not in json.dumps([w.gateway.asked, w.gateway.reports])


@VERSIONS
@pytest.mark.parametrize("stream", [True, False])
def test_what_a_model_request_used_is_told(w: InspectingWorld, version: str, stream: bool) -> None:
    w.gateway.rules["allowed.test"] = models
    done = ask_model(w, version, stream=stream)
    assert "usage" in done.stdout, done
    (told,) = w.told("llm.request")
    assert told["target"] == "maker/small"
    assert told["attributes"] == {
        "provider": "maker",
        "model": "small",
        "input_tokens": 10,
        "output_tokens": 42 if stream else 5,
        "cache_read_tokens": 7,
        "cache_write_tokens": 0,
    }


def test_an_answer_that_tells_no_usage_is_not_taken_for_none(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = models
    w.curl("--json", '{"model": "small"}', "https://allowed.test:8443/elsewhere")
    (told,) = w.told("llm.request")
    assert told["attributes"]["output_tokens"] == "unknown"
    assert "cannot be read" in told["reason"]


def test_a_model_request_that_nobody_could_count_is_denied_with_what_to_do(
    w: InspectingWorld,
) -> None:
    w.gateway.rules["allowed.test"] = models
    body = json.dumps({"model": "small", "stream": True})
    for path, words in (
        ("/v1/chat/completions", "include_usage"),
        ("/v1/messages/batches", "batch"),
    ):
        done = w.curl("-i", "--json", body, f"https://allowed.test:8443{path}")
        assert "403" in done.stdout and words in done.stdout and "llm-usage" in done.stdout
    assert "no model" in w.curl("--json", "{}", "https://allowed.test:8443/v1/messages").stdout
    socket_head = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    headers = [x for h in (*socket_head, f"Sec-WebSocket-Key: {'A' * 22}==") for x in ("-H", h)]
    done = w.curl("-i", "--http1.1", *headers, "https://allowed.test:8443/v1/realtime")
    assert "403" in done.stdout and "WebSocket" in done.stdout and "llm-usage" in done.stdout
    assert w.peer.seen == []
    told = json.dumps({"model": "small", "stream": True, "stream_options": {"include_usage": True}})
    done = w.curl("-i", "--json", told, "https://allowed.test:8443/v1/chat/completions")
    assert "200" in done.stdout


def test_what_is_no_model_request_passes_a_provider_as_ever(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = models
    assert w.curl("-f", "https://allowed.test:8443/v1/models").returncode == 0
    assert w.curl("-f", "--json", '{"event": 1}', "https://allowed.test:8443/e").returncode == 0
    assert w.asked("llm.request") == [] and len(w.told(count=2)) == 2


# -- secrets

TOKEN = "ghs-0123456789abcdefghij"
INJECT = Obligation(
    "inject",
    {
        "id": "files/github",
        "source": {"credential": "github-token"},
        "header": "Authorization",
        "format": "Bearer {}",
        "placeholder": "aa-github-placeholder",
    },
)


def with_secret(attributes: Mapping[str, Any]) -> Decision:
    return decision(obligations=(INJECT,))


HELD = ("-H", "Authorization: token aa-github-placeholder")


@VERSIONS
def test_a_secret_goes_to_the_origin_in_place_of_its_placeholder_and_nowhere_else(
    w: InspectingWorld, version: str
) -> None:
    w.give_credential("github-token", TOKEN + "\n")
    w.gateway.rules["allowed.test"] = requests(with_secret)
    done = w.curl(version, "-i", *HELD, "https://allowed.test:8443/echo")
    (head,) = w.peer.reached("http")
    assert f"Bearer {TOKEN}" in head.decode() and "placeholder" not in head.decode()
    assert "200" in done.stdout and TOKEN not in done.stdout  # though the origin echoes it
    assert f"Bearer {'*' * len(TOKEN)}" in done.stdout.lower().replace("bearer", "Bearer")
    assert done.stdout.count("*" * len(TOKEN)) == 2  # in a header, and in a body sent in pieces
    told = json.dumps([w.gateway.asked, w.gateway.reports, w.told()])
    assert TOKEN not in told and TOKEN not in w.log.read_text()


def test_a_request_without_the_placeholder_is_left_as_it_is(w: InspectingWorld) -> None:
    w.give_credential("github-token", TOKEN)
    w.gateway.rules["allowed.test"] = requests(with_secret)
    w.curl("-H", "Authorization: token mine", "https://allowed.test:8443/x")
    (head,) = w.peer.reached("http")
    assert b"token mine" in head and TOKEN.encode() not in head


def test_a_secret_that_is_not_there_or_would_not_go_over_tls_denies(w: InspectingWorld) -> None:
    w.give_credential("github-token", "two\nlines")
    w.gateway.rules["allowed.test"] = requests(with_secret)
    done = w.curl("-i", *HELD, "https://allowed.test/x")
    assert "403" in done.stdout and "github-token" in done.stdout and "two" not in done.stdout
    w.give_credential("github-token", TOKEN)
    done = w.curl("-i", *HELD, "http://allowed.test/x")
    assert "403" in done.stdout and "over TLS alone" in done.stdout
    assert w.peer.seen == []


def test_an_answer_in_which_a_secret_could_hide_does_not_reach_the_agent(
    w: InspectingWorld,
) -> None:
    w.give_credential("github-token", TOKEN)
    w.gateway.rules["allowed.test"] = requests(with_secret)
    assert w.curl(ONE, *HELD, "https://allowed.test:8443/encoded").returncode in (52, 56)
    assert w.refused()[-1]["rule"] == "<secret>"


# -- WebSockets

SOCKET = """
import json, socket, ssl, sys
import wsproto, wsproto.events as e
c = ssl.create_default_context(cafile=sys.argv[1])
s = c.wrap_socket(socket.create_connection((sys.argv[2], 443), 5), server_hostname="allowed.test")
w = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
s.sendall(w.send(e.Request(host="allowed.test", target=sys.argv[3],
    extensions=[wsproto.extensions.PerMessageDeflate()])))
told, texts = [], sys.argv[4:]
def say():
    if texts:
        s.sendall(w.send(e.TextMessage(texts.pop(0))))
    else:
        s.sendall(w.send(e.CloseConnection(1000)))
over = False
while not over:
    data = s.recv(65536)
    if not data:
        told.append("end"); break
    w.receive_data(data)
    for event in w.events():
        if isinstance(event, e.AcceptConnection):
            say()
        elif isinstance(event, e.RejectConnection):
            told.append(event.status_code); over = True
        elif isinstance(event, e.TextMessage):
            told.append(event.data); say()
        elif isinstance(event, e.CloseConnection):
            told.append([event.code, event.reason]); over = True
print(json.dumps(told))
"""


def socket_(w: InspectingWorld, path: str, *texts: str) -> list[Any]:
    return list(json.loads(w.python(SOCKET, str(w.root), _address(w), path, *texts)))


def messages(attributes: Mapping[str, Any]) -> Decision:
    if attributes["path"].startswith("/denied"):
        return decision("deny")
    if "ws" in attributes:
        return decision("deny" if attributes["ws"]["texts"] else "allow")
    wanted = {"ws": {"out": ["*DROP*"], "in": [], "secrets": []}}
    return decision(obligations=(Obligation("inspect", wanted),))


def test_a_websocket_passes_and_a_denied_one_is_not_opened(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    assert socket_(w, "/ws", "one", "two") == ["echo one", "echo two", [1000, ""]]
    assert w.peer.reached("message") == ["one", "two"]
    (told,) = w.told()
    assert told["attributes"]["status"] == 101 and told["attributes"]["sent"] == 6
    w.peer.seen.clear()
    assert socket_(w, "/denied") == [403]
    assert w.peer.seen == []


def test_each_message_is_decided_and_a_denied_one_ends_the_socket_with_the_rule(
    w: InspectingWorld,
) -> None:
    w.gateway.rules["allowed.test"] = requests(messages)
    assert socket_(w, "/ws", "SELECT", "DROP x", "never") == [
        "echo SELECT",
        [1008, "denied by test/deny"],
    ]
    assert w.peer.reached("message") == ["SELECT"]
    facts = [a["ws"] for a in w.asked() if "ws" in a]
    assert [(f["direction"], f["texts"]) for f in facts] == [("out", []), ("out", ["*DROP*"])]
    assert "SELECT" not in json.dumps([w.gateway.asked, w.gateway.reports])


def test_messages_to_the_agent_are_decided_too(w: InspectingWorld) -> None:
    def judge(attributes: Mapping[str, Any]) -> Decision:
        if "ws" in attributes:
            return decision("deny" if attributes["ws"]["texts"] else "allow")
        wanted = {"ws": {"out": [], "in": ["*echo two*"], "secrets": []}}
        return decision(obligations=(Obligation("inspect", wanted),))

    w.gateway.rules["allowed.test"] = requests(judge)
    assert socket_(w, "/ws", "one", "two") == ["echo one", [1008, "denied by test/deny"]]


# -- certificates


def test_another_intermediate_is_taken_into_use_without_cutting_a_stream(
    w: InspectingWorld,
) -> None:
    w.gateway.rules["allowed.test"] = requests(by_path)
    script = (
        "import ssl, socket, sys, time\n"
        "c = ssl.create_default_context(cafile=sys.argv[1])\n"
        "s = c.wrap_socket(socket.create_connection((sys.argv[2], 443), 5),"
        " server_hostname='allowed.test')\n"
        "f = s.makefile('rb')\n"
        "def ask(path):\n"
        "    s.sendall(b'GET /%s HTTP/1.1\\r\\nHost: allowed.test\\r\\n\\r\\n' % path)\n"
        "    while line := f.readline():\n"
        "        if line.startswith(b'GET'): break\n"
        "    print(line.decode(), end='', flush=True)\n"
        "ask(b'one'); sys.stdin.readline(); ask(b'two')\n"
    )
    before = _issuer(w)
    going = w.start_python(script, str(w.root), _address(w))
    assert going.stdout is not None and going.stdin is not None
    assert going.stdout.readline() == "GET /one\n"
    w.renew_authority("--renew")
    assert _issuer(w) != before  # the next connection has it without being told
    going.stdin.write("\n")
    going.stdin.flush()
    assert going.stdout.readline() == "GET /two\n"


def _issuer(w: InspectingWorld) -> str:
    done = w.curl("-v", ONE, "https://allowed.test/x")
    assert done.stdout == "GET /x\n", done.stderr
    return next(x for x in done.stderr.split("\n") if "issuer:" in x)


# -- status


def test_the_status_tells_of_the_workers(w: InspectingWorld) -> None:
    inspection = w.gateway.status["details"]["inspection"]
    assert inspection["installed"] is True and inspection["workers"] == 1
    assert inspection["engine"].startswith("mitmproxy ") and inspection["problem"] == ""
    assert wait_for(lambda: w.gateway.status["details"]["inspection"]["rss_kb"][0] > 0)
