"""Varlink messages as bytes: strict JSON in, compact JSON out, one NUL behind each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from json import encoder, scanner
from typing import Any, NoReturn

Json = Any

MAX_MESSAGE = 1 << 20
"""Bytes of one message, the NUL not counted. A longer one ends its connection."""

MAX_DEPTH = 64
"""Nesting of objects and arrays in one message."""


class ProtocolError(Exception):
    """The bytes are not a Varlink message; the connection cannot go on."""


class VarlinkError(Exception):
    """A typed error of a call: its full name and its parameters."""

    def __init__(self, error: str, parameters: Mapping[str, Json] | None = None) -> None:
        self.error = error
        self.parameters: dict[str, Json] = dict(parameters or {})
        super().__init__(error, self.parameters)

    @property
    def name(self) -> str:
        """The error's name without its interface."""
        return self.error.rpartition(".")[2]

    def __str__(self) -> str:
        told = self.parameters.get("reason") or ", ".join(
            f"{k}={v}" for k, v in self.parameters.items()
        )
        return f"{self.name}: {told}" if told else self.name


def _refuse_constant(name: str) -> NoReturn:
    raise ProtocolError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999: written again it would be no JSON
        raise ProtocolError("a number is too large")
    return number


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ProtocolError("an object names a key twice")
    return found


_decoder = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
)
_scan: Any = scanner.make_scanner(
    json.JSONDecoder(  # type: ignore[arg-type]
        parse_constant=_refuse_constant, parse_float=_finite
    )
)


def decode(message: bytes) -> dict[str, Json]:
    """Reads one message (without its NUL). Raises `ProtocolError` for anything but an object."""
    if message.count(b"{") + message.count(b"[") > MAX_DEPTH and _nesting(message) > MAX_DEPTH:
        raise ProtocolError(f"nested deeper than {MAX_DEPTH}")
    value = _usual(message)
    return value if value is not None else _strict(message)


def _usual(message: bytes) -> dict[str, Json] | None:
    """The message if it is in the form that our own clients write, which is read twice as fast:
    no space before a colon, no \\u, and no key twice. None for any other.

    A key is a text with a colon behind it. There are as many of these in the bytes as keys in what
    was read only if none was given twice: texts that look alike make it more, and nothing less.
    """
    if b"\\u" in message or b" :" in message or b"\t:" in message:
        return None
    if b"\n" in message or b"\r" in message:
        return None
    try:
        text = message.decode("utf-8")
        value, end = _scan(text, 0)
    except (StopIteration, ValueError, RecursionError, ProtocolError):
        return None
    if type(value) is not dict or end != len(text) or message.count(b'":') != _keys(value):
        return None
    return value


def _keys(value: dict[str, Json] | list[Json]) -> int:
    """How many keys all objects in it have."""
    count = 0
    inside: Iterable[Json] = value
    if type(value) is dict:
        count, inside = len(value), value.values()
    for inner in inside:
        if type(inner) is dict or type(inner) is list:
            count += _keys(inner)
    return count


def _strict(message: bytes) -> dict[str, Json]:
    try:
        text = message.decode("utf-8")
        value = _decoder.decode(text)
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise ProtocolError(f"not a JSON message: {e}") from None
    if not isinstance(value, dict):
        raise ProtocolError("a message is an object")
    if "\\u" in text and _has_lone_surrogate(value):
        raise ProtocolError("a text holds half of a surrogate pair")
    return value


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} is not JSON")


# Made once: json.dumps makes one for each call.
_chunks = encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, _refuse, encoder.encode_basestring_ascii, None, ":", ",", False, False, False
)


def encode(message: Mapping[str, Json]) -> bytes:
    """One message with its NUL. Raises `ProtocolError` when it is over `MAX_MESSAGE`."""
    data = "".join(_chunks(message, 0)).encode("ascii")
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE}")
    return data + b"\0"


def _nesting(message: bytes) -> int:
    """An upper bound of the nesting, cheap for the usual small message."""
    opens = message.count(b"{") + message.count(b"[")
    if opens <= MAX_DEPTH:
        return opens
    depth = deepest = 0
    in_text = escaped = False
    for byte in message:
        if in_text:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_text = False
        elif byte == 0x22:
            in_text = True
        elif byte in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"}]":
            depth -= 1
    return deepest


def _has_lone_surrogate(value: Json) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return any(_has_lone_surrogate(k) or _has_lone_surrogate(v) for k, v in value.items())
    if isinstance(value, list):
        return any(_has_lone_surrogate(v) for v in value)
    return False


class Framer:
    """Cuts a byte stream into messages. Feed it; it raises `ProtocolError` at the limit."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        if not self._buffer and data.find(b"\0") == len(data) - 1 >= 0:
            return [data[:-1]]  # one whole message, as a client sends it that waits for its answer
        self._buffer += data
        if b"\0" not in data:
            if len(self._buffer) > MAX_MESSAGE:
                raise ProtocolError(f"a message is over the limit of {MAX_MESSAGE} bytes")
            return []
        *whole, rest = bytes(self._buffer).split(b"\0")
        if len(rest) > MAX_MESSAGE or any(len(m) > MAX_MESSAGE for m in whole):
            raise ProtocolError(f"a message is over the limit of {MAX_MESSAGE} bytes")
        self._buffer = bytearray(rest)
        return whole
