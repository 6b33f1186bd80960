"""Reads TOML files that decide about security: strictly, and with errors a person can act on.

Every finding names file, line and key, says what is wrong in plain words and
what to do. A file that others may write, that is too large or that uses an
unknown key is not read in part: it is refused.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import hashlib
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aa import fits

if TYPE_CHECKING:
    import jsonschema

Json = Any
KeyPath = tuple[str | int, ...]

SIZE_LIMIT = 4 << 20
"""Bytes of one file. 10,000 rules are about 2 MiB."""
DEPTH_LIMIT = 24
"""Levels of tables and arrays in one file."""
PROBLEM_LIMIT = 100
"""Problems reported for one file; the rest is counted."""
INTEGER_LIMIT = 2**63
SHOWN_VALUE = 60
"""Characters of a wrong value that are repeated in a message."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a file. `line` is 1 for what concerns the whole file."""

    file: str
    line: int
    key: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: "
        key = f"{self.key}: " if self.key else ""
        fix = f" ({self.fix})" if self.fix else ""
        return f"{place}{key}{self.message}{fix}"

    def as_json(self) -> dict[str, Json]:
        return {
            "file": self.file,
            "line": self.line,
            "key": self.key,
            "message": self.message,
            "fix": self.fix,
        }


class InvalidFile(ValueError):
    """One or more files cannot be used; `problems` says why, in the order of the files."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


@dataclass(frozen=True)
class Document:
    """A file that was read: its values and where each of them stands."""

    file: str
    data: Mapping[str, Json]
    digest: str
    """SHA-256 of the file's bytes, in hex."""
    text: str = field(repr=False, compare=False)

    @functools.cached_property
    def lines(self) -> Mapping[KeyPath, int]:
        """The line of every key and list element; looked for when first needed."""
        return _Locator(self.text).lines()

    def line(self, path: Sequence[str | int]) -> int:
        """The line of a key, or of the nearest table around it."""
        key = tuple(path)
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def problem(self, path: Sequence[str | int], message: str, fix: str = "") -> Problem:
        return Problem(self.file, self.line(path), dotted(path), message, fix)


def load(
    path: Path, schema: Mapping[str, Json], *, owners: Collection[int] | None = None
) -> Document:
    """Reads, parses and validates. Raises InvalidFile, or FileNotFoundError."""
    document = parse(read(path, owners=owners), file=str(path))
    problems = validate(document, schema)
    if problems:
        raise InvalidFile(problems)
    return document


def read(path: Path, *, owners: Collection[int] | None = None, limit: int = SIZE_LIMIT) -> bytes:
    """The bytes of a file that only its rightful owners can have written.

    `owners` are the user ids the file and its directory may belong to: root and
    the caller unless said otherwise. A symbolic link must stay in the file's own directory.
    """
    allowed = {0, os.geteuid()} if owners is None else set(owners)
    try:
        real = _real_path(path)
        _refuse_foreign(path, os.stat(real.parent), allowed, what=f"its directory {real.parent}")
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise InvalidFile([_whole(path, f"cannot be read: {reason}", "make it readable")]) from e
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InvalidFile([_whole(path, "is not a regular file", "replace it by a file")])
    with os.fdopen(descriptor, "rb") as stream:
        _refuse_foreign(path, status, allowed, what="it")
        try:
            content = stream.read(limit + 1)
        except OSError as e:
            raise InvalidFile([_whole(path, f"cannot be read: {e.strerror}")]) from e
    if len(content) > limit:
        raise InvalidFile([_whole(path, f"is larger than {limit} bytes", "split it")])
    return content


def parse(content: bytes | str, *, file: str, any_number: bool = False) -> Document:
    """Parses TOML. Raises InvalidFile with the line of what is wrong.

    With `any_number`, NaN, infinities and integers above 64 bits are values like others.
    """
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        problem = Problem(file, line, "", "is not UTF-8 text", "save it as UTF-8")
        raise InvalidFile([problem]) from e
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InvalidFile([Problem(file, line, "", "contains a NUL character", "remove it")])
    try:
        data = tomllib.loads(text)
    except RecursionError as e:
        raise InvalidFile([Problem(file, 1, "", "is nested too deeply", "flatten it")]) from e
    except ValueError as e:
        raise InvalidFile([_syntax(file, text, str(e))]) from e
    if not _depth_within(data, DEPTH_LIMIT):
        message = f"is nested more than {DEPTH_LIMIT} levels deep"
        raise InvalidFile([Problem(file, 1, "", message, "flatten it")])
    document = Document(file, data, hashlib.sha256(raw).hexdigest(), text)
    odd = [] if any_number else list(_odd_numbers(document))
    if odd:
        raise InvalidFile(odd[:PROBLEM_LIMIT])
    return document


