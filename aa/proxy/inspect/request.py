"""What one request says, read in one way or refused: the name it is for, and what the policy may see.

Works on what an HTTP reader took apart (of either version), so it needs no sockets and no reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aa.model import Action, Decision, Kind, deny
from aa.policy.host import InvalidHost, canonical_host
from aa.proxy.dial import address_of
from aa.proxy.http1 import HARMLESS_UPGRADES
from aa.proxy.inspect.session import Session
from aa.proxy.sniff import HEADERS_LIMIT, METHOD_LIMIT

PATH_LIMIT = 1 << 15
"""Bytes of a request's target."""
VALUE_LIMIT = 1 << 12
"""Characters of one header's value that go to the gateway; a longer one denies."""

MALFORMED, MISMATCH, UPGRADE = "<malformed-http>", "<name-mismatch>", "<upgrade>"

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")  # no space, no fragment
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]@/?#\\]+)(?::([1-9][0-9]{0,4}))?")

VERSIONS: Mapping[str, str] = {"HTTP/1.0": "1.0", "HTTP/1.1": "1.1", "HTTP/2.0": "2"}

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head as it was read. `authority` is that of HTTP/2 or of a whole URL."""

    version: str
    method: bytes
    scheme: bytes
    authority: bytes
    path: bytes
    fields: Fields

    def values(self, name: bytes) -> list[bytes]:
        return [v for n, v in self.fields if n.lower() == name]

    @property
    def shown(self) -> str:
        """The request for a record: method and path without its query."""
        return f"{_text(self.method[:METHOD_LIMIT])} {_text(_path(self.path)[:1024])}"


@dataclass(frozen=True, slots=True)
class Request:
    """What is decided. `upgrade` says that it asks for a WebSocket."""

    action: Action
    upgrade: bool = False


def looks_like_http(data: bytes) -> bool | None:
    """Whether it begins with a method and a space; None while it may still."""
    method, space, _ = data[: METHOD_LIMIT + 1].partition(b" ")
    if method and not (method.isalpha() and method.isascii() and method.isupper()):
        return False
    if space:
        return bool(method)
    return None if len(data) <= METHOD_LIMIT else False


def judge(head: Head, session: Session) -> Request | Decision:
    """The request as an action, or why it is refused without asking."""
    wrong = _malformed(head) or _other_name(head, session)
    if wrong is not None:
        return wrong
    upgrade = _upgrade(head)
    if isinstance(upgrade, Decision):
        return upgrade
    seen = _seen_headers(head, session.wanted.headers)
    if isinstance(seen, Decision):
        return seen
    attributes: dict[str, Any] = {
        "port": session.port,
        "addresses": [str(a) for a in session.addresses],
        "protocol": session.protocol,
        "method": head.method.decode("ascii"),
        "path": _path(head.path).decode("ascii"),
        "headers": seen,
        "http": VERSIONS[head.version],
    }
    if session.host:
        attributes["host"] = session.host
    return Request(Action(Kind.HTTP_REQUEST, session.target, attributes), upgrade)


def _malformed(head: Head) -> Decision | None:
    if head.version not in VERSIONS:
        return _broken(f"it is of version {head.version[:16]!r}")
    if len(head.method) > METHOD_LIMIT or not _TOKEN.fullmatch(head.method):
        return _broken("its method is no method")
    if head.method.upper() in (b"CONNECT", b"PRI"):
        return deny("CONNECT is served at the explicit proxy port alone", rule="<connect-inside>")
    if len(head.path) > PATH_LIMIT:
        return deny(f"its target is longer than {PATH_LIMIT} bytes", rule="<limit:path>")
    if not _TARGET.fullmatch(head.path) and not (head.path == b"*" and head.method == b"OPTIONS"):
        return _broken("its target is not a path of printable characters")
    if len(head.fields) > HEADERS_LIMIT:
        return deny(f"it has more than {HEADERS_LIMIT} headers", rule="<limit:headers>")
    for name, value in head.fields:
        if not _TOKEN.fullmatch(name):
            return _broken(f"a header is called {_text(name[:40])!r}")
        if not _VALUE.fullmatch(value):
            return _broken(f"the header {_text(name[:40])} has a line end or a control character")
    return _framing(head)


def _framing(head: Head) -> Decision | None:
    """How long the body is must be said once."""
    encodings = head.values(b"transfer-encoding")
    lengths = head.values(b"content-length")
    if encodings and (lengths or head.version != "HTTP/1.1" or len(encodings) > 1):
        return _broken("the length of its body can be read in two ways")
    if encodings and encodings[0].lower() != b"chunked":
        return _broken("its transfer encoding is not chunked")
    if len(lengths) > 1 or not all(re.fullmatch(rb"[0-9]{1,18}", x) for x in lengths):
        return _broken("its length is not one number")
    return None


def _other_name(head: Head, session: Session) -> Decision | None:
    """Every name in the request is the one name of the connection, and there is one."""
    hosts = head.values(b"host")
    if len(hosts) > 1:
        return _broken("it has two Host headers")
    names = [(b"Host", hosts[0])] if hosts else []
    if head.authority:
        names.append((b":authority" if head.version == "HTTP/2.0" else b"URL", head.authority))
    if not names and head.version != "HTTP/1.0":
        return _broken("it names no host")
    expected_scheme = b"https" if session.protocol == "tls" else b"http"
    if head.scheme and head.scheme.lower() != expected_scheme:
        return deny(
            f"the request is for {_text(head.scheme[:16])}, the connection is not", rule=MISMATCH
        )
    for what, name in names:
        wrong = _wrong_name(_text(what), name, session)
        if wrong is not None:
            return wrong
    return None


def _wrong_name(what: str, name: bytes, session: Session) -> Decision | None:
    matched = _AUTHORITY.fullmatch(_text(name)) if name.isascii() else None
    try:
        if matched is None:
            raise InvalidHost("it is no host")
        host = canonical_host(matched[1].removeprefix("[").removesuffix("]"))
    except InvalidHost as e:
        return deny(f"the {what} of the request cannot be read: {e}", rule=MALFORMED)
    usual = 443 if session.protocol == "tls" else 80
    port = int(matched[2]) if matched[2] else usual
    same = str(host) == session.host
    if not session.host:
        same = host.is_address and address_of(str(host)) in session.addresses
    if same and port == session.port:
        return None
    return deny(
        f"the {what} names {host} port {port}, but the connection is for {session.target}",
        rule=MISMATCH,
    )


def _upgrade(head: Head) -> bool | Decision:
    """Whether it asks for a WebSocket. Any other protocol to change to is refused, for we would be
    blind to it; offers that the request is complete without are left out by `outgoing_fields`."""
    offered = [part.strip().lower() for v in head.values(b"upgrade") for part in v.split(b",")]
    wanted = [name for name in offered if name not in HARMLESS_UPGRADES]
    if not wanted:
        return False
    if (
        wanted == [b"websocket"]
        and head.version == "HTTP/1.1"
        and head.method == b"GET"
        and head.values(b"sec-websocket-version") == [b"13"]
        and not head.values(b"transfer-encoding")
        and head.values(b"content-length") in ([], [b"0"])
    ):
        return True
    return deny(f"an upgrade to {_text(wanted[0][:64])!r} is not passed", rule=UPGRADE)


def _seen_headers(head: Head, names: tuple[str, ...]) -> dict[str, str] | Decision:
    """The headers that rules ask for. No other is told to anybody."""
    seen: dict[str, str] = {}
    for name in names:
        values = head.values(name.encode("ascii"))
        if not values:
            continue
        text = ", ".join(_text(v.strip(b" \t")) for v in values)
        if len(text) > VALUE_LIMIT:
            return deny(
                f"the header {name} is longer than {VALUE_LIMIT} characters", rule="<limit:header>"
            )
        seen[name] = text
    return seen


DROPPED = frozenset(
    (
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"sec-websocket-extensions",
        b"te",
        b"trailer",
    )
)
"""Headers of the hop to us, and the compression of WebSocket messages, which must be read."""


def outgoing_fields(head: Head, session: Session, *, upgrade: bool) -> Fields:
    """The headers as the origin gets them: the decided name as Host, nothing of this hop.

    For HTTP/2 there is no Host: the name is the `:authority`.
    """
    dropped = DROPPED if upgrade else DROPPED | {b"upgrade"}
    fields = [(n, v) for n, v in head.fields if n.lower() not in dropped and n.lower() != b"host"]
    if head.version == "HTTP/2.0":
        return tuple(fields)
    if not upgrade:
        tokens = [t.strip().lower() for v in head.values(b"connection") for t in v.split(b",")]
        fields = [(n, v) for n, v in fields if n.lower() != b"connection"]
        if b"close" in tokens:
            fields.append((b"Connection", b"close"))
    had_host = bool(head.values(b"host") or head.authority)
    host = ((b"Host", session.authority.encode("ascii")),) if had_host else ()
    return (*host, *fields)


def _path(target: bytes) -> bytes:
    return target.partition(b"?")[0]


def _broken(why: str) -> Decision:
    return deny(f"the request can be read in two ways: {why}", rule=MALFORMED)


def _text(data: bytes) -> str:
    return data.decode("latin-1")
