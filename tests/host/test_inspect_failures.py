"""Inspection when client, origin or worker misbehave: a clear end, a record, and no byte undecided."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.host import front_world
from tests.host.front_world import RUN, world
from tests.host.inspect_world import (
    EXPIRED,
    MUTE,
    NOT_TLS,
    OTHER_NAME,
    UNTRUSTED,
    InspectingWorld,
    by_path,
    requests,
)
from tests.host.redirect_lab import wait_for

CONFIG = "[proxy]\npeek_seconds = 1.5\nconnect_seconds = 2.0\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[InspectingWorld]:
    with world(CONFIG, kind=InspectingWorld) as made:
        assert isinstance(made, InspectingWorld)
        made.started_workers()
        yield made


@pytest.fixture
def w(shared: InspectingWorld) -> InspectingWorld:
    shared.fresh()
    shared.gateway.rules["allowed.test"] = requests(by_path)
    return shared


SPEAK = """
import json, socket, ssl, sys, time
ca, address, port, data = sys.argv[1:5]
options = sys.argv[5:]
s = socket.create_connection((address, int(port)), 5)
if port == "443":
    s = ssl.create_default_context(cafile=ca).wrap_socket(s, server_hostname="allowed.test")
began, out, error = time.monotonic(), b"", ""
s.settimeout(8)
try:
    for part in data.encode("latin-1").decode("unicode_escape").split("|"):
        text, _, times = part.partition("*times*")
        s.sendall(text.encode("latin-1") * int(times or 1))
        if "slowly" in options: time.sleep(0.3)
    if "close" in options:
        s.close() if port == "443" else s.shutdown(socket.SHUT_WR)
    while part := s.recv(65536):
        out += part
        if "answer" in options and b"policy explain" in out: break
except (OSError, ValueError) as e:
    error = type(e).__name__
print(json.dumps({"out": out.decode("latin-1")[:4000], "error": error,
                  "seconds": time.monotonic() - began}))