def validate(document: Document, schema: Mapping[str, Json]) -> list[Problem]:
    """What a JSON Schema has against a document, in the order of its lines.

    Annotations of ours in a schema: `x-not-built` (what is not there yet, in words),
    `x-not-built-values` (the same for values) and `x-says` (what a `pattern` means).
    """
    text = json.dumps(schema)
    if _fits(text)(document.data):
        return []
    found: list[Problem] = []
    for error in _validator(text).iter_errors(dict(document.data)):
        found.extend(_problems_of(document, error))
        if len(found) > 4 * PROBLEM_LIMIT:
            break
    if not found:  # the two disagree: what one of them refuses is refused
        found.append(document.problem((), "does not fit its schema", "compare it with the docs"))
    unique = sorted(dict.fromkeys(found), key=lambda p: (p.line, p.key, p.message))
    if len(unique) > PROBLEM_LIMIT:
        rest = Problem(document.file, 1, "", f"more than {PROBLEM_LIMIT} problems in this file")
        return [*unique[:PROBLEM_LIMIT], rest]
    return unique


@functools.cache
def schema(name: str) -> Mapping[str, Json]:
    """A JSON Schema that ships with this package: `config`, `agent`, `policy`."""
    text = resources.files("aa").joinpath("schema", f"{name}.json").read_text("utf-8")
    loaded: Mapping[str, Json] = json.loads(text)
    return loaded


def dotted(path: Sequence[str | int]) -> str:
    """A key as people write it: `rule[2].network.hosts[0]`. Lists count from 0."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part)
            text += f".{name}" if text else name
    return text


def did_you_mean(word: str, known: Collection[str]) -> str:
    """A fix for a misspelt word."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(sorted(known)) if known else ""


# -- reading ---------------------------------------------------------------------------------


def _whole(path: Path, message: str, fix: str = "") -> Problem:
    return Problem(str(path), 1, "", message, fix)


def _real_path(path: Path) -> Path:
    directory = path.parent.resolve(strict=True)
    real = (directory / path.name).resolve(strict=True)
    if not real.is_relative_to(directory):
        raise ValueError(f"it is a link that leaves its directory, to {real}")
    return real


def _refuse_foreign(path: Path, status: os.stat_result, owners: set[int], *, what: str) -> None:
    if status.st_uid not in owners:
        names = " or ".join(str(uid) for uid in sorted(owners))
        message = f"{what} belongs to user {status.st_uid}, not to user {names}"
        raise InvalidFile([_whole(path, message, "chown it to root")])
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # In a sticky directory nobody can replace what is not his own.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if others and not sticky:
        message = f"{what} can be written by its group or by others"
        raise InvalidFile([_whole(path, message, "chmod go-w it")])


# -- syntax ----------------------------------------------------------------------------------


def _syntax(file: str, text: str, message: str) -> Problem:
    place = re.search(r"\(at line (\d+), column (\d+)\)", message)
    words = re.sub(r"\s*\(at [^()]*\)", "", message).strip()
    line = int(place[1]) if place else 1
    if "Cannot overwrite a value" in words or "declare" in words:
        fix = "a key or table may be given once"
    elif text.startswith("\ufeff"):
        fix = "save it without a byte order mark"
    else:
        fix = "see https://toml.io; texts need quotes, lists need [ ]"
    return Problem(file, line, "", f"is not valid TOML: {words}", fix)


def _depth_within(data: Json, limit: int) -> bool:
    level = [data]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return True
    return False


def _children(node: Json) -> Collection[Json]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _odd_numbers(document: Document) -> Iterator[Problem]:
    """NaN, infinities and integers above 64 bits compare in surprising ways: none has a use here."""
    for path, value in _walk(document.data, ()):
        if isinstance(value, float) and not math.isfinite(value):
            yield document.problem(path, f"{value} is not a number to compare with", "remove it")
        elif isinstance(value, int) and not -INTEGER_LIMIT <= value < INTEGER_LIMIT:
            yield document.problem(path, "does not fit into 64 bits", "use a smaller number")


def _walk(node: Json, path: KeyPath) -> Iterator[tuple[KeyPath, Json]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, (*path, index))
    else:
        yield path, node


