"""What a client's first bytes say: a TLS ClientHello, an HTTP/1 head, or something else. No I/O.

A `Sniffer` is fed bytes as they come and answers with one `Finding`. What looks
like TLS or HTTP but breaks their rules is `Malformed`, never "something else":
a name is believed only where it can be read in exactly one way.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from aa.policy.host import Host, InvalidHost, canonical_host

HELLO_LIMIT = 1 << 16
"""Bytes of one ClientHello. Post-quantum key shares and session tickets stay far below."""
RECORDS_LIMIT = 1 << 10
"""TLS records that one ClientHello may be cut into."""
RECORD_LIMIT = 1 << 14
"""Bytes of one plaintext TLS record (RFC 8446, 5.1)."""
HEAD_LIMIT = 1 << 16
"""Bytes of an HTTP head, request line included."""
HEADERS_LIMIT = 256
METHOD_LIMIT = 32
"""Characters before the first space of what may still be a request line."""
LENGTH_DIGITS = 18
"""Digits of a Content-Length: below 2**63."""

HANDSHAKE, CLIENT_HELLO = 0x16, 0x01
SERVER_NAME, ALPN, ECH = 0, 16, 0xFE0D
HOST_NAME = 0

KNOWN_METHODS = frozenset(
    (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT")
)
HTTP2_PREFACE = b"PRI * HTTP/2.0"

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/1\.([01])" % _TOKEN)
_FIELD = re.compile(rb"(%s):[ \t]*([\t\x20-\x7e\x80-\xff]*)" % _TOKEN)
_NOT_TOKEN = re.compile(rb"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_BARE_CR = re.compile(rb"\r(?!\n)")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


class Protocol(enum.StrEnum):
    TLS = "tls"
    HTTP = "http"
    OPAQUE = "opaque"


class Form(enum.StrEnum):
    """The form of an HTTP request target (RFC 9112, 3.2)."""

    ORIGIN = "origin"
    ABSOLUTE = "absolute"
    AUTHORITY = "authority"  # CONNECT alone
    ASTERISK = "asterisk"  # OPTIONS alone


@dataclass(frozen=True, slots=True)
class Hello:
    """A ClientHello. `host` is None when it names no server."""

    host: Host | None
    alpn: tuple[str, ...] = ()
    encrypted: bool = False
    """It carries encrypted_client_hello: a true one or the decoy that browsers always send."""


@dataclass(frozen=True, slots=True)
class Head:
    """An HTTP/1 request head. `host` is None only for HTTP/1.0 without a Host.

    `port` is what the client wrote, None when it wrote none. `path` is the target
    as an origin wants it. `headers` keep their order; names are in lower case.
    """

    method: str
    form: Form
    path: str
    minor: int
    host: Host | None
    port: int | None
    headers: tuple[tuple[str, bytes], ...]
    size: int
    """Bytes of the head within the sniffed bytes; what follows belongs to the body."""

    def header(self, name: str) -> bytes | None:
        """The first value of a header, by its name in lower case."""
        return next((v for n, v in self.headers if n == name), None)


@dataclass(frozen=True, slots=True)
class Opaque:
    """Neither TLS nor HTTP/1; only its address says anything about it."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """It is that protocol and breaks its rules, or names a host in a way we refuse."""

    protocol: Protocol
    reason: str


Finding = Hello | Head | Opaque | Malformed


class _Broken(Exception):
    """Why the bytes are malformed."""


class Sniffer:
    """Feed it until it has a finding. All bytes that it took are in `taken`."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.protocol: Protocol | None = None
        """What the bytes so far can only be; None while anything is possible."""
        self.finding: Finding | None = None
        self._hello = bytearray()
        self._records = 0
        self._at = 0  # TLS: where the next record begins; HTTP: how far was searched
        self._line_seen = False

    def feed(self, data: bytes) -> Finding | None:
        """Takes further bytes; None asks for more. After a finding it only keeps the bytes."""
        self.taken += data
        if self.finding is None and self.taken:
            self.finding = self._look()
        return self.finding

    def end(self, why: str) -> Finding:
        """No more bytes come in time. Says what to take the bytes for that are here."""
        if self.finding is None:
            self.finding = self._unfinished(why)
        return self.finding

    def _unfinished(self, why: str) -> Finding:
        if self.protocol is None or self.protocol is Protocol.OPAQUE:
            return Opaque()
        what = "ClientHello" if self.protocol is Protocol.TLS else "HTTP request head"
        return Malformed(self.protocol, f"the {what} is not complete: {why}")

    def _look(self) -> Finding | None:
        if self.protocol is None:
            self.protocol = _recognise(self.taken)
        if self.protocol is None:
            return None
        if self.protocol is Protocol.OPAQUE:
            return Opaque()
        try:
            if self.protocol is Protocol.TLS:
                return self._look_at_tls()
            return self._look_at_http()
        except _Broken as e:
            return Malformed(self.protocol, str(e))

    # -- TLS

    def _look_at_tls(self) -> Finding | None:
        """Joins handshake records until the ClientHello in them is whole."""
        while len(self.taken) - self._at >= 5:
            kind, major = self.taken[self._at], self.taken[self._at + 1]
            length = int.from_bytes(self.taken[self._at + 3 : self._at + 5], "big")
            if kind != HANDSHAKE or major != 3:
                raise _Broken("the ClientHello is cut by a record that is no handshake")
            if not 0 < length <= RECORD_LIMIT:
                raise _Broken(f"a TLS record says it has {length} bytes")
            if len(self.taken) - self._at - 5 < length:
                break
            self._records += 1
            if self._records > RECORDS_LIMIT:
                raise _Broken(f"the ClientHello is cut into more than {RECORDS_LIMIT} records")
            self._hello += self.taken[self._at + 5 : self._at + 5 + length]
            self._at += 5 + length
            whole = _hello_size(self._hello)
            if whole is not None and len(self._hello) >= whole:
                if len(self._hello) > whole:
                    raise _Broken("other handshake messages follow the ClientHello in its record")
                return parse_hello(bytes(self._hello[4:]))
        return None

    # -- HTTP

    def _look_at_http(self) -> Finding | None:
        """Waits for the whole head; a bare CR or LF in it ends the wait."""
        if not self._line_seen:
            end = self.taken.find(b"\n")
            if end < 0:
                return self._too_long()
            line = bytes(self.taken[:end]).removesuffix(b"\r")
            kind = _kind_of_line(line)
            if kind is Protocol.OPAQUE:
                self.protocol = kind
                return Opaque()
            self.protocol = kind
            self._line_seen = True
        end = self.taken.find(b"\r\n\r\n", max(0, self._at - 3))
        head = self.taken[: end + 4] if end >= 0 else self.taken
        if _BARE_LF.search(head, max(0, self._at - 1)):
            raise _Broken("a line of the request head ends in a bare line feed")
        if end < 0:
            self._at = len(self.taken)
            return self._too_long()
        if end + 4 > HEAD_LIMIT:
            raise _Broken(f"the request head is over {HEAD_LIMIT} bytes")
        return parse_head(bytes(head))

    def _too_long(self) -> Finding | None:
        if len(self.taken) > HEAD_LIMIT:
            raise _Broken(f"the request head is over {HEAD_LIMIT} bytes")
        return None


