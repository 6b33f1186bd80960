"""Finds the heads of requests in what a client sends. Sans I/O: bytes with their offsets in, heads out.

A stream may have holes, for the kernel copies beginnings only. What a hole or a
limit hides is told as an `Unread` with its reason, once for each thing that cannot
be read; nothing of a body, a query or a header's value but the host's is kept.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import hpack

MAX_HEAD = 16384
"""Bytes of one HTTP/1 head."""
MAX_HEADS = 64
"""Heads in one piece of a stream."""
MAX_PATH = 1024
"""Characters of a path that are kept."""
MAX_HOST = 255
MAX_FRAME = 1 << 15
"""Bytes of one HTTP/2 frame with headers."""
MAX_BLOCK = 1 << 16
"""Bytes of the headers of one HTTP/2 request, compressed, and again unpacked."""
MAX_TABLE = 1 << 16
"""Bytes of HPACK's dynamic table."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_FRAME = struct.Struct(">BHBBI")
_HEADERS, _CONTINUATION = 1, 9
_PADDED, _PRIORITY, _END_HEADERS = 0x8, 0x20, 0x4

_START = re.compile(rb"[A-Z][A-Z-]{2,19} [/*A-Za-z0-9\[]")
_START_PART = re.compile(rb"[A-Z][A-Z-]{0,19} ?")
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\xff]+) HTTP/1\.([01])")
_AUTHORITY = re.compile(r"[A-Za-z0-9.:_\[\]%~-]{1,255}")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request as far as it is told."""

    method: str
    host: str  # with its port if one was given; "" where there is none
    path: str  # without query; "" for CONNECT
    http: str
    scheme: str = "https"
    at: int = 0  # offset in the stream; of HTTP/2, of the piece that completed it


@dataclass(frozen=True, slots=True)
class Unread:
    """Something that is not measured, and why."""

    reason: str


Found = Request | Unread

NO_HTTP = "no-http"
HEAD_CUT = "head-cut"
HOLE = "http2-hole"
BAD_HTTP2 = "http2-error"
TOO_MANY = "too-many-heads"


class Http1:
    """Requests of HTTP/1 on one connection, one after the other."""

    def __init__(self) -> None:
        self._head = bytearray()  # what there is of a head
        self._head_at = 0
        self._body_until = 0
        self._lost = False  # nobody knows where the next head begins
        self._told_no_http = False

    def feed(self, offset: int, data: bytes, length: int) -> list[Found]:
        """A piece of `length` bytes, of which `data` are the first."""
        found: list[Found] = []
        if self._head and offset != self._head_at + len(self._head):
            self._give_up(found, HEAD_CUT)
        if self._body_until > offset:
            skip = min(self._body_until - offset, length)
            offset, data, length = offset + skip, data[skip:], length - skip
            if not length:
                return found
        if self._head:
            self._head += data
        elif not self._begin(offset, data, found):
            return found
        self._heads(found)
        if len(data) < length and self._head:
            self._give_up(found, HEAD_CUT)
        return found

    def _begin(self, offset: int, data: bytes, found: list[Found]) -> bool:
        """Whether a head begins with this piece."""
        if _START.match(data) or _START_PART.fullmatch(data):
            self._head_at, self._lost = offset, False
            self._head += data
            return True
        if not self._lost and not self._told_no_http and data.strip(b"\r\n"):
            found.append(Unread(NO_HTTP))
            self._told_no_http = True
        self._lost = True
        return False

    def _heads(self, found: list[Found]) -> None:
        for _ in range(MAX_HEADS):
            end = _END_OF_HEAD.search(self._head, 0, MAX_HEAD)
            if end is None:
                if len(self._head) >= MAX_HEAD or not _may_be_head(self._head):
                    self._give_up(found, HEAD_CUT)
                return
            request, body = _parse(bytes(self._head[: end.start()]), self._head_at)
            if request is None:
                self._give_up(found, NO_HTTP)
                return
            found.append(request)
            del self._head[: end.end()]
            self._head_at += end.end()
            if body is None:
                self._lost = True
                self._head.clear()
                return
            self._body_until = self._head_at + body
            skip = min(body, len(self._head))
            del self._head[:skip]
            self._head_at += skip
            if not self._head:
                return
        self._give_up(found, TOO_MANY)

    def _give_up(self, found: list[Found], reason: str) -> None:
        found.append(Unread(reason))
        self._head.clear()
        self._lost = True


def _may_be_head(head: bytes | bytearray) -> bool:
    """False when a request line is complete and is none, or begins as none can."""
    line, newline, _ = head.partition(b"\n")
    if newline:
        return _REQUEST_LINE.fullmatch(line.rstrip(b"\r")) is not None
    return _START.match(head) is not None or _START_PART.fullmatch(head) is not None


def _parse(head: bytes, at: int) -> tuple[Request | None, int | None]:
    """A request and the length of its body; None for a length that the head does not say."""
    first, *lines = head.splitlines() or [b""]
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        return None, None
    hosts, body, framed = set(), 0, True
    for line in lines:
        name, _, value = line.partition(b":")
        match name.strip().lower():
            case b"host":
                hosts.add(value.strip().decode("latin-1"))
            case b"content-length":
                text = value.strip()
                framed = framed and text.isdigit() and len(text) < 19
                body = int(text) if framed else 0
            case b"transfer-encoding" | b"upgrade":
                framed = False
    method, target = found[1].decode(), found[2].decode("latin-1")
    host = hosts.pop() if len(hosts) == 1 else ""
    if method == "CONNECT":
        host, target, framed = target, "", False
    elif "://" in target[:16]:
        authority, slash, rest = target.partition("://")[2].partition("/")
        host, target = authority, slash + rest or "/"
    request = Request(method, _host(host), _path(target), "1." + found[3].decode(), "https", at)
    return request, body if framed else None


class Http2:
    """Requests of one HTTP/2 connection, from its preface on."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # offset of the end of the buffer
        self._skip = len(PREFACE)  # bytes that need not be seen
        self._block = bytearray()
        self._in_block = False
        self._dead = False
        self._decoder = hpack.Decoder(max_header_list_size=MAX_BLOCK)
        self._decoder.max_allowed_table_size = MAX_TABLE

    def feed(self, offset: int, data: bytes, length: int) -> list[Found]:
        """A piece of `length` bytes, of which `data` are the first."""
        if self._dead:
            return []
        if offset != self._at and not self._pass(offset - self._at):
            return self._die(HOLE)
        self._buffer += data
        self._at = offset + len(data)
        found: list[Found] = []
        while self._step(found):
            if len(found) > MAX_HEADS:
                return found + self._die(TOO_MANY)
        if self._dead:
            return found + [Unread(BAD_HTTP2)]
        if length > len(data) and not self._pass(length - len(data)):
            return found + self._die(HOLE)
        return found

    def _pass(self, hole: int) -> bool:
        """Goes over bytes that are not here; False when they would have been needed."""
        if hole < 0 or self._buffer or hole > self._skip:
            return False
        self._skip -= hole
        self._at += hole
        return True

    def _die(self, reason: str) -> list[Found]:
        self._dead = True
        self._buffer.clear()
        self._block.clear()
        return [Unread(reason)]

    def _step(self, found: list[Found]) -> bool:
        """Takes one thing from the buffer; False when there is none, or nothing more to expect."""
        if self._skip:
            some = min(self._skip, len(self._buffer))
            del self._buffer[:some]
            self._skip -= some
            return not self._skip
        if len(self._buffer) < 9:
            return False
        high, low, kind, flags, _ = _FRAME.unpack_from(self._buffer)
        size = high << 16 | low
        if self._in_block and kind != _CONTINUATION or size > 1 << 24:
            self._dead = True
            return False
        if kind not in (_HEADERS, _CONTINUATION):
            del self._buffer[:9]
            self._skip = size
            return True
        if size > MAX_FRAME or len(self._block) + size > MAX_BLOCK:
            self._dead = True
            return False
        if len(self._buffer) < 9 + size:
            return False
        payload = bytes(self._buffer[9 : 9 + size])
        del self._buffer[: 9 + size]
        self._headers(kind, flags, payload, found)
        return not self._dead

    def _headers(self, kind: int, flags: int, payload: bytes, found: list[Found]) -> None:
        if kind == _HEADERS:
            if flags & _PADDED:
                padding = payload[0] if payload else 0
                payload = payload[1 : max(1, len(payload) - padding)]
            if flags & _PRIORITY:
                payload = payload[5:]
        self._block += payload
        self._in_block = not flags & _END_HEADERS
        if self._in_block:
            return
        block = bytes(self._block)
        self._block.clear()
        try:
            fields = self._decoder.decode(block, raw=True)
        except (hpack.HPACKError, ValueError, IndexError, TypeError):
            self._dead = True
            return
        request = _request(fields, self._at)
        if request is not None:
            found.append(request)


