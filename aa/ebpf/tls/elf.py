"""Where exported functions are in an ELF file: the few tables that a dynamic linker would ask, and no more.

The file belongs to the agent: every number in it is checked before it is used, every
read has a bound, and what makes no sense is `NotReadable`.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterable
from dataclasses import dataclass

MAX_SEGMENTS = 128
MAX_DYNAMIC_BYTES = 64 * 1024
MAX_CHAIN = 4096
"""Symbols with one hash that are looked at; real chains have a handful."""
CHAIN_BLOCK = 64
"""Links of a chain that are read at once."""
MAX_NAME = 64
"""Bytes of the longest name that can be asked for."""

MACHINES = {"x86_64": 62, "aarch64": 183}

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_GNU_HASH = struct.Struct("<IIII")

_MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
_EXEC, _DYN = 2, 3
_LOAD, _DYNAMIC_SEGMENT = 1, 2
_EXECUTABLE = 1
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_GNU_HASH = 4, 5, 6, 0x6FFFFEF5
_FUNCTION = 2
_WORD = 0xFFFFFFFF


class NotReadable(ValueError):
    """The file is no ELF file of this machine, or one that contradicts itself."""


@dataclass(frozen=True, slots=True)
class _Segment:
    offset: int
    address: int
    size: int
    executable: bool


def functions(fd: int, names: Iterable[str]) -> dict[str, int]:
    """File offsets of those of `names` that the file exports as functions.

    Raises `NotReadable`, and `OSError` when reading fails.
    """
    return _File(fd).functions(names)


class _File:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._segments, dynamic = self._program_headers()
        self._tables = self._dynamic(dynamic)

    def functions(self, names: Iterable[str]) -> dict[str, int]:
        lookup = self._gnu if _DT_GNU_HASH in self._tables else self._sysv
        if not {_DT_STRTAB, _DT_SYMTAB} <= self._tables.keys():
            return {}
        found = {}
        for name in names:
            value = lookup(name.encode())
            if value is not None:
                found[name] = value
        return found

    def _read(self, offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > self._size:
            raise NotReadable(f"a table beyond the end of the file, at {offset:#x}")
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise NotReadable("the file became shorter")
        return data

    def _program_headers(self) -> tuple[list[_Segment], tuple[int, int] | None]:
        if self._size < _HEADER.size:
            raise NotReadable("too short")
        header = _HEADER.unpack(self._read(0, _HEADER.size))
        ident, type_, machine, at, size, count = (header[i] for i in (0, 1, 2, 5, 9, 10))
        if not ident.startswith(_MAGIC) or type_ not in (_EXEC, _DYN):
            raise NotReadable("no ELF file of 64 bits")
        if machine != MACHINES.get(platform.machine()):
            raise NotReadable("for another machine")
        if size != _SEGMENT.size or not 0 < count <= MAX_SEGMENTS:
            raise NotReadable(f"{count} segments of {size} bytes")
        segments, dynamic = [], None
        for raw in _SEGMENT.iter_unpack(self._read(at, size * count)):
            kind, flags, offset, address, _, in_file, _, _ = raw
            if kind == _LOAD:
                segments.append(_Segment(offset, address, in_file, bool(flags & _EXECUTABLE)))
            elif kind == _DYNAMIC_SEGMENT:
                dynamic = (offset, in_file)
        return segments, dynamic

    def _dynamic(self, where: tuple[int, int] | None) -> dict[int, int]:
        """File offsets of the tables that the dynamic section names."""
        if where is None:
            return {}
        offset, size = where
        size = min(size, MAX_DYNAMIC_BYTES) // _DYNAMIC.size * _DYNAMIC.size
        found = {}
        for tag, value in _DYNAMIC.iter_unpack(self._read(offset, size)):
            if tag == 0:
                break
            if tag in (_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_GNU_HASH):
                found[tag] = self._offset(value)
        return found

    def _offset(self, address: int, *, executable: bool = False) -> int:
        """Where the byte that is loaded to `address` lies in the file."""
        for s in self._segments:
            if s.address <= address < s.address + s.size and (s.executable or not executable):
                return s.offset + address - s.address
        raise NotReadable(f"nothing is loaded to {address:#x}")

    def _gnu(self, name: bytes) -> int | None:
        table = self._tables[_DT_GNU_HASH]
        buckets, first, bloom, _ = _GNU_HASH.unpack(self._read(table, _GNU_HASH.size))
        if not buckets:
            return None
        wanted = _gnu_hash(name)
        chains = table + _GNU_HASH.size + 8 * bloom + 4 * buckets
        index = self._word(chains - 4 * buckets + 4 * (wanted % buckets))
        if index < first:
            return None
        for _ in range(MAX_CHAIN // CHAIN_BLOCK):
            at = chains + 4 * (index - first)
            room = min(CHAIN_BLOCK, (self._size - at) // 4)
            if room <= 0:
                raise NotReadable("a chain beyond the end of the file")
            for link in struct.unpack(f"<{room}I", self._read(at, 4 * room)):
                if link | 1 == wanted | 1 and (value := self._function(index, name)) is not None:
                    return value
                if link & 1:
                    return None
                index += 1
        raise NotReadable("a chain without an end")

    def _sysv(self, name: bytes) -> int | None:
        if _DT_HASH not in self._tables:
            return None
        table = self._tables[_DT_HASH]
        buckets, count = struct.unpack("<II", self._read(table, 8))
        if not buckets:
            return None
        index = self._word(table + 8 + 4 * (_sysv_hash(name) % buckets))
        for _ in range(MAX_CHAIN):
            if index == 0 or index >= count:
                return None
            if (value := self._function(index, name)) is not None:
                return value
            index = self._word(table + 8 + 4 * buckets + 4 * index)
        raise NotReadable("a chain without an end")

    def _word(self, offset: int) -> int:
        word: int = struct.unpack("<I", self._read(offset, 4))[0]
        return word

    def _function(self, index: int, name: bytes) -> int | None:
        """The file offset of a symbol if it is a function of this name that the file has itself."""
        at = self._tables[_DT_SYMTAB] + index * _SYMBOL.size
        text, info, _, section, address, _ = _SYMBOL.unpack(self._read(at, _SYMBOL.size))
        if info & 0xF != _FUNCTION or not section or len(name) > MAX_NAME:
            return None
        if self._read(self._tables[_DT_STRTAB] + text, len(name) + 1) != name + b"\0":
            return None
        return self._offset(address, executable=True)


def _gnu_hash(name: bytes) -> int:
    value = 5381
    for byte in name:
        value = (value * 33 + byte) & _WORD
    return value


def _sysv_hash(name: bytes) -> int:
    value = 0
    for byte in name:
        value = (value << 4) + byte
        value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
    return value