class _Locator:
    """Finds the line of every key and list element in text that tomllib has accepted.

    Because the text is known to be valid, it only needs to know where strings,
    brackets and keys begin and end.
    """

    _BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
    _SPACE = re.compile(r"[ \t]*")
    _BARE = re.compile(r"[A-Za-z0-9_-]+")
    _BASIC = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
    _LITERAL = re.compile(r"'([^'\n]*)'")
    # Up to two quotation marks may stand directly before the closing three.
    _LONG_BASIC = re.compile(r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})', re.DOTALL)
    _LONG_LITERAL = re.compile(r"'''.*?'''(?:'{0,2})", re.DOTALL)
    _SCALAR = re.compile(r"[^,\]}#\n]*")

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [m.start() for m in re.finditer("\n", text)]
        self._lines: dict[KeyPath, int] = {}
        self._last: dict[KeyPath, int] = {}  # array of tables -> index of its latest table

    def lines(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._skip(self._BLANK)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(self._BLANK)
        return self._lines

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise AssertionError(f"no {pattern.pattern} at {self._at}")
        self._at = match.end()
        return match[0]

    def _mark(self, path: KeyPath, at: int) -> None:
        self._lines.setdefault(path, bisect.bisect_left(self._newlines, at) + 1)

    def _header(self) -> KeyPath:
        start = self._at
        many = self._text.startswith("[[", start)
        self._at += 2 if many else 1
        names = self._key()
        self._at += 2 if many else 1
        path: KeyPath = ()
        for position, name in enumerate(names):
            path += (name,)
            self._mark(path, start)
            if many and position == len(names) - 1:
                self._last[path] = self._last.get(path, -1) + 1
            if path in self._last:
                path += (self._last[path],)
                self._mark(path, start)
        return path

    def _key(self) -> list[str]:
        names = []
        while True:
            self._skip(self._SPACE)
            names.append(self._name())
            self._skip(self._SPACE)
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _name(self) -> str:
        first = self._text[self._at]
        if first == '"':
            # The only escapes that matter are those tomllib decodes too.
            quoted = self._skip(self._BASIC)
            return str(tomllib.loads(f"k = {quoted}")["k"])
        if first == "'":
            return self._skip(self._LITERAL)[1:-1]
        return self._skip(self._BARE)

    def _pair(self, table: KeyPath) -> None:
        start = self._at
        path = table
        for name in self._key():
            path += (name,)
            self._mark(path, start)
        self._at += 1  # "="
        self._skip(self._SPACE)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        text, at = self._text, self._at
        self._mark(path, at)
        if text[at] == "[":
            self._array(path)
        elif text[at] == "{":
            self._inline_table(path)
        elif text.startswith('"""', at):
            self._skip(self._LONG_BASIC)
        elif text.startswith("'''", at):
            self._skip(self._LONG_LITERAL)
        elif text[at] == '"':
            self._skip(self._BASIC)
        elif text[at] == "'":
            self._skip(self._LITERAL)
        else:
            self._skip(self._SCALAR)

    def _array(self, path: KeyPath) -> None:
        self._at += 1
        index = 0
        self._skip(self._BLANK)
        while self._text[self._at] != "]":
            self._value((*path, index))
            index += 1
            self._comma()
        self._at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self._at += 1
        self._skip(self._BLANK)
        while self._text[self._at] != "}":
            self._pair(path)
            self._comma()
        self._at += 1

    def _comma(self) -> None:
        self._skip(self._BLANK)
        if self._text[self._at] == ",":
            self._at += 1
            self._skip(self._BLANK)


# -- schema ----------------------------------------------------------------------------------

_TYPE_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a table",
}


@functools.lru_cache(maxsize=8)
def _fits(schema_text: str) -> fits.Fits:
    return fits.compiled(json.loads(schema_text))


@functools.lru_cache(maxsize=8)
def _validator(schema_text: str) -> jsonschema.protocols.Validator:
    import jsonschema

    base = jsonschema.Draft202012Validator
    # JSON Schema takes 443.0 for an integer; a reader of the file would not.
    types = base.TYPE_CHECKER.redefine(
        "integer", lambda _checker, value: isinstance(value, int) and not isinstance(value, bool)
    )
    strict = jsonschema.validators.extend(base, {"pattern": _pattern}, type_checker=types)
    validator: jsonschema.protocols.Validator = strict(json.loads(schema_text))
    return validator


def _pattern(
    _validator: Json, pattern: str, instance: Json, _schema: Json
) -> Iterator[jsonschema.ValidationError]:
    import jsonschema

    if isinstance(instance, str) and not fits.strict_pattern(pattern).search(instance):
        yield jsonschema.ValidationError(f"does not match {pattern}")


