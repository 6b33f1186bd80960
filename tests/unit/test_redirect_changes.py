"""What nf_tables tells as bytes: a number, names, or an error, and nothing else."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa import netlink
from aa.netlink import MalformedNetlink, Message
from aa.redirect.changes import NEWGEN, CannotTell, _authors, _generation

HEAD = struct.pack("!BBH", 0, 0, 7)


def generation(number: bytes, pid: int = 7, name: bytes = b"nft\0") -> bytes:
    attributes = netlink.attribute(1, number)
    attributes += netlink.attribute(2, struct.pack("!I", pid)) + netlink.attribute(3, name)
    return HEAD + attributes


def test_reads_the_number_of_the_last_transaction() -> None:
    assert _generation(Message(NEWGEN, 1, generation(struct.pack("!I", 4711)))) == 4711


def test_names_who_made_a_transaction() -> None:
    rules = netlink.message(10 << 8 | 6, 0, 0, HEAD + bytes(8))
    done = netlink.message(NEWGEN, 0, 0, generation(struct.pack("!I", 2), 99, b"iptables\0"))
    assert list(_authors(rules + done)) == ["iptables (pid 99)"]
    assert list(_authors(rules)) == []


@pytest.mark.parametrize("payload", [b"", HEAD, generation(b""), generation(b"\0\0\1")])
def test_an_answer_without_a_number_is_an_error(payload: bytes) -> None:
    with pytest.raises(MalformedNetlink):
        _generation(Message(NEWGEN, 1, payload))


def test_a_refusal_is_an_error() -> None:
    refusal = Message(netlink.NLMSG_ERROR, 1, struct.pack("=i", -1) + bytes(16))
    with pytest.raises(CannotTell, match="EPERM"):
        _generation(refusal)


@given(st.binary(max_size=120), st.sampled_from([NEWGEN, netlink.NLMSG_ERROR, 0]))
def test_any_bytes_are_an_answer_or_an_error(data: bytes, kind: int) -> None:
    with contextlib.suppress(MalformedNetlink, CannotTell):
        assert _generation(Message(kind, 1, data)) >= 0
    with contextlib.suppress(MalformedNetlink):
        assert all(isinstance(name, str) for name in _authors(data))
