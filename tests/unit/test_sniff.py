"""Sniffing: playbooks of bytes in and one finding out, for TLS, HTTP/1 and everything else."""

from __future__ import annotations

import itertools
import ssl

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aa.proxy import sniff
from aa.proxy.sniff import Form, Head, Hello, Malformed, Opaque, Protocol, Sniffer


def client_hello(
    name: str | None = "abc.test",
    *,
    alpn: tuple[str, ...] = (),
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ciphers: str = "",
) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = newest
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if ciphers:
        context.set_ciphers(ciphers)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


CORPUS = {
    "tls 1.3": client_hello(),
    "tls 1.2": client_hello(newest=ssl.TLSVersion.TLSv1_2),
    "alpn": client_hello(alpn=("h2", "http/1.1")),
    "many ciphers": client_hello(ciphers="ALL:@SECLEVEL=0"),
    "long name": client_hello(".".join(["a" * 60] * 4)),
    "one label": client_hello("localhost"),
    "upper case": client_hello("ABC.Test"),
}


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(data, 2)


def vector(data: bytes, size: int) -> bytes:
    return len(data).to_bytes(size, "big") + data


def server_name(*names: bytes, kind: int = 0) -> bytes:
    entries = b"".join(bytes([kind]) + vector(name, 2) for name in names)
    return extension(0, vector(entries, 2))


def body(*extensions: bytes, rest: bytes = b"") -> bytes:
    head = b"\x03\x03" + bytes(32) + vector(b"", 1) + vector(b"\x13\x01", 2) + vector(b"\0", 1)
    return head + vector(b"".join(extensions), 2) + rest


def message(content: bytes) -> bytes:
    return b"\x01" + vector(content, 3)


def records(content: bytes, size: int = 1 << 14) -> bytes:
    cut = [content[i : i + size] for i in range(0, len(content), size)]
    return b"".join(b"\x16\x03\x01" + vector(part, 2) for part in cut)


def hello(*extensions: bytes) -> bytes:
    return records(message(body(*extensions)))


def fed(*parts: bytes) -> object:
    sniffer = Sniffer()
    for part in parts:
        if sniffer.feed(part) is not None:
            break
    return sniffer.finding


def malformed(*parts: bytes) -> str:
    finding = fed(*parts)
    assert isinstance(finding, Malformed), finding
    return finding.reason


# -- TLS


@pytest.mark.parametrize("name", CORPUS)
def test_reads_the_hellos_of_a_real_client(name: str) -> None:
    finding = fed(CORPUS[name])
    assert isinstance(finding, Hello)
    expected = {"long name": ".".join(["a" * 60] * 4), "one label": "localhost"}
    assert str(finding.host) == expected.get(name, "abc.test")
    assert finding.alpn == (("h2", "http/1.1") if name == "alpn" else ())


def test_a_hello_without_a_name_has_no_host() -> None:
    assert fed(client_hello(None)) == Hello(None)


def test_reads_a_hello_without_extensions() -> None:
    without = b"\x03\x01" + bytes(32) + vector(b"", 1) + vector(b"\0\x2f", 2) + vector(b"\0", 1)
    assert fed(records(message(without))) == Hello(None)


@pytest.mark.parametrize("name", ["tls 1.3", "many ciphers"])
def test_reads_a_hello_that_arrives_in_two_segments_cut_anywhere(name: str) -> None:
    data = CORPUS[name]
    for cut in range(1, len(data)):
        sniffer = Sniffer()
        assert sniffer.feed(data[:cut]) is None
        finding = sniffer.feed(data[cut:])
        assert isinstance(finding, Hello) and str(finding.host) == "abc.test"
        assert bytes(sniffer.taken) == data


def test_reads_a_hello_that_arrives_byte_by_byte() -> None:
    data = CORPUS["alpn"]
    assert isinstance(fed(*(data[i : i + 1] for i in range(len(data)))), Hello)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 43, 100])
