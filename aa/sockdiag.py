"""Asks the kernel which socket, and so which user and cgroup, is behind an address.

One NETLINK_SOCK_DIAG socket per `SockDiag`; unprivileged. TCP is one exact query of
the four-tuple. A UDP sender's destination is not known after a REDIRECT (and sendto()
may name any), so UDP and raw sockets are found by where they may send from, and an
owner is named only when every such socket lies in the same cgroup.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from aa.netlink import (
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    MalformedNetlink,
    Message,
    error_number,
    message,
    parse_attributes,
    parse_messages,
)

Address = tuple[str, int]
"""Textual IP address and port; further members of a v6 socket name are left off."""

REPLY_SECONDS = 0.25
"""How long one question may take. The kernel answers inside the call, in microseconds."""
DUMP_LIMIT = 512
"""Sockets that may share one port before the answer is "too many to tell"."""
STALE_LIMIT = 64
"""Datagrams of earlier, abandoned questions that are skipped before giving up."""
RECEIVE_BYTES = 32768

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_SKV6ONLY = 11
INET_DIAG_CGROUP_ID = 21
ALL_STATES = 0xFFFFFFFF
NO_COOKIE = b"\xff" * 8
NO_UID = -1

_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2 up to its id
_SOCKID = struct.Struct("!HH16s16s")  # inet_diag_sockid: ports, addresses; then if, cookie
_ANSWER = struct.Struct("=BBBB48sIIIII")  # inet_diag_msg
_TIMEVAL = struct.Struct("@ll")

_MAPPED = b"\x00" * 10 + b"\xff\xff"
_WILDCARD = b"\x00" * 16


class SockDiagError(Exception):
    """The kernel could not be asked, or its answer made no sense. Callers deny."""


@dataclass(frozen=True, slots=True)
class SocketOwner:
    """Who made a socket. `cgroup_id` is the cgroup the socket was made in.

    `uid` is -1 and `inode` 0 for a socket that its process has closed while the
    connection lives on: the kernel has forgotten the user then, and some versions
    would answer root.
    """

    uid: int
    inode: int
    cgroup_id: int


@dataclass(frozen=True, slots=True)
class _Found:
    """One socket of an answer. Addresses are 16 bytes, v4 as v4-mapped."""

    family: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    owner: SocketOwner
    v6_only: bool


class SockDiag:
    """One open netlink socket. Not for several threads at once."""

    def __init__(self, *, seconds: float = REPLY_SECONDS) -> None:
        self._seconds = seconds
        self._sequence = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
        )
        try:
            self._socket.bind((0, 0))
            timeval = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> SockDiag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def owner(
        self, family: int, protocol: int, source: Address, destination: Address | None
    ) -> SocketOwner | None:
        """The owner of the socket that sends from `source` (to `destination`).

        For TCP the destination is the one that the program asked for (before any
        REDIRECT) and the answer is for exactly this four-tuple. For UDP and the rest
        it is ignored, and None is also the answer when several cgroups could have sent.
        `family` may be AF_INET6 for v4-mapped addresses. None: no such socket. Raises
        `SockDiagError` when the kernel could not be asked and ValueError for what is
        no address.
        """
        if protocol == socket.IPPROTO_TCP:
            if destination is None:
                raise ValueError("a TCP socket is looked up by both of its ends")
            return self._connected(family, source, destination)
        return unanimous(self.senders(family, protocol, source))

    def senders(self, family: int, protocol: int, source: Address) -> tuple[SocketOwner, ...]:
        """Every socket that a packet of `protocol` from `source` may have come from.

        For a protocol without ports these are the raw sockets of that protocol and
        those that write their own headers, as far as the kernel has raw_diag.
        """
        address = pack(family, source[0])
        if protocol == socket.IPPROTO_UDP:
            asked = [(protocol, source[1])]
        else:  # a raw socket's "port" is the protocol it was made for
            asked = [(socket.IPPROTO_RAW, protocol), (socket.IPPROTO_RAW, socket.IPPROTO_RAW)]
        families = [socket.AF_INET6]
        if address.startswith(_MAPPED):
            families = [socket.AF_INET, socket.AF_INET6]
        return tuple(
            found.owner
            for table, port in asked
            for each in families
            for found in self._dump(each, table, port)
            if found.local_port == port and _may_send_from(found, address)
        )

    def connected(self, family: int, local: str, destination: Address) -> tuple[SocketOwner, ...]:
        """Every TCP socket that is connected from an address, whatever its port, to `destination`.

        For connections whose port was changed on the way: where two redirected
        connections would look alike, conntrack gives one another source port. This
        reads the whole table, so it is no substitute for `owner`.
        """
        ends = pack(family, local), pack(family, destination[0]), destination[1]
        families = [socket.AF_INET6]
        if ends[0].startswith(_MAPPED):
            families = [socket.AF_INET, socket.AF_INET6]
        return tuple(
            found.owner
            for each in families
            for found in self._dump(each, socket.IPPROTO_TCP, 0, remote_port=destination[1])
            if (found.local, found.remote, found.remote_port) == ends
        )

    def _connected(self, family: int, source: Address, destination: Address) -> SocketOwner | None:
        local, remote = pack(family, source[0]), pack(family, destination[0])
        mapped = local.startswith(_MAPPED)
        if mapped != remote.startswith(_MAPPED):
            raise ValueError("the two ends are of different families")
        wire = (_wire4(local), _wire4(remote)) if mapped else (local, remote)
        table = socket.AF_INET if mapped else socket.AF_INET6
        sockid = _SOCKID.pack(source[1], destination[1], *wire)
        found = self._one(table, socket.IPPROTO_TCP, sockid)
        if found is None:
            return None
        # The kernel answers with a listener on the local end when no connection matches.
        ends = (found.local, found.local_port, found.remote, found.remote_port)
        return found.owner if ends == (local, source[1], remote, destination[1]) else None

    def _one(self, family: int, protocol: int, sockid: bytes) -> _Found | None:
        sequence = self._send(family, protocol, sockid, 0)
        for kind, payload in self._replies(sequence):
            if kind == SOCK_DIAG_BY_FAMILY:
                return parse_answer(payload)
            if kind == NLMSG_ERROR:
                code = _error(payload)
                if code in (errno.ENOENT, errno.ESTALE):
                    return None
                raise SockDiagError(f"SOCK_DIAG: {errno.errorcode.get(code, code)}")
        raise SockDiagError("SOCK_DIAG: no answer")

    def _dump(self, family: int, protocol: int, port: int, *, remote_port: int = 0) -> list[_Found]:
        sockid = _SOCKID.pack(port, remote_port, _WILDCARD, _WILDCARD)
        sequence = self._send(family, protocol, sockid, NLM_F_DUMP)
        found: list[_Found] = []
        for kind, payload in self._replies(sequence):
            if kind == NLMSG_DONE:
                return found
            if kind == NLMSG_ERROR:
                code = _error(payload)
                if code == errno.ENOENT:  # this kernel has no such table (raw_diag)
                    return []
                raise SockDiagError(f"SOCK_DIAG: {errno.errorcode.get(code, code)}")
            if kind == SOCK_DIAG_BY_FAMILY:
                one = parse_answer(payload)
                if one is not None:
                    found.append(one)
                if len(found) > DUMP_LIMIT:
                    raise SockDiagError(f"SOCK_DIAG: more than {DUMP_LIMIT} sockets on one port")
        raise SockDiagError("SOCK_DIAG: no answer")

    def _send(self, family: int, protocol: int, sockid: bytes, flags: int) -> int:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        request = _REQUEST.pack(family, protocol, 0, 0, ALL_STATES)
        body = request + sockid + bytes(4) + NO_COOKIE
        question = message(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | flags, self._sequence, body)
        try:
            self._socket.sendto(question, (0, 0))
        except OSError as e:
            raise SockDiagError(f"SOCK_DIAG: {e}") from e
        return self._sequence

    def _replies(self, sequence: int) -> Iterator[tuple[int, bytes]]:
        """The messages that answer `sequence`, until the deadline."""
        deadline = time.monotonic() + self._seconds
        stale = 0
        while time.monotonic() < deadline and stale < STALE_LIMIT:
            try:
                data, sender = self._socket.recvfrom(RECEIVE_BYTES)
            except OSError as e:
                raise SockDiagError(f"SOCK_DIAG: {e}") from e
            if sender[0] != 0:
                stale += 1  # not from the kernel
                continue
            for reply in _messages(data):
                if reply.sequence == sequence:
                    yield reply.kind, reply.payload
                else:
                    stale += 1


def unanimous(owners: tuple[SocketOwner, ...]) -> SocketOwner | None:
    """The one owner, or None when there is none or they lie in different cgroups.

    Where one cgroup has several sockets, a uid or inode that differs is left unknown.
    """
    if len({o.cgroup_id for o in owners}) != 1:
        return None
    uids, inodes = {o.uid for o in owners}, {o.inode for o in owners}
    return SocketOwner(
        uids.pop() if len(uids) == 1 else NO_UID,
        inodes.pop() if len(inodes) == 1 else 0,
        owners[0].cgroup_id,
    )


def pack(family: int, address: str) -> bytes:
    """An address as 16 bytes, v4 as v4-mapped. Raises ValueError for anything else."""
    try:
        if family == socket.AF_INET:
            return _MAPPED + socket.inet_pton(socket.AF_INET, address)
        if family == socket.AF_INET6:
            return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except OSError as e:
        raise ValueError(f"{address!r} is no address: {e}") from e
    raise ValueError(f"address family {family} is neither v4 nor v6")


def _messages(data: bytes) -> list[Message]:
    try:
        return list(parse_messages(data))
    except MalformedNetlink as e:
        raise SockDiagError(f"SOCK_DIAG: {e}") from e


def _error(payload: bytes) -> int:
    try:
        return error_number(payload)
    except MalformedNetlink as e:
        raise SockDiagError(f"SOCK_DIAG: {e}") from e


def parse_answer(payload: bytes) -> _Found | None:
    """An inet_diag_msg; None for what belongs to nobody (TIME_WAIT). Raises `SockDiagError`."""
    if len(payload) < _ANSWER.size:
        raise SockDiagError("SOCK_DIAG: an answer is cut short")
    family, _, _, _, sockid, _, _, _, uid, inode = _ANSWER.unpack_from(payload)
    if family not in (socket.AF_INET, socket.AF_INET6):
        raise SockDiagError(f"SOCK_DIAG: an answer of address family {family}")
    try:
        attributes = parse_attributes(payload[_ANSWER.size :])
    except MalformedNetlink as e:
        raise SockDiagError(f"SOCK_DIAG: {e}") from e
    cgroup = attributes.get(INET_DIAG_CGROUP_ID)
    if cgroup is None:
        return None
    if len(cgroup) != 8:
        raise SockDiagError("SOCK_DIAG: a cgroup id of a wrong size")
    local_port, remote_port, local, remote = _SOCKID.unpack_from(sockid)
    if family == socket.AF_INET:
        local, remote = _MAPPED + local[:4], _MAPPED + remote[:4]
    return _Found(
        family=family,
        local=local,
        local_port=local_port,
        remote=remote,
        remote_port=remote_port,
        owner=SocketOwner(uid if inode else NO_UID, inode, int.from_bytes(cgroup, sys.byteorder)),
        v6_only=attributes.get(INET_DIAG_SKV6ONLY, b"\x00") != b"\x00",
    )


def _may_send_from(found: _Found, address: bytes) -> bool:
    if found.local == address:
        return True
    if found.family == socket.AF_INET:
        return found.local == _MAPPED + bytes(4)
    if found.local != _WILDCARD:
        return False
    return not (address.startswith(_MAPPED) and found.v6_only)


def _wire4(address: bytes) -> bytes:
    return address[12:] + bytes(12)
