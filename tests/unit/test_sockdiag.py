"""SOCK_DIAG's answers as bytes: read strictly, and never more said than they prove."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aa import netlink
from aa.netlink import MalformedNetlink
from aa.sockdiag import (
    SOCK_DIAG_BY_FAMILY,
    SockDiag,
    SockDiagError,
    SocketOwner,
    pack,
    parse_answer,
    unanimous,
)

LOCAL, REMOTE = ("10.77.0.1", 40000), ("10.77.0.2", 443)


def answer(
    family: int = socket.AF_INET,
    local: tuple[str, int] = LOCAL,
    remote: tuple[str, int] = REMOTE,
    *,
    uid: int = 1000,
    inode: int = 77,
    cgroup: int | None = 4242,
    v6_only: bool | None = None,
) -> bytes:
    """An inet_diag_msg with its attributes, as the kernel makes it."""

    def wire(address: str) -> bytes:
        return socket.inet_pton(family, address).ljust(16, b"\0")

    sockid = struct.pack("!HH", local[1], remote[1]) + wire(local[0]) + wire(remote[0]) + bytes(12)
    message = struct.pack("=BBBB", family, 1, 0, 0) + sockid
    message += struct.pack("=IIIII", 0, 0, 0, uid, inode)
    if cgroup is not None:
        message += netlink.attribute(21, struct.pack("=Q", cgroup))
    if v6_only is not None:
        message += netlink.attribute(11, bytes([v6_only]))
    return message


class Kernel:
    """A stand-in for the netlink socket that answers with given datagrams."""

    def __init__(self, *datagrams: bytes, sender: int = 0) -> None:
        self.datagrams = list(datagrams)
        self.sender = sender
        self.asked: list[bytes] = []

    def sendto(self, data: bytes, _: object) -> None:
        self.asked.append(data)

    def recvfrom(self, _: int) -> tuple[bytes, tuple[int, int]]:
        if not self.datagrams:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return self.datagrams.pop(0), (self.sender, 0)

    def close(self) -> None:
        pass


@contextlib.contextmanager
def answering(kernel: Kernel) -> Iterator[SockDiag]:
    with SockDiag() as diag:
        diag.close()
        diag._socket = kernel  # type: ignore[assignment]
        yield diag


def reply(payload: bytes, sequence: int = 1, kind: int = SOCK_DIAG_BY_FAMILY) -> bytes:
    return netlink.message(kind, 0, sequence, payload)


def ask(diag: SockDiag) -> SocketOwner | None:
    return diag.owner(socket.AF_INET, socket.IPPROTO_TCP, LOCAL, REMOTE)


def test_names_the_owner_of_exactly_this_connection() -> None:
    with answering(Kernel(reply(answer()))) as diag:
        assert ask(diag) == SocketOwner(1000, 77, 4242)


@pytest.mark.parametrize(
    ("local", "remote"),
    [
        (LOCAL, ("0.0.0.0", 0)),  # the listener that the kernel offers instead
        (("0.0.0.0", LOCAL[1]), ("0.0.0.0", 0)),
        (LOCAL, (REMOTE[0], 80)),
        (LOCAL, ("10.77.0.3", 443)),
        ((LOCAL[0], 40001), REMOTE),
        (("10.77.0.9", LOCAL[1]), REMOTE),
    ],
)
def test_another_socket_than_asked_for_is_nobodys(
    local: tuple[str, int], remote: tuple[str, int]
) -> None:
    with answering(Kernel(reply(answer(local=local, remote=remote)))) as diag:
        assert ask(diag) is None


def test_a_v4_connection_of_a_v6_socket_is_the_same_connection() -> None:
    mapped = answer(
        socket.AF_INET6, (f"::ffff:{LOCAL[0]}", LOCAL[1]), (f"::ffff:{REMOTE[0]}", REMOTE[1])
    )
    with answering(Kernel(reply(mapped))) as diag:
        assert ask(diag) == SocketOwner(1000, 77, 4242)


def test_a_closed_socket_keeps_its_cgroup_and_loses_its_user() -> None:
    """An orphan's uid reads as 0 on many kernels: that would be root's socket."""
    with answering(Kernel(reply(answer(uid=0, inode=0)))) as diag:
        assert ask(diag) == SocketOwner(-1, 0, 4242)


def test_a_socket_without_cgroup_has_no_owner() -> None:
    with answering(Kernel(reply(answer(cgroup=None)))) as diag:
        assert ask(diag) is None


def test_no_such_socket_is_none_and_a_refusal_is_an_error() -> None:
    def error(code: int) -> bytes:
        return reply(struct.pack("=i", -code) + bytes(20), kind=netlink.NLMSG_ERROR)

    with answering(Kernel(error(2))) as diag:
        assert ask(diag) is None
    with answering(Kernel(error(1))) as diag, pytest.raises(SockDiagError, match="EPERM"):
        ask(diag)


def test_an_answer_to_an_earlier_question_is_skipped() -> None:
    stale = reply(answer(cgroup=666), sequence=99)
    with answering(Kernel(stale, reply(answer()))) as diag:
        assert ask(diag) == SocketOwner(1000, 77, 4242)
    with answering(Kernel(stale)) as diag, pytest.raises(SockDiagError):
        ask(diag)


def test_an_answer_that_is_not_the_kernels_is_not_believed() -> None:
    with answering(Kernel(reply(answer()), sender=4711)) as diag, pytest.raises(SockDiagError):
        ask(diag)


def test_endless_wrong_answers_come_to_an_end() -> None:
    flood = Kernel(*[reply(answer(), sequence=99)] * 10_000)
    with answering(flood) as diag, pytest.raises(SockDiagError):
        ask(diag)
    assert len(flood.datagrams) > 9_000


def test_every_socket_that_may_send_from_an_address_is_named() -> None:
    port = 5000

    def one(family: int, local: str, cgroup: int, v6_only: bool | None = None) -> bytes:
        any_end = "0.0.0.0" if family == socket.AF_INET else "::"
        return answer(family, (local, port), (any_end, 0), cgroup=cgroup, v6_only=v6_only)

    def done(sequence: int) -> bytes:
        return netlink.message(netlink.NLMSG_DONE, 0, sequence, bytes(4))

    v4 = [one(socket.AF_INET, "10.0.0.1", 1), one(socket.AF_INET, "0.0.0.0", 2)]
    v4 += [one(socket.AF_INET, "10.0.0.2", 3)]
    v6 = [one(socket.AF_INET6, "::", 4, False), one(socket.AF_INET6, "::", 5, True)]
    v6 += [one(socket.AF_INET6, "::ffff:10.0.0.1", 6), one(socket.AF_INET6, "fd00::1", 7)]
    dumps = [b"".join(reply(m) for m in v4) + done(1), b"".join(reply(m, 2) for m in v6) + done(2)]
    with answering(Kernel(*dumps)) as diag:
        found = diag.senders(socket.AF_INET, socket.IPPROTO_UDP, ("10.0.0.1", port))
    assert [o.cgroup_id for o in found] == [1, 2, 4, 6]
    only6 = b"".join(reply(m) for m in v6) + done(1)
    with answering(Kernel(only6)) as diag:
        found = diag.senders(socket.AF_INET6, socket.IPPROTO_UDP, ("fd00::1", port))
    assert [o.cgroup_id for o in found] == [4, 5, 7]


def test_senders_of_several_cgroups_are_no_owner() -> None:
    """Two sockets may share a port; then neither may speak for the other."""
    mine, again, other = SocketOwner(1, 10, 5), SocketOwner(1, 11, 5), SocketOwner(1, 12, 6)
    assert unanimous((mine, other)) is None
    assert unanimous(()) is None
    assert unanimous((mine,)) == mine
    assert unanimous((mine, again)) == SocketOwner(1, 0, 5)
    assert unanimous((mine, SocketOwner(2, 10, 5))) == SocketOwner(-1, 10, 5)


def test_more_sockets_than_anyone_has_is_an_error() -> None:
    many = b"".join([reply(answer(local=("0.0.0.0", 53)))] * 600)
    with answering(Kernel(many)) as diag, pytest.raises(SockDiagError, match="more than"):
        diag.senders(socket.AF_INET, socket.IPPROTO_UDP, ("10.0.0.1", 53))


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, "::1"), (socket.AF_INET, ""), (socket.AF_INET6, "x"), (socket.AF_UNIX, "")],
)
def test_refuses_what_is_no_address(family: int, address: str) -> None:
    with pytest.raises(ValueError):
        pack(family, address)


def test_refuses_a_connection_between_families() -> None:
    with SockDiag() as diag, pytest.raises(ValueError):
        diag.owner(socket.AF_INET6, socket.IPPROTO_TCP, ("::1", 1), ("::ffff:127.0.0.1", 2))


def test_a_scope_is_no_part_of_an_address() -> None:
    assert pack(socket.AF_INET6, "fe80::1%eth0") == pack(socket.AF_INET6, "fe80::1")


@given(st.binary(max_size=200))
@example(answer()[:-1])
@example(answer() + b"\x03\x00\x15\x00")
@example(answer()[:72] + netlink.attribute(21, b"\x01"))
def test_any_payload_is_an_answer_or_an_error(payload: bytes) -> None:
    with contextlib.suppress(SockDiagError):
        found = parse_answer(payload)
        assert found is None or len(found.local) == len(found.remote) == 16


@given(st.binary(max_size=120))
@example(struct.pack("=IHHII", 0, 1, 0, 0, 0))
@example(struct.pack("=IHHII", 0xFFFFFFFF, 1, 0, 0, 0))
def test_any_datagram_is_messages_or_an_error(data: bytes) -> None:
    with contextlib.suppress(MalformedNetlink):
        for each in netlink.parse_messages(data):
            netlink.parse_attributes(each.payload)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=6))
def test_attributes_are_read_back_as_they_were_written(given_: list[tuple[int, bytes]]) -> None:
    data = b"".join(netlink.attribute(kind, payload) for kind, payload in given_)
    assert netlink.parse_attributes(data) == dict(given_)


@given(st.lists(st.binary(max_size=120), max_size=5))
def test_any_answer_is_an_owner_or_an_error(datagrams: list[bytes]) -> None:
    with answering(Kernel(*datagrams)) as diag, contextlib.suppress(SockDiagError):
        assert ask(diag) is None
