"""Netlink messages and attributes as bytes: built here, and read back strictly."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE = 1, 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLA_TYPE_MASK = 0x3FFF  # the two top bits of an attribute's type are flags

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")


class MalformedNetlink(Exception):
    """What came from the socket is not what the kernel sends."""


@dataclass(frozen=True, slots=True)
class Message:
    kind: int
    sequence: int
    payload: bytes


def message(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, sequence, 0) + payload


def attribute(kind: int, payload: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def parse_messages(data: bytes) -> Iterator[Message]:
    """Each message of one datagram. Raises `MalformedNetlink`."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < _HEADER.size:
            raise MalformedNetlink("a message's header is cut short")
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or length > len(data) - offset:
            raise MalformedNetlink(f"a message says it has {length} bytes")
        yield Message(kind, sequence, data[offset + _HEADER.size : offset + length])
        offset += (length + 3) & ~3


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type. Raises `MalformedNetlink` for lengths that do not fit."""
    attributes: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        if len(data) - offset < _ATTRIBUTE.size:
            raise MalformedNetlink("an attribute is cut short")
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or length > len(data) - offset:
            raise MalformedNetlink(f"an attribute says it has {length} bytes")
        attributes[kind & NLA_TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return attributes


def error_number(payload: bytes) -> int:
    """The errno of an NLMSG_ERROR, 0 for an acknowledgement."""
    if len(payload) < _ERROR.size:
        raise MalformedNetlink("an error is cut short")
    return -int(_ERROR.unpack_from(payload)[0])
