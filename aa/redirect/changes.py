"""Notices, cheaply, that somebody changed the firewall since it was last read in full.

nf_tables counts its transactions and tells of each, with who made it. Legacy tables
do neither, so the chains that matter are read with python-iptables and compared.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, Protocol

from aa.netlink import (
    NLM_F_REQUEST,
    NLMSG_ERROR,
    MalformedNetlink,
    Message,
    error_number,
    message,
    parse_attributes,
    parse_messages,
)
from aa.redirect.ruleset import CHAINS, V4, Family

ANSWER_SECONDS = 1.0
NOTICES_LIMIT = 1024
"""Notifications read at one go; a large reload sends one for each rule."""
RULES_LIMIT = 65536
"""Rules of one legacy chain that are looked through."""
RECEIVE_BYTES = 65536
SOCKET_BYTES = 1024 * 1024

NETLINK_NETFILTER = 12
SUBSYSTEM_NFTABLES = 10
NFNLGRP_NFTABLES = 7
NEWGEN = SUBSYSTEM_NFTABLES << 8 | 15
GETGEN = SUBSYSTEM_NFTABLES << 8 | 16
NFTA_GEN_ID, NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME = 1, 2, 3
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1

_NFGENMSG = struct.Struct("!BBH")


class CannotTell(Exception):
    """The state could not be had this way; the caller reads the tables in full."""


class Changes(Protocol):
    """Whatever it returns differs when the firewall may have changed."""

    def watermark(self) -> object:
        """Raises `CannotTell`."""

    def close(self) -> None: ...


class NfTables:
    """Transactions of this network namespace's nf_tables."""

    def __init__(self) -> None:
        self._sequence = 0
        self._questions = _netfilter_socket()
        try:
            self._notices = _netfilter_socket()
        except BaseException:
            self._questions.close()
            raise
        self._questions.settimeout(ANSWER_SECONDS)
        self._notices.setblocking(False)
        self._notices.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
        self._notices.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES)

    def close(self) -> None:
        self._questions.close()
        self._notices.close()

    def fileno(self) -> int:
        """Readable when there were transactions."""
        return self._notices.fileno()

    def watermark(self) -> object:
        """The number of the last transaction. Raises `CannotTell`."""
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        body = _NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            self._questions.sendto(message(GETGEN, NLM_F_REQUEST, self._sequence, body), (0, 0))
            while time.monotonic() < deadline:
                for answer in parse_messages(self._questions.recv(RECEIVE_BYTES)):
                    if answer.sequence == self._sequence:
                        return _generation(answer)
        except (OSError, MalformedNetlink) as e:
            raise CannotTell(f"nf_tables: {e}") from e
        raise CannotTell("nf_tables: the kernel did not answer")

    def authors(self) -> set[str]:
        """Reads the notifications that wait and names the programs that made them."""
        names: set[str] = set()
        for _ in range(NOTICES_LIMIT):
            try:
                names |= set(_authors(self._notices.recv(RECEIVE_BYTES)))
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:  # more than it could hold; the count tells anyway
                    raise CannotTell(f"nf_tables: {e}") from e
            except MalformedNetlink:
                continue
        return names


class Legacy:
    """The legacy chains that our rules are in, read with python-iptables."""

    def __init__(self, families: tuple[Family, ...]) -> None:
        try:
            import iptc  # it loads ip_tables at import, which other hosts need not have
        except Exception as e:  # it fails in many ways where its libraries are not as it expects
            raise CannotTell(f"python-iptables: {e}") from e
        self._tables = [
            (iptc.Table if family is V4 else iptc.Table6, table)
            for family in families
            for table in CHAINS
        ]

    def close(self) -> None:
        pass

    def watermark(self) -> object:
        """A digest of the chains without their counters. Raises `CannotTell`."""
        digest = hashlib.sha256()
        try:
            for kind, name in self._tables:
                table = kind(name)
                table.refresh()
                for chain in ("INPUT", "OUTPUT", *CHAINS[name]):
                    digest.update(f"{kind.__name__} {name} {chain}\n".encode())
                    for part in _legacy_rules(table, chain):
                        digest.update(part)
        except Exception as e:  # IPTCError, XTablesError, and plain errors out of ctypes
            raise CannotTell(f"python-iptables: {e}") from e
        return digest.digest()


def _legacy_rules(table: Any, chain: str) -> Iterator[bytes]:
    """Each rule of a chain as bytes, with its target's name and without its counters."""
    if not table.is_chain(chain):
        yield b"missing"
        return
    entry = table.first_rule(chain)
    for _ in range(RULES_LIMIT):
        if not entry:
            return
        raw = bytearray(ctypes.string_at(ctypes.addressof(entry), entry.next_offset))
        counters = type(entry).counters
        raw[counters.offset : counters.offset + counters.size] = bytes(counters.size)
        yield len(raw).to_bytes(4, "big") + raw + str(table.get_target(entry)).encode()
        entry = table.next_rule(entry)
    raise CannotTell(f"{chain} has more than {RULES_LIMIT} rules")


def _netfilter_socket() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
    )
    try:
        sock.bind((0, 0))
    except OSError:
        sock.close()
        raise
    return sock


def _generation(answer: Message) -> int:
    if answer.kind == NLMSG_ERROR:
        code = error_number(answer.payload)
        raise CannotTell(f"nf_tables: {errno.errorcode.get(code, code)}")
    if answer.kind != NEWGEN:
        raise MalformedNetlink(f"an answer of type {answer.kind}")
    number = parse_attributes(answer.payload[_NFGENMSG.size :]).get(NFTA_GEN_ID, b"")
    if len(number) != 4:
        raise MalformedNetlink("an answer without a number")
    return int.from_bytes(number, "big")


def _authors(data: bytes) -> Iterator[str]:
    for notice in parse_messages(data):
        if notice.kind != NEWGEN:
            continue
        attributes = parse_attributes(notice.payload[_NFGENMSG.size :])
        name = attributes.get(NFTA_GEN_PROC_NAME, b"").rstrip(b"\x00")
        pid = int.from_bytes(attributes.get(NFTA_GEN_PROC_PID, b""), "big")
        yield f"{name.decode('ascii', 'replace')} (pid {pid})"
