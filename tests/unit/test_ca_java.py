"""Java's trust store, read without Java."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.ca.java import UnknownFormat, parse, trusted


def store(*entries: tuple[str, bytes], tag: int = 2, kind: bytes = b"X.509") -> bytes:
    data = struct.pack(">III", 0xFEEDFEED, 2, len(entries))
    for alias, certificate in entries:
        data += struct.pack(">IH", tag, len(alias)) + alias.encode() + struct.pack(">Q", 1)
        data += (
            struct.pack(">H", len(kind)) + kind + struct.pack(">I", len(certificate)) + certificate
        )
    return data + b"d" * 20


def test_reads_every_certificate_by_its_alias() -> None:
    assert parse(store(("debian:a.pem", b"A" * 300), ("b", b"B"))) == {
        "debian:a.pem": b"A" * 300, "b": b"B",
    }  # fmt: skip
    assert parse(store()) == {}


def test_no_store_is_not_an_empty_one(tmp_path: Path) -> None:
    assert trusted(tmp_path / "cacerts") is None
    (tmp_path / "cacerts").write_bytes(store())
    assert trusted(tmp_path / "cacerts") == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30\x82",
        store(("a", b"x"))[:-1],
        store(("a", b"x")) + b"x",
        store(("a", b"x"), tag=1),
    ],
)
def test_another_format_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "cacerts").write_bytes(data)
    with pytest.raises(UnknownFormat):
        trusted(tmp_path / "cacerts")


@given(st.binary(max_size=300), st.integers(0, 60))
def test_any_bytes_are_read_or_are_an_error(tail: bytes, cut: int) -> None:
    for data in (tail, store(("alias", b"c" * 20))[:cut] + tail):
        try:
            parse(data)
        except (UnknownFormat, struct.error, UnicodeDecodeError):
            pass
