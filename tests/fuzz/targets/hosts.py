"""Names of hosts: one canonical form that is its own, and no address under another name."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

from aa.policy.address import place
from aa.policy.host import Host, InvalidHost, canonical_host
from aa.policy.pattern import InvalidPattern, host_pattern

SPELLINGS = (
    "a.example", "A.Example.", "xn--bcher-kva.example", "bücher.example", "_dmarc.a.example",
    "127.0.0.1", "0x7f.1", "2130706433", "127.1", "0177.0.0.1", "::1", "::ffff:10.0.0.1",
    "fe80::1%eth0", "[::1]", "64:ff9b::a00:1", "a..b", "-a.b", "a-.b", "１２７.0.0.1", "127。0。0。1",
    "*.a.example", "**.a.example", "**", "a.example:443", "10.0.0.0/8", "ｅxample.org", "a\u00adb.c",
    "faß.de", "x" * 63 + ".y", "a\u200db.c", "ⓔxample.com", "1.2.3.4.", "0x.0x", "localhost",
)  # fmt: skip
WORDS = tuple(text.encode() for text in ("xn--", "。", "％", "ß", "\u0131", "0x7f", "::ffff:", "ſ"))


def seeds() -> Iterator[bytes]:
    for text in SPELLINGS:
        yield text.encode()


def one(data: bytes) -> None:
    text = data[:600].decode("utf-8", "surrogateescape")
    _pattern(text)
    try:
        host = canonical_host(text)
    except InvalidHost as e:
        assert len(str(e)) < 2000
        return
    assert host.text.isascii() and canonical_host(host.text) == host
    assert host.text == host.text.lower() and not host.text.endswith(".")
    if host.address is None:
        _no_address(host)
    else:
        assert host.address == ipaddress.ip_address(host.text)
        assert place(host.text).text == host.text


def _no_address(host: Host) -> None:
    """What the C library would take for an address must not pass as a name."""
    try:
        socket.inet_aton(host.text)
    except OSError:
        return
    raise AssertionError(f"{host.text!r} is an address to inet_aton")


def _pattern(text: str) -> None:
    try:
        pattern = host_pattern(text)
    except InvalidPattern as e:
        assert isinstance(e.fix, str)
        return
    assert str(host_pattern(str(pattern))) == str(pattern)
    assert pattern.covers(pattern)
    name = pattern.suffix or "a"
    assert pattern.matches(name) is (pattern.depth == 0 or not pattern.suffix)