def _problems_of(document: Document, error: jsonschema.ValidationError) -> Iterator[Problem]:
    path = tuple(error.absolute_path)
    keyword = str(error.validator)
    rule: Mapping[str, Json] = error.schema if isinstance(error.schema, dict) else {}
    if "x-not-built" in rule:
        message = f"{rule['x-not-built']} is not built into this version"
        yield document.problem(path, message, "remove it; nothing would enforce it")
    elif keyword == "additionalProperties":
        yield from _unknown_keys(document, path, error.instance, rule)
    elif keyword == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield document.problem(path, f"{name!r} is missing", f"add {name} = ...")
    else:
        explain = _EXPLANATIONS.get(keyword, _explain_other)
        message, fix = explain(error.instance, error.validator_value, rule)
        yield document.problem(path, message or error.message, fix)


def _unknown_keys(
    document: Document, path: KeyPath, instance: Mapping[str, Json], rule: Mapping[str, Json]
) -> Iterator[Problem]:
    known = rule.get("properties", {})
    for name in instance:
        if name not in known:
            yield document.problem((*path, name), "unknown key", did_you_mean(name, known))


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."


def _type_word(value: Json) -> str:
    for kind, matches in (
        ("boolean", bool),
        ("integer", int),
        ("number", float),
        ("string", str),
        ("array", list),
        ("object", dict),
    ):
        if isinstance(value, matches):
            return _TYPE_WORDS[kind]
    return "a date or time"


Explanation = tuple[str, str]


def _explain_type(value: Json, wanted: Json, _rule: Mapping[str, Json]) -> Explanation:
    kinds = [wanted] if isinstance(wanted, str) else list(wanted)
    words = " or ".join(_TYPE_WORDS.get(kind, kind) for kind in kinds)
    fix = ""
    if kinds == ["array"] and not isinstance(value, (dict, list)):
        fix = f"write [{_shown(value)}]"
    elif "string" in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        fix = f'write "{value}"'
    elif "integer" in kinds and isinstance(value, str) and value.isdecimal():
        fix = f"write {value} without quotes"
    return f"must be {words}, not {_type_word(value)}", fix


def _explain_enum(value: Json, wanted: Json, rule: Mapping[str, Json]) -> Explanation:
    texts = [w for w in wanted if isinstance(w, str)]
    if value in rule.get("x-not-built-values", ()):
        return f"{_shown(value)} is not built into this version", f"use {', '.join(texts)}"
    fix = did_you_mean(value, texts) if isinstance(value, str) else ""
    words = ", ".join(_shown(w) for w in wanted)
    return f"{_shown(value)} is not one of {words}", "" if fix.startswith("known") else fix


def _explain_min_items(value: Json, wanted: Json, _rule: Mapping[str, Json]) -> Explanation:
    if not value:
        return "is an empty list, and empty never means everything", "fill it or remove the key"
    return f"must have at least {wanted} entries", ""


def _explain_pattern(value: Json, _wanted: Json, rule: Mapping[str, Json]) -> Explanation:
    if not value:
        return "is empty", str(rule.get("x-says", ""))
    return f"{_shown(value)} is not valid here", str(rule.get("x-says", ""))


def _explain_min_length(_value: Json, wanted: Json, _rule: Mapping[str, Json]) -> Explanation:
    return "is empty" if wanted == 1 else f"must have at least {wanted} characters", "fill it in"


def _explain_min_properties(_value: Json, _wanted: Json, rule: Mapping[str, Json]) -> Explanation:
    known = ", ".join(sorted(rule.get("properties", {})))
    return "is an empty table, and empty never means everything", f"use {known}" if known else ""


def _explain_unique(_value: Json, _wanted: Json, _rule: Mapping[str, Json]) -> Explanation:
    return "names something twice", "remove the second"


def _explain_bound(words: str) -> Callable[[Json, Json, Mapping[str, Json]], Explanation]:
    def explain(value: Json, wanted: Json, _rule: Mapping[str, Json]) -> Explanation:
        return f"{_shown(value)} is {words} {wanted}", f"the limit is {wanted}"

    return explain


def _explain_other(_value: Json, _wanted: Json, rule: Mapping[str, Json]) -> Explanation:
    return "", str(rule.get("x-says", ""))


_EXPLANATIONS: Mapping[str, Callable[[Json, Json, Mapping[str, Json]], Explanation]] = {
    "type": _explain_type,
    "enum": _explain_enum,
    "minItems": _explain_min_items,
    "pattern": _explain_pattern,
    "minLength": _explain_min_length,
    "minProperties": _explain_min_properties,
    "uniqueItems": _explain_unique,
    "minimum": _explain_bound("below"),
    "maximum": _explain_bound("above"),
    "maxLength": lambda _v, w, _r: (f"is longer than {w} characters", "shorten it"),
    "maxItems": lambda _v, w, _r: (f"has more than {w} entries", "use fewer"),
    "maxProperties": lambda _v, w, _r: (f"has more than {w} keys", "use exactly one of them"),
}