def test_reads_a_hello_that_is_cut_into_many_records(size: int) -> None:
    finding = fed(records(CORPUS["tls 1.3"][5:], size))
    assert isinstance(finding, Hello) and str(finding.host) == "abc.test"


def test_reads_a_large_hello_in_several_records() -> None:
    padding = extension(21, bytes(40_000))
    finding = fed(hello(padding, server_name(b"big.example")))
    assert isinstance(finding, Hello) and str(finding.host) == "big.example"


def test_refuses_a_hello_over_the_limit_before_it_is_all_there() -> None:
    announced = b"\x01" + (sniff.HELLO_LIMIT).to_bytes(3, "big")
    assert "over" in malformed(b"\x16\x03\x01" + vector(announced, 2))


def test_refuses_a_hello_in_more_records_than_the_limit() -> None:
    padded = message(body(extension(21, bytes(sniff.RECORDS_LIMIT))))
    assert "records" in malformed(records(padded, 1))


def test_says_that_a_hello_is_encrypted_inside() -> None:
    finding = fed(hello(server_name(b"front.example"), extension(0xFE0D, b"\0" * 20)))
    assert isinstance(finding, Hello) and finding.encrypted


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (b"192.0.2.7", "IP address"),
        (b"::1", "IP address"),
        (b"0x7f.1", "names no host"),
        (b"127.1", "names no host"),
        (b"abc.test\0.evil.example", "names no host"),
        (b"abc.test\n", "names no host"),
        (b"", "names no host"),
        (b"a..b", "names no host"),
        (b"-a.example", "names no host"),
        ("münchen.example".encode(), "not ASCII"),
        (b"a" * 64 + b".example", "names no host"),
        (b"abc.test:443", "names no host"),
        (b"*.abc.test", "names no host"),
    ],
)
def test_refuses_an_sni_that_names_no_host_in_one_way(name: bytes, why: str) -> None:
    assert why in malformed(hello(server_name(name)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (hello(server_name(b"a.example", b"b.example")), "more than one entry"),
        (hello(server_name(b"a.example"), server_name(b"a.example")), "twice"),
        (hello(server_name(b"a.example", kind=1)), "type 1"),
        (hello(extension(0, vector(b"", 2))), "longer than what holds it"),
        (hello(extension(0, vector(b"\0\0\x01a", 2) + b"x")), "left over"),
        (hello(b"\0\0\0\x09"), "longer than what holds it"),
        (records(message(body(rest=b"x"))), "left over"),
        (records(message(body()) + message(body())), "other handshake messages"),
        (records(b"\x02" + vector(bytes(40), 3)), "not a ClientHello"),
        (records(message(body())[:20]) + b"\x17\x03\x03\0\x01x", "no handshake"),
        (b"\x16\x03\x01\0\0", "says it has 0 bytes"),
        (b"\x16\x03\x01\xff\xff", "says it has 65535 bytes"),
        (records(message(b"\x03\x03" + bytes(10))), "longer than what holds it"),
    ],
)
def test_refuses_what_breaks_the_rules_of_a_hello(data: bytes, why: str) -> None:
    assert why in malformed(data)


def test_a_hello_that_never_ends_is_malformed_not_opaque() -> None:
    sniffer = Sniffer()
    sniffer.feed(CORPUS["tls 1.3"][:100])
    finding = sniffer.end("nothing more within 5 s")
    assert isinstance(finding, Malformed) and finding.protocol is Protocol.TLS
    assert "5 s" in finding.reason


@given(st.binary(max_size=300))
def test_no_bytes_after_a_record_header_break_the_sniffer(data: bytes) -> None:
    finding = fed(b"\x16\x03\x01" + vector(data, 2)) if data else None
    assert finding is None or isinstance(finding, (Hello, Malformed))


