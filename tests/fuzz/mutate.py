"""Changes that keep the shape of an input: for JSON values and for texts made of words.

libFuzzer's own changes break most structured inputs in their first bytes; half of
the changes of a target that names one of these functions are made by it.
"""

from __future__ import annotations

import json
import random
from typing import Any

Json = Any

ODD_VALUES: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.0,
    65536,
    2**63,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\ud800",
    "\U0010ffff",
    "a" * 300,
    "*",
    "1e999",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": {"c": []}}},
)
"""What is a value of JSON as Python reads it, and seldom what somebody expected."""


def json_value(data: bytes, rng: random.Random) -> bytes:
    """One change somewhere in a JSON text; data that is none comes back as it was."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    try:
        return json.dumps(_changed(value, rng)).encode()
    except RecursionError:
        return data


def _changed(value: Json, rng: random.Random) -> Json:
    inside = isinstance(value, (dict, list)) and value
    if not inside or rng.random() < 0.15:
        return _replaced(value, rng)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, rng.choice(["", "host", "addresses", key + "x"]): value[key]}
            case 2:
                return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: _changed(value[key], rng)}
    at = rng.randrange(len(value))
    match rng.randrange(6):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return value[:at] + [value[at]] * rng.choice([2, 2, 50]) + value[at + 1 :]
        case 2:
            return [*value, _replaced(value[at], rng)]
    return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]


def _replaced(value: Json, rng: random.Random) -> Json:
    match rng.randrange(4):
        case 0:
            return [value]
        case 1 if isinstance(value, str):
            return _text(value, rng)
        case 2 if isinstance(value, (int, float)) and not isinstance(value, bool):
            return rng.choice([-value, str(value), value + 1, bool(value)])
    return rng.choice(ODD_VALUES)


def _text(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    match rng.randrange(6):
        case 0:
            return text[:at] + text[at + 1 :]
        case 1:
            return text[:at] + chr(rng.randrange(256)) + text[at:]
        case 2:
            return (
                text[:at] + rng.choice("./:%*\\\0\n\u2028\u202e\u3002\uff0e\xad\ud800") + text[at:]
            )
        case 3:
            return text.upper() if rng.random() < 0.5 else text[::-1]
        case 4:
            return text * rng.choice([2, 3, 40])
    return text[:at]


def words(known: tuple[bytes, ...]) -> Any:
    """A function that puts one of these words into a text, in place of a line, or takes a line out."""

    def change(data: bytes, rng: random.Random) -> bytes:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 2:
                lines.insert(at, rng.choice(known))
            case _:
                line = lines[at]
                cut = rng.randrange(len(line) + 1)
                end = min(len(line), cut + rng.choice([0, 0, 1, 8]))
                lines[at] = line[:cut] + rng.choice(known) + line[end:]
        return b"\n".join(lines)

    return change
