"""The reader of ELF files: right about real ones, and never surprised by hostile ones."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aa.ebpf.tls import elf

NAMES = ("SSL_write", "SSL_read", "not_there", "hidden", "SSL_data", "imported")
SOURCE = """
int imported(void);
int SSL_data = 1;
int SSL_write(void) { return 1; }
int SSL_read(void) { return 2; }
__attribute__((visibility("hidden"))) int hidden(void) { return imported(); }
int uses(void) { return hidden(); }
"""


def build(directory: Path, *options: str) -> Path:
    (directory / "l.c").write_text(SOURCE)
    made = directory / f"l{''.join(options)}.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", *options, "-o", made, directory / "l.c"], check=True, timeout=60
    )
    return made


def functions(path: Path) -> dict[str, int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return elf.functions(fd, NAMES)
    finally:
        os.close(fd)


def nm(path: Path) -> dict[str, int]:
    """What another reader says. In these small libraries the code's addresses are its offsets."""
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", path], check=True, capture_output=True, text=True, timeout=60
    )
    lines = (line.split() for line in listed.stdout.splitlines())
    return {name: int(at, 16) for at, kind, name in lines if kind == "T" and name in NAMES}


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
def test_finds_exported_functions_and_nothing_else(tmp_path: Path, style: str) -> None:
    library = build(tmp_path, f"-Wl,--hash-style={style}")
    assert functions(library).keys() == {"SSL_write", "SSL_read"}
    assert functions(library) == nm(library)


def test_needs_no_section_headers(tmp_path: Path) -> None:
    library = build(tmp_path)
    before = functions(library)
    raw = bytearray(library.read_bytes())
    raw[40:48] = bytes(8)  # e_shoff
    raw[60:64] = bytes(4)  # e_shnum, e_shstrndx
    library.write_bytes(raw)
    assert functions(library) == before != {}


def test_a_static_program_exports_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.c").write_text("int SSL_write(void) { return 1; } int main(void) { return 0; }")
    made = tmp_path / "s"
    subprocess.run(["gcc", "-static", "-o", made, tmp_path / "s.c"], check=True, timeout=60)
    assert functions(made) == {}


@pytest.mark.parametrize(
    "raw",
    [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x02\x01\x01" + bytes(100), b"\x7fELF\x01\x01\x01"],
)
def test_what_is_no_elf_file_is_not_readable(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(raw)
    with pytest.raises(elf.NotReadable):
        functions(path)


@functools.lru_cache(maxsize=1)
def real() -> tuple[bytes, bytes]:
    directory = Path(tempfile.mkdtemp())
    try:
        return tuple(
            build(directory, f"-Wl,--hash-style={style}").read_bytes() for style in ("gnu", "sysv")
        )  # type: ignore[return-value]
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def scratch() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    which=st.integers(0, 1),
    changes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 0x400), st.integers(0, 0x3000)),
            st.sampled_from([b"\0", b"\1", b"\xff", b"\x7f", b"\xff" * 4, b"\xff" * 8, bytes(8)]),
        ),
        min_size=1,
        max_size=12,
    ),
    cut=st.one_of(st.none(), st.integers(0, 20000)),
)
def test_any_change_ends_in_an_answer_or_a_refusal(
    scratch: int, which: int, changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    raw = bytearray(real()[which])
    for at, value in changes:
        raw[at : at + len(value)] = value
    raw = raw[:cut]
    os.ftruncate(scratch, 0)
    os.pwrite(scratch, raw, 0)
    try:
        found = elf.functions(scratch, NAMES)
    except elf.NotReadable:
        return
    assert all(name in NAMES and offset >= 0 for name, offset in found.items())
