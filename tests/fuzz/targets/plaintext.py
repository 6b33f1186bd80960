"""Plaintext out of TLS libraries: the same requests however it is cut, with holes anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import hpack

from aa.ebpf.tls import http
from aa.ebpf.tls.http import MAX_HEADS, Found, Http1, Http2, Request, Unread
from tests.unit.test_tls_http import CHUNKED, GET, POST, SETTINGS, frame, request

WORDS = (
    b"GET / HTTP/1.1\r\n", b"Host: a.test\r\n", b"Content-Length: 5\r\n", b"\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n", b"CONNECT a:1 HTTP/1.1\r\n", http.PREFACE,
    b"\0\0\x05\x01\x04\0\0\0\1", b"\0\0\x05\x09\x04\0\0\0\1", b"\x82\x86\x84\x41\x8a", b"\x3f\xe1\x1f",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    for data in (GET, POST + GET, CHUNKED, GET + b"\x00\x01"):
        yield b"\x00\x05" + data
    encoder = hpack.Encoder()
    whole = http.PREFACE + SETTINGS + frame(1, 4, request(encoder, "/x", cookie="y" * 40))
    whole += frame(0, 1, b"body" * 5) + frame(1, 0, request(encoder, "/x")[:3])
    yield b"\x01\x07" + whole
    yield (
        b"\x01\x07" + http.PREFACE + frame(1, 4 | 8 | 32, b"\3" + bytes(5) + b"\x82\x86" + bytes(3))
    )
    yield b"\x03\x07" + whole


def one(data: bytes) -> None:
    if len(data) < 3:
        return
    kind, step, data = data[0], data[1] + 1, data[2:]
    new = Http2 if kind & 1 else Http1
    whole = _brief(new().feed(0, data, len(data)))
    stream, cut = new(), []
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        cut += stream.feed(at, piece, len(piece))
    if kind & 1 and len(whole) < MAX_HEADS:
        assert whole == _brief(cut), (whole, _brief(cut))
    _holes(new(), data, step)


def _holes(stream: Http1 | Http2, data: bytes, step: int) -> None:
    """Pieces of which the end was not copied, and pieces that never came."""
    found: list[Found] = []
    for n, at in enumerate(range(0, len(data), step)):
        piece = data[at : at + step]
        if n % 5 == 3:
            continue
        found += stream.feed(at, piece[: len(piece) - n % 3], len(piece))
    _brief(found)


def _brief(found: list[Found]) -> list[tuple[str, ...]]:
    told = []
    for each in found:
        if isinstance(each, Request):
            assert (each.method + each.host + each.path).isprintable()
            assert "?" not in each.path and "@" not in each.host
            told.append((each.method, each.host, each.path))
        else:
            assert isinstance(each, Unread) and each.reason
            told.append((each.reason,))
    return told