def _recognise(data: bytearray) -> Protocol | None:
    """What the first bytes can only be. HTTP here means "wait for the first line"."""
    if data[0] == HANDSHAKE:
        if len(data) < 2:
            return None
        return Protocol.TLS if data[1] == 3 else Protocol.OPAQUE
    stop = _NOT_TOKEN.search(data, 0, METHOD_LIMIT + 1)
    if stop is None:
        return Protocol.OPAQUE if len(data) > METHOD_LIMIT else None
    if bytes(data[: stop.start()]).upper() in KNOWN_METHODS:
        return Protocol.HTTP
    if stop.start() == 0 or stop.group() != b" ":
        return Protocol.OPAQUE
    end = data.find(b"\n", 0, HEAD_LIMIT)
    if end < 0:
        return None if len(data) <= HEAD_LIMIT else Protocol.OPAQUE
    return _kind_of_line(bytes(data[:end]).removesuffix(b"\r"))


def _kind_of_line(line: bytes) -> Protocol:
    """Whether a first line means to be an HTTP/1 request, however badly."""
    if line == HTTP2_PREFACE:
        return Protocol.OPAQUE
    first = _NOT_TOKEN.split(line, maxsplit=1)[0]
    if first.upper() in KNOWN_METHODS or b"HTTP/" in line.upper():
        return Protocol.HTTP
    return Protocol.OPAQUE


