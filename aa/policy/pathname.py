"""Paths: of files and programs as rules write them, and of HTTP requests in their one normal form.

Matching takes time proportional to pattern times path at worst, whatever either says.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from aa.policy.pattern import InvalidPattern, Matcher, glob

CACHE_SIZE = 4096
CACHED_LENGTH = 256
"""Characters of a request's path that is worth remembering."""
PATH_LIMIT = 8192
"""Characters of a request's path; a longer one is ambiguous."""

DEEP = "**"


class AmbiguousPath(ValueError):
    """A server could read the path in another way than the policy; the message says why."""


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A path with wildcards: `*` within one component, `**` for any number of components.

    At the end `**` is one or more: `/a/**` is all below /a. In a deny rule (`whole`) it is /a as well.
    A pattern below `~` is compared with what lies below the run's home.
    """

    text: str
    home: bool
    literal: tuple[str, ...]
    """The components before the first wildcard."""
    runs: tuple[tuple[Matcher, ...], ...]
    """Those from there on, split where a `**` stands; () for a pattern without wildcards."""
    whole: bool

    def matches(self, parts: Sequence[str]) -> bool:
        """Whether it matches a path that is given by its components."""
        n = len(self.literal)
        if len(parts) < n or tuple(parts[:n]) != self.literal:
            return False
        if not self.runs:
            return len(parts) == n
        return _matches(self.runs, parts, n, self.whole)

    def covers(self, other: PathPattern) -> bool:
        """Whether it is sure to match whatever the other one does."""
        if self.home != other.home:
            return False
        if self.text == other.text:
            return self.whole or not other.whole
        if not other.runs:
            return self.matches(other.literal)
        deep = self.runs == ((), ())
        n = len(self.literal)
        return deep and other.literal[:n] == self.literal and (self.whole or not other.whole)

    def __str__(self) -> str:
        return self.text


def _matches(
    runs: tuple[tuple[Matcher, ...], ...], parts: Sequence[str], at: int, whole: bool
) -> bool:
    """Between two `**` the first place where a run fits leaves the most for those behind it."""
    first, *deeper = runs
    if not _fits(first, parts, at):
        return False
    at += len(first)
    if not deeper:
        return at == len(parts)
    *middle, last = deeper
    for run in middle:
        while not _fits(run, parts, at):
            at += 1
            if at + len(run) > len(parts):
                return False
        at += len(run)
    least = 0 if last or whole else 1
    end = len(parts) - len(last)
    return end - at >= least and _fits(last, parts, end)


def _fits(run: Sequence[Matcher], parts: Sequence[str], at: int) -> bool:
    return at + len(run) <= len(parts) and all(test(parts[at + n]) for n, test in enumerate(run))


def components(path: str) -> tuple[str, ...]:
    """`/a/b` is a and b; `/a/` has an empty one at its end, and `/` is an empty one."""
    return tuple(path[1:].split("/"))


def file_pattern(text: str, *, whole: bool) -> PathPattern:
    """Reads a pattern of files: absolute or below `~/`. Raises InvalidPattern."""
    home = text.startswith("~/")
    if not home and not text.startswith("/"):
        raise InvalidPattern(f"{text!r} is neither absolute nor below ~/", "write /NAME or ~/NAME")
    if "?" in text:
        raise InvalidPattern(f"{text!r} has a ?", "a * stands for characters of one component")
    path = text[1:] if home else text
    if path.startswith("//") or posixpath.normpath(path) != path:
        raise InvalidPattern(
            f"{text!r} is not in its normal form", "no . or .., no // and no / at the end"
        )
    return _pattern(text, path, home=home, whole=whole)


def request_pattern(text: str, *, whole: bool, slash: bool = True) -> PathPattern:
    """Reads a pattern of request paths. Without `slash` one at its end says nothing: most servers
    take /a/ for /a, so a denial does. Raises InvalidPattern.
    """
    if not text.startswith("/"):
        raise InvalidPattern(f"{text!r} does not begin with /", f"write /{text}")
    if "?" in text or "#" in text:
        fix = "write the path alone; the query is not matched"
        raise InvalidPattern(f"{text!r} has a query or a fragment", fix)
    if "%" in text:
        raise InvalidPattern(f"{text!r} has a %", "write the character itself")
    try:
        _check(text, _NEVER_DECODED)
    except AmbiguousPath as e:
        raise InvalidPattern(
            f"{text!r}: {e}; no request with such a path is decided", "correct it"
        ) from e
    path = text if slash or text == "/" else text.removesuffix("/")
    return _pattern(text, path, home=False, whole=whole)


def _pattern(text: str, path: str, *, home: bool, whole: bool) -> PathPattern:
    parts = components(path)
    if any(DEEP in part and part != DEEP for part in parts):
        raise InvalidPattern(
            f"{text!r} has ** inside a component", "** stands alone between slashes"
        )
    first = next((n for n, part in enumerate(parts) if "*" in part), len(parts))
    runs: list[tuple[Matcher, ...]] = [()] if first < len(parts) else []
    for part in parts[first:]:
        if part == DEEP:
            runs.append(())
        else:
            runs[-1] += (glob(part),)
    return PathPattern(text, home, parts[:first], tuple(runs), whole)


# -- the path of a request ---------------------------------------------------------------------

_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9._~!$&'()*+,=:@-]*)*/?")
"""Paths that are in their normal form as they are; most are."""
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_NEVER_SENT = re.compile(r"[\x00-\x20\x7f\\;#?]")
_NEVER_DECODED = re.compile(r"[\x00-\x1f\x7f\\;]")
_HIDDEN = frozenset(b"/\\.%;\x00")
"""What must not be written as %XX: it would mean something else to a server that decodes twice
or after it has split the path."""


ReadPath = tuple[str, tuple[str, ...], str]


def read_path(raw: str) -> ReadPath:
    """A request's path in its normal form and its components; or "", none, and why it is ambiguous."""
    return _remembered(raw) if len(raw) <= CACHED_LENGTH else _read(raw)


