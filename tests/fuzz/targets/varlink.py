"""Varlink messages: one object or a protocol error, however the stream is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator

from aa.varlink.codec import MAX_DEPTH, Framer, ProtocolError, VarlinkError, decode, encode
from aa.varlink.server import Service
from tests.fuzz.mutate import ODD_VALUES

WORDS = (
    b'{"method":"org.varlink.service.GetInfo"}',
    b'"parameters":{',
    b'"interface":"org.varlink.service"',
    b'"more":true',
    b'"oneway":true',
    b"NaN",
    b"Infinity",
    b"1e999",
    b"\\ud800",
    b"\\u0000",
    b"\x00",
    b"[[[[[[[[",
    b"\xef\xbb\xbf",
)

SERVICE = Service("fuzz", "0")


def seeds() -> Iterator[bytes]:
    call = {
        "method": "org.varlink.service.GetInterfaceDescription",
        "parameters": {"interface": "org.varlink.service"},
    }
    yield b"\x00" + encode(call)
    yield b"\x10" + encode(call) + encode({**call, "more": True, "oneway": False})
    yield b"\x02" + json.dumps({"method": "x", "parameters": ODD_VALUES}).encode() + b"\0"
    yield b"\x03" + b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}\0"
    yield b"\x04" + b'{"a":1,"a":2}\0'


def one(data: bytes) -> None:
    if not data:
        return
    step, data = data[0] + 1, data[1:]
    whole = Framer().feed(data)
    framer = Framer()
    cut = [m for at in range(0, len(data), step) for m in framer.feed(data[at : at + step])]
    assert whole == cut
    for message in whole:
        _message(message)


def _message(message: bytes) -> None:
    try:
        value = decode(message)
    except ProtocolError:
        return
    again = encode(value)
    assert decode(again[:-1]) == value
    try:
        SERVICE.find(value)
    except (ProtocolError, VarlinkError) as e:
        assert str(e) is not None
