"""Predicates over the arguments of a tool call.

What is missing, and what has another type than the predicate compares with, is
neither true nor false: it counts against the agent, so a deny or ask rule
matches and an allow rule does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aa.policy.pattern import glob

Json = Any
Scalar = str | bool | int | float

OPERATORS = (
    "eq", "ne", "lt", "le", "gt", "ge", "in", "not_in", "glob", "starts_with", "contains", "exists",
)  # fmt: skip


class Missing:
    """What stands for an argument that is not there."""


MISSING = Missing()

Test = Callable[[Json], bool | None]
"""True, False, or None for what cannot be compared."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """One operator on one argument. `path` leads to it through nested objects."""

    path: tuple[str, ...]
    operator: str
    operand: Json
    test: Test

    def holds(self, arguments: Json, *, against: bool) -> bool:
        """Whether it holds; `against` is the answer for what is missing or of another type."""
        value = lookup(arguments, self.path)
        if self.operator == "exists":
            return (value is not MISSING) is self.operand
        if value is MISSING:
            return against
        answer = self.test(value)
        return against if answer is None else answer

    def __str__(self) -> str:
        return f"{'.'.join(self.path)} {self.operator} {self.operand!r}"


def lookup(arguments: Json, path: Sequence[str]) -> Json:
    """The value at a path, or MISSING. None is nothing, so it is missing too."""
    value = arguments
    for name in path:
        if type(value) is not dict and not isinstance(value, Mapping):  # the first is quicker
            return MISSING
        value = value.get(name, MISSING)
        if value is MISSING:
            return MISSING
    return MISSING if value is None else value


def predicate(path: tuple[str, ...], operator: str, operand: Json) -> Predicate:
    """Builds a predicate. Raises ValueError when the operand does not fit the operator."""
    return Predicate(path, operator, operand, _BUILDERS[operator](operator, operand))


def contradiction(predicates: Sequence[Predicate]) -> str:
    """Why predicates on one argument cannot all be true; "" if they can."""
    by: dict[str, Json] = {p.operator: p.operand for p in predicates}
    if by.get("exists") is False and len(by) > 1:
        return "an argument that does not exist cannot be compared"
    low = [(by[o], o == "gt") for o in ("gt", "ge") if o in by]
    high = [(by[o], o == "lt") for o in ("lt", "le") if o in by]
    for bottom, above in low:
        for top, below in high:
            if bottom > top or (bottom == top and (above or below)):
                return f"no number is above {bottom} and below {top}"
    exact = [by["eq"]] if "eq" in by else by.get("in")
    if exact is not None:
        others = [p for p in predicates if p.operator not in ("eq", "in", "exists")]
        if "eq" in by and "in" in by:
            others = [p for p in predicates if p.operator == "in"]
        if others and not any(all(p.test(v) is True for p in others) for v in exact):
            return f"none of {exact} can fulfil {' and '.join(str(p) for p in others)}"
    return ""


# -- operators ---------------------------------------------------------------------------------


def _class(value: Json) -> str:
    """Values are only compared within one class: true is not 1, and "1" is not either."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number" if not (isinstance(value, float) and math.isnan(value)) else ""
    return ""


def _scalar(operator: str, operand: Json) -> Scalar:
    if not _class(operand):
        raise ValueError(f"{operator} compares with a text, a number, or true or false")
    scalar: Scalar = operand
    return scalar


def _number(operator: str, operand: Json) -> float:
    if _class(operand) != "number":
        raise ValueError(f"{operator} compares with a number")
    number: float = operand
    return number


def _text(operator: str, operand: Json) -> str:
    if not isinstance(operand, str) or not operand:
        raise ValueError(f"{operator} needs a text that is not empty")
    return operand


def _scalars(operator: str, operand: Json) -> list[Scalar]:
    if not isinstance(operand, list) or not operand:
        raise ValueError(f"{operator} needs a list that is not empty")
    return [_scalar(operator, value) for value in operand]


def _equality(operator: str, operand: Json) -> Test:
    wanted, kind, same = _scalar(operator, operand), _class(operand), operator == "eq"
    return lambda value: bool(value == wanted) is same if _class(value) == kind else None


def _membership(operator: str, operand: Json) -> Test:
    values = _scalars(operator, operand)
    members = {(_class(v), v) for v in values}
    kinds, inside = {_class(v) for v in values}, operator == "in"

    def test(value: Json) -> bool | None:
        kind = _class(value)
        return ((kind, value) in members) is inside if kind in kinds else None

    return test


_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _order(operator: str, operand: Json) -> Test:
    bound, compare = _number(operator, operand), _ORDER[operator]
    return lambda value: compare(value, bound) if _class(value) == "number" else None


def _glob(operator: str, operand: Json) -> Test:
    matches = glob(_text(operator, operand))
    return lambda value: matches(value) if isinstance(value, str) else None


def _starts_with(operator: str, operand: Json) -> Test:
    beginning = _text(operator, operand)
    return lambda value: value.startswith(beginning) if isinstance(value, str) else None


def _contains(operator: str, operand: Json) -> Test:
    part, kind = _scalar(operator, operand), _class(operand)
    if kind == "text":
        _text(operator, operand)

    def test(value: Json) -> bool | None:
        if isinstance(value, list):
            return any(_class(v) == kind and v == part for v in value)
        return part in value if isinstance(value, str) and isinstance(part, str) else None

    return test


def _exists(operator: str, operand: Json) -> Test:
    if not isinstance(operand, bool):
        raise ValueError(f"{operator} is true or false")
    return lambda _value: None  # `Predicate.holds` looks for the argument itself


_BUILDERS: Mapping[str, Callable[[str, Json], Test]] = {
    "eq": _equality,
    "ne": _equality,
    "in": _membership,
    "not_in": _membership,
    "lt": _order,
    "le": _order,
    "gt": _order,
    "ge": _order,
    "glob": _glob,
    "starts_with": _starts_with,
    "contains": _contains,
    "exists": _exists,
}
