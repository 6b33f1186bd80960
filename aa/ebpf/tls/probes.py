"""Loads the TLS programs and puts them into libraries.

A probe sits in a file, so every user of the file meets it: a program looks first
whether the process is governed, and the probes are taken out when no run is left.
Nothing is pinned: without a reader of the ring they would be of no use.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aa.ebpf import libbpf, tables
from aa.ebpf.libbpf import BpfError, BpfObject, UprobeLink, UprobesLink
from aa.ebpf.tls import elf, records
from aa.ebpf.tls.records import Count, Totals

OBJECT = "tls.bpf.o"

MAX_LIBRARIES = 24
"""Files with probes at one time; each takes up to 8 descriptors, or 22 before Linux 6.6."""
MAX_NUMBERED = 4096
"""Libraries whose path is remembered for late records."""


@dataclass(frozen=True, slots=True)
class Point:
    """A program at the entry (or, `back`, at the return) of a function."""

    symbol: str
    program: str
    back: bool = False


OPENSSL = (
    Point("SSL_new", "aa_tls_new", back=True),
    Point("SSL_set_fd", "aa_tls_set_fd"),
    Point("SSL_write", "aa_tls_written", back=True),
    Point("SSL_write", "aa_tls_enter"),
    Point("SSL_write_ex", "aa_tls_written_ex", back=True),
    Point("SSL_write_ex", "aa_tls_enter"),
    Point("SSL_read", "aa_tls_read", back=True),
    Point("SSL_read", "aa_tls_enter"),
    Point("SSL_read_ex", "aa_tls_read_ex", back=True),
    Point("SSL_read_ex", "aa_tls_enter"),
    Point("SSL_free", "aa_tls_free"),
)
GNUTLS = (
    Point("gnutls_handshake", "aa_tls_handshake"),
    Point("gnutls_transport_set_int2", "aa_tls_set_fd"),
    Point("gnutls_record_send", "aa_tls_written", back=True),
    Point("gnutls_record_send", "aa_tls_enter"),
    Point("gnutls_record_send2", "aa_tls_written", back=True),
    Point("gnutls_record_send2", "aa_tls_enter"),
    Point("gnutls_record_recv", "aa_tls_read", back=True),
    Point("gnutls_record_recv", "aa_tls_enter"),
    Point("gnutls_deinit", "aa_tls_free"),
)
FAMILIES = {"SSL_write": OPENSSL, "gnutls_record_send": GNUTLS}
"""A file that exports the function has the library, whatever the file is called."""
SYMBOLS = tuple(dict.fromkeys(p.symbol for points in FAMILIES.values() for p in points))
PROGRAMS = tuple(dict.fromkeys(p.program for points in FAMILIES.values() for p in points))

Identity = tuple[int, int]
"""Device and inode."""


class TooManyLibraries(Exception):
    """No room for one more."""


@dataclass(slots=True)
class Library:
    number: int
    path: str
    links: list[UprobeLink | UprobesLink] = field(default_factory=list)


class Probes:
    """The TLS programs in the kernel, and the files they sit in. For one thread."""

    def __init__(self, objects: Path, maps: dict[str, Path], *, together: bool) -> None:
        """`maps`: the loader's pinned maps that the programs share, by name.

        `together`: whether the kernel takes several probes at once (`libbpf.has_uprobe_multi`);
        one by one they need CAP_SYS_ADMIN.
        """
        self._together = together
        self._path = objects / OBJECT
        self._shared = maps
        self._object: BpfObject | None = None
        self._fds: dict[str, int] = {}
        self._libraries: dict[Identity, Library] = {}
        self._paths: dict[int, str] = {}
        self._cpus = libbpf.possible_cpus()

    def open(self) -> None:
        """Loads the programs. Raises `BpfError` when the kernel does not take them."""
        opened = BpfObject(self._path)
        try:
            for name, path in self._shared.items():
                opened.pin_map(name, path)
            if self._together:
                for program in PROGRAMS:
                    opened.set_attach_type(program, libbpf.UPROBE_MULTI)
            opened.load()
            for program in PROGRAMS:
                self._fds[program] = opened.program_fd(program)
            for name in ("aa_tls_events", "aa_tls_sessions", "aa_tls_counts"):
                self._fds[name] = opened.map_fd(name)
        except BaseException:
            opened.close()
            raise
        self._object = opened

    def close(self) -> None:
        self.detach_all()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        if self._object is not None:
            self._object.close()
            self._object = None

    @property
    def ring_fd(self) -> int:
        return self._fds["aa_tls_events"]

    @property
    def libraries(self) -> Iterable[Library]:
        return list(self._libraries.values())

    def path(self, number: int) -> str:
        return self._paths.get(number, "")

    def attach(self, fd: int, path: str) -> Library | None:
        """Puts probes into an open file. None: it has nothing to probe.

        Raises `NotReadable`, `TooManyLibraries`, and `OSError` when reading or the kernel fails.
        """
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        known = self._libraries.get(identity)
        if known is not None:
            return known
        offsets = elf.functions(fd, SYMBOLS)
        points = [
            point
            for sign, family in FAMILIES.items()
            if sign in offsets
            for point in family
            if point.symbol in offsets
        ]
        if not points:
            return None
        if len(self._libraries) >= MAX_LIBRARIES:
            raise TooManyLibraries(f"{path}: probes sit in {MAX_LIBRARIES} files already")
        library = Library(self._number(path), path)
        try:
            self._put(library, fd, points, offsets)
        except BpfError as e:
            self._detach(library)
            number = e.errno or errno.EIO  # and not libbpf's words, which name a descriptor
            raise BpfError(number, f"no probes in {path}: {os.strerror(number)}") from e
        self._libraries[identity] = library
        return library

    def _number(self, path: str) -> int:
        number = max(self._paths, default=0) + 1
        self._paths[number] = path
        if len(self._paths) > MAX_NUMBERED:
            del self._paths[min(self._paths)]
        return number

    def _put(
        self, library: Library, fd: int, points: Sequence[Point], offsets: Mapping[str, int]
    ) -> None:
        """Puts the probes into an open file. Raises `BpfError` with a part of them in place."""
        if self._object is None:
            raise BpfError(9, "the TLS programs are not loaded")
        # By descriptor: what was read is what is probed, whatever lies at the path now.
        file = Path(f"/proc/self/fd/{fd}")
        for (program, back), same in _by_program(points).items():
            places = [offsets[point.symbol] for point in same]
            if self._together:
                library.links.append(
                    libbpf.attach_uprobes(
                        self._fds[program], file, places, back=back, cookie=library.number
                    )
                )
                continue
            for place in places:
                library.links.append(
                    self._object.attach_uprobe(
                        program, file, place, back=back, cookie=library.number
                    )
                )

    @staticmethod
    def _detach(library: Library) -> None:
        while library.links:
            library.links.pop().close()

    def detach_all(self) -> None:
        for library in self._libraries.values():
            self._detach(library)
        self._libraries.clear()

    def counts(self) -> Count:
        size = records.COUNT.size * self._cpus
        raw = libbpf.map_lookup(self._fds["aa_tls_counts"], tables.index(0), size)
        return Count.sum_of(raw) if raw else Count()

    def totals(self, key: bytes) -> Totals | None:
        raw = libbpf.map_lookup(self._fds["aa_tls_sessions"], key, records.SESSION.size)
        return Totals.unpack(raw) if raw else None


def _by_program(points: Iterable[Point]) -> dict[tuple[str, bool], list[Point]]:
    """In the order of the points: at a return first, so that no entry is seen without its return."""
    found: dict[tuple[str, bool], list[Point]] = {}
    for point in sorted(points, key=lambda point: not point.back):
        found.setdefault((point.program, point.back), []).append(point)
    return found
