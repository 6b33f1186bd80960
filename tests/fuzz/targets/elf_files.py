"""ELF files of an agent: offsets of functions inside of the file, or `NotReadable`, after few reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

from aa.ebpf.tls import elf
from tests.unit.test_tls_elf import NAMES, real

FILE = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
MAX_READS = 4000
WORDS = (b"SSL_write", b"\xf5\xfe\xff\x6f", b"\xff\xff\xff\xff\xff\xff\xff\x7f", bytes(8))


def seeds() -> Iterator[bytes]:
    for raw in real():
        yield raw
        yield raw[:4096]


class _Counted:
    """`os` with a count of reads."""

    def __init__(self) -> None:
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pread(self, fd: int, size: int, at: int) -> bytes:
        self.reads += 1
        assert self.reads <= MAX_READS and size <= 1 << 20, (self.reads, size)
        return os.pread(fd, size, at)


def one(data: bytes) -> None:
    os.ftruncate(FILE.fileno(), 0)
    os.pwrite(FILE.fileno(), data, 0)
    elf.os = _Counted()  # type: ignore[assignment]
    try:
        found = elf.functions(FILE.fileno(), NAMES)
    except elf.NotReadable:
        return
    finally:
        elf.os = os
    assert all(name in NAMES and 0 <= offset < len(data) for name, offset in found.items())