@given(st.data())
@settings(max_examples=300)
def test_a_changed_hello_is_a_hello_or_malformed_and_never_another_name(
    data: st.DataObject,
) -> None:
    """Any change outside the name leaves the name as it is, or is refused."""
    original = CORPUS["alpn"]
    at = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[at] ^= data.draw(st.integers(1, 255))
    finding = fed(bytes(changed))
    inside = original.find(b"abc.test") <= at < original.find(b"abc.test") + 8
    if isinstance(finding, Hello) and finding.host is not None and not inside:
        assert str(finding.host) == "abc.test"


@given(st.binary(min_size=1, max_size=400), st.lists(st.integers(1, 50), max_size=20))
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", [1, 1, 1])
@example(CORPUS["tls 1.3"], [3, 3])
def test_segmentation_never_changes_the_finding(data: bytes, cuts: list[int]) -> None:
    edges = [0, *itertools.takewhile(lambda x: x < len(data), itertools.accumulate(cuts))]
    parts = [data[a:b] for a, b in itertools.pairwise([*edges, len(data)])]
    whole, cut = Sniffer(), Sniffer()
    whole.feed(data)
    for part in parts:
        cut.feed(part)
    assert whole.end("end") == cut.end("end")
    assert whole.taken == cut.taken == data


# -- HTTP/1


