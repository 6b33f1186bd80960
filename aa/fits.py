"""Whether a value fits a JSON Schema, quickly: a schema becomes one function that answers yes or no.

It knows the keywords that our schemas use and refuses a schema with any other,
so a keyword is never skipped. Saying what is wrong is left to the jsonschema
library, which is loaded only when something is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sized
from typing import Any

Json = Any
Fits = Callable[[Json], bool]

ANNOTATIONS = frozenset(("$schema", "$id", "$defs", "title", "description"))
"""Keywords that say nothing about the value; so do those that begin with `x-`."""

_TYPES: Mapping[str, Fits] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
}


class UnknownKeyword(ValueError):
    """The schema has a keyword that this module does not know."""


def compiled(schema: Mapping[str, Json]) -> Fits:
    """The function that tells whether a value fits. Raises UnknownKeyword."""
    return _compile(schema, schema)


def strict_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern as JSON Schema means it: Python's "$" also matches before a last newline."""
    return re.compile(pattern[:-1] + r"\Z" if pattern.endswith("$") else pattern)


def _compile(schema: Mapping[str, Json], root: Mapping[str, Json]) -> Fits:
    tests: list[Fits] = []
    if "$ref" in schema:
        tests.append(_compile(_referred(schema["$ref"], root), root))
    if "type" in schema:
        tests.append(_type(schema["type"]))
    for keyword, value in schema.items():
        if keyword in ("$ref", "type") or keyword in ANNOTATIONS or keyword.startswith("x-"):
            continue
        if keyword in ("properties", "additionalProperties", "items"):
            continue
        build = _KEYWORDS.get(keyword)
        if build is None:
            raise UnknownKeyword(f"the schema keyword {keyword!r} is not known")
        tests.append(build(value))
    if "properties" in schema or "additionalProperties" in schema:
        tests.append(_properties(schema, root))
    if "items" in schema:
        tests.append(_items(_compile(schema["items"], root)))
    if len(tests) == 1:
        return tests[0]
    return lambda value: all(test(value) for test in tests)


def _referred(reference: str, root: Mapping[str, Json]) -> Mapping[str, Json]:
    if not reference.startswith("#/$defs/"):
        raise UnknownKeyword(f"the reference {reference!r} leaves the schema's $defs")
    found: Mapping[str, Json] = root["$defs"][reference.removeprefix("#/$defs/")]
    return found


def _type(names: str | list[str]) -> Fits:
    if isinstance(names, str):
        return _TYPES[names]
    tests = [_TYPES[name] for name in names]
    return lambda value: any(test(value) for test in tests)


def _properties(schema: Mapping[str, Json], root: Mapping[str, Json]) -> Fits:
    if schema.get("additionalProperties", False) is not False:
        raise UnknownKeyword("additionalProperties other than false")
    open_ended = "additionalProperties" not in schema
    known = {name: _compile(s, root) for name, s in schema.get("properties", {}).items()}

    def fits(value: Json) -> bool:
        if not isinstance(value, dict):
            return True
        for name, member in value.items():
            test = known.get(name)
            if test is None:
                if not open_ended:
                    return False
            elif not test(member):
                return False
        return True

    return fits


def _items(test: Fits) -> Fits:
    return lambda value: not isinstance(value, list) or all(map(test, value))


def _same(a: Json, b: Json) -> bool:
    """Equality of JSON: true is not 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _enum(values: list[Json]) -> Fits:
    if all(isinstance(v, str) for v in values):
        members = frozenset(values)
        return lambda value: isinstance(value, str) and value in members
    return lambda value: any(_same(value, v) for v in values)


def _unique(wanted: bool) -> Fits:
    def fits(value: Json) -> bool:
        if not isinstance(value, list) or len(value) < 2:
            return True
        if all(isinstance(v, str) for v in value):
            return len(set(value)) == len(value)
        return not any(_same(a, b) for n, a in enumerate(value) for b in value[n + 1 :])

    return fits if wanted else lambda _value: True


def _size(kind: type[Sized], least: int = 0, most: float = math.inf) -> Fits:
    return lambda value: not isinstance(value, kind) or least <= len(value) <= most


def _bound(least: float = -math.inf, most: float = math.inf) -> Fits:
    number = _TYPES["number"]
    return lambda value: not number(value) or least <= value <= most


def _pattern(pattern: str) -> Fits:
    search = strict_pattern(pattern).search
    return lambda value: not isinstance(value, str) or search(value) is not None


def _required(names: list[str]) -> Fits:
    return lambda value: not isinstance(value, dict) or all(name in value for name in names)


def _never(schema: Json) -> Fits:
    if schema != {}:
        raise UnknownKeyword("not with anything but {}")
    return lambda _value: False


_KEYWORDS: Mapping[str, Callable[[Any], Fits]] = {
    "enum": _enum,
    "const": lambda wanted: lambda value: _same(value, wanted),
    "not": _never,
    "required": _required,
    "pattern": _pattern,
    "minLength": lambda n: _size(str, least=n),
    "maxLength": lambda n: _size(str, most=n),
    "minItems": lambda n: _size(list, least=n),
    "maxItems": lambda n: _size(list, most=n),
    "minProperties": lambda n: _size(dict, least=n),
    "uniqueItems": _unique,
    "minimum": lambda n: _bound(least=n),
    "maximum": lambda n: _bound(most=n),
}
