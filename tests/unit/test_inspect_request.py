"""What one request says, read in one way or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.model import Decision
from aa.proxy.inspect.request import Head, Request, judge, looks_like_http, outgoing_fields
from aa.proxy.inspect.session import Wanted
from aa.proxy.sniff import Sniffer
from tests.unit.test_inspect_session import session

HOST = (b"Host", b"allowed.test")


def head(*fields: tuple[bytes, bytes], **changes: Any) -> Head:
    made = Head("HTTP/1.1", b"GET", b"", b"", b"/x?q=1", fields or (HOST,))
    return replace(made, **changes)


def head2(*fields: tuple[bytes, bytes], **changes: Any) -> Head:
    made = Head("HTTP/2.0", b"GET", b"https", b"allowed.test", b"/x?q=1", fields)
    return replace(made, **changes)


def judged(asked: Head, **changes: Any) -> Request:
    found = judge(asked, session(**changes))
    assert isinstance(found, Request), found
    return found


def refused(asked: Head, **changes: Any) -> Decision:
    found = judge(asked, session(**changes))
    assert isinstance(found, Decision), found
    return found


@pytest.mark.parametrize(("asked", "http"), [(head(), "1.1"), (head2(), "2")])
def test_a_request_is_an_action_without_its_query(asked: Head, http: str) -> None:
    action = judged(asked).action
    assert (action.kind, action.target) == ("http.request", "allowed.test:443")
    assert action.attributes == {
        "host": "allowed.test",
        "port": 443,
        "addresses": ["192.0.2.1", "2001:db8::1"],
        "protocol": "tls",
        "method": "GET",
        "path": "/x",
        "headers": {},
        "http": http,
    }


def test_only_wanted_headers_are_told_and_several_are_joined() -> None:
    asked = head(HOST, (b"X-A", b" 1 "), (b"Cookie", b"k"), (b"x-a", b"2"))
    wanted = Wanted(("x-a", "x-b"))
    assert judged(asked, wanted=wanted).action.attributes["headers"] == {"x-a": "1, 2"}


def test_a_header_that_is_too_long_to_be_judged_denies() -> None:
    asked = head(HOST, (b"X-A", b"y" * 5000))
    assert refused(asked, wanted=Wanted(("x-a",))).rule == "<limit:header>"
    assert judged(asked)


@pytest.mark.parametrize(
    "name",
    [b"allowed.test", b"ALLOWED.test", b"allowed.test.", b"allowed.test:443", b"Allowed.Test.:443"],
)
def test_other_spellings_of_the_one_name_are_the_name(name: bytes) -> None:
    asked = head((b"Host", name))
    assert judged(asked)
    assert outgoing_fields(asked, session(), upgrade=False)[0] == (b"Host", b"allowed.test")
    assert judged(head2(authority=name))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (b"other.test", "<name-mismatch>"),
        (b"allowed.test:80", "<name-mismatch>"),
        (b"192.0.2.1", "<name-mismatch>"),
        (b"x.allowed.test", "<name-mismatch>"),
        (b"", "<malformed-http>"),
        (b"user@allowed.test", "<malformed-http>"),
        (b"allowed.test/", "<malformed-http>"),
        (b"allowed.test:0443", "<malformed-http>"),
        (b"allowed.test:443:443", "<malformed-http>"),
        (b"allowed.test,other.test", "<malformed-http>"),
        (b"allowed.test\xff", "<malformed-http>"),
        (b"0x7f.1", "<malformed-http>"),
    ],
)
def test_another_name_denies(name: bytes, rule: str) -> None:
    assert refused(head((b"Host", name))).rule == rule
    if name:
        assert refused(head2(authority=name)).rule == rule
        assert refused(head(authority=name, scheme=b"https")).rule == rule
        assert refused(head2((b"host", name))).rule == rule


def test_an_address_without_a_name_is_one_of_those_that_were_decided() -> None:
    assert judged(head((b"Host", b"192.0.2.1")), host="")
    assert judged(head((b"Host", b"[2001:db8::1]:443")), host="")
    assert refused(head((b"Host", b"192.0.2.2")), host="").rule == "<name-mismatch>"
    assert refused(head(), host="").rule == "<name-mismatch>"
    assert "host" not in judged(head((b"Host", b"192.0.2.1")), host="").action.attributes


def test_http_1_0_may_name_no_host() -> None:
    assert judged(head((b"X", b"y"), version="HTTP/1.0"))
    assert refused(head((b"X", b"y"))).rule == "<malformed-http>"
    assert refused(head2(authority=b"")).rule == "<malformed-http>"


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        (head(version="HTTP/2.1"), "<malformed-http>"),
        (head(version="HTTP/0.9"), "<malformed-http>"),
        (head(method=b"G T"), "<malformed-http>"),
        (head(method=b""), "<malformed-http>"),
        (head(method=b"X" * 33), "<malformed-http>"),
        (head(method=b"connect"), "<connect-inside>"),
        (head(method=b"PRI"), "<connect-inside>"),
        (head(path=b""), "<malformed-http>"),
        (head(path=b"x"), "<malformed-http>"),
        (head(path=b"*"), "<malformed-http>"),
        (head(path=b"/a b"), "<malformed-http>"),
        (head(path=b"/a\tb"), "<malformed-http>"),
        (head(path=b"/a\x00"), "<malformed-http>"),
        (head(path=b"/\xc3\xa4"), "<malformed-http>"),
        (head(path=b"/a#b"), "<malformed-http>"),
        (head(path=b"/" + b"a" * 40000), "<limit:path>"),
        (head(scheme=b"http", authority=b"allowed.test"), "<name-mismatch>"),
        (head2(scheme=b"http"), "<name-mismatch>"),
        (head(HOST, HOST), "<malformed-http>"),
        (head(HOST, (b"X\n", b"y")), "<malformed-http>"),
        (head(HOST, (b"X ", b"y")), "<malformed-http>"),
        (head(HOST, (b"", b"y")), "<malformed-http>"),
        (head(HOST, (b"X", b"y\r\nZ: 1")), "<malformed-http>"),
        (head(HOST, (b"X", b"y\rz")), "<malformed-http>"),
        (head(HOST, (b"X", b"y\0z")), "<malformed-http>"),
        (head(HOST, *[(b"X", b"y")] * 256), "<limit:headers>"),
        (head(HOST, (b"Transfer-Encoding", b"gzip, chunked")), "<malformed-http>"),
        (head(HOST, (b"Transfer-Encoding", b"xchunked")), "<malformed-http>"),
        (
            head(HOST, (b"Transfer-Encoding", b"chunked"), (b"Content-Length", b"1")),
            "<malformed-http>",
        ),
        (head(HOST, (b"Transfer-Encoding", b"chunked"), version="HTTP/1.0"), "<malformed-http>"),
        (head2((b"transfer-encoding", b"chunked")), "<malformed-http>"),
        (head(HOST, (b"Content-Length", b"1"), (b"Content-Length", b"1")), "<malformed-http>"),
        (head(HOST, (b"Content-Length", b"+1")), "<malformed-http>"),
        (head(HOST, (b"Content-Length", b"1,1")), "<malformed-http>"),
        (head(HOST, (b"Content-Length", b"")), "<malformed-http>"),
        (head(HOST, (b"Content-Length", b"1" * 19)), "<malformed-http>"),
        (head(HOST, (b"Upgrade", b"foo")), "<upgrade>"),
        (head(HOST, (b"Upgrade", b"websocket")), "<upgrade>"),
        (
            head(
                HOST,
                (b"Upgrade", b"websocket, foo"),
                (b"Sec-WebSocket-Version", b"13"),
            ),
            "<upgrade>",
        ),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(asked: Head, rule: str) -> None:
    assert refused(asked).rule == rule


SOCKET = (HOST, (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"))


def test_a_websocket_is_asked_for_and_keeps_what_it_needs() -> None:
    asked = head(
        *SOCKET,
        (b"Sec-WebSocket-Version", b"13"),
        (b"Sec-WebSocket-Extensions", b"permessage-deflate"),
    )
    assert judged(asked).upgrade
    names = [n for n, _ in outgoing_fields(asked, session(), upgrade=True)]
    assert names == [b"Host", b"Connection", b"Upgrade", b"Sec-WebSocket-Version"]
    assert refused(replace(asked, method=b"POST")).rule == "<upgrade>"


def test_offers_that_can_be_left_out_are_left_out() -> None:
    asked = head(HOST, (b"Connection", b"Upgrade, HTTP2-Settings"), (b"Upgrade", b"h2c"),
                 (b"HTTP2-Settings", b"x"), (b"TE", b"trailers"))  # fmt: skip
    assert not judged(asked).upgrade
    assert outgoing_fields(asked, session(), upgrade=False) == (HOST,)


def test_what_was_for_the_proxy_alone_stays_here() -> None:
    fields = ((b"Proxy-Authorization", b"x"), (b"Proxy-Connection", b"close"), (b"X", b"y"))
    asked = head(HOST, *fields, (b"Connection", b"close"))
    assert outgoing_fields(asked, session(), upgrade=False) == (
        HOST,
        (b"X", b"y"),
        (b"Connection", b"close"),
    )
    assert outgoing_fields(head2(HOST, (b"x", b"y")), session(), upgrade=False) == ((b"x", b"y"),)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"GET / HTTP/1.1\r\n", True),
        (b"PROPFIND ", True),
        (b"GE", None),
        (b"", None),
        (b"X" * 32, None),
        (b"X" * 33, False),
        (b"SSH-2.0-x\r\n", False),
        (b"get / HTTP/1.1", False),
        (b"\x16\x03\x01", False),
        (b" GET /", False),
        (b"220 hello\r\n", False),
        (b"\n", False),
    ],
)
def test_tells_http_from_what_is_none(data: bytes, found: bool | None) -> None:
    assert looks_like_http(data) is found


names = st.sampled_from([b"Host", b"host", b"X", b"Content-Length", b"Transfer-Encoding", b"A B"])
values = st.one_of(
    st.sampled_from([b"allowed.test", b"other.test", b"allowed.test:443", b"1", b"chunked"]),
    st.binary(max_size=8),
)


@given(
    st.lists(st.tuples(names, values), max_size=5),
    st.sampled_from(["HTTP/1.0", "HTTP/1.1", "HTTP/2.0"]),
    st.one_of(st.just(b"/"), st.binary(max_size=8)),
    values,
)
def test_whatever_passes_is_for_the_one_name_and_is_sent_on_with_it(
    fields: list[tuple[bytes, bytes]], version: str, path: bytes, authority: bytes
) -> None:
    asked = Head(version, b"GET", b"https" if version == "HTTP/2.0" else b"", authority
                 if version == "HTTP/2.0" else b"", path, tuple(fields))  # fmt: skip
    found = judge(asked, session())
    if isinstance(found, Decision):
        return
    sent = outgoing_fields(asked, session(), upgrade=found.upgrade)
    hosts = [v for n, v in sent if n.lower() == b"host"]
    assert hosts in ([], [b"allowed.test"])
    assert all(b"\n" not in v and b"\r" not in v and b"\0" not in v for _, v in sent)
    if version == "HTTP/1.1":  # another reader reads the same
        sniffer = Sniffer()
        lines = [b"GET " + path + b" HTTP/1.1", *(n + b": " + v for n, v in sent)]
        seen = sniffer.feed(b"\r\n".join(lines) + b"\r\n\r\n")
        assert getattr(seen, "path", None) == path.decode()
        assert str(getattr(seen, "host", "")) == "allowed.test"
