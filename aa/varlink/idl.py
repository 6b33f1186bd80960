"""Varlink interface definitions: a parser, and checks of parameters against it.

Parameters that an interface does not name, and values of another type than it
says, are errors: a typo must not be a silent default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NoReturn

Json = Any


class IdlError(ValueError):
    """An interface definition does not parse; names the place."""


@dataclass(frozen=True)
class Type:
    """A type of the interface language. `kind` is bool, int, float, string, object, struct,
    enum, array, map, maybe or name; the other fields belong to some of these."""

    kind: str
    element: Type | None = None
    fields: Mapping[str, Type] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Method:
    name: str
    parameters: Type
    reply: Type


@dataclass(frozen=True)
class Interface:
    name: str
    description: str
    """The definition's own text, as `GetInterfaceDescription` returns it."""
    types: Mapping[str, Type]
    methods: Mapping[str, Method]
    errors: Mapping[str, Type]
    # The checks of methods and of named types, made when they are first needed.
    _checks: dict[str, Callable[[Mapping[str, Json]], str | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _of_types: dict[str, Callable[[Json], bool]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def wrong_parameter(self, method: str, parameters: Mapping[str, Json]) -> str | None:
        """The name of the first parameter of a call that does not fit, or None."""
        check = self._checks.get(method)
        if check is None:
            check = self._checks[method] = self._struct(self.methods[method].parameters)
        return check(parameters)

    def wrong_field(self, struct: Type, values: Mapping[str, Json]) -> str | None:
        """The same for a reply or an error of this interface."""
        return self._struct(struct)(values)

    def _struct(self, t: Type) -> Callable[[Mapping[str, Json]], str | None]:
        """Names the first field of a value that does not fit."""
        names = t.fields.keys()
        checks = tuple((name, _EXACT.get(f.kind), self._fits(f)) for name, f in t.fields.items())

        def wrong(values: Mapping[str, Json]) -> str | None:
            if not values.keys() <= names:
                return next(name for name in values if name not in names)
            for name, exact, fits in checks:
                value = values.get(name)
                if type(value) is not exact and not fits(value):
                    return name
            return None

        return wrong

    def _fits(self, t: Type) -> Callable[[Json], bool]:
        """Whether a value, as JSON has it, is of a type."""
        match t.kind:
            case "maybe" | "array" | "map":
                assert t.element
                fits = self._fits(t.element)
                if t.kind == "maybe":
                    exact = _EXACT.get(t.element.kind)
                    return lambda v: v is None or type(v) is exact or fits(v)
                if t.kind == "array":
                    return lambda v: type(v) is list and all(map(fits, v))
                return lambda v: type(v) is dict and all(map(fits, v.values()))
            case "float":
                return lambda v: type(v) is float or type(v) is int
            case "enum":
                return lambda v: type(v) is str and v in t.values
            case "struct":
                wrong = self._struct(t)
                return lambda v: type(v) is dict and wrong(v) is None
            case "name":
                return self._named(t.name)
        exact = _EXACT[t.kind]
        return lambda v: type(v) is exact

    def _named(self, name: str) -> Callable[[Json], bool]:
        fits = self._of_types.get(name)
        if fits is None:
            self._of_types[name] = lambda v: self._of_types[name](v)  # for a type that names itself
            fits = self._of_types[name] = self._fits(self.types[name])
        return fits


_EXACT: Mapping[str, type] = {"bool": bool, "int": int, "string": str, "object": dict}
"""The types of JSON values that need no further look. JSON has no subclasses of them."""


_TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+|#[^\n]*)|(?P<arrow>->)|(?P<word>[A-Za-z][A-Za-z0-9_.\-]*)"
    r"|(?P<array>\[\])|(?P<map>\[string\])|(?P<sign>[():,?])"
)


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, int]] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if not found:
                raise IdlError(f"line {text.count(chr(10), 0, at) + 1}: unexpected {text[at]!r}")
            if found.lastgroup != "space":
                self._tokens.append((found.group(), text.count("\n", 0, at) + 1))
            at = found.end()
        self._at = 0

    def peek(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            self.fail(f"expected {expected or 'more'}, found {token or 'the end'}")
        self._at += 1
        return token

    def word(self) -> str:
        if not self.peek()[:1].isalpha():
            self.fail(f"expected a name, found {self.peek() or 'the end'}")
        return self.take()

    def fail(self, what: str) -> NoReturn:
        line = self._tokens[min(self._at, len(self._tokens) - 1)][1] if self._tokens else 1
        raise IdlError(f"line {line}: {what}")

    def type(self) -> Type:
        token = self.peek()
        if token == "?":
            self.take()
            return Type("maybe", element=self.type())
        if token in ("[]", "[string]"):
            self.take()
            return Type("array" if token == "[]" else "map", element=self.type())
        if token == "(":
            return self.struct_or_enum()
        word = self.word()
        if word in ("bool", "int", "float", "string", "object"):
            return Type(word)
        return Type("name", name=word)

    def struct_or_enum(self) -> Type:
        self.take("(")
        fields: dict[str, Type] = {}
        values: list[str] = []
        while self.peek() != ")":
            name = self.word()
            if self.peek() == ":":
                self.take()
                fields[name] = self.type()
            else:
                values.append(name)
            if self.peek() == ",":
                self.take()
        self.take(")")
        if fields and values:
            raise IdlError(f"{values[0]}: a field without a type")
        return Type("enum", values=tuple(values)) if values else Type("struct", fields=fields)


def parse_interface(text: str) -> Interface:
    """Parses one interface definition. Raises `IdlError` with the line."""
    p = _Parser(text)
    p.take("interface")
    name = p.word()
    types: dict[str, Type] = {}
    methods: dict[str, Method] = {}
    errors: dict[str, Type] = {}
    while p.peek():
        what, member = p.word(), p.word()
        if what == "type":
            types[member] = p.struct_or_enum()
        elif what == "error":
            errors[member] = p.struct_or_enum()
        elif what == "method":
            parameters = p.struct_or_enum()
            p.take("->")
            methods[member] = Method(member, parameters, p.struct_or_enum())
        else:
            raise IdlError(f"{what} is not type, method or error")
    return Interface(name, text, types, methods, errors)


def load_interface(name: str) -> Interface:
    """One of the interfaces that this package ships, by its full name."""
    file = resources.files("aa.varlink").joinpath(f"{name}.varlink")
    return parse_interface(file.read_text(encoding="utf-8"))