def _read(raw: str) -> ReadPath:
    try:
        path = normal_path(raw)
    except AmbiguousPath as e:
        return "", (), str(e)
    return path, components(path), ""


_remembered = functools.lru_cache(maxsize=CACHE_SIZE)(_read)


def normal_path(raw: str) -> str:
    """The one form of a request's path that rules compare with: decoded, in UTF-8.

    `raw` is the path as received, without its query. Raises AmbiguousPath.
    """
    if len(raw) > PATH_LIMIT:
        raise AmbiguousPath(f"it is longer than {PATH_LIMIT} characters")
    if raw and _PLAIN.fullmatch(raw):
        return raw
    if not raw.startswith("/"):
        raise AmbiguousPath("it does not begin with /")
    if not raw.isascii():
        raise AmbiguousPath("it has a character that is not ASCII and not encoded")
    _check(raw, _NEVER_SENT)
    if "%" not in raw:
        return raw
    return _decoded(raw)


def _decoded(raw: str) -> str:
    decoded = bytearray()
    at = 0
    for escape in _ESCAPE.finditer(raw):
        if escape[1] is None:
            raise AmbiguousPath("it has a % that is not followed by two hex digits")
        byte = int(escape[1], 16)
        if byte in _HIDDEN or byte < 0x20 or byte == 0x7F:
            raise AmbiguousPath(f"it has {escape[0]}, an encoded {chr(byte)!r}")
        decoded += raw[at : escape.start()].encode("ascii")
        decoded.append(byte)
        at = escape.end()
    decoded += raw[at:].encode("ascii")
    try:
        return decoded.decode("utf-8")
    except UnicodeDecodeError:
        raise AmbiguousPath("what it encodes is not UTF-8") from None


def _check(path: str, unsafe: re.Pattern[str]) -> None:
    found = unsafe.search(path)
    if found is not None:
        raise AmbiguousPath(f"it has the character {found[0]!r}")
    if "//" in path:
        raise AmbiguousPath("it has an empty segment")
    if any(part in (".", "..") for part in path.split("/")):
        raise AmbiguousPath("it has a dot segment")