def _request(fields: list[tuple[bytes, bytes]], at: int) -> Request | None:
    """The request of a list of fields; None for trailers."""
    pseudo: dict[bytes, str] = {}
    for name, value in fields:
        if name in (b":method", b":authority", b":path", b":scheme") or name == b"host":
            pseudo.setdefault(bytes(name), bytes(value).decode("latin-1"))
    if b":method" not in pseudo:
        return None
    method = pseudo[b":method"]
    return Request(
        method=method if re.fullmatch(r"[!-~]{1,32}", method) else "?",
        host=_host(pseudo.get(b":authority") or pseudo.get(b"host", "")),
        path=_path(pseudo.get(b":path", "")),
        http="2",
        scheme="http" if pseudo.get(b":scheme") == "http" else "https",
        at=at,
    )


def _host(text: str) -> str:
    """A host as it is told: what can be no authority, and any user and password, is left out."""
    text = text.rpartition("@")[2].lower()
    return text if _AUTHORITY.fullmatch(text) and len(text) <= MAX_HOST else ""


def _path(text: str) -> str:
    path = re.split(r"[?#]", text, maxsplit=1)[0]
    path = "".join(c if "!" <= c <= "~" else f"\\x{ord(c):02x}" for c in path[:MAX_PATH])
    return path[:MAX_PATH]