"""
"""Sends the parts of its data (each may be repeated) and tells what came back and how it ended."""


def speak(w: InspectingWorld, port: int, data: str, *options: str) -> dict[str, Any]:
    told = w.python(SPEAK, str(w.root), front_world.PEER4, str(port), data, *options)
    return dict(json.loads(told))


HOST = "Host: allowed.test\\r\\n"
OK = "GET /x HTTP/1.1\\r\\n" + HOST + "\\r\\n"
BOTH = pytest.mark.parametrize("port", [80, 443])


@BOTH
def test_the_same_connection_with_a_proper_request_works(w: InspectingWorld, port: int) -> None:
    told = speak(w, port, OK.replace(HOST, HOST + "Connection: close\\r\\n"))
    assert told["out"].startswith("HTTP/1.1 200 OK\r\n") and told["error"] == ""
    assert len(w.peer.reached("http")) == 1


# -- from the client

ODD = [
    ("two Hosts", "GET / HTTP/1.1\\r\\n" + HOST + "Host: other.test\\r\\n\\r\\n", "<malformed-http>"),
    ("another Host", "GET / HTTP/1.1\\r\\nHost: other.test\\r\\n\\r\\n", "<name-mismatch>"),
    ("no Host", "GET / HTTP/1.1\\r\\n\\r\\n", "<malformed-http>"),
    ("another port", "GET / HTTP/1.1\\r\\nHost: allowed.test:99\\r\\n\\r\\n", "<name-mismatch>"),
    ("a URL", "GET https://other.test/ HTTP/1.1\\r\\n" + HOST + "\\r\\n", "<name-mismatch>"),
    ("a folded line", "GET / HTTP/1.1\\r\\n" + HOST + "X: a\\r\\n b\\r\\n\\r\\n", "<malformed-http>"),
    ("a bare CR", "GET / HTTP/1.1\\r\\n" + HOST + "X: a\\rb\\r\\n\\r\\n", "<malformed-http>"),
    ("a NUL", "GET / HTTP/1.1\\r\\n" + HOST + "X: a\\0b\\r\\n\\r\\n", "<malformed-http>"),
    ("no header name", "GET / HTTP/1.1\\r\\n" + HOST + ": b\\r\\n\\r\\n", "<malformed-http>"),
    ("a space before the colon", "GET / HTTP/1.1\\r\\nHost : allowed.test\\r\\n\\r\\n", "<malformed-http>"),
    (
        "two lengths",
        "POST / HTTP/1.1\\r\\n" + HOST + "Content-Length: 1\\r\\nContent-Length: 2\\r\\n\\r\\nxx",
        "<malformed-http>",
    ),
    (
        "length and chunks",
        "POST / HTTP/1.1\\r\\n" + HOST + "Content-Length: 4\\r\\nTransfer-Encoding: chunked\\r\\n"
        "\\r\\n0\\r\\n\\r\\n",
        "<malformed-http>",
    ),
    (
        "an unknown encoding",
        "POST / HTTP/1.1\\r\\n" + HOST + "Transfer-Encoding: gzip, chunked\\r\\n\\r\\n0\\r\\n\\r\\n",
        "<malformed-http>",
    ),
    ("a negative length", "POST / HTTP/1.1\\r\\n" + HOST + "Content-Length: -1\\r\\n\\r\\n", "<malformed-http>"),
    ("another version", "GET / HTTP/3.0\\r\\n" + HOST + "\\r\\n", "<malformed-http>"),
    ("a fragment", "GET /a#b HTTP/1.1\\r\\n" + HOST + "\\r\\n", "<malformed-http>"),
    ("CONNECT", "CONNECT allowed.test:443 HTTP/1.1\\r\\n" + HOST + "\\r\\n", "<connect-inside>"),
    (
        "an upgrade",
        "GET / HTTP/1.1\\r\\n" + HOST + "Connection: Upgrade\\r\\nUpgrade: foo\\r\\n\\r\\n",
        "<upgrade>",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("data", "rule"), [o[1:] for o in ODD], ids=[o[0] for o in ODD])
def test_an_odd_request_inside_tls_is_refused_in_words(
    w: InspectingWorld, data: str, rule: str
) -> None:
    told = speak(w, 443, data, "answer")
    assert told["out"][:12] in ("HTTP/1.1 400", "HTTP/1.1 403"), told
    assert rule in told["out"]
    (refused,) = w.refused()
    assert (refused["rule"], refused["run"], refused["kind"]) == (rule, RUN, "http.request")
    assert w.peer.seen == []


@BOTH
def test_a_second_request_behind_an_allowed_one_is_decided_too(
    w: InspectingWorld, port: int
) -> None:
    second = "GET /denied HTTP/1.1\\r\\n" + HOST + "Connection: close\\r\\n\\r\\n"
    told = speak(w, port, OK + second)
    assert told["out"].count("HTTP/1.1 200 OK") == 1
    assert told["out"].count("HTTP/1.1 403 Forbidden") == 1
    assert [a["path"] for a in w.asked()] == ["/x", "/denied"]
    assert len(w.peer.reached("http")) == 1


@pytest.mark.parametrize(
    "data",
    [
        "GET / HTTP/1.1\\r\\n" + HOST + "X: |a*times*70000",
        "GET / HTTP/1.1\\r\\n" + HOST + "|X: y\\r\\n*times*9000",
        "GET /|a*times*70000",
    ],
)
def test_a_head_that_is_too_large_is_refused_in_words(w: InspectingWorld, data: str) -> None:
    told = speak(w, 443, data)
    assert told["out"].startswith("HTTP/1.1 400 Bad Request\r\n"), told
    assert w.refused()[0]["rule"] == "<malformed-http>"
    assert w.peer.seen == []


def test_too_many_headers_are_refused(w: InspectingWorld) -> None:
    told = speak(w, 443, "GET / HTTP/1.1\\r\\n" + HOST + "|X: y\\r\\n*times*300|\\r\\n", "answer")
    assert "limit:headers" in told["out"] and w.peer.seen == []


def test_a_head_that_does_not_come_to_its_end_is_given_up(w: InspectingWorld) -> None:
    told = speak(w, 443, "GET / HTTP/1.1\\r\\n" + HOST)
    assert told["out"].startswith("HTTP/1.1 400 ") and "not whole" in told["out"]
    assert 1 < told["seconds"] < 7
    assert w.refused()[0]["rule"] == "<malformed-http>" and w.peer.seen == []


def test_a_slow_request_in_time_works(w: InspectingWorld) -> None:
    slow = "GET /x HTTP/1.1\\r\\n|Host: allowed.test\\r\\n|Connection: close\\r\\n\\r\\n"
    assert speak(w, 443, slow, "slowly")["out"].startswith("HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "body",
    [
        "Content-Length: 10\\r\\n\\r\\nabc",
        "Transfer-Encoding: chunked\\r\\n\\r\\n5\\r\\nabcde\\r\\n",
        "Transfer-Encoding: chunked\\r\\n\\r\\n5\\r\\nabcde\\r\\nzz\\r\\n",
        "Transfer-Encoding: chunked\\r\\n\\r\\n5\\r\\nabcdeXX3\\r\\nabc\\r\\n0\\r\\n\\r\\n",
        "Transfer-Encoding: chunked\\r\\n\\r\\n|1;x*times*70000",
    ],
)
@BOTH
def test_half_a_body_never_looks_like_a_whole_request(
    w: InspectingWorld, body: str, port: int
) -> None:
    speak(w, port, "POST /x HTTP/1.1\\r\\n" + HOST + body, "close")
    (told,) = w.told("net.connect")
    assert told["reason"].startswith("client: "), told
    assert w.peer.reached("body") == [] and len(w.peer.reached("http")) <= 1


def test_chunks_that_are_none_are_refused_in_words(w: InspectingWorld) -> None:
    head = "POST /x HTTP/1.1\\r\\n" + HOST + "Transfer-Encoding: chunked\\r\\n\\r\\n"
    told = speak(w, 443, head + "|5\\r\\nabcde\\r\\nzz\\r\\n", "slowly")
    assert told["out"].startswith("HTTP/1.1 400 Bad Request\r\n"), told
    assert w.refused()[0]["rule"] == "<malformed-http>"
    assert w.peer.reached("body") == [] and w.peer.reached("ended")


def test_a_flood_behind_one_request_is_cut_off(w: InspectingWorld) -> None:
    w.gateway.rules["allowed.test"] = requests(lambda a: _late(by_path(a)))
    told = speak(w, 443, OK + "|GET /y HTTP/1.1\\r\\nHost: allowed.test\\r\\n\\r\\n*times*30000")
    assert told["error"] or told["out"].count("HTTP/1.1") <= 2
    assert "/y" not in str(w.peer.seen)


def _late(answer: Any) -> Any:
    async def wait() -> Any:
        import asyncio

        await asyncio.sleep(0.5)
        return answer

    return wait()


TLS_ODD = """
import socket, ssl, sys, time
kind, address = sys.argv[1:3]
inp, out = ssl.MemoryBIO(), ssl.MemoryBIO()
o = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
o.load_verify_locations(sys.argv[3])
t = o.wrap_bio(inp, out, server_hostname="allowed.test")
try: t.do_handshake()
except ssl.SSLWantReadError: pass
s = socket.create_connection((address, 443), 5); s.settimeout(8)
s.sendall(out.read())
began = time.monotonic()
if kind == "garbage":
    s.recv(100); s.sendall(b"\\x17\\x03\\x03\\x00\\x20" + bytes(32))