def _hello_size(message: bytearray) -> int | None:
    """Bytes of the handshake message, its four of header with them; None while not known."""
    if not message:
        return None
    if message[0] != CLIENT_HELLO:
        raise _Broken("the first handshake message is not a ClientHello")
    if len(message) < 4:
        return None
    size = 4 + int.from_bytes(message[1:4], "big")
    if size > HELLO_LIMIT:
        raise _Broken(f"the ClientHello is over {HELLO_LIMIT} bytes")
    return size


class _Bytes:
    """Reads length-prefixed fields; every shortage and every rest is an error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        if len(self._data) - self._at < count:
            raise _Broken("a field of the ClientHello is longer than what holds it")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))

    def end(self) -> None:
        if self:
            raise _Broken("bytes are left over in the ClientHello")


def parse_hello(body: bytes) -> Hello | Malformed:
    """A ClientHello without its handshake header (RFC 8446, 4.1.2; RFC 6066, 3)."""
    try:
        return _parse_hello(body)
    except _Broken as e:
        return Malformed(Protocol.TLS, str(e))


def _parse_hello(body: bytes) -> Hello:
    fields = _Bytes(body)
    fields.take(2 + 32)  # legacy_version, random
    fields.vector(1)  # legacy_session_id
    fields.vector(2)  # cipher_suites
    fields.vector(1)  # legacy_compression_methods
    if not fields:
        return Hello(None)
    extensions = _Bytes(fields.vector(2))
    fields.end()
    found: dict[int, bytes] = {}
    while extensions:
        kind, data = extensions.number(2), extensions.vector(2)
        if kind in found:
            raise _Broken(f"extension {kind} is there twice")
        found[kind] = data
    return Hello(
        host=_server_name(found[SERVER_NAME]) if SERVER_NAME in found else None,
        alpn=_protocols(found[ALPN]) if ALPN in found else (),
        encrypted=ECH in found,
    )


def _server_name(data: bytes) -> Host:
    fields = _Bytes(data)
    entries = _Bytes(fields.vector(2))
    fields.end()
    kind, name = entries.number(1), entries.vector(2)
    if kind != HOST_NAME:
        raise _Broken(f"server_name has an entry of type {kind}")
    if entries:
        raise _Broken("server_name has more than one entry")
    host = _host(name, "SNI")
    if host.is_address:
        raise _Broken(f"the SNI is an IP address ({host})")
    return host


def _protocols(data: bytes) -> tuple[str, ...]:
    fields = _Bytes(data)
    entries = _Bytes(fields.vector(2))
    fields.end()
    names = []
    while entries:
        names.append(entries.vector(1).decode("latin-1"))
    return tuple(names)


def _host(raw: bytes, what: str) -> Host:
    try:
        return canonical_host(raw.decode("ascii"))
    except UnicodeDecodeError:
        raise _Broken(f"the {what} is not ASCII") from None
    except InvalidHost as e:
        raise _Broken(f"the {what} names no host: {e}") from None


def parse_head(data: bytes) -> Head | Malformed:
    """A request head with the empty line at its end, as strict as RFC 9112 allows."""
    try:
        return _parse_head(data)
    except _Broken as e:
        return Malformed(Protocol.HTTP, str(e))


def _parse_head(data: bytes) -> Head:
    if _BARE_CR.search(data):
        raise _Broken("the request head holds a bare carriage return")
    first, *lines = data[:-4].split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise _Broken("the request line is not `METHOD target HTTP/1.1`")
    method, target, minor = match[1].decode(), match[2].decode(), int(match[3])
    headers = _fields(lines)
    _check_framing(headers, minor)
    form, named, path = _target(method, target)
    claimed = _claimed_host(headers, minor)
    if named is not None and claimed is not None and not _agree(named, claimed):
        raise _Broken(f"the request target names {_text(named)}, its Host {_text(claimed)}")
    host, port = named or claimed or (None, None)
    return Head(method, form, path, minor, host, port, headers, len(data))


def _fields(lines: list[bytes]) -> tuple[tuple[str, bytes], ...]:
    if len(lines) > HEADERS_LIMIT:
        raise _Broken(f"more than {HEADERS_LIMIT} headers")
    headers = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise _Broken("a header line is malformed (folded, spaced or with control characters)")
        headers.append((match[1].decode().lower(), match[2].rstrip(b" \t")))
    return tuple(headers)


def _check_framing(headers: tuple[tuple[str, bytes], ...], minor: int) -> None:
    """The body's length can be read in one way only."""
    lengths = [v for n, v in headers if n == "content-length"]
    codings = [v for n, v in headers if n == "transfer-encoding"]
    if len(lengths) + len(codings) > 1:
        raise _Broken("the length of the body is given more than once")
    if lengths and (not lengths[0].isdigit() or len(lengths[0]) > LENGTH_DIGITS):
        raise _Broken("Content-Length is not a number")
    if codings and (codings[0].lower() != b"chunked" or minor == 0):
        raise _Broken("Transfer-Encoding is something else than chunked in HTTP/1.1")


