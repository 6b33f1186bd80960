"""Logged packets as bytes: addresses and ports of every legal shape, an error for the rest."""

from __future__ import annotations

import contextlib
import socket
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aa import netlink
from aa.netlink import MalformedNetlink
from aa.nflog import Packet, parse_logged, parse_packet

TCP_PORTS = struct.pack("!HH", 40000, 443) + bytes(16)


def v4(protocol: int, payload: bytes, *, options: bytes = b"", fragment: int = 0) -> bytes:
    head = bytes([0x45 + len(options) // 4, 0]) + bytes(4) + struct.pack("!H", fragment)
    ends = socket.inet_aton("10.77.0.1") + socket.inet_aton("10.77.0.2")
    return head + bytes([64, protocol, 0, 0]) + ends + options + payload


def v6(protocol: int, payload: bytes) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, "fd77::1") + socket.inet_pton(
        socket.AF_INET6, "fd77::2"
    )
    return bytes([0x60, 0, 0, 0, 0, 0, protocol, 64]) + ends + payload


def test_reads_addresses_and_ports() -> None:
    assert parse_packet(v4(6, TCP_PORTS)) == Packet(4, 6, "10.77.0.1", 40000, "10.77.0.2", 443)
    assert parse_packet(v6(17, TCP_PORTS)) == Packet(6, 17, "fd77::1", 40000, "fd77::2", 443)


def test_steps_over_options_and_extension_headers() -> None:
    assert parse_packet(v4(6, TCP_PORTS, options=bytes(8))).destination_port == 443
    hop_by_hop, routing, authentication = bytes([43, 0]), bytes([51, 1]), bytes([6, 4])
    headers = hop_by_hop + bytes(6) + routing + bytes(14) + authentication + bytes(22)
    found = parse_packet(v6(0, headers + TCP_PORTS))
    assert (found.protocol, found.destination_port) == (6, 443)


def test_only_the_first_fragment_has_ports() -> None:
    assert parse_packet(v4(17, TCP_PORTS, fragment=0x2000)).destination_port == 443
    assert parse_packet(v4(17, TCP_PORTS, fragment=0x2001)).destination_port == 0
    first = bytes([17, 0, 0, 1]) + bytes(4)
    later = bytes([17, 0, 0, 9]) + bytes(4)
    assert parse_packet(v6(44, first + TCP_PORTS)).destination_port == 443
    assert parse_packet(v6(44, later + TCP_PORTS)).destination_port == 0


def test_protocols_without_ports_have_none() -> None:
    assert parse_packet(v4(1, TCP_PORTS)).destination_port == 0
    assert parse_packet(v4(1, TCP_PORTS)).protocol_name == "icmp"
    assert parse_packet(v6(58, TCP_PORTS)).protocol_name == "icmp6"
    assert parse_packet(v4(253, b"")).protocol_name == "253"


def test_ports_that_were_cut_off_are_zero() -> None:
    assert parse_packet(v4(6, TCP_PORTS[:3])).destination_port == 0


@pytest.mark.parametrize(
    "data", [b"", b"\x45", v4(6, b"")[:19], v6(6, b"")[:39], b"\x44" + bytes(30), b"\x50" * 60]
)
def test_refuses_what_is_no_ip_packet(data: bytes) -> None:
    with pytest.raises(MalformedNetlink):
        parse_packet(data)


def logged(**attributes: bytes) -> bytes:
    kinds = {"payload": 9, "prefix": 10, "uid": 11}
    body = b"".join(netlink.attribute(kinds[name], data) for name, data in attributes.items())
    return struct.pack("!BBH", socket.AF_INET, 0, 83) + body


def test_reads_prefix_and_user() -> None:
    payload, prefix = v4(6, TCP_PORTS), b"aa-redirect tcp\0"
    found = parse_logged(logged(payload=payload, prefix=prefix, uid=struct.pack("!I", 1000)))
    assert (found.prefix, found.uid) == ("aa-redirect tcp", 1000)
    assert parse_logged(logged(payload=payload)).uid == -1


def test_a_log_message_without_packet_is_an_error() -> None:
    with pytest.raises(MalformedNetlink):
        parse_logged(logged(prefix=b"aa-redirect tcp\0"))


@given(st.binary(max_size=120))
@example(v6(0, bytes([0, 0]) * 40))
@example(v6(51, bytes([51, 255]) * 4))
def test_any_bytes_are_a_packet_or_an_error(data: bytes) -> None:
    for parse in (parse_packet, parse_logged):
        with contextlib.suppress(MalformedNetlink):
            parse(data)


@given(st.binary(max_size=40), st.sampled_from([0x45, 0x4F, 0x60]))
def test_any_packet_has_addresses(rest: bytes, first: int) -> None:
    data = bytes([first]) + rest.ljust(39, b"\0")
    found = parse_packet(data)
    family = socket.AF_INET if found.version == 4 else socket.AF_INET6
    assert socket.inet_pton(family, found.destination)
    assert 0 <= found.destination_port < 65536