elif kind == "half":
    s.recv(100); s.shutdown(socket.SHUT_WR)
elif kind == "reset":
    s.recv(100); s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0"); s.close()
try:
    while s.recv(65536): pass
    print("end")
except OSError as e: print(type(e).__name__)
"""


@pytest.mark.parametrize("kind", ["garbage", "half", "reset", "silent"])
def test_a_client_that_breaks_off_its_tls_leaves_a_record_and_reaches_nobody(
    w: InspectingWorld, kind: str
) -> None:
    w.python(TLS_ODD, kind, front_world.PEER4, str(w.root))
    (told,) = w.told("net.connect")
    assert told["reason"].startswith("client: "), told
    assert w.peer.seen == [] and w.asked() == []


# -- from the origin


@pytest.mark.parametrize(
    ("port", "error", "words"),
    [
        (EXPIRED, "tls_certificate_error", "certificate has expired"),
        (OTHER_NAME, "tls_certificate_error", "not valid for 'allowed.test'"),
        (UNTRUSTED, "tls_certificate_error", "unable to get local issuer certificate"),
        (NOT_TLS, "tls_protocol_error", "wrong version number"),
        (MUTE, "connection_timeout", "no TLS within 2 s"),
        (8888, "connection_refused", "Connection refused"),
    ],
)
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_an_origin_that_cannot_be_trusted_is_a_failure_in_words(
    w: InspectingWorld, port: int, error: str, words: str, version: str
) -> None:
    done = w.curl(version, "-i", "-d", "secret", f"https://allowed.test:{port}/x")
    status = "504" if error == "connection_timeout" else "502"
    assert done.stdout.split(None, 2)[1] == status, done
    assert f"error={error}" in done.stdout and words in done.stdout
    assert "allowed this request, but it failed" in done.stdout
    (told,) = w.told()
    assert words in told["reason"] and told["attributes"]["received"] == 0
    assert w.peer.reached("http") == [] and w.peer.reached("http2") == []
    assert w.peer.reached("body") == []


@pytest.mark.parametrize("path", ["/nonsense", "/two-lengths", "/huge-head", "/hang-up"])
@BOTH
def test_an_answer_that_is_none_is_a_failure_in_words(
    w: InspectingWorld, path: str, port: int
) -> None:
    url = f"{'https' if port == 443 else 'http'}://allowed.test:{8443 if port == 443 else 80}{path}"
    done = w.curl("--http1.1", "-i", url)
    assert done.stdout.startswith("HTTP/1.1 502 Bad Gateway\n"), done
    assert "allowed this request, but it failed" in done.stdout
    (told,) = w.told()
    assert told["reason"].startswith("failed: ")


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_an_answer_that_is_cut_short_does_not_look_whole(w: InspectingWorld, version: str) -> None:
    done = w.curl(version, "https://allowed.test:8443/cut/x")
    assert done.returncode in (18, 56, 92), done
    (told,) = w.told()
    assert told["reason"].startswith("failed: ") and told["attributes"]["received"] == 1000


# -- the worker


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_worker_killed_in_the_middle_of_a_body_ends_it_and_another_one_serves(
    w: InspectingWorld, direction: str
) -> None:
    (pid,) = w.started_workers()
    if direction == "up":
        body = w.directory / "body"
        body.write_bytes(b"x" * 50_000_000)
        arguments = [
            "--limit-rate",
            "5M",
            "--data-binary",
            f"@{body}",
            "https://allowed.test:8443/x",
        ]
    else:
        arguments = [
            "--limit-rate",
            "5M",
            "-o",
            "/dev/null",
            "https://allowed.test:8443/bytes/50000000",
        ]
    going = w.start_curl("--http1.1", *arguments)
    assert wait_for(lambda: w.peer.reached("http"))
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    _, errors = going.communicate(timeout=15)
    assert going.returncode in (18, 35, 55, 56), errors
    (told,) = w.told("net.connect")
    assert told["reason"] == "the inspection worker ended" and told["attributes"]["inspected"]
    assert wait_for(lambda: "inspect" in [r["target"] for r in w.gateway.reports])
    if direction == "up":
        assert w.peer.reached("body") == [] and w.peer.reached("ended")
    assert w.curl("--http1.1", "https://allowed.test/x").stdout == "GET /x\n"
    assert wait_for(lambda: w.started_workers() != [pid])


def test_a_worker_takes_no_connection_that_is_not_the_fronts(w: InspectingWorld) -> None:
    w.started_workers()
    port = w.worker_port()
    greet = (
        "import socket, sys\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5); s.settimeout(5)\n"
        "try:\n"
        "    s.sendall(b'\\x05\\x01\\x02\\x01\\x02ab\\x02cd\\x05\\x01\\x00\\x01\\x7f\\0\\0\\1\\0\\x50')\n"
        "    out = b''\n"
        "    while part := s.recv(100): out += part\n"
        "except OSError as e: out = type(e).__name__.encode()\n"
        "print(out)\n"
    )
    stranger = w.as_user(0, greet, str(port))
    assert stranger in ("b''\n", "b'ConnectionResetError'\n", "b'BrokenPipeError'\n")
    without_token = w.as_user(front_world.PROXY_UID, greet, str(port))
    assert without_token.startswith("b'\\x05\\x02\\x01\\x01")  # heard, and its token refused
    assert w.peer.seen == [] and w.gateway.asked == []
