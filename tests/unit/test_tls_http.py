"""Heads of requests in what a client sends: whole, in pieces, with holes, and in hostile shapes."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.ebpf.tls import http
from aa.ebpf.tls.http import Found, Http1, Http2, Request, Unread

GET = b"GET /a/b?secret=1 HTTP/1.1\r\nHost: Site.Test\r\nAuthorization: geheim\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: site.test\r\nContent-Length: 5\r\n\r\nGET /"
CHUNKED = b"PUT /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"


def one(stream: Http1 | Http2, data: bytes) -> list[Found]:
    return stream.feed(0, data, len(data))


def paths(found: list[Found]) -> list[str]:
    return [f.path if isinstance(f, Request) else f"!{f.reason}" for f in found]


def test_tells_method_host_and_path_and_nothing_more() -> None:
    assert one(Http1(), GET) == [Request("GET", "site.test", "/a/b", "1.1")]


def test_a_body_is_no_head() -> None:
    assert paths(one(Http1(), POST + GET)) == ["/p", "/a/b"]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_pieces_make_no_difference(sizes: list[int]) -> None:
    stream, whole, at, found = Http1(), POST + GET + POST, 0, []
    for size in [*sizes, len(whole)]:
        piece = whole[at : at + size]
        found += stream.feed(at, piece, len(piece))
        at += len(piece)
    assert paths(found) == ["/p", "/a/b", "/p"]


def test_goes_over_a_body_that_was_not_copied() -> None:
    stream = Http1()
    head = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n"
    assert paths(stream.feed(0, head, len(head))) == ["/p"]
    assert stream.feed(len(head), b"GET /evil HTTP/1.1\r\n\r\n", 50000) == []
    after = len(head) + 100000
    assert paths(stream.feed(after, GET, len(GET))) == ["/a/b"]


def test_after_a_body_of_unknown_length_the_next_piece_that_begins_like_a_request_is_one() -> None:
    stream = Http1()
    assert paths(one(stream, CHUNKED)) == ["/c"]
    assert stream.feed(500, b"more of it", 10) == []
    assert paths(stream.feed(600, GET, len(GET))) == ["/a/b"]


def test_a_head_whose_rest_was_not_copied_is_unread() -> None:
    assert one_cut(GET[:30], len(GET)) == [Unread(http.HEAD_CUT)]


def one_cut(data: bytes, length: int) -> list[Found]:
    return Http1().feed(0, data, length)


def test_a_head_without_an_end_is_unread() -> None:
    stream, found = Http1(), []
    line = b"X: " + b"y" * 1000 + b"\r\n"
    data = b"GET / HTTP/1.1\r\n" + line * 40
    for at in range(0, len(data), 1000):
        found += stream.feed(at, data[at : at + 1000], 1000)
    assert found == [Unread(http.HEAD_CUT)]


@pytest.mark.parametrize("data", [b"\x00\x01binary", b"HELO mail.test\r\n", b"ssh stuff", b"AAAAA"])
def test_what_is_no_http_is_said_once(data: bytes) -> None:
    stream = Http1()
    found = one(stream, data) + stream.feed(len(data), b"\x03\x04 more", 7)
    found += stream.feed(len(data) + 7, b"\x03\x04 more", 7)
    assert len([f for f in found if isinstance(f, Unread)]) == 1
    assert not [f for f in found if isinstance(f, Request)]


def test_a_body_that_is_followed_by_empty_lines_is_followed_by_no_head() -> None:
    found = one(Http1(), POST + b"\r\n\r\n" + GET)
    assert paths(found) == ["/p", f"!{http.NO_HTTP}"]
    assert paths(one(Http1(), b"POST / HTTP/1.1\nHost: h\n\n\r1\r\n\r\n"))[0] == "/"


def test_many_heads_in_one_piece_have_a_bound() -> None:
    found = one(Http1(), b"GET / HTTP/1.1\r\n\r\n" * 1000)
    assert len(found) == http.MAX_HEADS + 1
    assert found[-1] == Unread(http.TOO_MANY)


def test_connect_and_absolute_targets() -> None:
    assert one(Http1(), b"CONNECT h.test:443 HTTP/1.1\r\nHost: other\r\n\r\n") == [
        Request("CONNECT", "h.test:443", "", "1.1")
    ]
    assert one(Http1(), b"GET http://u:pw@h.test/x?y HTTP/1.1\r\nHost: h\r\n\r\n") == [
        Request("GET", "h.test", "/x", "1.1")
    ]


def test_two_host_headers_are_none() -> None:
    found = one(Http1(), b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n")
    assert found == [Request("GET", "", "/", "1.1")]


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_taken(data: bytes, more: int) -> None:
    for found in (
        Http1().feed(0, data, len(data) + more),
        Http1().feed(0, b"GET " + data, len(data) + 4 + more),
        Http2().feed(0, data, len(data) + more),
        Http2().feed(0, http.PREFACE + data, len(http.PREFACE) + len(data) + more),
    ):
        for f in found:
            if isinstance(f, Request):
                assert (f.path + f.host).isprintable() and "?" not in f.path


# -- HTTP/2


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + b"\0\0\0\1" + payload


def request(encoder: hpack.Encoder, path: str, **more: str) -> bytes:
    return encoder.encode(
        [(":method", "GET"), (":path", path), (":authority", "h.test"), (":scheme", "https")]
        + list(more.items())
    )


SETTINGS = frame(4, 0, bytes(6))


def test_http2_heads_share_one_table() -> None:
    encoder = hpack.Encoder()
    data = http.PREFACE + SETTINGS
    for n in range(4):
        data += frame(1, 4, request(encoder, f"/{n}?q", cookie="same"))
        data += frame(0, 1, b"body" * 50)
    assert one(Http2(), data) == [
        Request("GET", "h.test", f"/{n}", "2", at=len(data)) for n in range(4)
    ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_http2_pieces_make_no_difference(sizes: list[int]) -> None:
    encoder, stream, at, found = hpack.Encoder(), Http2(), 0, []
    block = request(encoder, "/x", long="y" * 100)
    whole = http.PREFACE + SETTINGS + frame(1, 0, block[:20]) + frame(9, 4, block[20:])
    whole += frame(1, 4, request(encoder, "/x"))
    for size in [*sizes, len(whole)]:
        piece = whole[at : at + size]
        found += stream.feed(at, piece, len(piece))
        at += len(piece)
    assert paths(found) == ["/x", "/x"]


def test_http2_goes_over_data_that_was_not_copied() -> None:
    encoder, stream = hpack.Encoder(), Http2()
    data = http.PREFACE + frame(1, 4, request(encoder, "/a")) + frame(0, 0, b"x" * 9000)
    assert paths(stream.feed(0, data[:200], len(data))) == ["/a"]
    after = frame(1, 4, request(encoder, "/b"))
    assert paths(stream.feed(len(data), after, len(after))) == ["/b"]


def test_http2_ends_at_a_hole_in_its_heads() -> None:
    encoder, stream = hpack.Encoder(), Http2()
    data = http.PREFACE + frame(1, 4, request(encoder, "/a"))
    assert stream.feed(0, data[:-4], len(data)) == [Unread(http.HOLE)]
    after = frame(1, 4, request(encoder, "/b"))
    assert stream.feed(len(data), after, len(after)) == []


def test_http2_with_padding_priority_and_trailers() -> None:
    encoder = hpack.Encoder()
    block = request(encoder, "/p")
    padded = frame(1, 4 | 8 | 32, bytes([3]) + bytes(5) + block + bytes(3))
    trailers = frame(1, 5, encoder.encode([("checksum", "1")]))
    assert paths(one(Http2(), http.PREFACE + padded + trailers)) == ["/p"]


def test_http2_refuses_what_makes_no_sense_or_is_too_large() -> None:
    for bad in (
        frame(1, 4, b"\xff\xff\xff\xff\xff\xff\xff"),
        frame(1, 0, b"") + SETTINGS,
        b"\xff\xff\xff\x01\x04\0\0\0\1",
    ):
        assert one(Http2(), http.PREFACE + bad) == [Unread(http.BAD_HTTP2)]
    flood = frame(1, 4, b"\x90" * 16000)  # each byte stands for a whole header
    assert one(Http2(), http.PREFACE + flood) == [Unread(http.BAD_HTTP2)]
