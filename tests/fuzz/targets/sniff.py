"""A client's first bytes: one finding however they are cut, and a head that h11 reads alike."""

from __future__ import annotations

from collections.abc import Iterator

from aa.policy.host import canonical_host
from aa.proxy.http1 import check_head, outgoing_head, unwanted_upgrade
from aa.proxy.sniff import Finding, Head, Hello, Malformed, Opaque, Sniffer
from tests.unit.test_sniff import CORPUS, message, records, request
from tests.fuzz.mutate import words

WORDS = (
    b"GET / HTTP/1.1\r\n",
    b"CONNECT a.b:443 HTTP/1.1\r\n",
    b"http://a.b/",
    b"Host: a.b\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 3\r\n",
    b"Upgrade: websocket\r\n",
    b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n",
    b"\x16\x03\x01",
    b"\x00\x00\x00\x08\x00\x06\x00\x00\x03a.b",
    b"\xfe\x0d",
    b"xn--",
)
mutate = words(WORDS)


def seeds() -> Iterator[bytes]:
    for hello in CORPUS.values():
        yield b"\x00" + hello
        yield b"\x05" + records(hello[5:], 40)
    yield b"\x03" + records(message(b"\x03\x03" + bytes(40)))
    for lines in (
        ("GET / HTTP/1.1", "Host: a.example"),
        ("POST http://a.example:8080/x?y HTTP/1.1", "Host: a.example:8080", "Content-Length: 3"),
        ("PUT / HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked"),
        ("CONNECT a.example:443 HTTP/1.1", "Host: a.example:443"),
        ("CONNECT [2001:db8::1]:443 HTTP/1.1", "Host: [2001:db8::1]:443"),
        ("OPTIONS * HTTP/1.0",),
        ("GET / HTTP/1.1", "Host: xn--bcher-kva.example", "Upgrade: h2c, websocket"),
    ):
        yield b"\x07" + request(*lines, body=b"abc")
    yield b"\x01SSH-2.0-x\r\n"


def one(data: bytes) -> None:
    if len(data) < 2:
        return
    step, data = data[0] + 1, data[1:]
    whole, cut = Sniffer(), Sniffer()
    whole.feed(data)
    for at in range(0, len(data), step):
        cut.feed(data[at : at + step])
    finding = whole.end("end")
    assert finding == cut.end("end"), (finding, cut.finding)
    assert whole.taken == cut.taken == data
    _check(finding, data)


def _check(finding: Finding, data: bytes) -> None:
    match finding:
        case Hello(host=host):
            assert host is None or (canonical_host(host.text) == host and not host.is_address)
        case Head():
            assert finding.size <= len(data)
            assert all(v.isascii() or b"\n" not in v for _, v in finding.headers)
            unwanted_upgrade(finding)
            if finding.host is not None:
                assert canonical_host(finding.host.text) == finding.host
            if finding.path:
                check_head(outgoing_head(finding, 80), finding)
        case Malformed(reason=reason):
            assert reason.isprintable() and len(reason) < 1000, reason
        case other:
            assert isinstance(other, Opaque)
