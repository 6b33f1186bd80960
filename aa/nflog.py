"""Reads the packets that the firewall logs to an NFLOG group, with who sent them as far as it says.

The kernel hands each packet over at once; what the socket cannot hold is lost there.
Who needs to know compares with the firewall's own counters.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from aa.netlink import (
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    MalformedNetlink,
    attribute,
    error_number,
    message,
    parse_attributes,
    parse_messages,
)

COPY_BYTES = 256
"""How much of each packet is read: every header that names addresses and ports."""
SOCKET_BYTES = 4 * 1024 * 1024
"""The kernel's buffer for us; about 8000 packets."""
RECEIVE_BYTES = 65536
CONFIGURE_SECONDS = 2.0
EXTENSION_LIMIT = 8
"""IPv6 extension headers that are stepped over to find the protocol."""

NETLINK_NETFILTER = 12
SUBSYSTEM_ULOG = 4
PACKET = SUBSYSTEM_ULOG << 8
CONFIG = SUBSYSTEM_ULOG << 8 | 1
CFG_CMD, CFG_MODE, CFG_QTHRESH = 1, 2, 5
CMD_BIND = 1
COPY_PACKET = 2
NFULA_PACKET_HDR, NFULA_PAYLOAD, NFULA_PREFIX, NFULA_UID = 1, 9, 10, 11
SO_RCVBUFFORCE = 33

PROTOCOLS = {1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 58: "icmp6", 132: "sctp", 136: "udplite"}
WITH_PORTS = frozenset({6, 17, 33, 132, 136})
EXTENSIONS = frozenset({0, 43, 51, 60, 135})
FRAGMENT = 44

_NFGENMSG = struct.Struct("!BBH")
_PORTS = struct.Struct("!HH")


class NflogError(Exception):
    """The group could not be bound, or its socket failed."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One IP packet's addresses. Ports are 0 where the protocol has none or they were cut off."""

    version: int
    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int

    @property
    def protocol_name(self) -> str:
        return PROTOCOLS.get(self.protocol, str(self.protocol))


@dataclass(frozen=True, slots=True)
class Logged:
    """A packet with the prefix of the rule that logged it and its socket's uid, -1 for none."""

    packet: Packet
    prefix: str
    uid: int


class NflogReader:
    """The one reader of an NFLOG group. Needs CAP_NET_ADMIN in the network namespace."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.malformed = 0
        self.drained = True
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
        )
        try:
            self._socket.bind((0, 0))
            _grow(self._socket)
            self._configure()
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NflogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self, limit: int) -> list[Logged]:
        """The packets of up to `limit` datagrams that wait. Raises `NflogError`.

        `drained` is then true when none waits any more.
        """
        logged: list[Logged] = []
        self.drained = False
        for _ in range(limit):
            try:
                data, sender = self._socket.recvfrom(RECEIVE_BYTES)
            except BlockingIOError:
                self.drained = True
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise NflogError(f"NFLOG group {self.group}: {e}") from e
                continue
            if sender[0] == 0:
                logged += self._take(data)
        return logged

    def _take(self, data: bytes) -> Iterator[Logged]:
        try:
            for each in parse_messages(data):
                if each.kind == PACKET:
                    yield parse_logged(each.payload)
        except MalformedNetlink:
            self.malformed += 1

    def _configure(self) -> None:
        self._request(attribute(CFG_CMD, bytes([CMD_BIND])))
        mode = struct.pack("!IBx", COPY_BYTES, COPY_PACKET)
        # A threshold of 1 hands each packet over at once; the default collects for a second.
        self._request(attribute(CFG_MODE, mode) + attribute(CFG_QTHRESH, struct.pack("!I", 1)))

    def _request(self, attributes: bytes) -> None:
        body = _NFGENMSG.pack(socket.AF_UNSPEC, 0, self.group) + attributes
        self._socket.sendto(message(CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, body), (0, 0))
        deadline = time.monotonic() + CONFIGURE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            for each in parse_messages(self._socket.recv(RECEIVE_BYTES)):
                if each.kind != NLMSG_ERROR:
                    continue  # a packet of the group that is bound already
                code = error_number(each.payload)
                if code:
                    raise NflogError(f"NFLOG group {self.group}: {_meaning(code)}")
                return
        raise NflogError(f"NFLOG group {self.group}: the kernel did not answer")


def parse_logged(payload: bytes) -> Logged:
    """One NFULNL_MSG_PACKET. Raises `MalformedNetlink`."""
    if len(payload) < _NFGENMSG.size:
        raise MalformedNetlink("a logged packet is cut short")
    attributes = parse_attributes(payload[_NFGENMSG.size :])
    uid = attributes.get(NFULA_UID, b"")
    prefix = attributes.get(NFULA_PREFIX, b"").split(b"\x00", 1)[0]
    return Logged(
        packet=parse_packet(attributes.get(NFULA_PAYLOAD, b"")),
        prefix=prefix.decode("ascii", "replace"),
        uid=int.from_bytes(uid, "big") if len(uid) == 4 else -1,
    )


def parse_packet(data: bytes) -> Packet:
    """The addresses of an IPv4 or IPv6 packet. Raises `MalformedNetlink`."""
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        return _parse_v4(data)
    if version == 6 and len(data) >= 40:
        return _parse_v6(data)
    raise MalformedNetlink(f"{len(data)} bytes that are no IP packet")


def _parse_v4(data: bytes) -> Packet:
    start = (data[0] & 0x0F) * 4
    if start < 20:
        raise MalformedNetlink("an IPv4 header that is too short")
    fragment = int.from_bytes(data[6:8], "big") & 0x1FFF
    ports = _ports(data, start, data[9]) if fragment == 0 else (0, 0)
    source, destination = data[12:16], data[16:20]
    return Packet(
        4,
        data[9],
        socket.inet_ntop(socket.AF_INET, source),
        ports[0],
        socket.inet_ntop(socket.AF_INET, destination),
        ports[1],
    )


def _parse_v6(data: bytes) -> Packet:
    protocol, start, first = data[6], 40, True
    for _ in range(EXTENSION_LIMIT):
        if len(data) < start + 8:
            break
        if protocol == FRAGMENT:
            first = first and int.from_bytes(data[start + 2 : start + 4], "big") >> 3 == 0
            protocol, start = data[start], start + 8
        elif protocol in EXTENSIONS:
            # The authentication header counts in words of 4 bytes, all others in 8.
            unit = (data[start + 1] + 2) * 4 if protocol == 51 else (data[start + 1] + 1) * 8
            protocol, start = data[start], start + unit
        else:
            break
    ports = _ports(data, start, protocol) if first else (0, 0)
    return Packet(
        6,
        protocol,
        str(ipaddress.IPv6Address(data[8:24])),
        ports[0],
        str(ipaddress.IPv6Address(data[24:40])),
        ports[1],
    )


def _ports(data: bytes, start: int, protocol: int) -> tuple[int, int]:
    if protocol not in WITH_PORTS or len(data) < start + _PORTS.size:
        return (0, 0)
    source, destination = _PORTS.unpack_from(data, start)
    return (source, destination)


def _grow(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BYTES)
    except PermissionError:  # no CAP_NET_ADMIN in the first user namespace: up to rmem_max
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)


def _meaning(code: int) -> str:
    if code in (errno.EBUSY, errno.EPERM):  # EPERM also for a group that another socket has
        return "another program reads it already, or CAP_NET_ADMIN is missing"
    return errno.errorcode.get(code, str(code))
