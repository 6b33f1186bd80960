"""Patterns of names: of hosts by labels, of tools and argument values as globs.

Matching takes time proportional to pattern times text at worst, whatever either says.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from aa.policy.host import InvalidHost, canonical_host

PUBLIC_SUFFIXES = frozenset(
    """
    ac.uk co.uk gov.uk org.uk com.au net.au org.au co.jp ne.jp or.jp com.br com.cn net.cn org.cn
    co.in co.kr co.nz co.za com.mx com.tr com.sg com.hk com.tw com.ar com.ua co.il
    github.io githubusercontent.com gitlab.io herokuapp.com appspot.com run.app web.app
    firebaseapp.com cloudfunctions.net vercel.app netlify.app pages.dev workers.dev r2.dev
    fly.dev onrender.com railway.app deno.dev surge.sh glitch.me repl.co replit.app
    cloudfront.net amazonaws.com elasticbeanstalk.com azurewebsites.net azureedge.net
    cloudapp.net trafficmanager.net windows.net blob.core.windows.net
    ngrok.io ngrok.app ngrok-free.app trycloudflare.com loca.lt duckdns.org ddns.net
    blogspot.com wordpress.com hf.space streamlit.app
    """.split()
)
"""Suffixes of two and more labels below which anybody can have a name. Every single label counts
as one too. It is a short list of the usual ones, not the whole Public Suffix List."""


class Depth(enum.IntEnum):
    """What stands before the suffix of a host pattern."""

    EXACT = 0  # nothing
    ONE = 1  # `*.`: one label
    ANY = 2  # `**.`: one label or more; alone: every name


class InvalidPattern(ValueError):
    """The pattern means nothing; `fix` says what to write."""

    def __init__(self, message: str, fix: str = "") -> None:
        self.fix = fix
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class HostPattern:
    """`a.example` is EXACT, `*.a.example` ONE, `**.a.example` ANY, `**` ANY with suffix ""."""

    depth: Depth
    suffix: str

    def matches(self, name: str) -> bool:
        if self.depth is Depth.EXACT:
            return name == self.suffix
        if not self.suffix:
            return True
        if not name.endswith("." + self.suffix):
            return False
        return self.depth is Depth.ANY or "." not in name[: -len(self.suffix) - 1]

    def covers(self, other: HostPattern) -> bool:
        """Whether every name that the other matches is matched by this one."""
        if self.depth is Depth.ANY and (
            not self.suffix or other.suffix.endswith("." + self.suffix)
        ):
            return True
        if self.suffix == other.suffix:
            # The apex is EXACT alone; ANY and ONE do not match it.
            return self.depth == other.depth or (
                self.depth is Depth.ANY and other.depth is Depth.ONE
            )
        return other.depth is Depth.EXACT and self.matches(other.suffix)

    @property
    def wide(self) -> bool:
        """Whether it spans names of people who have nothing to do with each other."""
        if self.depth is Depth.EXACT or not self.suffix:
            return False
        return "." not in self.suffix or self.suffix in PUBLIC_SUFFIXES

    def __str__(self) -> str:
        stars = "*" * self.depth
        return ".".join(part for part in (stars, self.suffix) if part)


def host_pattern(text: str) -> HostPattern:
    """Reads a pattern of host names. Raises InvalidPattern."""
    if text == "**":
        return HostPattern(Depth.ANY, "")
    if text == "*":
        raise InvalidPattern("'*' alone is not a pattern", "'**' is every name")
    depth, rest = Depth.EXACT, text
    for stars, meaning in (("**.", Depth.ANY), ("*.", Depth.ONE)):
        if text.startswith(stars):
            depth, rest = meaning, text[len(stars) :]
            break
    if "*" in rest or "?" in rest:
        raise InvalidPattern(
            f"{text!r} has a wildcard inside", "write *.NAME, **.NAME, or ** for every name"
        )
    if "/" in rest:
        fix = "put it into cidrs" if _is_network(rest) else "write the name of the host alone"
        raise InvalidPattern(f"{text!r} is not a host's name", fix)
    try:
        host = canonical_host(rest)
    except InvalidHost as e:
        raise InvalidPattern(str(e), _host_fix(rest)) from e
    if host.is_address:
        raise InvalidPattern(f"{text!r} is an address, not a name", f"put it into cidrs: {host}")
    return HostPattern(depth, host.text)


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _host_fix(text: str) -> str:
    name, colon, port = text.rpartition(":")
    if colon and port.isdecimal():
        return f'write hosts = ["{name}"], ports = [{port}]'
    return "write a name such as example.org"


Matcher = Callable[[str], bool]


def is_glob(pattern: str) -> bool:
    return "*" in pattern or "?" in pattern


def glob(pattern: str) -> Matcher:
    """A matcher for the whole of a text: `*` is any characters, `?` one; case counts."""
    if not is_glob(pattern):
        return pattern.__eq__
    head, *rest = pattern.split("*")
    if not rest:
        whole = _segment(head)
        return lambda text: len(text) == len(head) and whole.match(text) is not None
    first, last = _segment(head), _segment(rest[-1])
    middle = [_segment(part) for part in rest[:-1] if part]
    tail = len(rest[-1])

    def matches(text: str) -> bool:
        if first.match(text) is None:
            return False
        at = len(head)
        # The first place where a part fits leaves the most for those behind it.
        for part in middle:
            found = part.search(text, at)
            if found is None:
                return False
            at = found.end()
        return len(text) - tail >= at and last.match(text, len(text) - tail) is not None

    return matches


def _segment(part: str) -> re.Pattern[str]:
    return re.compile("".join("." if c == "?" else re.escape(c) for c in part), re.DOTALL)


def literal_prefix(pattern: str) -> str:
    """The characters before a glob's first wildcard."""
    return re.split(r"[*?]", pattern, maxsplit=1)[0]