def request(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body


def test_reads_a_request_head_and_says_where_the_body_begins() -> None:
    data = request("POST /x?y=1 HTTP/1.1", "Host: a.example:8080", "Content-Length: 3", body=b"abc")
    finding = fed(data)
    assert isinstance(finding, Head)
    assert (finding.method, finding.path, finding.form) == ("POST", "/x?y=1", Form.ORIGIN)
    assert (str(finding.host), finding.port) == ("a.example", 8080)
    assert data[finding.size :] == b"abc"


@pytest.mark.parametrize(
    ("lines", "form", "host", "port", "path"),
    [
        (("GET http://a.example/p HTTP/1.1", "Host: a.example"), Form.ABSOLUTE, "a.example", None, "/p"),
        (("GET http://A.Example:81 HTTP/1.1", "Host: a.example:81"), Form.ABSOLUTE, "a.example", 81, "/"),
        (("GET http://a.example?q HTTP/1.1", "Host: a.example:80"), Form.ABSOLUTE, "a.example", None, "/?q"),
        (("CONNECT a.example:443 HTTP/1.1", "Host: a.example:443"), Form.AUTHORITY, "a.example", 443, ""),
        (("CONNECT [fd00::1]:443 HTTP/1.1", "Host: [fd00::1]:443"), Form.AUTHORITY, "fd00::1", 443, ""),
        (("OPTIONS * HTTP/1.1", "Host: a.example."), Form.ASTERISK, "a.example", None, "*"),
        (("GET / HTTP/1.1", "Host: 192.0.2.1"), Form.ORIGIN, "192.0.2.1", None, "/"),
    ],
)  # fmt: skip
def test_reads_every_form_of_a_request_target(
    lines: tuple[str, ...], form: Form, host: str, port: int | None, path: str
) -> None:
    finding = fed(request(*lines))
    assert isinstance(finding, Head), finding
    assert (finding.form, str(finding.host), finding.port, finding.path) == (form, host, port, path)


def test_http_1_0_may_have_no_host() -> None:
    finding = fed(request("GET / HTTP/1.0"))
    assert isinstance(finding, Head) and finding.host is None and finding.minor == 0


def test_takes_methods_that_it_does_not_know() -> None:
    finding = fed(request("PROPFIND /repo HTTP/1.1", "Host: a.example"))
    assert isinstance(finding, Head) and finding.method == "PROPFIND"


HOST = "Host: a.example"


@pytest.mark.parametrize(
    "data",
    [
        request("GET / HTTP/1.1"),
        request("GET / HTTP/1.1", HOST, HOST),
        request("GET / HTTP/1.1", HOST, "Host: b.example"),
        request("GET / HTTP/1.1", "Host:"),
        request("GET / HTTP/1.1", "Host: a.example, b.example"),
        request("GET / HTTP/1.1", "Host: user@a.example"),
        request("GET / HTTP/1.1", "Host: a.example:"),
        request("GET / HTTP/1.1", "Host: a.example:0"),
        request("GET / HTTP/1.1", "Host: a.example:65536"),
        request("GET / HTTP/1.1", "Host: a.example:080"),
        request("GET / HTTP/1.1", "Host: a.example:80:81"),
        request("GET / HTTP/1.1", "Host: [fd00::1"),
        request("GET / HTTP/1.1", "Host: [a.example]"),
        request("GET / HTTP/1.1", "Host: fd00::1"),
        request("GET / HTTP/1.1", "Host: a.example/b"),
        request("GET / HTTP/1.1", "Host: 0x7f.1"),
        request("GET / HTTP/1.1", "Host: m\xfcnchen.example"),
        request("GET / HTTP/1.0", HOST, HOST),
        request("GET http://a.example/ HTTP/1.1", "Host: b.example"),
        request("GET http://a.example:81/ HTTP/1.1", "Host: a.example:82"),
        request("GET http://a.example:81/ HTTP/1.1", "Host: a.example:80"),
        request("GET http://u:p@a.example/ HTTP/1.1", HOST),
        request("GET http:///x HTTP/1.1", HOST),
        request("GET https://a.example/ HTTP/1.1", HOST),
        request("GET ftp://a.example/ HTTP/1.1", HOST),
        request("GET http://a.example/#f HTTP/1.1", HOST),
        request("GET a.example HTTP/1.1", HOST),
        request("GET * HTTP/1.1", HOST),
        request("CONNECT a.example HTTP/1.1", HOST),
        request("CONNECT a.example:443 HTTP/1.1", "Host: b.example:443"),
        request("CONNECT /x HTTP/1.1", HOST),
        request("GET  / HTTP/1.1", HOST),
        request("GET / HTTP/1.1 ", HOST),
        request("GET\t/ HTTP/1.1", HOST),
        request("GET / x HTTP/1.1", HOST),
        request("GET / HTTP/1.2", HOST),
        request("GET / HTTP/2.0", HOST),
        request("GET / http/1.1", HOST),
        request("GET /\x7f HTTP/1.1", HOST),
        request("GET /\xfc HTTP/1.1", HOST),
        request("GET /", HOST),
        request("get"),
        request("GET / HTTP/1.1", HOST, " folded: x"),
        request("GET / HTTP/1.1", "X: y", " Host: b.example", HOST),
        request("GET / HTTP/1.1", HOST, "X : y"),
        request("GET / HTTP/1.1", HOST, "X"),
        request("GET / HTTP/1.1", HOST, ": y"),
        request("GET / HTTP/1.1", HOST, "X: a\x00b"),
        request("GET / HTTP/1.1", HOST, "X: a\rb"),
        request("GET / HTTP/1.1", HOST, "X: a\nHost: b.example"),
        request("GET / HTTP/1.1", HOST, "X: a\x1bb"),
        b"GET / HTTP/1.1\nHost: a.example\n\n",
        b"GET / HTTP/1.1\r\nHost: a.example\r\nX: y\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a.example\n\r\n\r\n",
        b"GET / HTTP/1.1\r\r\nHost: a.example\r\n\r\n",
        request("POST / HTTP/1.1", HOST, "Content-Length: 3", "Content-Length: 3", body=b"abc"),
        request("POST / HTTP/1.1", HOST, "Content-Length: 3, 3", body=b"abc"),
        request("POST / HTTP/1.1", HOST, "Content-Length: +3", body=b"abc"),
        request("POST / HTTP/1.1", HOST, "Content-Length: 0x3", body=b"abc"),
        request("POST / HTTP/1.1", HOST, "Content-Length: -1"),
        request("POST / HTTP/1.1", HOST, "Content-Length:"),
        request("POST / HTTP/1.1", HOST, "Content-Length: 9999999999999999999"),
        request("POST / HTTP/1.1", HOST, "Content-Length: 3", "Transfer-Encoding: chunked"),
        request("POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked", "Transfer-Encoding: x"),
        request("POST / HTTP/1.1", HOST, "Transfer-Encoding: gzip, chunked"),
        request("POST / HTTP/1.1", HOST, "Transfer-Encoding: xchunked"),
        request("POST / HTTP/1.1", HOST, "Transfer-Encoding: identity"),
        request("POST / HTTP/1.0", HOST, "Transfer-Encoding: chunked"),
    ],
)
def test_refuses_a_request_that_two_readers_could_read_differently(data: bytes) -> None:
    finding = fed(data)
    assert isinstance(finding, Malformed) and finding.protocol is Protocol.HTTP, finding


@pytest.mark.parametrize(
    "data",
    [
        request("POST / HTTP/1.1", HOST, "Content-Length: 3", body=b"abc"),
        request("POST / HTTP/1.1", HOST, "Transfer-Encoding: Chunked", body=b"0\r\n\r\n"),
        request("GET / HTTP/1.1", "hOsT:a.example"),
        request("GET / HTTP/1.1", "Host: \t a.example \t"),
        request("GET /%2e%2e/;x,y HTTP/1.1", HOST, "X: \xfc\t y", "Empty:"),
    ],
)
def test_takes_the_same_requests_written_properly(data: bytes) -> None:
    finding = fed(data)
    assert isinstance(finding, Head) and str(finding.host) == "a.example", finding


def test_refuses_a_head_over_the_limit_before_it_ends() -> None:
    line = b"GET / HTTP/1.1\r\nX: " + b"a" * sniff.HEAD_LIMIT
    assert "over" in malformed(line)
    assert "over" in malformed(b"GET /" + b"a" * sniff.HEAD_LIMIT)


def test_refuses_more_headers_than_the_limit() -> None:
    many = [f"X-{i}: y" for i in range(sniff.HEADERS_LIMIT + 1)]
    assert "headers" in malformed(request("GET / HTTP/1.1", HOST, *many))


def test_a_bare_line_feed_is_refused_while_the_head_is_still_open() -> None:
    sniffer = Sniffer()
    sniffer.feed(b"GET / HTTP/1.1\r\nHost: a.example\n")
    assert isinstance(sniffer.finding, Malformed)


@pytest.mark.parametrize("start", [b"GET / HTT", b"GET / HTTP/1.1\r\nHost: a.exa", b"POST "])
def test_a_head_that_never_ends_is_malformed_not_opaque(start: bytes) -> None:
    sniffer = Sniffer()
    assert sniffer.feed(start) is None
    finding = sniffer.end("the client closed")
    assert isinstance(finding, Malformed) and finding.protocol is Protocol.HTTP


@given(st.binary(max_size=200))
def test_no_bytes_after_a_request_line_break_the_sniffer(data: bytes) -> None:
    finding = fed(b"GET / HTTP/1.1\r\n" + data)
    assert finding is None or isinstance(finding, (Head, Malformed))


# -- everything else


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        b"EHLO me.example\r\n",
        b"NICK me\r\nUSER me\r\n",
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f",  # postgres SSLRequest
        b"\x05\x01\x00",  # SOCKS5
        b"\x80\x2e\x01\x03\x01",  # an SSLv2 hello
        b"\x16\xfe\xfd\x00",  # DTLS
        b"\r\nGET / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"X" * (sniff.METHOD_LIMIT + 1),
    ],
)
def test_anything_else_is_opaque(data: bytes) -> None:
    assert fed(data) == Opaque()


def test_a_silent_client_is_opaque() -> None:
    assert Sniffer().end("nothing more") == Opaque()


@pytest.mark.parametrize("start", [b"\x16", b"SSH-2.0", b"HELLO wor"])
def test_what_may_still_be_anything_is_waited_for_and_opaque_in_the_end(start: bytes) -> None:
    sniffer = Sniffer()
    assert sniffer.feed(start) is None
    assert sniffer.protocol is None
    assert sniffer.end("nothing more") == Opaque()
