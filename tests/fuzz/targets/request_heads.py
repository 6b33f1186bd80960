"""Heads of requests inside of inspected connections: refused, or the same to whoever reads them next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import h11

from aa.model import Decision
from aa.proxy.inspect.request import DROPPED, VERSIONS, Head, judge, outgoing_fields
from aa.proxy.inspect.session import Session, Wanted
from tests.fuzz.mutate import json_value

WORDS = (
    b"HTTP/1.1",
    b"HTTP/2.0",
    b"\\r\\n",
    b"transfer-encoding",
    b"chunked",
    b"a.example:443",
    b"\\u0000",
)
SESSIONS = tuple(
    Session(
        id="i", secret="s", run="r", uid=1000, host=host, port=port, protocol=protocol,
        addresses=(ip_address(address),), wanted=Wanted(headers=("x-api-version", "content-type")),
    )
    for host, port, protocol, address in (
        ("a.example", 443, "tls", "192.0.2.1"),
        ("a.example", 80, "http", "192.0.2.1"),
        ("", 8080, "http", "2001:db8::1"),
    )
)  # fmt: skip

mutate = json_value


def seeds() -> Iterator[bytes]:
    """[session, version, method, scheme, authority, path, [[name, value], ...]]"""
    host = ["Host", "a.example"]
    upgrade = [["Upgrade", "websocket"], ["Connection", "Upgrade"], ["Sec-WebSocket-Version", "13"]]
    for head in (
        [0, "HTTP/1.1", "GET", "", "", "/v1/x?y=z", [host, ["X-Api-Version", "2"], ["Te", "trailers"]]],
        [0, "HTTP/1.1", "POST", "", "", "/", [host, ["Content-Length", "3"]]],
        [1, "HTTP/1.1", "PUT", "http", "a.example", "/x", [host, ["Transfer-Encoding", "chunked"]]],
        [0, "HTTP/1.1", "GET", "", "", "/ws", [host, *upgrade]],
        [1, "HTTP/1.0", "GET", "", "", "/", []],
        [0, "HTTP/2.0", "GET", "https", "a.example", "/", [["cookie", "a=b"], ["cookie", "c=d"]]],
        [2, "HTTP/1.1", "GET", "", "", "/", [["Host", "[2001:db8::1]:8080"], ["Connection", "close, x-a"]]],
        [1, "HTTP/1.1", "OPTIONS", "", "", "*", [host, ["Upgrade", "h2c"], ["HTTP2-Settings", "x"]]],
        [0, "HTTP/1.1", "GET", "", "", "/", [["Host", "b.example"]]],
    ):  # fmt: skip
        yield json.dumps(head).encode()


def one(data: bytes) -> None:
    try:
        written = json.loads(data)
        number, version, method, scheme, authority, path, fields = written
        head = Head(
            str(version),
            *(str(text).encode("latin-1") for text in (method, scheme, authority, path)),
            fields=tuple((str(n).encode("latin-1"), str(v).encode("latin-1")) for n, v in fields),
        )
        session = SESSIONS[int(number) % len(SESSIONS)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return
    assert isinstance(head.shown, str)
    found = judge(head, session)
    if isinstance(found, Decision):
        assert not found.permits and found.rule.startswith("<")
        assert len(found.reason) < 2000
        return
    attributes = found.action.attributes
    assert set(attributes["headers"]) <= set(session.wanted.headers)
    assert "?" not in attributes["path"] and attributes["http"] == VERSIONS[head.version]
    assert found.action.target == session.target
    sent = outgoing_fields(head, session, upgrade=found.upgrade)
    assert not {n.lower() for n, _ in sent} & DROPPED
    if head.version == "HTTP/1.1":
        _read_again(head, session, sent, attributes)


def _read_again(head: Head, session: Session, sent: Any, attributes: dict[str, Any]) -> None:
    """What h11 makes of the head as it goes to the origin."""
    lines = [b"%b %b HTTP/1.1" % (head.method, head.path), *(b"%b: %b" % field for field in sent)]
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    reader.receive_data(b"\r\n".join((*lines, b"", b"")))
    try:
        event = reader.next_event()
    except h11.RemoteProtocolError:
        return  # it takes less than the RFC allows, which is no other reading
    assert isinstance(event, h11.Request), event
    assert event.method.decode() == attributes["method"]
    assert event.target.partition(b"?")[0].decode() == attributes["path"]
    assert [v for n, v in event.headers if n == b"host"] == [session.authority.encode()]