Authority = tuple[Host, int | None]


def _target(method: str, target: str) -> tuple[Form, Authority | None, str]:
    """The form of a request target, the authority it names, and its path."""
    if method == "CONNECT":
        authority = _authority(target, "CONNECT target")
        if authority[1] is None:
            raise _Broken("the CONNECT target has no port")
        return Form.AUTHORITY, authority, ""
    if target.startswith("/"):
        return Form.ORIGIN, None, target
    if target == "*" and method == "OPTIONS":
        return Form.ASTERISK, None, "*"
    scheme, found, rest = target.partition("://")
    if not found or scheme.lower() != "http":
        raise _Broken("the request target is neither a path nor an http:// URL")
    named = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path = rest[len(named) :]
    if "#" in path:
        raise _Broken("the request target has a fragment")
    if not path.startswith("/"):
        path = "/" + path
    return Form.ABSOLUTE, _authority(named, "request target"), path


def _claimed_host(headers: tuple[tuple[str, bytes], ...], minor: int) -> Authority | None:
    hosts = [v for n, v in headers if n == "host"]
    if len(hosts) > 1 or (minor == 1 and not hosts):
        raise _Broken(f"{len(hosts)} Host headers where one is needed")
    if not hosts:
        return None
    try:
        return _authority(hosts[0].decode("ascii"), "Host")
    except UnicodeDecodeError:
        raise _Broken("the Host is not ASCII") from None


def _authority(text: str, what: str) -> Authority:
    """`name`, `name:port`, `1.2.3.4:port` or `[v6]:port`; nothing else, no user, no empty port."""
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in name or (rest and not rest.startswith(":")):
            raise _Broken(f"the {what} names no host")
        port = rest[1:] if rest else None
    else:
        name, colon, rest = text.partition(":")
        port = rest if colon else None
    if port is not None and (not _PORT.fullmatch(port) or int(port) > 65535):
        raise _Broken(f"the {what} has a port that is none")
    host = _host(name.encode(), what)
    if text.startswith("[") and not host.is_address:
        raise _Broken(f"the {what} names no host")
    return host, None if port is None else int(port)


def _agree(a: Authority, b: Authority) -> bool:
    """Same host, and no two different ports."""
    return a[0] == b[0] and (a[1] or b[1] or 80) == (b[1] or a[1] or 80)


def _text(authority: Authority) -> str:
    host, port = authority
    return str(host) if port is None else f"{host}:{port}"
