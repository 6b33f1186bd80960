"""Netlink: logged packets, answers about sockets and notices of nf_tables become values or typed errors."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from aa import netlink
from aa.netlink import MalformedNetlink, Message
from aa.nflog import parse_logged, parse_packet
from aa.redirect.changes import NEWGEN, CannotTell, _authors, _generation
from aa.sockdiag import SockDiagError, parse_answer
from tests.unit.test_nflog import TCP_PORTS, logged, v4, v6
from tests.unit.test_redirect_changes import HEAD, generation
from tests.unit.test_sockdiag import answer, reply

WORDS = (b"\x08\x00\x09\x00", b"\x0c\x00\x15\x00", b"\x45\x00", b"\x60\x00", b"aa-redirect tcp\0")


def seeds() -> Iterator[bytes]:
    for packet in (
        v4(6, TCP_PORTS),
        v4(17, TCP_PORTS, options=bytes(8), fragment=0x2000),
        v6(17, TCP_PORTS),
        v6(0, bytes([44, 0]) + bytes(6) + bytes([17, 0, 0, 1]) + bytes(4) + TCP_PORTS),
        v6(51, bytes([6, 4]) + bytes(22) + TCP_PORTS),
    ):
        yield b"\0" + packet
        body = logged(payload=packet, prefix=b"aa-redirect tcp\0", uid=struct.pack("!I", 1000))
        yield b"\1" + body
        yield b"\4" + netlink.message(0x400, 0, 1, body)
    yield b"\2" + answer()
    yield b"\4" + reply(answer(local=("0.0.0.0", 53)))
    yield b"\3" + generation(struct.pack("!I", 4711))
    done = netlink.message(NEWGEN, 0, 0, generation(struct.pack("!I", 2), 99, b"iptables\0"))
    yield b"\4" + netlink.message(10 << 8 | 6, 0, 0, HEAD + bytes(8)) + done


def one(data: bytes) -> None:
    if not data:
        return
    how, data = data[0] % 5, data[1:]
    try:
        match how:
            case 0:
                _packet(data)
            case 1:
                assert -1 <= parse_logged(data).uid < 2**32
            case 2:
                found = parse_answer(data)
                assert found is None or len(found.local) == len(found.remote) == 16
            case 3:
                for kind in (NEWGEN, netlink.NLMSG_ERROR):
                    assert _generation(Message(kind, 1, data)) >= 0
            case 4:
                _messages(data)
    except (MalformedNetlink, SockDiagError, CannotTell):
        return


def _packet(data: bytes) -> None:
    packet = parse_packet(data)
    family = socket.AF_INET if packet.version == 4 else socket.AF_INET6
    assert socket.inet_pton(family, packet.source) and socket.inet_pton(family, packet.destination)
    assert 0 <= packet.source_port < 65536 and 0 <= packet.destination_port < 65536
    assert packet.protocol_name


def _messages(data: bytes) -> None:
    messages = list(netlink.parse_messages(data))
    assert sum(len(m.payload) for m in messages) <= len(data)
    assert all(isinstance(name, str) for name in _authors(data))
    for message in messages:
        netlink.parse_attributes(message.payload)
